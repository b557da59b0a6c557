"""What an intervention is: a change of one site of one layer, on some tokens, of a branch's own row.

    class Zero(Intervention):
        def apply(self, row, where, around): row[where.local] = 0.0

Those that come with the package are in `interventions` and `ablation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.tokens import Tokens, Where, as_tokens, extent
from hookdepth.errors import HookdepthError, choose, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import ORDER, READ_ONLY


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
        own = vars(self)  # frozen for its users; at once, since plans have thousands
        own.update(
            site=choose("site", site, ORDER),
            layer=whole_number(f"{who}: the layer", layer),
            tokens=as_tokens(tokens, who),
            head=None if head is None else whole_number(f"{who}: the head", head, 0),
        )
        own["_placed"] = (self.site, self.layer, self.tokens, self.head)
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
        place = (self.site, self.layer, self.tokens, getattr(self, "head", None))
        if not all(map(is_, place, getattr(self, "_placed", (None,) * 4))):
            self._place(*place)  # a subclass has set them in an `__init__` of its own
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
        extent(self.tokens, length)

    def shape(self, model: Decoder) -> tuple[int, ...]:
        """The shape of one token of what `apply` gets: (width,), or (head, head_dim) of all heads."""
        return model.shape_of(self.site, self.layer)[self.head is not None :]
