"""What a counterfactual run changes: small frozen values, no hooks.

    from hookdepth import AddVector, Branch, Patch, Skip

    branches = [Branch((Skip(layer=s),)) for s in range(model.n_layers)]
    branches += [Branch((Patch("resid_post", 5, other_resid[5]),))]            # activation patching
    branches += [Branch((Skip(3, "attn"), AddVector("resid_pre", 9, steer)))]  # two at once

An intervention acts at one site of one layer on some tokens; one or more of them make a branch (`branches`),
and `hookdepth.run` runs any list of branches in shared passes. Heads, neurons, and what is set to zero: `ablation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from hookdepth.engine.intervention import Intervention, Surroundings
from hookdepth.engine.tokens import Tokens, Where, positions
from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.model.sites import PARTS, part_site


@dataclass(frozen=True, eq=False)
class Identity(Intervention):
    """Changes nothing: what the null branch does.

    Branch((Identity("resid_pre", 0),))   # equals the clean run bit by bit where rows are treated equally
    """

    tokenwise: ClassVar[bool] = True

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Leave the row as it is."""


@dataclass(frozen=True, eq=False, init=False)
class Skip(Intervention):
    """Skip a layer, or one of its sublayers: what it adds to the residual stream becomes 0.

        Skip(7)                                 # resid_post[7] := resid_pre[7] on tokens ≥ 1
        Skip(7, "attn", tokens=slice(1, 40))    # attention adds nothing there; the MLP recomputes

    Args:
        layer: the layer skipped.
        part: layer, attn or mlp; mixer or extra, where a family has them.
        tokens: default all but the first, as the paper's notebook does (`no_skip_front=1`).

    Raises:
        HookdepthError: an unknown part.

    Source: 2505.13898, Fig. 3.
    """

    tokenwise: ClassVar[bool] = True
    part: str = "layer"

    def __init__(self, layer: int, part: str = "layer", tokens: Tokens = slice(1, None)) -> None:
        object.__setattr__(self, "part", choose("part", part, PARTS))
        self._place(part_site(part), layer, tokens)

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Set the residual back to the layer's input, or the sublayer's output to 0."""
        row[where.local] = around.resid_pre()[where.local] if self.part == "layer" else 0.0


@dataclass(frozen=True, eq=False)
class WithValue(Intervention):
    """Base of those that bring a tensor along.

    Patch("resid_post", 5, torch.zeros(64), tokens=[3])     # value: [width], or [n, width] for n tokens
    """

    tokenwise: ClassVar[bool] = True
    value: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __init__(
        self, site: str, layer: int, value: Tensor, tokens: Tokens = slice(None), head: int | None = None
    ) -> None:
        self._place(site, layer, tokens, head)
        object.__setattr__(self, "value", real_tensor(type(self).__name__, value))

    def at(self, where: Where) -> Tensor:
        """The value for the tokens of a pass: [d] or [n, d]."""
        return for_tokens(self, self.value, where)

    def check(self, model: Decoder, length: int) -> None:
        """Also check the value's shape: [width], or [tokens, width] for the tokens acted on."""
        super().check(model, length)
        check_shape(self, self.value, length, self.shape(model))


@dataclass(frozen=True, eq=False, init=False)
class Patch(WithValue):
    """Replace a site's value by a tensor: activation patching, or erasure with a single vector.

        Patch("resid_post", 5, clean_resid[5])                  # [T, d]: the whole prompt
        Patch("resid_pre", 5, mean_resid[5], tokens=[3])        # [d]: erase one token

    Args:
        site, layer, tokens, head: where.
        value: [d], or [n, d] for the n tokens acted on (at `z`, of a head or of all: [head, head_dim]); cast to the
            model's dtype. Gradients flow into it where the pass runs with gradients.
    """

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Overwrite the selected tokens."""
        row[where.local] = self.at(where).to(row.device, row.dtype)


Erase = Patch
"""Residual erasure (2505.13898, Fig. 6b) is a patch with one vector: the uninformative residual."""


@dataclass(frozen=True, eq=False, init=False)
class AddVector(WithValue):
    """Add a vector, e.g. a steering direction; the sum is taken in float32.

        AddVector("resid_post", 12, 4.0 * direction, tokens=slice(-1, None))

    Args:
        site, layer, tokens, head: where.
        value: [d], or [n, d] for the n tokens acted on.
    """

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Add to the selected tokens."""
        added = row[where.local].float() + self.at(where).to(row.device, torch.float32)
        row[where.local] = added.to(row.dtype)


@dataclass(frozen=True, eq=False, init=False)
class Scale(Intervention):
    """Multiply a site's value by a number, or by numbers.

        Scale("mlp_out", 4, 0.5)    # half of what the MLP adds

    Args:
        site, layer, tokens, head: where.
        factor: a finite number; or a tensor, [d] or [n, d] for the n tokens acted on.
    """

    tokenwise: ClassVar[bool] = True
    factor: float | Tensor = 1.0

    def __init__(
        self, site: str, layer: int, factor: float | Tensor, tokens: Tokens = slice(None), head: int | None = None
    ) -> None:
        self._place(site, layer, tokens, head)
        object.__setattr__(self, "factor", self._checked(factor))

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Scale the selected tokens."""
        factor = self.factor
        if isinstance(factor, Tensor) and factor.ndim:
            factor = for_tokens(self, factor, where).to(row.device, row.dtype)
        row[where.local] = row[where.local] * factor

    @staticmethod
    def _checked(factor: Any) -> float | Tensor:
        if isinstance(factor, Tensor) and factor.ndim:
            return real_tensor("Scale", factor)
        plain = real_tensor("Scale", factor).item() if isinstance(factor, Tensor) else factor
        if isinstance(plain, bool) or not isinstance(plain, Real) or not isfinite(plain):
            raise HookdepthError(f"Scale: the factor is {shown(factor)}", "give a finite number, or a tensor [width]")
        return factor if isinstance(factor, Tensor) else float(plain)

    def check(self, model: Decoder, length: int) -> None:
        """Also check the shape of a factor that is a tensor."""
        super().check(model, length)
        if isinstance(self.factor, Tensor) and self.factor.ndim:
            check_shape(self, self.factor, length, self.shape(model))


@dataclass(frozen=True, eq=False, init=False)
class Subtract(Intervention):
    """Take an earlier layer's contribution out of a layer's input: the direct effect of Fig. 5.

        Branch((Subtract(source=3, layer=9),), until=9)   # layer 9 sees h_9 − c_3; nothing is propagated

    c_3 is the clean run's in the same pass; the difference is taken in float32.
    """

    tokenwise: ClassVar[bool] = True
    source: int = 0

    def __init__(self, source: int, layer: int, tokens: Tokens = slice(1, None)) -> None:
        self._place("resid_pre", layer, tokens)
        object.__setattr__(self, "source", whole_number("Subtract: the source", source))

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Subtract on the selected tokens."""
        rest = row[where.local].float() - around.contribution(self.source)[where.local].to(row.device)
        row[where.local] = rest.to(row.dtype)

    def sources(self) -> tuple[int, ...]:
        """The layer that is taken out."""
        return (self.source,)

    def check(self, model: Decoder, length: int) -> None:
        """Also check that the source comes before the layer."""
        super().check(model, length)
        if not 0 <= self.source < self.layer:
            raise HookdepthError(
                f"Subtract(source={self.source}, layer={self.layer})", "give a source before the layer, from 0"
            )


def is_patch(own: Sequence[Intervention] | None) -> bool:
    """Whether a branch does nothing at a site but to replace tokens by a tensor: is_patch([Patch("z", 1, value)])"""
    return own is not None and [type(one) for one in own] == [Patch] and own[0].head is None


def patched_rows(
    values: Tensor, rows: Sequence[int], patches: Sequence[Intervention], wheres: Sequence[Where]
) -> Tensor:
    """Copies of rows, each with its own patch, in the same few operations however many they are.

        patched_rows(resid, [0, 0], [patch, other], [where, other_where])    # [2, token, width]

    Args:
        values: [row, token, …] of a pass.
        rows: which of them.
        patches, wheres: what each is patched with, and where that lies in the pass.
    """
    n_tokens = values.shape[1]
    given, places = [], []
    for number, (patch, where) in enumerate(zip(patches, wheres, strict=True)):
        assert isinstance(patch, WithValue)
        local = where.local
        tokens = range(*local.indices(n_tokens)) if isinstance(local, slice) else local
        own, shape = patch.at(where), values.shape[2:]
        given.append(own if own.ndim > len(shape) else own.expand(len(tokens), *shape))
        places += [number * n_tokens + token for token in tokens]
    alike = len({one.dtype for one in given}) == 1  # else `cat` would choose a dtype of its own
    new = torch.cat([one.to(values.device, one.dtype if alike else values.dtype) for one in given]).to(values.dtype)
    if places == list(range(len(rows) * n_tokens)):  # all of every row
        return new.unflatten(0, (len(rows), n_tokens))
    one_run = len(set(rows)) == 1
    copies = values[rows[0]].expand(len(rows), *values.shape[1:]) if one_run else values[_index(rows, values)]
    flat = copies.contiguous().flatten(0, 1).index_copy_(0, _index(places, values), new)
    return flat.unflatten(0, (len(rows), n_tokens))


def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
    return send(numbers, like.device)


def real_tensor(who: str, given: Any) -> Tensor:
    """A tensor of real numbers, with data: real_tensor("Patch", torch.zeros(64))"""
    if not isinstance(given, Tensor):
        raise HookdepthError(f"{who} got {shown(given)} for a value", "give a tensor, [width] or [tokens, width]")
    if given.layout != torch.strided or given.is_quantized:
        raise HookdepthError(f"{who} got a sparse or quantised tensor for a value", "give a plain one")
    if given.is_meta:
        raise HookdepthError(f"{who} got a tensor on the meta device, without data", "give one with data")
    if given.is_complex() or given.dtype == torch.bool:
        raise HookdepthError(f"{who} got a tensor of dtype {given.dtype}", "give a tensor of real numbers")
    return given


def for_tokens(whose: Intervention, value: Tensor, where: Where) -> Tensor:
    """A value for the tokens of a pass: the same for all, or each its own."""
    alike = 2 if whose.site == "z" and whose.head is None else 1
    return value if value.ndim == alike else value[where.picked]


def check_shape(whose: Intervention, value: Tensor, length: int, shape: tuple[int, ...]) -> None:
    """Raise where a value fits neither one token nor all that are acted on."""
    given = tuple(value.shape)
    if given == shape:
        return
    acted_on = len(positions(whose.tokens, length))
    if given != (acted_on, *shape):
        axes = "tokens acted on, heads, width of one" if len(shape) > 1 else "tokens acted on, width there"
        raise HookdepthError(
            f"{type(whose).__name__} got a value of shape {list(given)} for {acted_on} tokens",
            f"give {list(shape)} or {[acted_on, *shape]} ({axes})",
        )
