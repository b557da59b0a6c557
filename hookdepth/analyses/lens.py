"""logit-lens: what each layer's residual would predict, against the final prediction (2505.13898, Fig. 4).

    hookdepth.analyse("demo", "logit-lens", limit=2)["kl"]   # [L+1], means over tokens

Final norm and unembedding of resid_pre[0..L−1] and of the final residual; KL(lens‖final) in nats and the
share of the top 5 in common. All layers of a few tokens are unembedded in one product, whose last rows are
the final prediction: so entry L is exactly 0 and 1, and the logits of all layers never exist at once.
The first `keep_front` tokens of each prompt (0) are left out. Of the first prompts of a data set it is kept what every
layer would say at the last tokens: the interactive page shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import depth, said
from hookdepth.analyses.base import Analysis, token_means
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.engine.reading import points_of
from hookdepth.engine.work import Work, plain_work
from hookdepth.metrics import blocks, in_common, likeliest, probabilities_and_logs
from hookdepth.model.decoder import Decoder
from hookdepth.model.unembedding import most_logits
from hookdepth.report.figures import Bars, WordMap
from hookdepth.results import Result

_MEAN = "mean over tokens and prompts"
Look = Callable[[int, Tensor], object]


class LogitLens(Analysis):
    """The logit lens: analyse(model, "logit-lens")["kl"]."""

    name = "logit-lens"
    question = "when the prediction is there"
    heading = "Logit lens: when the prediction is there"
    paper = "2505.13898, Fig. 4"
    order = 2
    in_all = True
    options = ("keep_front",)
    tensors = {
        "kl": "point",
        "topk_overlap": "point",
        **said.TENSORS,
    }
    figures = (
        Bars(
            "kl",
            "The final norm and unembedding are applied to the residual stream before every layer and compared "
            "with the final prediction, which the last place is. Where the divergence falls below the dotted line, "
            "half of the largest, layers have begun to refine the output.",
            label="KL divergence (nats)",
            caption="KL divergence from the final prediction",
            reduction=_MEAN,
            threshold=lambda kl: depth.KL_SHARE * kl.max().item(),
            threshold_label="half of the largest",
            mark=depth.first_below_share,
            grey_last=True,
            over_training="Logit lens:\nKL divergence (nats)",
        ),
        Bars(
            "topk_overlap",
            "How many of the five likeliest tokens of each layer are among the final five; the grey bar is "
            "the final residual itself. Where the overlap passes the dotted line, the answer is taking shape.",
            label="Top-5 overlap",
            caption="overlap of the five likeliest tokens",
            name="overlap",
            reduction=_MEAN,
            threshold=depth.OVERLAP_THRESHOLD,
            threshold_label=f"threshold {depth.OVERLAP_THRESHOLD}",
            mark=depth.first_above,
            grey_last=True,
            over_training=None,
        ),
        WordMap(
            tuple(said.TENSORS),
            "Each cell is the likeliest next token if the model ended before that layer, and its colour how likely the "
            "token is there that the model predicts in the end. Point at a cell for the five likeliest.",
            label="Probability of the final prediction",
            caption="what each layer would say",
            signed=False,
            limits=(0.0, 1.0),
        ),
    )

    def numbers(self, result: Result) -> dict[str, Any]:
        """The effective depths by divergence and by overlap."""
        return {"effective_depth": depth.lens_depths(result.tensors)}

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """Means over the tokens of a prompt, from one forward pass."""
        count = self.measured_tokens(subject)[item]
        kept = said.Said(count if item < said.PROMPTS and subject.inputs.texts else 0)
        sums = lens_sums(subject.model, subject.inputs.prompts[item], self.front(subject.settings), look=kept.take)
        on_pass()
        return Partial({name: own / count for name, own in sums.items()} | kept.tensors, 1)

    def work(self, subject: Subject) -> Work:
        """A forward pass of each prompt; all points are kept, and again when they are stacked, and unembedded."""
        n_layers = subject.model.n_layers
        return plain_work(subject.model, subject.inputs.prompts, unembedded=n_layers + 1, kept=2 * n_layers)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Means over all tokens, so that a long prompt counts for more, and each prompt's own."""
        sums = [{name: own for name, own in item.items() if name not in said.NAMES} for item in items]
        return token_means(sums, self.measured_tokens(subject)) | said.numbered(items)

    def each(self, tensors: Mapping[str, Tensor]) -> list[Tensors]:
        """What each prompt gave, and what its layers would say."""
        return [own | said.of_prompt(tensors, number) for number, own in enumerate(super().each(tensors))]

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """Which words the layers would say, and after which."""
        return said.spelled(subject, tensors)


def lens_sums(model: Decoder, prompt: Sequence[int], front: int = 0, look: Look | None = None) -> Tensors:
    """Sums over a prompt's tokens from `front` on of KL and top-5 overlap.

        lens_sums(model, ids)["topk_overlap"]   # [L+1]

    Args:
        look: as of `stream_sums`.
    """
    with model.evaluating():
        kl, overlap = stream_sums(model, points_of(model, prompt, front), look).cpu()
    return {"kl": kl, "topk_overlap": overlap}


def stream_sums(
    model: Decoder, resid: Float[Tensor, "point token width"], look: Look | None = None
) -> Float[Tensor, "2 point"]:
    """Sums over tokens of KL and top-5 overlap of what each point predicts, against the last.

        stream_sums(model, resid_pre[:, 0])   # [2, point]

    Args:
        look: is given the first token and the logits of every chunk of tokens.
    """
    size = max(1, most_logits(model.device) // (len(resid) * int(model.config.vocab_size)))
    sums = []
    for number, chunk in enumerate(resid.split(size, dim=1)):
        logits = model.unembed(model.norm(chunk))
        fused = model.fused_now
        sums.append(_kl_and_overlap(logits) if fused is None else fused.lens(logits, said.TOP_K).sum(-1))
        if look is not None:
            look(number * size, logits)
    return sum(sums[1:], sums[0])


def _kl_and_overlap(logits: Float[Tensor, "point token vocab"]) -> Float[Tensor, "2 point"]:
    """Sums over tokens, against the last point."""
    n_points, n_tokens, vocab = logits.shape
    sums = torch.zeros(2, n_points, device=logits.device)
    for tokens in blocks(n_tokens, vocab, logits.device):
        final = logits[-1:, tokens].float()
        (_, final_logs), final_top = probabilities_and_logs(final), likeliest(final, said.TOP_K)
        for points in blocks(n_points, final.numel(), logits.device):
            here = logits[points, tokens].float()
            p, logs = probabilities_and_logs(here)
            sums[0, points] += logs.sub_(final_logs).mul_(p).sum(-1).sum(-1)
            sums[1, points] += in_common(likeliest(here, said.TOP_K), final_top).sum(-1)
    return sums
