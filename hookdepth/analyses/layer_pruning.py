"""layer-pruning: leave out one layer after the other, and see what the loss becomes.

    hookdepth.analyse("demo", "layer-pruning", limit=1, keep=27)["greedy.loss"]     # [k + 1], the model's own first

`greedy` measures all that are left and takes out the one that costs least (token-weighted mean loss over the prompts),
again and again, until `keep` layers are left. Beside it the order of block influence (smallest 1 − cos(h_l, h_{l+1})
first, 2403.03853), the best single span of each length (2403.17887 chooses among these by a distance), and random
orders (mean of five). Every step is one run of paths that begin alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis, OnPass, Partial, Subject, Tensors
from hookdepth.analyses.layer_paths import magnitudes, rearranged
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurements import Loss
from hookdepth.engine.passes import measure
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.work import Work, plain_work
from hookdepth.errors import HookdepthError
from hookdepth.report.figures import Lines
from hookdepth.results import Result

_RANDOM = 5


class LayerPruning(Analysis):
    """How far layers can be left out: analyse(model, "layer-pruning")["order"]."""

    name = "layer-pruning"
    question = "which layers can be left out one after the other, and at what loss"
    heading = "Leaving out layer after layer"
    paper = "2403.03853; 2403.17887"
    order = 9
    options = ("keep", "max_rows")
    tensors = {
        "order": "step",
        **{f"{rule}.loss": "count" for rule in ("greedy", "influence", "span", "random")},
    }
    figures = (
        Lines(
            "*.loss",
            "The loss of what is left, against the number of layers left out. The lower the curve, the better the rule "
            "finds layers that are not needed; random choice is what any rule has to beat.",
            label="Mean next-token loss (nats)",
            caption="loss against layers left out",
            name="curve",
            axis="Layers left out",
            reduction="mean over tokens",
            compared="greedy",
            over_training=None,
        ),
    )

    def items(self, subject: Subject) -> Sequence[int]:
        """One: which layer goes next depends on all prompts together."""
        return [0]

    def refuse(self, subject: Subject) -> None:
        """Also more layers to keep than there are."""
        super().refuse(subject)
        if self.keep(subject) >= subject.model.n_layers:
            raise HookdepthError(
                f"--keep {self.keep(subject)} of {subject.model.n_layers} layers leaves none to take out",
                "give a smaller number",
            )

    @staticmethod
    def keep(subject: Subject) -> int:
        """How many layers are left at the end."""
        return subject.settings.keep or (subject.model.n_layers + 1) // 2

    def used(self, subject: Subject) -> dict[str, Any]:
        """Also the number of layers that it is where nobody gives it."""
        return super().used(subject) | {"keep": self.keep(subject)}

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """Losses by rule, [1 + k], and of each prompt, [prompt, 1 + k]."""
        n, steps, losses = (
            subject.model.n_layers,
            range(subject.model.n_layers - self.keep(subject)),
            _Losses(subject, on_pass),
        )
        clean = losses.of([[*range(n)]])
        found, order = {"greedy": [clean[0]]}, []
        for _ in steps:
            rest = [layer for layer in range(n) if layer not in order]
            own = losses.of([[one for one in rest if one != layer] for layer in rest])
            best = int(losses.mean(own).argmin())
            order.append(rest[best])
            found["greedy"].append(own[best])
        influence = self._influence(subject, on_pass).argsort(stable=True).tolist()
        found["influence"] = [*losses.of(without(influence[: len(steps)], n))]
        found["span"] = [clean[0]]
        for length in (step + 1 for step in steps):
            own = losses.of([rearranged("skip", a, a + length - 1, n) for a in range(n - length + 1)])
            found["span"].append(own[int(losses.mean(own).argmin())])
        draws = [Random(number).sample(range(n), len(steps)) for number in range(_RANDOM)]
        own = losses.of([path for draw in draws for path in without(draw, n)])
        found["random"] = [*own.view(_RANDOM, len(steps) + 1, -1).mean(0)]
        tensors: Tensors = {"order": torch.tensor(order).float()}
        for rule, values in found.items():
            each = torch.stack(list(values))  # [1 + k, prompt]
            tensors |= {f"{rule}.loss": losses.mean(each).float(), f"per_prompt.{rule}.loss": each.T.contiguous()}
        return Partial(tensors, losses.passes + len(subject.inputs.prompts), losses.floor, losses.where)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """The one that there is."""
        return dict(items[0])

    def work(self, subject: Subject) -> Work:
        """Of every step half of the layer visits of all that are left, and as many of the spans."""
        n, steps = subject.model.n_layers, subject.model.n_layers - self.keep(subject)
        paths = 2 * sum(n - step for step in range(steps)) + (1 + _RANDOM) * (steps + 1)
        return plain_work(subject.model, subject.inputs.prompts, unembedded=1).times(0.6 * paths)

    def numbers(self, result: Result) -> dict[str, Any]:
        """The order, and how many layers each rule takes out before the loss has risen by a tenth."""
        if not result.tensors:
            return {}
        curves = {name.removesuffix(".loss"): own for name, own in result.tensors.items() if name.count(".") == 1}
        order = [int(layer) for layer in result["order"]]
        return {
            "clean_loss": result["greedy.loss"][0].item(),
            "order": order,
            "left_out_at_a_tenth_more": {
                rule: int((own <= 1.1 * own[0]).long().cumprod(0).sum()) - 1 for rule, own in curves.items()
            },
        }

    def notes(self, result: Result) -> list[str]:
        """How far each rule gets."""
        own = self.numbers(result)
        reached = ", ".join(f"{rule} {count}" for rule, count in own["left_out_at_a_tenth_more"].items())
        return [
            f"Greedy order: {', '.join(map(str, own['order']))}.",
            f"Layers left out before the loss is more than a tenth above the model's {own['clean_loss']:.3f}: {reached}.",
        ]

    @staticmethod
    def _influence(subject: Subject, on_pass: OnPass) -> Tensor:
        tokens, total = 0, torch.zeros(subject.model.n_layers, dtype=torch.float64)
        for prompt in subject.inputs.prompts:
            total += magnitudes(subject.model, prompt)["block_influence"] * len(prompt)
            tokens += len(prompt)
            on_pass()
        return total / tokens


class _Losses:
    """Losses of paths on all prompts; counts passes and keeps the largest noise floor."""

    def __init__(self, subject: Subject, on_pass: OnPass) -> None:
        self.subject, self.on_pass = subject, on_pass
        self.passes, self.floor, self.where = 0, 0.0, None

    def of(self, paths: Iterable[Sequence[Any]]) -> Tensor:
        """[path, prompt]"""
        own, prompts = [LayerPath(path) for path in paths], self.subject.inputs.prompts
        branches = [Branch((path,), prompt=number) for path in own for number in range(len(prompts))]
        rows = self.subject.settings.max_rows
        found = measure(self.subject.model, prompts, branches, [Loss()], max_rows=rows, on_pass=self.on_pass)
        self.passes += found.passes
        if found.null_effect > self.floor:
            self.floor, self.where = found.null_effect, found.null_where
        return found.output["loss"].view(len(own), len(prompts))

    def mean(self, losses: Tensor) -> Tensor:
        """Over the tokens of all prompts, [path]; the last of each has no next one."""
        weights = torch.tensor([len(prompt) - 1 for prompt in self.subject.inputs.prompts], dtype=torch.float64)
        return losses.double() @ weights / weights.sum()


def without(order: Sequence[int], n_layers: int) -> list[list[int]]:
    """What is left after each step, the whole first: without([2, 0], 3)    # [[0, 1, 2], [0, 1], [1]]"""
    gone = accumulate(order, lambda before, layer: before | {layer}, initial=frozenset())
    return [[layer for layer in range(n_layers) if layer not in out] for out in gone]
