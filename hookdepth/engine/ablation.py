"""Heads, neurons and whole sites set to a value: zero, a mean, a number.

Branch((Ablate("z", 5, head=3), Ablate("z", 7, head=1, value="mean")))     # two heads of two layers
Branch((Clamp("neurons", 4, 17, 5.0),))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from hookdepth.engine.intervention import Intervention, Surroundings
from hookdepth.engine.interventions import check_shape, for_tokens, real_tensor
from hookdepth.engine.tokens import Tokens, Where
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.model.decoder import Decoder


@dataclass(frozen=True, eq=False, init=False)
class Ablate(Intervention):
    """Set a site, or one head of it, to zero, to its mean over the prompt, or to what you give.

        Ablate("z", 5, head=3)                       # head 3 of layer 5 adds nothing
        Ablate("z", 5, head=3, value="mean")
        Ablate("z", 5, head=3, value=torch.zeros(16))

    Args:
        site, layer, head, tokens: where.
        value: a finite number; "mean", the clean run's mean over the tokens of the whole prompt; or a tensor, as in
            `Patch`.
    """

    value: float | str | Tensor = 0.0

    def __init__(
        self,
        site: str,
        layer: int,
        head: int | None = None,
        value: float | str | Tensor = 0.0,
        tokens: Tokens = slice(None),
    ) -> None:
        self._place(site, layer, tokens, head)
        if not isinstance(value, Tensor) and value != "mean":
            value = _number("Ablate", value, 'a finite number, "mean", or a tensor')
        object.__setattr__(self, "value", real_tensor("Ablate", value) if isinstance(value, Tensor) else value)

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        """A mean needs the whole prompt."""
        return not isinstance(self.value, str)

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Overwrite the selected tokens."""
        if isinstance(self.value, Tensor):
            row[where.local] = for_tokens(self, self.value, where).to(row.device, row.dtype)
        elif isinstance(self.value, str):
            row[where.local] = around.clean().float().mean(0).to(row.dtype)
        else:
            row[where.local] = self.value

    def check(self, model: Decoder, length: int) -> None:
        """Also check the shape of a value that is a tensor."""
        super().check(model, length)
        if isinstance(self.value, Tensor):
            check_shape(self, self.value, length, self.shape(model))
        elif not isinstance(self.value, str):
            _check_range(self, self.value, model)


@dataclass(frozen=True, eq=False, init=False)
class Clamp(Intervention):
    """Hold single entries of a site at a number: neurons, or dimensions of the stream.

        Clamp("neurons", 4, 17, 5.0)
        Clamp("neurons", 4, [17, 40], 0.0, tokens=[-1])

    Args:
        site, layer, tokens, head: where.
        index: which of its entries, one or several.
        value: a finite number.
    """

    tokenwise: ClassVar[bool] = True
    index: tuple[int, ...] = ()
    value: float = 0.0

    def __init__(
        self,
        site: str,
        layer: int,
        index: int | Sequence[int],
        value: float,
        tokens: Tokens = slice(None),
        head: int | None = None,
    ) -> None:
        self._place(site, layer, tokens, head)
        listed = index if isinstance(index, Sequence) and not isinstance(index, str) else [index]
        object.__setattr__(self, "index", tuple(whole_number("Clamp: the index", one, 0) for one in listed))
        object.__setattr__(self, "value", _number("Clamp", value, "a finite number"))

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Overwrite these entries of the selected tokens."""
        here = row[where.local].clone()
        here[..., list(self.index)] = self.value
        row[where.local] = here

    def check(self, model: Decoder, length: int) -> None:
        """Also check that there are such entries, each once."""
        super().check(model, length)
        _check_range(self, self.value, model)
        width = self.shape(model)[-1]
        if self.site == "z" and self.head is None:
            raise HookdepthError("Clamp at z of no head", "say which: head=3")
        if not self.index or len(set(self.index)) < len(self.index) or max(self.index) >= width:
            raise HookdepthError(
                f"Clamp of {list(self.index)} of {width} entries of {self.site}",
                f"give numbers from 0 to {width - 1}, each once",
            )


def _check_range(whose: Intervention, value: float, model: Decoder) -> None:
    if abs(value) > torch.finfo(model.dtype).max:
        problem = f"{type(whose).__name__} to {value:g}, which {str(model.dtype).removeprefix('torch.')} does not reach"
        raise HookdepthError(problem, "give a smaller number")


def _number(who: str, given: Any, meant: str) -> float:
    if isinstance(given, bool) or not isinstance(given, Real) or not isfinite(given):
        raise HookdepthError(f"{who}: the value is {shown(given)}", f"give {meant}")
    return float(given)
