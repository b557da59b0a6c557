"""What is read off a pass: functions of rows that end as one number per branch.

    run_branches(model, [ids], branches, [LayerEffect(), OutputEffect()])

A measurement gives a value per row and token; the engine reduces it over the tokens at which the branch is
measured. `LayerMeasurement`s are asked at every layer, `OutputMeasurement`s at the unembedding, in chunks.
Write your own by subclassing either: see the README.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth import metrics


@dataclass
class LayerView:
    """The rows of a pass at one layer.

    Attributes:
        layer: its index.
        resid_pre, resid_post: [row, token, width], the model's dtype.
        clean_row: [row], the row that holds each row's clean run; None where row 0 is everyone's.
        n_clean: number of clean runs; they are the first rows.
    """

    layer: int
    resid_pre: Tensor
    resid_post: Tensor
    clean_row: Tensor | None
    n_clean: int = 1

    @cached_property
    def contribution(self) -> Float[Tensor, "row token width"]:
        """c = resid_post − resid_pre, in float32."""
        return self.resid_post.float() - self.resid_pre.float()

    def clean(self, values: Tensor) -> Tensor:
        """The clean run's values, for every row: [row or 1, …]."""
        return values[:1] if self.clean_row is None else values.index_select(0, self.clean_row)


@dataclass
class OutputView:
    """Rows of one prompt at some positions, unembedded. Row 0 is the clean run.

    Attributes:
        logits: [row, position, vocab], the model's dtype.
        positions: where in the prompt.
        next_tokens: [position], the prompt's token after each position (the last position's is its own).
        prompt: index of the prompt.
    """

    logits: Tensor
    positions: Sequence[int]
    next_tokens: Tensor
    prompt: int

    @cached_property
    def probabilities(self) -> Float[Tensor, "row position vocab"]:
        """Softmax of the logits, in float32."""
        return torch.softmax(self.logits, dim=-1, dtype=torch.float32)


class LayerMeasurement:
    """A number per branch and layer. Subclasses set `name`, `reduce` (max, sum or mean) and give `values`.

    `change` promises values that are 0 where a branch is its clean run: there nothing need be computed.

    class Norm(LayerMeasurement):
        name, reduce = "norm", "mean"
        def values(self, view):
            return view.resid_post.float().norm(dim=-1)
    """

    name: str
    reduce: str = "max"
    change: bool = False

    def values(self, view: LayerView) -> Float[Tensor, "row token"]:
        """One value per row and token."""
        raise TypeError(f"{type(self).__name__} must define values(view)")


class OutputMeasurement:
    """A number per branch, read off the logits. Subclasses set `name`, `reduce` (and `change`), give `values`.

    class Entropy(OutputMeasurement):
        name, reduce = "entropy", "mean"
        def values(self, view):
            return torch.special.entr(view.probabilities).sum(-1)
    """

    name: str
    reduce: str = "max"
    change: bool = False

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """One value per row and position."""
        raise TypeError(f"{type(self).__name__} must define values(view)")


class LayerEffect(LayerMeasurement):
    """max over tokens of ‖c_i − c̄_i‖ / ‖c_i‖ at every layer i (2505.13898, Fig. 3a and 3b).

    run_branches(model, [ids], [Branch((Skip(4),))], [LayerEffect()]).layer["effect"]   # [branch, L], ≥ 0
    """

    name = "effect"
    change = True

    def values(self, view: LayerView) -> Float[Tensor, "row token"]:
        """Relative change of the layer's contribution against the clean run's."""
        pre, post = view.resid_pre, view.resid_post
        clean = post[: view.n_clean].float() - pre[: view.n_clean].float()
        sizes = clean.norm(dim=-1)
        changes = []
        for rows in metrics.blocks(post.shape[0], post[0].numel(), post.device):
            own = slice(0, 1) if view.clean_row is None else view.clean_row[rows]
            contribution = post[rows].float() - pre[rows].float()
            changes.append(metrics.relative_change(clean[own], contribution, sizes[own]))
        return torch.cat(changes)


class OutputEffect(OutputMeasurement):
    """max over tokens of ‖softmax(z) − softmax(z̄)‖₂ (2505.13898): 0 to √2.

    run_branches(model, [ids], [Branch((Skip(4),))], [OutputEffect()]).output["output"]   # [branch]
    """

    name = "output"
    change = True

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Distance of the next-token distributions from the clean run's."""
        logits = view.logits
        n_rows, n_positions, vocab = logits.shape
        distances = []
        for positions in metrics.blocks(n_positions, vocab, logits.device):
            here = logits[:, positions]
            clean = torch.softmax(here[:1], dim=-1, dtype=torch.float32)
            rows_of = [here[rows] for rows in metrics.blocks(n_rows, clean.numel(), logits.device)]
            moved = [torch.softmax(rows, dim=-1, dtype=torch.float32).sub_(clean).norm(dim=-1) for rows in rows_of]
            distances.append(torch.cat(moved))
        return torch.cat(distances, dim=1)


class TargetProbability(OutputMeasurement):
    """Sum over positions of the probability of the prompt's own next token: Σ p(answer token).

    branch = Branch((Skip(4),), measured=slice(-4, -1))     # the answer: the last three tokens
    run_branches(model, [ids], [branch], [TargetProbability()]).output["target_probability"]   # [branch]
    """

    name = "target_probability"
    reduce = "sum"

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Probability of the token that follows in the prompt."""
        index = view.next_tokens[None, :, None].expand(view.logits.shape[0], -1, 1)
        return view.probabilities.gather(-1, index)[..., 0]


@dataclass
class LogitDifference(OutputMeasurement):
    """Mean over positions of logit(token_a) − logit(token_b): the usual score of activation patching.

    LogitDifference(paris_id, rome_id)
    """

    token_a: int
    token_b: int
    name: str = "logit_difference"
    reduce: str = "mean"

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Difference of the two logits, float32."""
        return view.logits[..., self.token_a].float() - view.logits[..., self.token_b].float()


@dataclass
class Custom(OutputMeasurement):
    """Any function of an `OutputView` that gives [row, position].

    Custom("entropy", lambda view: torch.special.entr(view.probabilities).sum(-1), reduce="mean")
    """

    name: str
    function: Callable[[OutputView], Tensor]
    reduce: str = "max"

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """What the function gives."""
        return self.function(view)


Measurement = LayerMeasurement | OutputMeasurement


def zero_where_clean(measurements: Sequence[Measurement]) -> bool:
    """Whether all are 0 at tokens where a branch is its clean run, so that these need not be computed.

    zero_where_clean([LayerEffect(), OutputEffect()])   # True
    """
    return all(one.change and one.reduce != "mean" for one in measurements)
