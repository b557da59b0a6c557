"""What a counterfactual run changes: small frozen values, no hooks.

    from hookdepth import AddVector, Branch, Patch, Skip

    branches = [Branch((Skip(layer=s),)) for s in range(model.n_layers)]
    branches += [Branch((Patch("resid_post", 5, other_resid[5]),))]            # activation patching
    branches += [Branch((Skip(3, "attn"), AddVector("resid_pre", 9, steer)))]  # two at once

An intervention acts at one site of one layer on some tokens; one or more of them make a branch (`branches`),
and `hookdepth.run` runs any list of branches in shared passes. Heads, neurons, and what is set to zero: `ablation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.tokens import Tokens, Where, as_tokens, positions
from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import ORDER, PARTS, READ_ONLY, part_site


class Surroundings(Protocol):
    """What an intervention may read besides the value that it changes: rows of the same pass."""

    def clean(self) -> Float[Tensor, "token width"]:
        """The clean run's value at this site (of this head)."""

    def resid_pre(self) -> Float[Tensor, "token width"]:
        """The input of this layer on the branch's own row."""

    def contribution(self, layer: int) -> Float[Tensor, "token width"]:
        """What an earlier layer added to the clean run, in float32."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions: where it acts. Subclasses say what happens there, in `apply`.

        class Zero(Intervention):
            def apply(self, row, where, around):
                row[where.local] = 0.0

        Branch((Zero("mlp_out", 4, tokens=[-1]),))

    One that promises to be `tokenwise` may be given only some of its prompt's tokens: a pass may begin at a later token
    or stop early. What it draws or looks up is indexed by the position in the prompt, so that no number depends on how
    branches were packed into passes:

        @dataclass(frozen=True, eq=False)
        class Noise(Intervention):
            tokenwise: ClassVar[bool] = True
            seed: int = 0

            def apply(self, row, where, around):
                generator = torch.Generator().manual_seed(self.seed)
                noise = torch.randn(where.length, row.shape[1], generator=generator)
                row[where.local] += noise[where.positions].to(row.device, row.dtype)

    Attributes:
        site: one of `model.sites.ORDER`.
        layer: decoder layer, 0-based.
        tokens: the positions it acts on.
        head: at `z`, the one query head that it sees and changes; None for all, [token, head, head_dim].
        tokenwise: `apply` looks at no other tokens than those that it changes. Only a promise can be relied on, so a
            subclass that keeps it says so; passes may then leave out tokens that nothing needs. One that does not
            promise it is always given the whole prompt: `where.start` is 0 and the row has `where.length` tokens.
    """

    tokenwise: ClassVar[bool] = False
    site: str
    layer: int
    tokens: Tokens = field(default_factory=lambda: slice(None))
    head: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._place(self.site, self.layer, self.tokens, self.head)

    def _place(self, site: Any, layer: Any, tokens: Any, head: Any = None) -> None:
        """Keep where it acts, in plain ints; what can be no place in any model is refused here and now."""
        who = type(self).__name__
        if site in READ_ONLY:
            remedy = "change z, what each head gives; q, k, v and pattern are read with `capture`"
            raise HookdepthError(f"{who} at {site}, which can only be read", remedy)
        object.__setattr__(self, "site", choose("site", site, ORDER))
        object.__setattr__(self, "layer", whole_number(f"{who}: the layer", layer))
        object.__setattr__(self, "tokens", as_tokens(tokens, who))
        object.__setattr__(self, "head", None if head is None else whole_number(f"{who}: the head", head, 0))
        if head is not None and site != "z":
            raise HookdepthError(f"{who} of a head at {site}", "heads are told apart at z")

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Change `row` [token, width] in place at `where` (see `tokens.Where`), and nothing that `around` gives.

        The row is a copy. It holds the prompt's tokens from `where.start` on, without padding.
        """
        raise HookdepthError(f"{type(self).__name__} says nothing to do", "give the intervention an `apply`")

    def sources(self) -> tuple[int, ...]:
        """Earlier layers whose contribution `apply` asks for."""
        return ()

    def check(self, model: Decoder, length: int) -> None:
        """Raise where the intervention does not fit the model or the prompt."""
        # A subclass may have set them in an `__init__` of its own.
        self._place(self.site, self.layer, self.tokens, getattr(self, "head", None))
        if not 0 <= self.layer < model.n_layers:
            raise HookdepthError(
                f"{type(self).__name__} at layer {self.layer} of a model of {model.n_layers} layers",
                f"give a layer from 0 to {model.n_layers - 1}",
            )
        shape = model.shape_of(self.site, self.layer)
        if shape == (0,):
            raise model.sites.missing(self.site, self.layer)
        if self.head is not None and self.head >= shape[0]:
            raise HookdepthError(
                f"{type(self).__name__} of head {self.head} of {shape[0]} heads", f"give 0 to {shape[0] - 1}"
            )
        positions(self.tokens, length)

    def shape(self, model: Decoder) -> tuple[int, ...]:
        """The shape of one token of what `apply` gets: (width,), or (head, head_dim) of all heads."""
        return model.shape_of(self.site, self.layer)[self.head is not None :]


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
    acted_on = len(positions(whose.tokens, length))
    if tuple(value.shape) not in {shape, (acted_on, *shape)}:
        axes = "tokens acted on, heads, width of one" if len(shape) > 1 else "tokens acted on, width there"
        raise HookdepthError(
            f"{type(whose).__name__} got a value of shape {list(value.shape)} for {acted_on} tokens",
            f"give {list(shape)} or {[acted_on, *shape]} ({axes})",
        )
