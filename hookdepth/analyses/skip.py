"""skip-current and skip-future: skip a layer or sublayer, see who notices (2505.13898, Fig. 3).

    hookdepth.analyse("demo", ["skip-current", "skip-future"], parts=("layer", "attn"), limit=2)

Row s of an effect: layer s skipped; column i: max over tokens of ‖c_i − c̄_i‖/‖c_i‖. Output: max over
tokens of ‖softmax(z) − softmax(z̄)‖₂. *current* skips all tokens from `keep_front` on and measures all;
*future* skips those left of a cut and measures those right of it, max over the prompt's cuts. Both come from
the same passes: the skips without a cut lend their keys and values to every cut.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Skip
from hookdepth.engine.measurements import LayerEffect, OutputEffect
from hookdepth.report.figures import Bars, Heatmap
from hookdepth.results import Result

_BARS = (
    "A bar a layer: how far the predicted distribution moves, at most, when that layer is skipped (0 is not at all, "
    "√2 is from one certain token to another). "
)
EFFECT: dict[str, Any] = {
    "label": "Relative change",
    "caption": "effect on later layers",
    "limits": (0.0, 1.0),
    "signed": False,
    "causal": True,
}
_SKIPPED = {**EFFECT, "rows": "Layer skipped", "columns": "Effect @ layer"}
_OUTPUT: dict[str, Any] = {
    "label": "Output change norm",
    "caption": "effect on the output",
    "axis": "Layer skipped",
}
LARGEST = "largest over tokens and prompts"
LARGEST_OF_CUTS = "largest over tokens, cuts and prompts"


@cache
def _skip(layer: int, part: str, front: int) -> Skip:
    """One object for both analyses: the engine knows branches that share their states by their interventions."""
    return Skip(layer, part, slice(front, None))


class Effects(Analysis):
    """What all analyses of effects on later layers have in common, without a cut or right of several."""

    keep_front = 1
    in_all = True

    def cuts(self, subject: Subject, item: int) -> list[int | None]:
        """Where a prompt is cut; None for not at all."""
        return list(subject.inputs.cuts[item]) if self.needs == "cuts" else [None]

    def numbers(self, result: Result) -> dict[str, Any]:
        """Depth scores by part, and what the noise floor is compared with."""
        effects = result.tensors
        return {"depth_score": depth.depth_scores_of(effects), "largest_effect": depth.largest_effect(effects)}


class Skips(Effects):
    """What both have in common: which layers and parts are skipped, and what is measured."""

    options = ("parts", "keep_front", "over_prompts", "max_rows")
    together = "skip"
    measurements = (LayerEffect(), OutputEffect())
    tensors = {"{part}.effect": "layer layer", "{part}.output": "layer?"}

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every part of every layer, once or at every cut."""
        front = self.front(subject.settings)
        return [
            Branch((_skip(layer, part, front),), cut=cut)
            for part in subject.settings.parts
            for layer in range(subject.model.n_layers)
            for cut in self.cuts(subject, item)
        ]

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """Of each part [L, L] and [L], the maximum over cuts; NaN for a prompt without any."""
        shape = (len(subject.settings.parts), subject.model.n_layers, len(self.cuts(subject, item)))
        effect = largest(measured.layer["effect"].view(*shape, subject.model.n_layers))
        output = largest(measured.output["output"].view(shape))
        parts = enumerate(subject.settings.parts)
        return {f"{part}.{kind}": v[n] for n, part in parts for kind, v in (("effect", effect), ("output", output))}


def largest(values: torch.Tensor) -> torch.Tensor:
    """The maximum over the cuts, axis 2; NaN where there are none: largest(torch.ones(1, 30, 4, 30)) is [1, 30, 30]."""
    return values.amax(2) if values.shape[2] else values.new_full((*values.shape[:2], *values.shape[3:]), torch.nan)


class SkipCurrent(Skips):
    """Layer skips seen from all tokens: analyse(model, "skip-current")["layer.effect"]."""

    name = "skip-current"
    question = "which later layers notice that a layer is skipped"
    heading = "Skipping a layer: all tokens"
    paper = "2505.13898, Fig. 3a"
    order = 3
    figures = (
        Heatmap(
            "{part}.effect",
            "Row s, column i: by how much the contribution of layer i changes when layer s is skipped, as "
            "the largest relative change over tokens and prompts. Dark rows are layers on which no later layer "
            "depends.",
            reduction=LARGEST,
            **_SKIPPED,
        ),
        Bars(
            "{part}.output",
            _BARS + "Low bars late in the model are layers that could be left out at little cost.",
            reduction=LARGEST,
            over_training="Layer skipped:\noutput change norm",
            **_OUTPUT,
        ),
    )


class SkipFuture(Skips):
    """Layer skips seen from later tokens only: analyse(model, "skip-future")["layer.effect"]."""

    name = "skip-future"
    question = "the same, seen from later tokens only"
    heading = "Skipping a layer: future tokens only"
    paper = "2505.13898, Fig. 3b"
    order = 4
    needs = "cuts"
    figures = (
        Heatmap(
            "{part}.effect",
            "The layer is skipped before a cut and its effect is measured on the tokens after it, as the "
            "largest relative change over tokens, cuts and prompts. A layer that is dark here but bright under "
            "“all tokens” works on the current prediction and builds nothing that later tokens use.",
            reduction=LARGEST_OF_CUTS,
            **_SKIPPED,
        ),
        Bars(
            "{part}.output",
            _BARS + "Only tokens after the cut are measured: what a layer leaves for later.",
            reduction=LARGEST_OF_CUTS,
            over_training="Layer skipped, later tokens:\noutput change norm",
            **_OUTPUT,
        ),
    )
