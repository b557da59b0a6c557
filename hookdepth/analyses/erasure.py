"""residual-erasure: until which layer is each token needed? (2505.13898, Fig. 6b)

    hookdepth.analyse("demo", "residual-erasure", limit=2)["effect.0"]     # [L+1, T]

For every layer point l = 0 … L and token t, h_l[t] is replaced by the uninformative residual of that point: its
token mean over the data set's first prompts, over the probe itself or one `counterfactual` prompt, or zero
(`erasure_baseline`). Effect: max over
the answer's tokens of ‖softmax − softmax‖₂ at the positions that predict them, or over all later positions
(`measure`). With `erase` "before" all tokens before t are replaced instead, and "later" begins at t. Where nothing
that is measured can see what is replaced, the effect is 0, by causality. (The authors' repository has the erasure of
all that is before, and does not use it; it measures from t + 1 on.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.data import Probe, encode
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Patch
from hookdepth.engine.measurements import OutputEffect
from hookdepth.engine.passes import padded, prompts_together
from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.engine.work import Work, plain_work
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.report.figures import TokenMap
from hookdepth.results import Result


class ResidualErasure(Analysis):
    """Residual erasure: analyse(model, "residual-erasure")["effect.0"]."""

    name = "residual-erasure"
    question = "until which layer each token is needed for an answer"
    heading = "Residual erasure: until when each token is needed"
    paper = "2505.13898, Fig. 6b"
    order = 7
    in_all = True
    needs = "probes"
    baseline = True
    options = ("erasure_baseline", "counterfactual", "erase", "measure", "max_rows")
    measurements = (OutputEffect(),)
    tensors = {"effect.{i}": "point token{i}", "baseline": "point width?", "baseline.{i}": "point width?"}
    figures = (
        TokenMap(
            "effect.{i}",
            "Each cell replaces the residual of one token before one layer by an uninformative mean, and shows "
            "how far the predictions of the answer (bold) move. A column that turns dark at layer l was last read "
            "below l; if computation were compositional, tokens needed first would turn dark first.",
            label="Probability Difference Norm",
            caption="",
            name="{i}",
            reduction="largest over the tokens that are measured",
            signed=False,
            without_last=True,
            over_training="Token erased:\nchange of the answer\n(mean over tokens)",
        ),
    )

    def numbers(self, result: Result) -> dict[str, Any]:
        """What the noise floor is compared with."""
        return {"largest_effect": depth.largest_effect(result.tensors)}

    def notes(self, result: Result) -> list[str]:
        """What is erased and measured, where it is not what the figure's text says."""
        settings = result.metadata.get("settings") or {}
        said = {
            "Here each cell replaces all tokens before it.": settings.get("erase") == "before",
            "Here the effect is on all later tokens, not on the answer's alone.": settings.get("measure") == "later",
        }
        return [sentence for sentence, holds in said.items() if holds]

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every token whose replacement can be seen where it is measured, at every point."""
        how = subject.settings
        vectors = self._vectors(subject, item).to(subject.model.device)  # once, not with every branch
        return erasure_branches(subject.inputs.probes[item], vectors, how.erase, how.measure)

    def planned(self, subject: Subject, item: int) -> list[Branch]:
        """The same without the vectors, which a model without weights could not give."""
        nothing, how = torch.zeros(subject.model.n_layers + 1, 1), subject.settings
        return erasure_branches(subject.inputs.probes[item], nothing, how.erase, how.measure)

    def work(self, subject: Subject) -> Work:
        """A forward pass of each prompt whose mean is taken, beside the branches; they are not counted as passes."""
        items = self.items(subject) if self._each_its_own(subject) else [0]
        prompts = [prompt for item in items for prompt in self._averaged(subject, item)]
        return replace(plain_work(subject.model, prompts), passes=0)

    def refuse(self, subject: Subject) -> None:
        """Also a counterfactual prompt that nothing would read, or whose tokens the model does not have."""
        super().refuse(subject)
        given = subject.settings.counterfactual
        if given is not None and subject.settings.erasure_baseline != "prompt":
            raise HookdepthError(
                f"--counterfactual is the prompt of --erasure-baseline prompt, not {subject.settings.erasure_baseline}",
                "give --erasure-baseline prompt with it",
            )
        if given is not None:
            subject.model.check_ids(self._averaged(subject, 0)[0], "the counterfactual prompt")

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """[L+1, T]: 0 where nothing that is measured can see."""
        probe, points, how = subject.inputs.probes[item], subject.model.n_layers + 1, subject.settings
        effect = torch.zeros(points, len(probe.token_ids))
        seen = list(_erasures(probe, how.erase, how.measure))
        effect[:, seen] = measured.output["output"].view(points, -1)
        own = {"baseline": self._vectors(subject, item)} if self._each_its_own(subject) else {}
        return {"effect": effect, **own}

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Effects by probe, and what was put in."""
        shared = {} if self._each_its_own(subject) else {"baseline": self._vectors(subject, 0)}
        return super().reduce(subject, items) | shared

    def _each_its_own(self, subject: Subject) -> bool:
        return subject.settings.erasure_baseline == "prompt" and subject.settings.counterfactual is None

    def _averaged(self, subject: Subject, item: int) -> Sequence[Sequence[int]]:
        """The prompts whose mean replaces a residual."""
        kind, given = subject.settings.erasure_baseline, subject.settings.counterfactual
        if kind != "prompt":
            return subject.inputs.baseline if kind == "dataset" else ()
        if given is None:
            return [subject.inputs.probes[item].token_ids]
        if isinstance(given, str) and subject.model.tokenizer is None:
            raise HookdepthError("the counterfactual prompt is text, and there is no tokenizer", "give token ids")
        return [encode(subject.model.tokenizer, given) if isinstance(given, str) else given]

    def _vectors(self, subject: Subject, item: int) -> Tensor:
        """Computed once, by whoever asks first."""
        model = subject.model
        if subject.settings.erasure_baseline == "zero":
            return torch.zeros(model.n_layers + 1, model.d_model)
        key = f"{self.name}/{item}" if self._each_its_own(subject) else self.name
        if key not in subject.shared:
            subject.shared[key] = uninformative_residual(model, self._averaged(subject, item))
        vectors: Tensor = subject.shared[key]
        return vectors


def erasure_branches(
    probe: Probe, baseline: Float[Tensor, "point width"], erase: str = "token", measure: str = "answer"
) -> list[Branch]:
    """A branch for every layer point and every token whose replacement can be seen, points first.

    len(erasure_branches(probe, baseline))   # (L+1) · T'
    """
    n_layers, seen = baseline.shape[0] - 1, _erasures(probe, erase, measure)
    return [
        Branch((_erase(point, n_layers, baseline[point], tokens),), measured=measured)
        for point in range(n_layers + 1)
        for tokens, measured in seen.values()
    ]


def _erasures(probe: Probe, erase: str, measure: str) -> dict[int, tuple[list[int], list[int]]]:
    """Token → (what is replaced, where it is measured), of those tokens where the second can see the first."""
    length, found = len(probe.token_ids), {}
    for token in range(length):
        tokens = [token] if erase == "token" else list(range(token))
        predicting = [position - 1 for position in probe.answer_positions]
        measured = predicting if measure == "answer" else list(range(token + (erase == "token"), length))
        if tokens and measured and measured[-1] >= tokens[0]:
            found[token] = (tokens, measured)
    return found


def _erase(point: int, n_layers: int, vector: Tensor, tokens: list[int]) -> Patch:
    if point < n_layers:
        return Patch("resid_pre", point, vector, tokens)
    return Patch("resid_post", n_layers - 1, vector, tokens)


def uninformative_residual(model: Decoder, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "point width"]:
    """Token mean of resid_pre[0..L−1] and of the final residual, float32 on the CPU.

    uninformative_residual(model, first_ten_prompts)   # [L+1, d]
    """
    sums = torch.zeros(model.n_layers + 1, model.d_model, dtype=torch.float64)
    of_prompts: dict[int, list[Tensor]] = {}

    def add(layer: int, sites: LayerSites) -> None:
        points = [sites.resid_pre, *([sites.resid_post] if layer == model.n_layers - 1 else [])]
        for point in points:
            for row, number in enumerate(group):
                total = point[row, : len(prompts[number])].float().sum(0)
                of_prompts.setdefault(number, []).append(total.to(model.device))

    with model.evaluating(), each_layer(model, add):
        for group in prompts_together(model, prompts):
            model.forward(padded([prompts[number] for number in group], model.device))
    # At the end, so that no pass waits for the one before; in the order of the prompts, whoever shared a pass.
    for found in torch.stack([torch.stack(of_prompts[number]) for number in range(len(prompts))]).cpu():
        sums += found.double()
    return (sums / sum(len(prompt) for prompt in prompts)).float()
