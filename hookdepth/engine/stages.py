"""A sequence of layers as one writes it, in Python or as text. Nothing here needs torch: it is an option as well.

    parsed("0-2,4+5,3-1")      # ((0,), (1,), (2,), (4, 5), (3,), (2,), (1,))

A *stage* is what reads one input: a layer, or several whose contributions are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any

from hookdepth.errors import HookdepthError, shown, whole_number

Stage = tuple[int, ...]
"""Layers that read the same input, in rising order; nearly always one."""
Piece = tuple[int, int, Stage]
"""Layers in a row, (first, last, ()), or several together, (first, last, layers)."""
_REMEDY = "give layers in the order of the visits, e.g. '0-9,4-9,10-29' ('3+4': both on the same input)"
_MOST_STAGES = 100_000


def parsed(text: str) -> tuple[Stage, ...]:
    """The stages that a text names: parsed("0-2,4+5,3")    # ((0,), (1,), (2,), (4, 5), (3,))

    Raises:
        HookdepthError: it names none.
    """
    stages: list[Stage] = []
    for part in text.split(","):
        numbers = part.strip().replace("+", "-").split("-")
        if not all(one.isascii() and one.isdecimal() and len(one) < 7 for one in numbers):
            raise HookdepthError(f"{part.strip()!r} in the path {shown(text)} names no layers", _REMEDY)
        layers = [int(one) for one in numbers]
        if "-" in part:
            if len(layers) > 2 or "+" in part:
                raise HookdepthError(f"{part.strip()!r} in the path {shown(text)} names no layers", _REMEDY)
            first, last = layers
            step = 1 if first <= last else -1
            if len(stages) + abs(last - first) > _MOST_STAGES:
                raise HookdepthError(f"the path {shown(text)} makes more than {_MOST_STAGES} visits", _REMEDY)
            stages += [(layer,) for layer in range(first, last + step, step)]
        else:
            stages.append(_stage(layers, text))
    return tuple(stages)


def stages_of(given: Any) -> tuple[Stage, ...]:
    """The stages of a sequence of layers and sets of layers: stages_of([0, {1, 2}])    # ((0,), (1, 2))"""
    listed = given.tolist() if getattr(given, "ndim", 0) == 1 else given
    if not isinstance(listed, Sequence) or isinstance(listed, bytes):
        raise HookdepthError(f"LayerPath got {shown(given)}", _REMEDY)
    return tuple((one,) if type(one) is int and one >= 0 else _stage(one, given) for one in listed)


def _stage(one: Any, given: Any) -> Stage:
    several = list(one) if isinstance(one, AbstractSet | list | tuple) else [one]
    layers = sorted(whole_number(f"LayerPath: a layer of {shown(given)}", layer, 0) for layer in several)
    if not layers or len(set(layers)) < len(layers):
        raise HookdepthError(f"LayerPath got {shown(one)} for the layers of one stage", "name one or more, each once")
    return tuple(layers)


def path_text(stages: Iterable[Stage]) -> str:
    """A path as one writes it: path_text([(0,), (1,), (2, 3)])    # '0-1,2+3'"""
    parts: list[list[Stage]] = []
    for stage in stages:
        if parts and len(stage) == 1 and _goes_on(parts[-1], stage[0]):
            parts[-1].append(stage)
        else:
            parts.append([stage])
    ends = [(part[0], part[-1]) for part in parts]
    return ",".join("+".join(map(str, a)) if a is b else f"{a[0]}-{b[0]}" for a, b in ends)


def _goes_on(part: list[Stage], layer: int) -> bool:
    steps = {b[0] - a[0] for a, b in pairwise([*part, (layer,)])} if len(part[-1]) == 1 else set()
    return steps in ({1}, {-1})


def pieces_of(stages: Iterable[Stage]) -> Iterator[Piece]:
    """Stages as layers in a row, (first, last, ()), and as several together, (first, last, layers)."""
    first, last = 0, -1
    for stage in stages:
        if len(stage) == 1 and stage[0] == last + 1 and first <= last:
            last += 1
            continue
        if first <= last:
            yield first, last, ()
        first, last = (0, -1) if len(stage) > 1 else (stage[0], stage[0])
        if len(stage) > 1:
            yield stage[0], stage[-1], stage
    if first <= last:
        yield first, last, ()
