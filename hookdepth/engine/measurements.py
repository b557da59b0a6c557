"""What is read off a pass: functions of rows that end as one number per branch.

    run(model, ids, branches, [LayerEffect(), OutputEffect(), KL(), Loss()])

A measurement gives a value per row and token; the engine reduces it over the tokens at which the branch is
measured, and over no others (`reduce=None` leaves a value a token). `LayerMeasurement`s are asked at every layer,
`OutputMeasurement`s at the unembedding, in chunks. Write your own by subclassing either: see the README.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookdepth import metrics
from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.words import token_id


@dataclass
class LayerView:
    """The rows of a pass at one layer.

    Attributes:
        layer: its index.
        resid_pre, resid_post: [row, token, width], the model's dtype.
        slots: [row], which of the clean runs is a row's own; None where there is only one.
        clean_runs: the rows that are clean runs.
    """

    layer: int
    resid_pre: Tensor
    resid_post: Tensor
    slots: Tensor | None
    clean_runs: slice = field(default_factory=lambda: slice(0, 1))

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


@dataclass
class LayerEffect(LayerMeasurement):
    """max over tokens of ‖c_i − c̄_i‖ / ‖c_i‖ at every layer i (2505.13898, Fig. 3a and 3b).

    run(model, ids, Skip(4), [LayerEffect()])["effect"]   # [branch, L], ≥ 0
    """

    reduce: str | None = "max"
    name: str = "effect"
    change = True

    def values(self, view: LayerView) -> Float[Tensor, "row token"]:
        """Relative change of the layer's contribution against the clean run's."""
        pre, post = view.resid_pre, view.resid_post
        clean = post[view.clean_runs].float() - pre[view.clean_runs].float()
        sizes = clean.norm(dim=-1)
        changes = []
        for rows in metrics.blocks(post.shape[0], post[0].numel(), post.device):
            own = slice(None) if view.slots is None else view.slots[rows]
            contribution = post[rows].float() - pre[rows].float()
            changes.append(metrics.relative_change(clean[own], contribution, sizes[own]))
        return torch.cat(changes)


@dataclass
class Norm(LayerMeasurement):
    """Mean over tokens of the norm of `resid_pre`, `resid_post` or the layer's `contribution`, at every layer.

    run(model, ids, Skip(4), [Norm("contribution")])["norm"]   # [branch, L]
    """

    of: str = "resid_post"
    reduce: str | None = "mean"
    name: str = "norm"

    def __post_init__(self) -> None:
        choose("norm", self.of, ("resid_pre", "resid_post", "contribution"))

    def values(self, view: LayerView) -> Float[Tensor, "row token"]:
        """Norms, in float32."""
        values: Tensor = getattr(view, self.of)
        return values.float().norm(dim=-1)


@dataclass
class OutputEffect(OutputMeasurement):
    """max over tokens of ‖softmax(z) − softmax(z̄)‖₂ (2505.13898): 0 to √2.

    run(model, ids, Skip(4), [OutputEffect()])["output"]   # [branch]
    """

    reduce: str | None = "max"
    name: str = "output"
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


@dataclass
class KL(OutputMeasurement):
    """Mean over tokens of KL(clean run ‖ branch) of the next-token distributions, in nats, ≥ 0.

    run(model, ids, Skip(4), [KL()])["kl"]   # [branch]
    """

    reduce: str | None = "mean"
    name: str = "kl"
    change = True

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """The divergence from the clean run, row by row."""
        logs = view.log_probabilities
        rows_of = metrics.blocks(logs.shape[0], logs[0].numel(), logs.device)
        return torch.cat([metrics.kl_divergence(logs[:1], logs[rows]) for rows in rows_of])


@dataclass
class Loss(OutputMeasurement):
    """Mean over tokens of −log p(next token of the prompt), in nats; the last token has no next one, and is left out.

    r = run(model, ids, Skip(4), [Loss()])
    r["loss"] - r.clean["loss"]   # [branch]: what skipping costs
    """

    reduce: str | None = "mean"
    name: str = "loss"
    needs_target = True

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Cross-entropy of the token that follows in the prompt."""
        return -_at_next(view.log_probabilities, view)


@dataclass
class Top1(OutputMeasurement):
    """Share of tokens at which the likeliest next token is the clean run's.

    run(model, ids, Skip(4), [Top1()])["top1"]   # [branch], 0 to 1
    """

    reduce: str | None = "mean"
    name: str = "top1"

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """1 where both say the same, else 0."""
        likeliest = view.logits.argmax(-1)
        return (likeliest == likeliest[:1]).float()


@dataclass
class Probability(OutputMeasurement):
    """Mean over tokens of the probability that a word comes next: a token's id, or a word of one token.

        last = Branch((Skip(4),), measured=[-1])     # after the prompt's end alone
        run(model, ids, last, [Probability("a")])["probability"]   # [branch]

    Raises:
        HookdepthError: when the run begins: a word that is not one token of this model's.
    """

    token: int | str
    reduce: str | None = "mean"
    name: str = "probability"

    def bind(self, model: Decoder) -> Probability:
        """The same with a token id that this model has."""
        return replace(self, token=token_id(model, self.token))

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Its probability."""
        if isinstance(self.token, str):
            raise HookdepthError("Probability has a word and no token id yet", "call bind(model) first")
        return view.probabilities[..., self.token]


@dataclass
class TargetProbability(OutputMeasurement):
    """Sum over positions of the probability of the prompt's own next token: Σ p(answer token).

        branch = Branch((Skip(4),), measured=slice(-4, -1))     # the answer: the last three tokens
        run(model, ids, branch, [TargetProbability()])["target_probability"]   # [branch]

    The prompt's last token has no next one, and is left out.
    """

    reduce: str | None = "sum"
    name: str = "target_probability"
    needs_target = True

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Probability of the token that follows in the prompt."""
        return _at_next(view.probabilities, view)


def _at_next(values: Tensor, view: OutputView) -> Tensor:
    """[row, position]: what stands at the tokens that follow in the prompt."""
    index = view.next_tokens[None, :, None].expand(values.shape[0], -1, 1)
    return values.gather(-1, index)[..., 0]


@dataclass
class LogitDifference(OutputMeasurement):
    """Mean over positions of logit(token_a) − logit(token_b): the usual score of activation patching.

        LogitDifference(" Paris", " Rome")
        LogitDifference(paris_id, rome_id)

    Args:
        token_a, token_b: token ids; or words, which `run` looks up in the model's own tokenizer, without the
            special tokens that it may put in front of a text. Most tokenizers want the space in front of a word.
        name, reduce: as in every measurement.

    Raises:
        HookdepthError: twice the same token; and, when the run begins, a word that is not exactly one known token, an
            id that the model does not have, or words for a model without a tokenizer.
    """

    token_a: int | str
    token_b: int | str
    name: str = "logit_difference"
    reduce: str | None = "mean"

    def __post_init__(self) -> None:
        for end, token in (("token_a", self.token_a), ("token_b", self.token_b)):
            if not isinstance(token, str):
                setattr(self, end, whole_number("LogitDifference: a token id", token, 0))
        if self.token_a == self.token_b:
            raise HookdepthError(
                f"LogitDifference of {self.token_a!r} and itself is 0 everywhere", "give two different tokens"
            )
        metrics.check_reduction(self.reduce)

    def bind(self, model: Decoder) -> LogitDifference:
        """The same with token ids that this model has."""
        return replace(self, token_a=token_id(model, self.token_a), token_b=token_id(model, self.token_b))

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """Difference of the two logits, float32."""
        if isinstance(self.token_a, str) or isinstance(self.token_b, str):
            raise HookdepthError("LogitDifference has words and no token ids yet", "call bind(model) first")
        return view.logits[..., self.token_a].float() - view.logits[..., self.token_b].float()


@dataclass
class LogitLens(OutputMeasurement):
    """What a branch would predict after `layer` layers, as the logit lens reads it: how far from its own prediction.

        r = run(model, ids, Skip(4), [LogitLens(2)])
        r["logit_lens_2"], r.clean["logit_lens_2"]     # [branch] each; KL(lens ‖ final), mean over tokens, in nats

    Args:
        layer: 0 to L−1: the lens reads its input.
        of: another measurement of the output, which is then made on the lens: LogitLens(12, Probability("a")).

    Raises:
        HookdepthError: when the run begins: no such layer.
    """

    layer: int
    of: OutputMeasurement | None = None
    reduce: str | None = "mean"
    name: str = ""

    def __post_init__(self) -> None:
        self.layer = whole_number("LogitLens: the layer", self.layer, 0)
        if self.of is not None and not isinstance(self.of, OutputMeasurement):
            raise HookdepthError(f"LogitLens of {shown(self.of)}", "give a measurement of the output")
        self.name = self.name or f"logit_lens_{self.layer}" + (f"_{self.of.name}" if self.of is not None else "")
        self.lenses, self.needs_target = (self.layer,), self.of is not None and self.of.needs_target

    def bind(self, model: Decoder) -> LogitLens:
        """The same for a layer that this model has."""
        whole_number("LogitLens: the layer", self.layer, 0, model.n_layers - 1)
        return self if self.of is None else replace(self, of=self.of.bind(model))

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """The divergence, or what the other measurement gives."""
        lens = view.through_lens(self.layer)
        if self.of is not None:
            return self.of.values(lens)
        return metrics.kl_divergence(lens.log_probabilities, view.log_probabilities)


@dataclass
class Custom(OutputMeasurement):
    """Any function of an `OutputView` that gives [row, position].

        Custom("entropy", lambda view: torch.special.entr(view.probabilities).sum(-1), reduce="mean")

    Args:
        name: what the result calls it.
        function: gets the view, gives the values.
        reduce: max, min, mean or sum over the measured tokens; None for a value a token.
        needs_target: the function reads `view.next_tokens`.

    Raises:
        HookdepthError: a function that cannot be called, or an unknown reduction.
    """

    name: str
    function: Callable[[OutputView], Tensor]
    reduce: str | None = "max"
    needs_target: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise HookdepthError(f"Custom got {shown(self.function)}", "give a function of a view")
        metrics.check_reduction(self.reduce)

    def values(self, view: OutputView) -> Float[Tensor, "row position"]:
        """What the function gives."""
        return self.function(view)


Measurement = LayerMeasurement | OutputMeasurement


def zero_where_clean(measurements: Sequence[Measurement]) -> bool:
    """Whether all are 0 at tokens where a branch is its clean run, so that these need not be computed.

    zero_where_clean([LayerEffect(), OutputEffect()])   # True
    """
    return all(one.change for one in measurements)
