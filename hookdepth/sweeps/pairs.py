"""Pairs of prompts that differ in what matters, and the metric by which they are told apart.

paired(model, [5, 6, 7], [5, 9, 7], True, "equal")[0].places     # {0: 0, 1: 1, 2: 2}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hookdepth.engine.arguments import as_measurements, as_prompts
from hookdepth.engine.measurement import OutputMeasurement
from hookdepth.errors import HookdepthError, choose, shown
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder

ALIGN = ("equal", "ends")


@dataclass(frozen=True)
class Pair:
    """A prompt that is changed, one that gives the values, and which token of one is which of the other."""

    base: list[int]
    source: list[int]
    places: Mapping[int, int]

    def is_same(self, token: int) -> bool:
        """Whether all activations up to a token are the same in both, because all tokens up to there are."""
        return self.base[: token + 1] == self.source[: token + 1]


def paired(model: Decoder, clean: Any, corrupted: Any, denoise: bool, align: str) -> list[Pair]:
    """Prompts pair by pair: paired(model, [5, 6], [5, 7], True, "equal")[0].base     # [5, 7]

    Raises:
        HookdepthError: as many of one as of the other are needed, of lengths that can be aligned.
    """
    choose("alignment", align, ALIGN)
    if not isinstance(denoise, bool):
        raise HookdepthError(f"denoise is {shown(denoise)}", "give True or False")
    both = [as_prompts(checked(model), given) for given in (clean, corrupted)]
    if len(both[0]) != len(both[1]) or not both[0]:
        raise HookdepthError(f"{len(both[0])} clean and {len(both[1])} corrupted prompts", "give them pair by pair")
    pairs = []
    for number, (one, other) in enumerate(zip(*both, strict=True)):
        if one == other:
            raise HookdepthError(f"the prompts of pair {number} are the same", "give a corrupted one that differs")
        if len(one) != len(other) and align == "equal":
            raise HookdepthError(
                f"the prompts of pair {number} have {len(one)} and {len(other)} tokens",
                'give prompts of equal length, or align="ends"',
            )
        base, source = (other, one) if denoise else (one, other)
        if not (places := _places(base, source)):
            problem = f"the prompts of pair {number} neither begin nor end with a token that they share"
            raise HookdepthError(problem, "give prompts that do, or of equal length")
        pairs.append(Pair(base, source, places))
    return pairs


def _places(base: Sequence[int], source: Sequence[int]) -> dict[int, int]:
    if len(base) == len(source):
        return {token: token for token in range(len(base))}
    short = min(len(base), len(source))
    front = next((n for n in range(short) if base[n] != source[n]), short)
    back = next((n for n in range(short - front) if base[-1 - n] != source[-1 - n]), short - front)
    places = {token: token for token in range(front)}
    return places | {len(base) - n: len(source) - n for n in range(back, 0, -1)}


def refuse_equal(base: Tensor, other: Tensor) -> None:
    """Raise where a metric is the same on both prompts of a pair, so that nothing is a share of the difference."""
    for number, (one, two) in enumerate(zip(base.tolist(), other.tolist(), strict=True)):
        if abs(one - two) <= 1e-6 * max(1.0, abs(one)):
            problem = f"the metric is {one:.6g} on both prompts of pair {number}"
            raise HookdepthError(problem, "give a metric that tells them apart")


def per_prompt(model: Decoder, metric: Any, count: int) -> list[OutputMeasurement]:
    """The metric of each prompt: per_prompt(model, LogitDifference(5, 6), 3)"""
    listed = list(metric) if isinstance(metric, list | tuple) else [metric] * count
    if len(listed) != count:
        raise HookdepthError(f"{len(listed)} metrics for {count} prompts", "give one, or one for each")
    bound: list[OutputMeasurement] = []
    for (one,) in (as_measurements(model, [one]) for one in listed):
        if not isinstance(one, OutputMeasurement):
            raise HookdepthError(f"{type(one).__name__} measures layers", "give a measurement of the output")
        if one.reduce is None:
            raise HookdepthError(f"{one.name!r} leaves a value a token", 'give it a reduction, e.g. reduce="mean"')
        bound.append(one)
        if (one.reduce, one.needs_target) != (bound[0].reduce, bound[0].needs_target):
            raise HookdepthError("metrics of different reductions", "give the same measurement with other tokens")
    return bound
