"""depth-by-level: do harder examples use deeper layers? (2505.13898, Fig. 7)

    hookdepth.analyse("demo", "depth-by-level", dataset="demo-levels", limit=2)["score.layer.max"]     # [levels]

Skips as right of a cut, with cuts inside the answer. D[l, m]: max over measured tokens and cuts; e_l = Σ_m D[l, m] /
max(1, L−1−l); score: Σ l·e_l / Σ e_l, likewise from the output. Of a level D is the maximum over its examples (the
paper's) or the mean; intervals: 95 % of so many bootstrap samples of the level's examples, NaN where there is but one.

The authors' code finds the answer by the lengths of separately tokenised texts, gives answers of four tokens or fewer
no cut at all, never measures the position that predicts the first answer token of a cut (`--cut question` does), and
exchanges the titles of its two figures. Here the answer is found by character offsets in the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Skip
from hookdepth.engine.measurements import LayerEffect, OutputEffect
from hookdepth.errors import HookdepthError
from hookdepth.report.figures import Bars, Heatmap
from hookdepth.report.intervals import Intervals
from hookdepth.results import Result

SAMPLES, SEED, SHARE = 1000, 123, 0.95
_KINDS = ("layer", "output")
_HOW: dict[str, Callable[..., Tensor]] = {"max": torch.amax, "mean": torch.mean}


class DepthByLevel(Analysis):
    """Depth scores by level: analyse(model, "depth-by-level", dataset="demo-levels")["score.layer.max"]."""

    name = "depth-by-level"
    question = "whether harder examples use deeper layers"
    heading = "Depth by difficulty"
    paper = "2505.13898, Fig. 7"
    order = 20
    needs = "levels"
    options = ("cut", "keep_front", "max_rows")
    keep_front = 1
    measurements = (LayerEffect(), OutputEffect())
    tensors = {
        **{f"{{level}}.effect.{how}": "layer layer" for how in _HOW},
        **{f"{{level}}.output.{how}": "layer" for how in _HOW},
        **{f"score.{kind}.{how}": "level" for kind in _KINDS for how in _HOW},
        **{f"score_interval.{kind}.{how}": "level end" for kind in _KINDS for how in _HOW},
        **{f"per_prompt.{{level}}.effect.{how}": "_ layer layer" for how in _HOW},
        **{f"per_prompt.{{level}}.output.{how}": "_ layer" for how in _HOW},
    }
    labels = {"end": ("lower", "upper")}
    figures = (
        Intervals(
            "score.*.max",
            "The mean layer, weighted by the effect of skipping it, for each level, with 95 % intervals over examples. "
            "Were harder examples to use deeper layers, the points would rise.",
            label="Depth score (layer)",
            caption="depth score by level",
            name="score",
            reduction="largest over tokens, cuts and examples",
            interval="score_interval.*.max",
            whiskers="95 % interval over the examples of a level, of two or more",
            places="{level}.effect.max",
            axis="Level",
            labels={"layer": "by effect on later layers", "output": "by effect on the output"},
        ),
        Heatmap(
            "{level}.effect.max",
            "Row s, column i: by how much the contribution of layer i to later answer tokens changes when layer s is "
            "skipped before them, as the largest relative change over tokens, cuts and the level's examples.",
            label="Relative change",
            caption="effect on later layers",
            limits=(0.0, 1.0),
            signed=False,
            rows="Layer skipped",
            columns="Effect @ layer",
            reduction="largest over tokens, cuts and examples",
        ),
        Bars(
            "{level}.output.max",
            "A bar a layer: how far the predictions of later answer tokens move, at most, when that layer is skipped "
            "before them.",
            label="Output change norm",
            caption="effect on the output",
            axis="Layer skipped",
            reduction="largest over tokens, cuts and examples",
            over_training=None,
        ),
    )

    def cuts(self, subject: Subject, item: int) -> list[int]:
        """Where an answer is cut; for `question` one earlier, where the first answer token is predicted."""
        return [cut - (subject.settings.cut == "question") for cut in subject.inputs.levels[item].cuts]

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every layer at every cut."""
        front = self.front(subject.settings)
        layers = range(subject.model.n_layers)
        return [
            Branch((Skip(s, "layer", slice(front, None)),), cut=c) for s in layers for c in self.cuts(subject, item)
        ]

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """[L, L] and [L] of an example, the maximum over its cuts."""
        n_layers = subject.model.n_layers
        effect = measured.layer["effect"].view(n_layers, -1, n_layers).amax(1)
        return {"effect": effect, "output": measured.output["output"].view(n_layers, -1).amax(1)}

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Of each level the maximum and the mean over its examples, scores with their intervals, and each example's."""
        levels = [one.level for one in subject.inputs.levels]
        found: Tensors = {}
        scores: dict[str, list[Tensor]] = {}
        for level in dict.fromkeys(levels):
            own = [one for one, its in zip(items, levels, strict=True) if its == level]
            for kind, tensor in (("layer", "effect"), ("output", "output")):
                values = torch.stack([one[tensor] for one in own])
                for how, reduced in _HOW.items():
                    name = f"{level}.{tensor}.{how}"
                    found |= {name: reduced(values, dim=0), f"per_prompt.{name}": values}
                    score = partial(_score, kind=kind, how=how)
                    scores.setdefault(f"score.{kind}.{how}", []).append(score(values))
                    scores.setdefault(f"score_interval.{kind}.{how}", []).append(_interval(values, score))
        return found | {name: torch.stack(own).float() for name, own in scores.items()}

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """What the levels are called, in the order of the scores."""
        return {"labels": {"level": list(dict.fromkeys(str(one.level) for one in subject.inputs.levels))}}

    def numbers(self, result: Result) -> dict[str, Any]:
        """What the noise floor is compared with, and the depth score of each level, (score + 1) / L."""
        names, scores = (result.metadata.get("labels") or {}).get("level", ()), result.tensors.get("score.layer.max")
        found = {"largest_effect": depth.largest_effect(result.tensors)}
        if scores is None or not names:
            return found
        n_layers = len(result.tensors[f"{names[0]}.output.max"])
        return found | {"score_by_level": dict(zip(names, ((scores + 1) / n_layers).tolist(), strict=True))}

    def refuse(self, subject: Subject) -> None:
        """A cut must leave something before it."""
        super().refuse(subject)
        front = self.front(subject.settings)
        for item, one in enumerate(subject.inputs.levels):
            if min(self.cuts(subject, item)) <= front:
                raise HookdepthError(
                    f"the prompt {one.probe.prompt[:40]!r} leaves nothing before its answer for {self.name} to change",
                    "give it a longer prompt, or a smaller --keep-front",
                )


def _score(values: Float[Tensor, "example ..."], kind: str, how: str) -> Tensor:
    level = _HOW[how](values, dim=0)
    score = depth.depth_score(depth.later_effect(level) if kind == "layer" else level)
    return torch.tensor(torch.nan if score is None else score, dtype=torch.float64)


def _interval(values: Float[Tensor, "example ..."], score: Callable[[Tensor], Tensor]) -> Tensor:
    """The same numbers at every call: the samples are drawn by a generator of their own. NaN of a single example."""
    if len(values) < 2:  # every sample would be the example itself, an interval of no width
        return torch.full((2,), torch.nan, dtype=torch.float64)
    draw = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(values), (SAMPLES, len(values)), generator=draw)
    scores = torch.stack([score(values[own]) for own in drawn])
    return scores.nanquantile(torch.tensor([(1 - SHARE) / 2, (1 + SHARE) / 2], dtype=torch.float64))
