"""head-ablation: what each attention head does for the prediction.

    hookdepth.analyse("demo", "head-ablation", limit=2)["zero.output"]     # [L, H]

Each query head's z, what it hands to the output projection, is set to 0 (`zero`) or to its token mean over the first
prompts of the data set (`mean`). Output: max over tokens of ‖softmax(z) − softmax(z̄)‖₂; loss: by how much the mean
next-token loss rises. All heads of a prompt are rows of one pass or a few, which join at the projection's input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.engine.ablation import Ablate
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurements import Loss, OutputEffect
from hookdepth.engine.reading import capture
from hookdepth.engine.work import Work, plain_work
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.report.figures import Heatmap
from hookdepth.results import Result

HOW = ("zero", "mean")
_MAP = partial(Heatmap, rows="Layer", columns="Head")


class HeadAblation(Analysis):
    """Single heads ablated: analyse(model, "head-ablation")["zero.output"]."""

    name = "head-ablation"
    question = "what each attention head does for the prediction"
    heading = "Ablating single attention heads"
    order = 11
    baseline = True
    options = ("keep_front", "over_prompts", "max_rows")
    measurements = (OutputEffect(), Loss())
    tensors = {"{how}.output": "layer head", "{how}.loss": "layer head"}
    figures = (
        _MAP(
            "{how}.output",
            "A cell a head: how far the predicted distribution moves, at most, when the head is set to zero, or "
            "to its mean over the first prompts. Zero also takes away what the head adds everywhere alike; where only "
            "`zero` is bright, that is all the head does.",
            label="Output change norm",
            caption="effect of a head on the output",
            reduction="largest over tokens and prompts",
            signed=False,
        ),
        _MAP(
            "{how}.loss",
            "By how much the next-token loss rises without the head; below zero the model does better without it.",
            label="Change of the loss (nats)",
            caption="effect of a head on the loss",
            reduction="mean over tokens and prompts",
        ),
    )

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every head of every layer, each way."""
        return self._ablations(subject, self._means(subject))

    def planned(self, subject: Subject, item: int) -> list[Branch]:
        """The same without the means, which a model without weights could not give."""
        model = subject.model
        return self._ablations(subject, {n: torch.zeros(model.shape_of("z", n)) for n in _having(model)})

    def _ablations(self, subject: Subject, means: dict[int, Tensor]) -> list[Branch]:
        tokens = slice(self.front(subject.settings), None)
        values: dict[str, Any] = {"zero": lambda _layer, _head: 0.0, "mean": lambda layer, head: means[layer][head]}
        return [
            Branch((Ablate("z", layer, head, values[how](layer, head), tokens),), measured=tokens)
            for how in HOW
            for layer in means
            for head in range(len(means[layer]))
        ]

    def work(self, subject: Subject) -> Work:
        """A forward pass of each of the baseline's prompts, beside the branches; they are not counted as passes."""
        return replace(plain_work(subject.model, subject.inputs.baseline), passes=0)

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """[L, H] of each; NaN where a layer has no such head."""
        model, found = subject.model, {}
        there = torch.zeros(model.n_layers, model.n_heads, dtype=torch.bool)
        for layer in _having(model):
            there[layer, : model.shape_of("z", layer)[0]] = True
        rises = measured.output["loss"] - measured.clean["loss"]
        for kind, values in (("output", measured.output["output"]), ("loss", rises)):
            for how, own in zip(HOW, values.view(len(HOW), -1), strict=True):
                found[f"{how}.{kind}"] = torch.full(there.shape, torch.nan).masked_scatter(there, own)
        return found

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Of outputs the largest (`over_prompts`); of losses the mean over all tokens that have a next one."""
        result = super().reduce(subject, items)
        weights = torch.tensor(self.measured_tokens(subject), dtype=torch.float64) - 1
        for how in HOW:
            own = torch.stack([values[f"{how}.loss"] for values in items]).double()
            result[f"{how}.loss"] = (torch.tensordot(weights, own, 1) / weights.sum()).float()
        return result

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Also the prompts whose mean is taken."""
        baseline = hashlib.sha256(json.dumps(subject.inputs.baseline).encode()).hexdigest()
        return {**super().identity(subject), "baseline_sha256": baseline}

    def numbers(self, result: Result) -> dict[str, Any]:
        """What the noise floor is compared with, and the heads that the loss needs most."""
        loss = result.tensors["mean.loss"].nan_to_num(-torch.inf)
        most = loss.flatten().topk(min(5, loss.numel())).indices
        heads = [[int(one) // loss.shape[1], int(one) % loss.shape[1]] for one in most]
        return {"largest_effect": depth.largest_effect(result.tensors), "most_needed_heads": heads}

    def refuse(self, subject: Subject) -> None:
        """Also a model without heads, and prompts of which no next token can be predicted."""
        super().refuse(subject)
        if not _having(subject.model):
            raise HookdepthError(f"{subject.model.name!r} has no attention heads for {self.name}", "leave it out")
        for number, left in enumerate(self.measured_tokens(subject)):
            if left < 2:
                raise HookdepthError(f"prompt {number} has no next token for {self.name} to predict", "leave it out")

    def _means(self, subject: Subject) -> dict[int, Tensor]:
        """Computed once, by whoever asks first."""
        if self.name not in subject.shared:
            subject.shared[self.name] = head_means(subject.model, subject.inputs.baseline)
        means: dict[int, Tensor] = subject.shared[self.name]
        return means


def _having(model: Decoder) -> list[int]:
    return [layer for layer in range(model.n_layers) if "z" in model.sites.of(layer)]


def head_means(model: Decoder, prompts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Layer → token mean of z over prompts, in float32, on the layer's device, where it is put in.

    head_means(model, first_ten_prompts)[3]     # [H, head_dim]
    """
    sums: dict[int, Tensor] = {}
    for prompt in prompts:
        with model.evaluating(), capture(model, "z") as acts:
            model.forward(send([list(prompt)], model.device))
        for (_, layer), z in acts.items():
            sums[layer] = sums.get(layer, 0) + z[0].float().sum(0).double()
    tokens = sum(len(prompt) for prompt in prompts)
    return {layer: (sums[layer] / tokens).float() for layer in sorted(sums)}
