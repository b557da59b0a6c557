"""Which tensors of a result a pattern names.

A pattern is a tensor's name with placeholders. `{part}` or any other word in braces is whatever stands there in the
result: each assignment is a figure of its own. `{i}` is a whole number, that of a probe. A `*` is whatever stands
there, too, but all that fit are curves of the same figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from hookdepth.results import PER_PROMPT, Result

PART_NAMES = {"layer": "whole layer", "attn": "attention", "mlp": "MLP", "extra": "third contribution"}
SERIES_NAMES = {"attn": "Attention", "mlp": "MLP", "layer": "Attention + MLP", "resid": "Residual stream"}
PAGE = "page."  # begins the names of what the interactive page alone shows: no table, no data frame
MOST_PROBES = 20  # are drawn; the rest of a large data set of probes is in the file
_ORDER = ("resid", "layer", "attn", "mlp", "mixer", "extra")
_PLACEHOLDER = re.compile(r"\{(\w+)\}|\*")


def match(pattern: str, name: str) -> dict[str, str] | None:
    """What the placeholders of a pattern stand for in a tensor's name; None where it does not fit.

    match("{part}.effect", "mlp.effect")   # {"part": "mlp"}
    match("norm.*", "norm.resid")          # {"*": "resid"}
    """
    found = _compiled(pattern).fullmatch(name)
    if found is None or (name.startswith(PER_PROMPT) and not pattern.startswith(PER_PROMPT)):
        return None
    return {"*" if key == "_star" else key: value for key, value in found.groupdict().items()}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts, end = [], 0
    for found in _PLACEHOLDER.finditer(pattern):
        key = found[1] or "_star"
        # A name becomes part of a file's name, so no folder may be in it.
        values = "[0-9]{1,9}" if key == "i" else r"[^./\\\x00-\x1f]+"
        parts += [re.escape(pattern[end : found.start()]), f"(?P<{key}>{values})"]
        end = found.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern with its placeholders replaced: fill("{part}.effect", {"part": "mlp"})   # 'mlp.effect'"""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1] or "*", found[0]), pattern)


def assignments(pattern: str, names: Iterable[str]) -> list[dict[str, str]]:
    """Everything that the placeholders stand for among these names, `*` aside, in the order of the figures.

    assignments("effect.{i}", ["effect.1", "effect.0", "baseline"])   # [{"i": "0"}, {"i": "1"}]
    """
    found = [values for name in names if (values := match(pattern, name)) is not None]
    for values in found:
        values.pop("*", None)
    unique = list({tuple(values.items()): values for values in found if int(values.get("i", 0)) < MOST_PROBES}.values())
    return sorted(unique, key=lambda values: [_rank(value) for value in values.values()])


def series(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """What `*` stands for in a pattern whose other placeholders are filled → the tensor; without one, its own name.

    series("norm.*", ["norm.attn", "norm.resid"])   # {"resid": "norm.resid", "attn": "norm.attn"}
    """
    found = {values.get("*", name): name for name in names if (values := match(pattern, name)) is not None}
    return dict(sorted(found.items(), key=lambda item: _rank(item[0])))


def _rank(value: str) -> tuple[int, int, str]:
    """Parts first, in their order; numbers by their size; then the alphabet."""
    place = _ORDER.index(value) if value in _ORDER else len(_ORDER)
    return place, int(value) if value.isascii() and value.isdigit() else 0, value


def axes_of(tensors: Mapping[str, str], name: str) -> list[str]:
    """The names of a tensor's axes by its analysis' declaration: axes_of({"kl": "point"}, "kl")   # ["point"]"""
    pattern = name if name in tensors else next((one for one in tensors if match(one, name) is not None), None)
    return [] if pattern is None else [axis.partition("{")[0].rstrip("?") for axis in tensors[pattern].split()]


def probe_of(result: Result, values: Mapping[str, str]) -> dict[str, Any]:
    """What is known of the probe, or the shown prompt, that {i} stands for: probe_of(result, {"i": "0"})["tokens"]."""
    probes = result.metadata.get("probes") or result.metadata.get("shown") or []
    number = int(values.get("i", len(probes)))
    return probes[number] if number < len(probes) else {}
