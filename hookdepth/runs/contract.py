"""What a result file must hold: the tensors that its analysis declares, and metadata of the right kinds.

A file with the right header may still have been cut, edited or written by something else; whoever reads it is told
in a line what is wrong with it, so that no figure has to ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from hookdepth.analyses.registry import declared
from hookdepth.errors import DamagedError, HookdepthError, as_path
from hookdepth.report.patterns import match
from hookdepth.results import PER_PROMPT, RERUN, SUFFIX, Result

_NUMBER = (int, float, type(None))
_KINDS: dict[str, Any] = {
    "model": (dict, type(None)),
    "data": (dict, type(None)),
    "settings": (dict, type(None)),
    "versions": (dict, type(None)),
    "probes": (list, type(None)),
    "shown": (list, type(None)),
    "null_effect": _NUMBER,
    "null_where": (str, type(None)),
}


def load_folder(folder: str | os.PathLike[str]) -> dict[str, Result]:
    """All results in a folder, by analysis.

        load_folder("out")[name].tensors     # name → tensor

    Raises:
        HookdepthError: no such folder, no result in it, a file in it that is not one, or two of one analysis.
    """
    folder = as_path(folder)
    if not os.path.isdir(folder):
        raise HookdepthError(f"no folder {str(folder)!r}", "give the --out folder of a `hookdepth run`")
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    results = [Result.load(path) for path in paths]
    if not results:
        raise HookdepthError(f"no result files in {str(folder)!r}", "give the --out folder of a `hookdepth run`")
    loaded: dict[str, Result] = {}
    for path, result in zip(paths, results, strict=True):
        check_contents(result, path)
        if result.analysis in loaded:
            what = f"{str(path)!r} holds {result.analysis}, and so does another file of its folder"
            raise HookdepthError(what, "move one of them away")
        loaded[result.analysis] = result
    return loaded


def check_contents(result: Result, path: str | os.PathLike[str]) -> None:
    """Raise `DamagedError` where a result lacks what its analysis declares: check_contents(result, path)"""
    found = violation(result)
    if found:
        raise DamagedError(f"{str(path)!r} is no complete {result.analysis} result: {found}", RERUN)


def violation(result: Result) -> str | None:
    """What is wrong with a result, in a clause; None where nothing is, or where nobody knows its analysis."""
    metadata = result.metadata
    for key, kinds in _KINDS.items():
        if not isinstance(metadata.get(key), kinds) or isinstance(metadata.get(key), bool):
            return f"its {key} is {type(metadata[key]).__name__}"
    lengths = (metadata.get("data") or {}).get("lengths")
    if lengths is not None and not _whole_numbers(lengths):
        return "its data.lengths is no list of whole numbers"
    tested = metadata.get("tested", [])
    if not (_whole_numbers(tested) and all(0 <= number < len(lengths or ()) for number in tested)):
        return "its tested is no list of numbers of its prompts"
    wrong = _wrong_probes(metadata)
    declaration = declared(result)
    if wrong or declaration is None:
        return wrong
    n_layers = (metadata.get("model") or {}).get("n_layers")
    return wrong_tensors(declaration.tensors, result.tensors, n_layers)


def _wrong_probes(metadata: Mapping[str, Any]) -> str | None:
    tolerance = (metadata.get("settings") or {}).get("ig_tolerance")
    if tolerance is not None and not (isinstance(tolerance, float) and 0 < tolerance < 1):
        return "its settings.ig_tolerance is no number between 0 and 1"
    for number, probe in enumerate([*(metadata.get("probes") or []), *(metadata.get("shown") or [])]):
        if not isinstance(probe, dict):
            return f"its probe {number} is {type(probe).__name__}"
        tokens, positions = probe.get("tokens"), probe.get("answer_positions")
        if not isinstance(probe.get("words", {}), dict):
            return f"the words of prompt {number} are no dict"
        if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
            return f"the tokens of probe {number} are no list of strings"
        if positions is not None and not _whole_numbers(positions):
            return f"the answer_positions of probe {number} are no list of whole numbers"
    return None


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and abs(item) < 2**53 for item in value)


def wrong_tensors(
    declared_axes: Mapping[str, str], tensors: Mapping[str, Tensor], n_layers: Any = None, strict: bool = False
) -> str | None:
    """What is wrong with tensors, held against axes by name: wrong_tensors({"kl": "point"}, {"kl": kl}, 30)   # None"""
    # Beside what is reduced over prompts stands what each prompt gave.
    every = {f"{PER_PROMPT}{pattern}": f"prompt {axes.removesuffix('?')}?" for pattern, axes in declared_axes.items()}
    every |= declared_axes
    # A name that is written out comes last, and counts: it may fit a pattern as well.
    by_exactness = sorted(every.items(), key=lambda entry: -entry[0].count("{"))
    axes = {
        name: axes.removesuffix("?").format(**words)
        for pattern, axes in by_exactness
        for name in tensors
        if (words := match(pattern, name)) is not None
    }
    for pattern, wanted in declared_axes.items():
        here = [match(one, name) for one in (pattern, f"{PER_PROMPT}{pattern}") for name in tensors]
        if not wanted.endswith("?") and all(found is None for found in here):
            return f"the tensor {pattern} is missing"
    if strict and (strange := [name for name in tensors if name not in axes]):
        return f"nobody has declared the tensor {strange[0]}"
    if not axes:
        return "it has none of the tensors that its analysis gives"
    return _wrong_shapes(axes, tensors, n_layers)


def _wrong_shapes(axes: Mapping[str, str], tensors: Mapping[str, Tensor], n_layers: Any) -> str | None:
    """jaxtyping holds all of them against each other: the same word is the same size, points are one more."""
    layers = n_layers if isinstance(n_layers, int) and n_layers > 0 else _layers(axes, tensors)
    with jaxtyped("context"):
        _is_shaped(torch.empty(layers, device="meta"), "layer")  # from here on the word has this size
        for name, wanted in axes.items():
            shape = list(tensors[name].shape)
            if 0 in shape or not _is_shaped(tensors[name], wanted):
                of = f", for {layers} layers" if "layer" in wanted or "point" in wanted else ""
                return f"the tensor {name} has shape {shape}, its axes are [{', '.join(wanted.split())}]{of}"
    return None


def _is_shaped(tensor: Tensor, axes: str) -> bool:
    return isinstance(tensor, Float[Tensor, axes.replace("point", "layer+1")])  # type: ignore[arg-type]


def _layers(axes: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """How many layers there are, where the metadata do not say: by the first tensor that has an axis of them."""
    for name, wanted in axes.items():
        for word, size in zip(wanted.split(), tensors[name].shape, strict=False):
            if word in ("layer", "point"):
                return max(size - (word == "point"), 1)
    return 1
