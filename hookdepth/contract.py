"""What a result file must hold for its figures to be drawn: tensors with their shapes, and the kinds of metadata.

    violation("logit-lens", {"kl": torch.zeros(31)}, {})   # 'the tensor topk_overlap is missing'

A file with the right header may still have been cut, edited or written by something else; whoever reads it is told
in a line what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_PARTS = ("attn", "mlp", "layer")
# Sizes by letter: L layers, P = L + 1 points between them, T tokens, N prompts, d width; the same letter is the same
# size within a file. T is a probe's own, so that of probe 3 is T3.
_EFFECT = {"effect": "LL", "output": "L", "per_prompt_effect": "NLL", "per_prompt_output": "NL"}
_REQUIRED: dict[str, dict[str, str]] = {
    "residual-stats": {
        "norm.resid": "P",
        **{f"{name}.{part}": "L" for name in ("relative_contribution", "cosine", "norm") for part in _PARTS},
    },
    "logit-lens": {"kl": "P", "topk_overlap": "P"},
}
_PER_PART = ("skip-current", "skip-future", "local-current", "local-future")
_PER_PROBE = {
    "residual-erasure": {"effect": "PT"},
    "integrated-gradients": {
        "attribution": "LT",
        "completeness_error": "L",
        "evaluations": "L",
        "f_baseline": "L",
        "converged": "L",
        "f_input": "",
    },
}
_NUMBER = (int, float, type(None))
_KINDS: dict[str, Any] = {
    "model": (dict, type(None)),
    "data": (dict, type(None)),
    "settings": (dict, type(None)),
    "versions": (dict, type(None)),
    "probes": (list, type(None)),
    "null_effect": _NUMBER,
    "wall_time_s": _NUMBER,
    "passes": _NUMBER,
}


def violation(analysis: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with a result, in a clause; None where nothing is, or where the analysis is not known here.

    violation("skip-current", result.tensors, result.metadata)   # None
    """
    for key, kinds in _KINDS.items():
        if not isinstance(metadata.get(key), kinds) or isinstance(metadata.get(key), bool):
            return f"its {key} is {type(metadata[key]).__name__}"
    return _wrong_data(metadata.get("data") or {}) or _wrong_probes(metadata) or _wrong_tensors(analysis, tensors)


def _wrong_data(data: Mapping[str, Any]) -> str | None:
    lengths = data.get("lengths")
    if lengths is not None and not _whole_numbers(lengths):
        return "its data.lengths is no list of whole numbers"
    return None


def _wrong_probes(metadata: Mapping[str, Any]) -> str | None:
    tolerance = (metadata.get("settings") or {}).get("ig_tolerance")
    if tolerance is not None and not (isinstance(tolerance, float) and 0 < tolerance < 1):
        return "its settings.ig_tolerance is no number between 0 and 1"
    for number, probe in enumerate(metadata.get("probes") or []):
        if not isinstance(probe, dict):
            return f"its probe {number} is {type(probe).__name__}"
        tokens, positions = probe.get("tokens"), probe.get("answer_positions")
        if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
            return f"the tokens of probe {number} are no list of strings"
        if positions is not None and not _whole_numbers(positions):
            return f"the answer_positions of probe {number} are no list of whole numbers"
    return None


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and abs(item) < 2**53 for item in value)


def _wrong_tensors(analysis: str, tensors: Mapping[str, Tensor]) -> str | None:
    expected = dict(_REQUIRED.get(analysis, {}))
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        letters = expected.get(name) or _letters(analysis, name)
        if letters is None:
            continue
        wrong = _wrong_shape(name, list(value.shape), letters, sizes)
        if wrong:
            return wrong
    missing = [name for name in expected if name not in tensors]
    if missing:
        return f"the tensor {missing[0]} is missing"
    if analysis in _PER_PART and not any(f"{part}.effect" in tensors for part in _PARTS):
        return "the tensor layer.effect is missing"
    if "P" in sizes and sizes.setdefault("L", sizes["P"] - 1) != sizes["P"] - 1:
        return f"its tensors are of {sizes['L']} and of {sizes['P'] - 1} layers"
    return None


def _letters(analysis: str, name: str) -> list[str] | str | None:
    """The sizes of a tensor whose name has a part or the number of a probe in it."""
    if analysis in _PER_PART:
        part, _, kind = name.partition(".")
        return _EFFECT.get(kind) if part in _PARTS else None
    if analysis in _PER_PROBE:
        found = re.fullmatch(r"(?:(?:attn|mlp)\.)?(\w+)\.(\d{1,9})", name, re.ASCII)
        letters = _PER_PROBE[analysis].get(found[1]) if found else None
        return None if found is None or letters is None else [x.replace("T", f"T{found[2]}") for x in letters]
    return None


def _wrong_shape(name: str, shape: Sequence[int], letters: Sequence[str], sizes: dict[str, int]) -> str | None:
    if len(shape) != len(letters) or 0 in shape or (letters[:1] == "P" and shape[0] < 2):
        return f"the tensor {name} has shape {shape}"
    for letter, size in zip(letters, shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            return f"the tensor {name} has shape {shape}, others say {sizes[letter]} for {size}"
    return None
