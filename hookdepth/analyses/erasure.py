"""residual-erasure: until which layer is each token needed? (2505.13898, Fig. 6b)

    hookdepth.analyse("demo", "residual-erasure")["effect.0"]     # [L+1, T]

For every layer point l = 0 … L and token t, h_l[t] is replaced by the uninformative residual of that point,
its token mean over the baseline prompts; effect: max over the answer's tokens of ‖softmax − softmax‖₂ at the
positions that predict them. Tokens that no such position can see have effect 0, by causality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis, Measured, Subject, Tensors
from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Patch
from hookdepth.engine.measurements import OutputEffect
from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.engine.work import Work, plain_work
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
    options = ("max_rows",)
    baseline = True
    measurements = (OutputEffect(),)
    tensors = {"effect.{i}": "point token{i}", "baseline": "point width?"}
    figures = (
        TokenMap(
            "effect.{i}",
            "Each cell replaces the residual of one token before one layer by an uninformative mean, and shows "
            "how far the predictions of the answer (bold) move. A column that turns dark at layer l was last read "
            "below l; if computation were compositional, tokens needed first would turn dark first.",
            label="Probability Difference Norm",
            caption="",
            name="{i}",
            reduction="largest over the answer's tokens",
            signed=False,
            without_last=True,
        ),
    )

    def numbers(self, result: Result) -> dict[str, Any]:
        """What the noise floor is compared with."""
        return {"largest_effect": depth.largest_effect(result.tensors)}

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every token that a predicting position can see, at every point."""
        return erasure_branches(subject.inputs.probes[item], self._vectors(subject))

    def planned(self, subject: Subject, item: int) -> list[Branch]:
        """The same without the vectors, which a model without weights could not give."""
        return erasure_branches(subject.inputs.probes[item], torch.zeros(subject.model.n_layers + 1, 1))

    def work(self, subject: Subject) -> Work:
        """A forward pass of each of the baseline's prompts, beside the branches; they are not counted as passes."""
        return replace(plain_work(subject.model, subject.inputs.baseline), passes=0)

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """[L+1, T]: 0 where no predicting position can see."""
        probe, points = subject.inputs.probes[item], subject.model.n_layers + 1
        effect = torch.zeros(points, len(probe.token_ids))
        effect[:, : 1 + _last_predicting(probe)] = measured.output["output"].view(points, -1)
        return {"effect": effect}

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Effects by probe, and what was put in."""
        return super().reduce(subject, items) | {"baseline": self._vectors(subject)}

    def _vectors(self, subject: Subject) -> Tensor:
        """Computed once, by whoever asks first."""
        if self.name not in subject.shared:
            subject.shared[self.name] = uninformative_residual(subject.model, subject.inputs.baseline)
        vectors: Tensor = subject.shared[self.name]
        return vectors


def erasure_branches(probe: Probe, baseline: Float[Tensor, "point width"]) -> list[Branch]:
    """A branch for every layer point and every token that a predicting position can see, points first.

    len(erasure_branches(probe, baseline))   # (L+1) · T'
    """
    n_layers = baseline.shape[0] - 1
    measured = [position - 1 for position in probe.answer_positions]
    return [
        Branch((_erase(point, n_layers, baseline[point], token),), measured=measured)
        for point in range(n_layers + 1)
        for token in range(1 + _last_predicting(probe))
    ]


def _erase(point: int, n_layers: int, vector: Tensor, token: int) -> Patch:
    if point < n_layers:
        return Patch("resid_pre", point, vector, [token])
    return Patch("resid_post", n_layers - 1, vector, [token])


def _last_predicting(probe: Probe) -> int:
    return max(probe.answer_positions) - 1


def uninformative_residual(model: Decoder, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "point width"]:
    """Token mean of resid_pre[0..L−1] and of the final residual, float32 on the CPU.

    uninformative_residual(model, first_ten_prompts)   # [L+1, d]
    """
    sums = torch.zeros(model.n_layers + 1, model.d_model, dtype=torch.float64)

    def add(layer: int, sites: LayerSites) -> None:
        here.append(sites.resid_pre[0].float().sum(0))
        if layer == model.n_layers - 1:
            here.append(sites.resid_post[0].float().sum(0))

    with model.evaluating(), each_layer(model, add):
        for prompt in prompts:
            here: list[Tensor] = []
            model.forward(torch.tensor([list(prompt)], device=model.device))
            sums += torch.stack([value.cpu() for value in here]).double()
    return (sums / sum(len(prompt) for prompt in prompts)).float()
