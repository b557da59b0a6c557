"""Whether what an analysis says about itself can be used: asked when it is chosen, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hookdepth.analyses.settings import Settings
from hookdepth.engine.measurement import LayerMeasurement, OutputMeasurement
from hookdepth.errors import HookdepthError, choose
from hookdepth.report.figures import Kind
from hookdepth.report.patterns import match
from hookdepth.results import PER_PROMPT

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_AXES = re.compile(r"([A-Za-z_]\w*(\{\w+\})?( [A-Za-z_]\w*(\{\w+\})?)*)?\??")  # none: a number
_TEXTS = ("question", "heading", "paper", "together")


def check_declaration(analysis: Any, needs: tuple[str, ...]) -> None:
    """Raise where a declaration cannot be used.

    Raises:
        HookdepthError: no usable name; texts, tensors, measurements, figures, needs or options that are none.
    """
    label, name = type(analysis).__name__, getattr(analysis, "name", None)
    if name is None:
        raise HookdepthError(f"{label} has no name", 'give it one, e.g. name = "half-mlp"')
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise HookdepthError(f"{label} has the name {name!r}", "give it words in small letters, joined by hyphens")
    for text in _TEXTS:
        if not isinstance(getattr(analysis, text), str):
            raise HookdepthError(f"{label} has the {text} {getattr(analysis, text)!r}", "give a text")
    choose(f"need of {label}:", str(analysis.needs), needs)
    for option in _listed(analysis, "options", str, "names of options"):
        choose(f"option of {label}:", option, Settings.__dataclass_fields__)
    _listed(analysis, "measurements", LayerMeasurement | OutputMeasurement, "measurements, such as OutputEffect()")
    _check_tensors(label, analysis.tensors)
    for kind in _listed(analysis, "figures", Kind, 'figures, such as Bars("output", "How to read it.")'):
        for pattern in kind.patterns:
            if not any(_same(pattern, own) for own in analysis.tensors):
                raise HookdepthError(
                    f"a figure of {label} draws {pattern!r}, and its tensors are {', '.join(analysis.tensors)}",
                    "draw one of them, or declare that one, too",
                )


def _listed(analysis: Any, name: str, kind: Any, meant: str) -> Any:
    given = getattr(analysis, name)
    if not isinstance(given, list | tuple) or not all(isinstance(one, kind) for one in given):
        shown = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
        raise HookdepthError(f"{type(analysis).__name__} has the {name} {shown}", f"give a tuple of {meant}")
    return given


def _check_tensors(label: str, tensors: Any) -> None:
    example = 'say what it gives and along which axes, e.g. tensors = {"output": "layer"}'
    if not isinstance(tensors, Mapping) or not tensors:
        raise HookdepthError(f"{label} declares no tensors", example)
    for name, axes in tensors.items():
        if not isinstance(name, str) or not isinstance(axes, str) or not _AXES.fullmatch(axes):
            raise HookdepthError(f"{label} declares the tensors {name!r}: {axes!r}", example)


def _same(pattern: str, own: str) -> bool:
    """Whether a figure's pattern and a declared one can name the same tensor."""
    pattern = pattern.removeprefix(PER_PROMPT)
    return pattern == own or match(own, pattern) is not None or match(pattern, own) is not None
