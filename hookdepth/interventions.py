"""What a counterfactual run changes: small frozen values, no hooks.

    from hookdepth import AddVector, Branch, Patch, Skip

    branches = [Branch((Skip(layer=s),)) for s in range(model.n_layers)]
    branches += [Branch((Patch("resid_post", 5, other_resid[5]),))]            # activation patching
    branches += [Branch((Skip(3, "attn"), AddVector("resid_pre", 9, steer)))]  # two at once

An intervention acts at one site of one layer on some tokens; a branch is one counterfactual run, made of
one or more interventions. `branching.run_branches` runs any list of them in shared launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.errors import HookdepthError, choose

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Sites of a layer in the order in which a forward pass meets them."""
PARTS = ("layer", "attn", "mlp")
_PART_SITE = {"layer": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}

Tokens = slice | Sequence[int]
"""Positions in a prompt; negative ones count from its end."""


@dataclass(frozen=True)
class Where:
    """The tokens that an intervention acts on, in a launch that may hold only some of a prompt's.

    Attributes:
        local: their positions in the row.
        picked: which of the intervention's own tokens these are.
    """

    local: slice | list[int]
    picked: slice | list[int]


class Surroundings(Protocol):
    """What an intervention may read besides the value that it changes: rows of the same launch."""

    def resid_pre(self) -> Float[Tensor, "token width"]:
        """The input of this layer on the branch's own row."""

    def contribution(self, layer: int) -> Float[Tensor, "token width"]:
        """What an earlier layer added to the trunk, in float32."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions: where it acts. Subclasses say what happens there, in `apply`.

        class Zero(Intervention):
            def apply(self, row, where, around):
                row[where.local] = 0.0

        Branch((Zero("mlp_out", 4, tokens=[-1]),))

    Attributes:
        site: one of `SITES`.
        layer: decoder layer, 0-based.
        tokens: the positions it acts on.
        tokenwise: `apply` looks at no other tokens than those that it changes. Only a promise can be relied on, so a
            subclass that keeps it says so; values at tokens that nobody measures may then be left out.
    """

    tokenwise: ClassVar[bool] = False
    site: str
    layer: int
    tokens: Tokens = field(default_factory=lambda: slice(None))

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Change `row` [token, width] in place at `where`. The row is the caller's own copy."""
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

    Branch((Identity("resid_pre", 0),))   # equals the trunk bit by bit where rows are treated equally
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
        object.__setattr__(self, "site", _PART_SITE[part])
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
        """The value for the tokens of a launch: [d] or [n, d]."""
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
            where the launch runs with gradients.
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

    c_3 is the trunk's in the same launch; the difference is taken in float32.
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


@dataclass(frozen=True, eq=False)
class Branch:
    """One counterfactual run of one prompt.

        skip = Skip(4)
        Branch((skip,))                        # propagated to the end, measured everywhere
        Branch((skip,), cut=16)                # only on tokens < 16, measured at tokens ≥ 16
        Branch((skip,), prompt=2, until=9)     # dropped after layer 9

    Branches of a prompt that hold the same intervention objects and differ in `cut` share their states
    left of the cuts.

    Attributes:
        interventions: what it changes; at least one.
        prompt: index of the prompt it belongs to.
        cut: intervene on tokens < cut only, and measure at tokens ≥ cut.
        until: last layer it lives through; None for all of them and the output.
        measured: positions at which measurements read; default all from the cut on.

    Raises:
        HookdepthError: no interventions; what does not fit model or prompt is refused by `run_branches`.
    """

    interventions: tuple[Intervention, ...]
    prompt: int = 0
    cut: int | None = None
    until: int | None = None
    measured: Tokens | None = None

    def __post_init__(self) -> None:
        if not self.interventions:
            raise HookdepthError("a branch without interventions", "give at least one, e.g. Identity('resid_pre', 0)")

    def birth(self) -> tuple[int, str]:
        """(layer, site) of its first intervention: before that the branch is the trunk."""
        first = min(self.interventions, key=lambda i: (i.layer, SITES.index(i.site)))
        return first.layer, first.site

    def check(self, n_layers: int, length: int, width: int) -> None:
        """Raise where the branch does not fit the model or the prompt."""
        for intervention in self.interventions:
            intervention.check(n_layers, length, width)
        if self.cut is not None and not 0 < self.cut < length:
            raise HookdepthError(f"a cut at {self.cut} in a prompt of {length} tokens", f"give 1 to {length - 1}")
        last = max(i.layer for i in self.interventions)
        if self.until is not None and not last <= self.until < n_layers:
            raise HookdepthError(
                f"a branch until layer {self.until} that intervenes at layer {last} of {n_layers}",
                "let it live at least through the layer of its last intervention",
            )
        if not self.measured_positions(length):
            raise HookdepthError("a branch that is measured nowhere", "measure at least one token, from its cut on")

    def measured_positions(self, length: int) -> list[int]:
        """The positions at which it is measured, in a prompt of `length` tokens."""
        first = self.cut or 0
        chosen = positions(self.measured if self.measured is not None else slice(None), length)
        return [position for position in chosen if position >= first]


def positions(tokens: Tokens, length: int) -> range | list[int]:
    """The positions that `tokens` selects in a prompt of `length` tokens.

        positions(slice(1, None), 4)   # range(1, 4)
        positions([0, -1], 4)          # [0, 3]

    Raises:
        HookdepthError: a position outside the prompt.
    """
    if isinstance(tokens, slice):
        return range(*tokens.indices(length))
    wrong = [token for token in tokens if not -length <= token < length]
    if wrong:
        raise HookdepthError(
            f"token {wrong[0]} of a prompt of {length} tokens", f"give positions from {-length} to {length - 1}"
        )
    return [token % length for token in tokens]


def locate(tokens: Tokens, length: int, start: int, stop: int) -> Where:
    """Where the tokens that an intervention names lie in a launch of tokens start..stop−1.

    locate(slice(1, None), 10, 4, 9)   # Where(local=slice(0, 5), picked=slice(3, 8))
    """
    chosen = positions(tokens, length)
    if isinstance(chosen, range) and chosen.step == 1:
        low, high = max(chosen.start, start), max(min(chosen.stop, stop), start)
        low = min(low, high)
        return Where(slice(low - start, high - start), slice(low - chosen.start, high - chosen.start))
    inside = [(order, position) for order, position in enumerate(chosen) if start <= position < stop]
    return Where([position - start for _, position in inside], [order for order, _ in inside])
