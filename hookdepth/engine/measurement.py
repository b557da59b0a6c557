"""What a measurement is: a function of the rows of a pass, seen at a layer or at the unembedding.

    class Length(LayerMeasurement):
        name = "length"
        def values(self, view: LayerView): return view.resid_post.float().norm(dim=-1)

A measurement gives a value per row and token; the engine reduces it over the tokens at which the branch is
measured, and over no others (`reduce=None` leaves a value a token). `LayerMeasurement`s are asked at every layer,
`OutputMeasurement`s at the unembedding, in chunks. Those that come with the package are in `measurements`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder

if TYPE_CHECKING:
    from hookdepth.kernels.fused import Fused


@dataclass
class LayerView:
    """The rows of a pass at one layer.

    Attributes:
        layer: its index.
        resid_pre, resid_post: [row, token, width], the model's dtype.
        slots: [row], which of the clean runs is a row's own; None where there is only one.
        clean_runs: the rows that are clean runs.
        fused: kernels that may be used, where the user asked for them.
    """

    layer: int
    resid_pre: Tensor
    resid_post: Tensor
    slots: Tensor | None
    clean_runs: slice = field(default_factory=lambda: slice(0, 1))
    fused: Fused | None = None

    @cached_property
    def contribution(self) -> Float[Tensor, "row token width"]:
        """c = resid_post − resid_pre, in float32."""
        return self.resid_post.float() - self.resid_pre.float()

    def clean(self, values: Tensor) -> Tensor:
        """The clean run's values, for every row: [row or 1, …]."""
        runs = values[self.clean_runs]
        return runs if self.slots is None else runs.index_select(0, self.slots)


class OutputView:
    """Rows of one prompt at some positions, unembedded. Row 0 is the clean run.

    Attributes:
        logits: [row, position, vocab], the model's dtype.
        positions: where in the prompt.
        prompt: index of the prompt.
    """

    def __init__(
        self,
        logits: Tensor,
        positions: Sequence[int],
        next_tokens: Tensor | None,
        prompt: int,
        whole: OutputView | None = None,
        lens: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.logits, self.positions, self.prompt = logits, positions, prompt
        self._next_tokens, self._whole, self._lens = next_tokens, whole, lens
        self.fused: Fused | None = None if whole is None else whole.fused

    def followed_by(self, next_tokens: Tensor) -> OutputView:
        """The first positions, with the tokens that follow them; what is derived from logits is not computed again."""
        n = len(next_tokens)
        return OutputView(self.logits[:, :n], self.positions[:n], next_tokens, self.prompt, self, self._lens)

    def through_lens(self, layer: int) -> OutputView:
        """The same rows at the same positions, as the logit lens reads the input of a layer.

        Raises:
            HookdepthError: the measurement does not name this layer in `lenses`.
        """
        if self._lens is None:
            raise HookdepthError(f"the lens at layer {layer} was not kept", f"set lenses = ({layer},)")
        logits = self._lens(layer)[:, : len(self.positions)]
        return OutputView(logits, self.positions, self._next_tokens, self.prompt)

    @property
    def next_tokens(self) -> Int[Tensor, " position"]:
        """The prompt's token after each position: what a loss calls the target.

        The prompt's last token has none. So only a measurement with `needs_target = True` is given targets, and the
        last token is not among its positions.

        Raises:
            HookdepthError: the measurement does not say that it needs them.
        """
        if self._next_tokens is None:
            raise HookdepthError(
                "a measurement reads next_tokens at positions of which one may be the prompt's last, which has none",
                "set needs_target = True on the measurement, and the last token is left out",
            )
        return self._next_tokens

    @cached_property
    def probabilities(self) -> Float[Tensor, "row position vocab"]:
        """Softmax of the logits, in float32."""
        if self._whole is not None:
            return self._whole.probabilities[:, : len(self.positions)]
        return torch.softmax(self.logits, dim=-1, dtype=torch.float32)

    @cached_property
    def log_probabilities(self) -> Float[Tensor, "row position vocab"]:
        """Log-softmax of the logits, in float32."""
        if self._whole is not None:
            return self._whole.log_probabilities[:, : len(self.positions)]
        return torch.log_softmax(self.logits, dim=-1, dtype=torch.float32)


class LayerMeasurement:
    """A number per branch and layer. Subclasses set `name`, `reduce` (max, min, mean, sum or None), give `values`.

    `change` promises values that are 0 where a branch is its clean run: there nothing need be computed.

    class Norm(LayerMeasurement):
        name, reduce = "norm", "mean"
        def values(self, view):
            return view.resid_post.float().norm(dim=-1)
    """

    name: str
    reduce: str | None = "max"
    change: bool = False

    def bind(self, model: Decoder) -> LayerMeasurement:
        """What measures on this model: `run` asks once, before anything runs. Default: itself.

        For measurements that need the model or its tokenizer to know what they measure.
        """
        return self

    def values(self, view: LayerView) -> Float[Tensor, "row token"]:
        """One value per row and token."""
        raise HookdepthError(f"{type(self).__name__} says nothing to measure", "define values(view)")


class OutputMeasurement:
    """A number per branch, read off the logits. Subclasses set `name`, `reduce` (and `change`), give `values`.

    class Entropy(OutputMeasurement):
        name, reduce = "entropy", "mean"
        def values(self, view):
            return torch.special.entr(view.probabilities).sum(-1)

    One that reads `view.next_tokens` sets `needs_target = True`: a prompt's last token has no target, and is then never
    among its positions; a branch that is measured nowhere else is refused.
    """

    name: str
    reduce: str | None = "max"
    change: bool = False
    needs_target: bool = False
    lenses: tuple[int, ...] = ()

    def bind(self, model: Decoder) -> OutputMeasurement:
        """What measures on this model: `run` asks once, before anything runs. Default: itself."""
        return self

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """One value per row and position."""
        raise HookdepthError(f"{type(self).__name__} says nothing to measure", "define values(view)")


Measurement = LayerMeasurement | OutputMeasurement


def zero_where_clean(measurements: Sequence[Measurement]) -> bool:
    """Whether all are 0 at tokens where a branch is its clean run, so that these need not be computed.

    zero_where_clean([LayerEffect(), OutputEffect()])   # True
    """
    return all(one.change for one in measurements)
