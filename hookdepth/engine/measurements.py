"""What is read off a pass: the measurements that come with the package.

    run(model, ids, branches, [LayerEffect(), OutputEffect(), KL(), Loss()])

Write your own by subclassing `LayerMeasurement` or `OutputMeasurement` (`engine.measurement`): see the README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from hookdepth import metrics
from hookdepth.engine.measurement import LayerMeasurement, LayerView, OutputMeasurement, OutputView
from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.words import token_id


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
        kernels = view.fused or metrics
        return kernels.layer_change(view.resid_pre, view.resid_post, view.clean_runs, view.slots)


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
        kernels = view.fused or metrics
        return kernels.output_change(view.logits)


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
        return metrics.divergences(view.log_probabilities)


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
