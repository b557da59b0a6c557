"""Where colours and axes end, and what is said about the values beyond.

No drawing here, so that figures can be declared without matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookdepth.metrics import mean_interval
from hookdepth.results import PER_PROMPT, Result

_SATURATED = 0.1  # a larger share of values at the end of the colours tells nothing


@dataclass(frozen=True)
class Scale:
    """The colours of a map: Scale(0.0, 1.0, "Relative change")."""

    low: float  # value of the first colour
    high: float  # and of the last
    label: str = ""  # beside the colour bar
    signed: bool = False  # zero is white, and both sides are of the same length
    log: bool = False  # equal colours are equal factors: many values would be at the end of a linear scale
    linear: float = 0.0  # of a signed logarithmic scale: up to here, on both sides of zero, it is linear
    said: str = ""  # why it is so

    @classmethod
    def of(
        cls,
        values: Tensor,
        label: str = "",
        signed: bool | None = None,
        limits: tuple[float | None, float | None] | None = None,
        clip: bool = False,
    ) -> Scale:
        """The scale of a map: between limits, or as far as its finite values go.

            Scale.of(torch.tensor([[0.5, -2.0]])).low   # -2.0

        Args:
            signed: None for whatever the values are.
            clip: the limits hold, however many values lie beyond; else the colours are logarithmic where too many do.
        """
        finite = finite_of(values)
        most = finite.abs().max().item() if finite.numel() else 0.0
        if signed is None:
            signed = bool(finite.numel()) and finite.min().item() < -1e-6 * most
        own = (-most if signed else 0.0), most
        low, high = (given if given is not None else end for given, end in zip(limits or own, own, strict=True))
        share = (finite > high).double().mean().item() if finite.numel() else 0.0
        if limits and not clip and share > _SATURATED and (signed or low == 0):
            said = f"logarithmic colours, as {100 * share:.0f} % of the values are above {high:g}"
            if signed:
                return cls(-most, most, label, True, True, high / 20, f"{said}; linear up to {high / 20:g}")
            least = max(finite[finite > 0].quantile(0.02).item(), most * 1e-4)
            return cls(min(least, most / 2), most, label, log=True, said=said)
        return cls(low, high, label, signed) if low < high else cls(-1.0 if signed else 0.0, 1.0, label, signed)

    def widest(self, other: Scale) -> Scale:
        """A scale that holds both: Scale(0, 1).widest(Scale(0, 3)).high   # 3"""
        low, high = min(self.low, other.low), max(self.high, other.high)
        if log := [one for one in (self, other) if one.log]:
            low, linear = min(one.low for one in log), min(one.linear for one in log)
            return Scale(low, high, self.label, log[0].signed, True, linear, log[0].said)
        return Scale(low, high, self.label, self.signed or other.signed)

    def beyond(self, values: Tensor) -> Tensor:
        """The finite values that have no colour of their own: Scale(0, 1).beyond(torch.tensor([2.0, 0.5]))"""
        finite = finite_of(values)
        slack = 1e-6 * (self.high - self.low)
        return finite[
            (finite > self.high + slack) | (finite < (-slack if self.log and not self.signed else self.low - slack))
        ]

    def clipped(self, maps: Sequence[Tensor]) -> str:
        """What is beyond the colours, in words; nothing where nothing is."""
        beyond = torch.cat([self.beyond(values) for values in maps])
        if not beyond.numel():
            return self.said
        furthest = beyond[beyond.abs().argmax()].item()
        ends = f"{self.low:.3g} and {self.high:.3g}" if self.low else f"{self.high:.3g}"
        total = sum(values.numel() for values in maps)
        return f"{beyond.numel()} of {total} values beyond the colours, which end at {ends}: up to {furthest:.3g}"


@dataclass(frozen=True)
class Rows:
    """A value a row, beside a map."""

    values: Tensor  # [row], on a logarithmic axis
    good: Tensor | None  # 1 in good rows, 0 in those that get a cross; None where all are good
    tolerance: float  # where the dotted line is
    label: str  # under the axis
    bad: str  # over it, where there are crosses


def finite_of(values: Tensor) -> Tensor:
    """The finite values, flat: finite_of(torch.tensor([1.0, float("nan")]))   # [1]"""
    return values[torch.isfinite(values)].double()


def interval_of(result: Result, name: str) -> Tensor | None:
    """Mean over prompts of a tensor with a value a place, and its 95 % interval, [3, place]; None where it has none.

    Prompts count as they do in the tensor: by their tokens where it is a mean over tokens, else each as much.
    """
    values = result.tensors.get(PER_PROMPT + name)
    if values is None or values.ndim != 2 or len(values) < 2:
        return None
    settings, data = (result.metadata.get(key) or {} for key in ("settings", "data"))
    lengths = None if "over_prompts" in settings else data.get("lengths")
    if lengths is not None and (tested := result.metadata.get("tested")) is not None:
        lengths = [lengths[number] for number in tested]
    weights = None
    if lengths is not None and len(lengths) == len(values):
        weights = torch.tensor(lengths, dtype=torch.float64) - (settings.get("keep_front") or 0)
    return mean_interval(values, weights)


def first_columns(causal: bool | Sequence[int], rows: int) -> list[int]:
    """The first column that each row of a map can reach: first_columns(True, 3)   # [0, 1, 2]"""
    return list(range(rows)) if causal is True else list(causal or [0] * rows)


def reached(causal: bool | Sequence[int], shape: Sequence[int]) -> Tensor:
    """Which cells of a map can be other than 0: reached(True, (2, 2))"""
    return torch.arange(shape[1]) >= torch.tensor(first_columns(causal, shape[0]))[:, None]


def not_finite(maps: Sequence[Tensor]) -> str:
    """How many values cannot be drawn, in words; nothing where all can."""
    count = sum(int((~torch.isfinite(values)).sum()) for values in maps)
    return f"{count} value{'' if count == 1 else 's'} {'is' if count == 1 else 'are'} not finite" if count else ""
