"""What a counterfactual run changes: small frozen values, no hooks.

    from hookdepth import AddVector, Branch, Patch, Skip

    branches = [Branch((Skip(layer=s),)) for s in range(model.n_layers)]
    branches += [Branch((Patch("resid_post", 5, other_resid[5]),))]            # activation patching
    branches += [Branch((Skip(3, "attn"), AddVector("resid_pre", 9, steer)))]  # two at once

An intervention acts at one site of one layer on some tokens; one or more of them make a branch (`branches`),
and `branching.run_branches` runs any list of branches in shared passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.tokens import Tokens, Where, positions
from hookdepth.errors import HookdepthError, choose
from hookdepth.model.decoder import PART_SITE, PARTS, SITES


class Surroundings(Protocol):
    """What an intervention may read besides the value that it changes: rows of the same pass_."""

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
        site: one of `SITES`.
        layer: decoder layer, 0-based.
        tokens: the positions it acts on.
        tokenwise: `apply` looks at no other tokens than those that it changes. Only a promise can be relied on, so a
            subclass that keeps it says so; passes may then leave out tokens that nothing needs. One that does not
            promise it is always given the whole prompt: `where.start` is 0 and the row has `where.length` tokens.
    """

    tokenwise: ClassVar[bool] = False
    site: str
    layer: int
    tokens: Tokens = field(default_factory=lambda: slice(None))

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Change `row` [token, width] in place at `where` (see `tokens.Where`), and nothing that `around` gives.

        The row is a copy. It holds the prompt's tokens from `where.start` on, without padding.
        """
        raise HookdepthError(f"{type(self).__name__} says nothing to do", "give the intervention an `apply`")

    def sources(self) -> tuple[int, ...]:
        """Earlier layers whose contribution `apply` asks for."""
        return ()

    def check(self, n_layers: int, length: int, width: int) -> None:
        """Raise where the intervention does not fit the model or the prompt."""
        choose("site", self.site, SITES)
        if not 0 <= self.layer < n_layers:
            raise HookdepthError(
                f"{type(self).__name__} at layer {self.layer} of a model of {n_layers} layers",
                f"give a layer from 0 to {n_layers - 1}",
            )
        positions(self.tokens, length)


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
        part: layer, attn or mlp.
        tokens: default all but the first, as the paper's notebook does (`no_skip_front=1`).

    Raises:
        HookdepthError: an unknown part.

    Source: 2505.13898, Fig. 3.
    """

    tokenwise: ClassVar[bool] = True
    part: str = "layer"

    def __init__(self, layer: int, part: str = "layer", tokens: Tokens = slice(1, None)) -> None:
        object.__setattr__(self, "part", choose("part", part, PARTS))
        object.__setattr__(self, "site", PART_SITE[part])
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", tokens)

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

    def __init__(self, site: str, layer: int, value: Tensor, tokens: Tokens = slice(None)) -> None:
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "value", value)

    def at(self, where: Where) -> Tensor:
        """The value for the tokens of a pass: [d] or [n, d]."""
        return self.value if self.value.ndim == 1 else self.value[where.picked]

    def check(self, n_layers: int, length: int, width: int) -> None:
        """Also check the value's shape: [width], or [tokens, width] for the tokens acted on."""
        super().check(n_layers, length, width)
        acted_on = len(positions(self.tokens, length))
        if tuple(self.value.shape) not in {(width,), (acted_on, width)}:
            raise HookdepthError(
                f"{type(self).__name__} got a value of shape {list(self.value.shape)} for {acted_on} tokens",
                f"give [{width}] or [{acted_on}, {width}] (tokens acted on, width of the model)",
            )


@dataclass(frozen=True, eq=False, init=False)
class Patch(WithValue):
    """Replace a site's value by a tensor: activation patching, or erasure with a single vector.

        Patch("resid_post", 5, clean_resid[5])                  # [T, d]: the whole prompt
        Patch("resid_pre", 5, mean_resid[5], tokens=[3])        # [d]: erase one token

    Args:
        site, layer, tokens: where.
        value: [d], or [n, d] for the n tokens acted on; cast to the model's dtype. Gradients flow into it
            where the pass runs with gradients.
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
        site, layer, tokens: where.
        value: [d], or [n, d] for the n tokens acted on.
    """

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Add to the selected tokens."""
        added = row[where.local].float() + self.at(where).to(row.device, torch.float32)
        row[where.local] = added.to(row.dtype)


@dataclass(frozen=True, eq=False, init=False)
class Scale(Intervention):
    """Multiply a site's value by a number.

    Scale("mlp_out", 4, 0.5)    # half of what the MLP adds
    """

    tokenwise: ClassVar[bool] = True
    factor: float = 1.0

    def __init__(self, site: str, layer: int, factor: float, tokens: Tokens = slice(None)) -> None:
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "factor", factor)

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Scale the selected tokens."""
        row[where.local] = row[where.local] * self.factor


@dataclass(frozen=True, eq=False, init=False)
class Subtract(Intervention):
    """Take an earlier layer's contribution out of a layer's input: the direct effect of Fig. 5.

        Branch((Subtract(source=3, layer=9),), until=9)   # layer 9 sees h_9 − c_3; nothing is propagated

    c_3 is the clean run's in the same pass; the difference is taken in float32.
    """

    tokenwise: ClassVar[bool] = True
    source: int = 0

    def __init__(self, source: int, layer: int, tokens: Tokens = slice(1, None)) -> None:
        object.__setattr__(self, "site", "resid_pre")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "source", source)

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Subtract on the selected tokens."""
        rest = row[where.local].float() - around.contribution(self.source)[where.local].to(row.device)
        row[where.local] = rest.to(row.dtype)

    def sources(self) -> tuple[int, ...]:
        """The layer that is taken out."""
        return (self.source,)

    def check(self, n_layers: int, length: int, width: int) -> None:
        """Also check that the source comes before the layer."""
        super().check(n_layers, length, width)
        if not 0 <= self.source < self.layer:
            raise HookdepthError(
                f"Subtract(source={self.source}, layer={self.layer})", "give a source before the layer, from 0"
            )
