"""layer-pruning: leave out one layer after the other, and see what the loss becomes.

    hookdepth.analyse("demo", "layer-pruning", limit=1)["greedy.loss"]     # [k + 1], the model's own first

`greedy` measures all that are left and takes out the one that costs least (token-weighted mean loss over the prompts),
again and again, until `keep` layers are left. Beside it the order of block influence (smallest 1 − cos(h_l, h_{l+1})
first, 2403.03853), of each length the best single span and that of the smallest angular distance at the last token
(2403.17887), and random orders (mean of five). Every step is one run of paths that begin alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.spans import Losses, magnitudes, rearranged, refuse_unpredicted, without
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.engine.work import Work, overhead_of, plain_work
from hookdepth.errors import HookdepthError
from hookdepth.report.figures import Lines
from hookdepth.results import Result

_RANDOM = 5
_RULES = {
    "greedy": "greedy",
    "span": "best span",
    "distance": "span of smallest angular distance",
    "influence": "block influence",
    "random": f"random (mean of {_RANDOM})",
}


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
        **{f"{rule}.loss": "count" for rule in _RULES},
    }
    figures = (
        Lines(
            tuple(f"{rule}.loss" for rule in _RULES),
            "The loss of what is left, against the number of layers left out. The lower the curve, the better the rule "
            "finds layers that are not needed; random choice is what any rule has to beat.",
            label="Mean next-token loss (nats)",
            caption="loss against layers left out",
            name="curve",
            axis="Layers left out",
            reduction="mean over tokens",
            labels={f"{rule}.loss": words for rule, words in _RULES.items()},
            compared="greedy.loss",
            over_training=None,
        ),
    )

    def items(self, subject: Subject) -> Sequence[int]:
        """One for each way of choosing; none is for prompts, since which layer goes next depends on all of them."""
        return range(len(_WAYS))

    def refuse(self, subject: Subject) -> None:
        """Also more layers to keep than there are, and prompts of which no next token can be predicted."""
        super().refuse(subject)
        refuse_unpredicted(subject)
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
        losses = Losses(subject, on_pass)
        search = _Search(subject, losses, subject.model.n_layers - self.keep(subject), on_pass)
        order, found = _WAYS[item](search)
        tensors: Tensors = {"order": torch.tensor(order).float()} if order else {}
        for rule, values in found.items():
            each = torch.stack(list(values))  # [1 + k, prompt]
            tensors |= {f"{rule}.loss": losses.mean(each).float(), f"per_prompt.{rule}.loss": each.T.contiguous()}
        return Partial(tensors, losses.passes + search.passes, losses.floor, losses.where)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """What all ways found, the rules in their order."""
        found = {name: values for item in items for name, values in item.items()}
        ordered = [name for rule in _RULES for name in (f"{rule}.loss", f"per_prompt.{rule}.loss")]
        return {name: found[name] for name in ("order", *ordered)}

    def sample(self, settings: Settings, times: int) -> Settings:
        """Half of the layers, of which the small model of a dry run has few."""
        return replace(settings, keep=None)

    def work(self, subject: Subject) -> Work:
        """Of every step half of the layer visits of all that are left, and as many of the spans."""
        n, steps = subject.model.n_layers, subject.model.n_layers - self.keep(subject)
        paths = 2 * sum(n - step for step in range(steps)) + (1 + _RANDOM) * (steps + 1)
        work = plain_work(subject.model, subject.inputs.prompts, unembedded=1).times(0.6 * paths)
        passes = 2 * steps + 12
        return replace(work, passes=passes, overhead=overhead_of(subject.model, work.token_layers, passes))

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
            f"Layers left out until the loss is a tenth above the model's {own['clean_loss']:.3f}: {reached}.",
        ]


@dataclass
class _Search:
    """The ways of choosing `steps` layers: each gives losses after 0, 1, … of them, [prompt], by rule."""

    subject: Subject
    losses: Losses
    steps: int
    on_pass: OnPass
    passes: int = 0  # beside those of the losses

    @property
    def n_layers(self) -> int:
        return self.subject.model.n_layers

    def clean(self) -> Tensor:
        return self.losses.of([[*range(self.n_layers)]])[0]

    def greedy(self) -> tuple[list[int], dict[str, list[Tensor]]]:
        found, order = [self.clean()], []
        for _ in range(self.steps):
            rest = [layer for layer in range(self.n_layers) if layer not in order]
            own = self.losses.of([[one for one in rest if one != layer] for layer in rest])
            best = int(self.losses.mean(own).argmin())
            order.append(rest[best])
            found.append(own[best])
        return order, {"greedy": found}

    def spans(self) -> tuple[list[int], dict[str, list[Tensor]]]:
        distance, clean = self._magnitude("angular_distance"), self.clean()
        best, nearest = [clean], [clean]
        for more in range(self.steps):  # layers of a span beside its first
            starts = range(self.n_layers - more)
            own = self.losses.of([rearranged("skip", a, a + more, self.n_layers) for a in starts])
            best.append(own[int(self.losses.mean(own).argmin())])
            nearest.append(own[int(distance.diagonal(more).argmin())])
        return [], {"span": best, "distance": nearest}

    def influence(self) -> tuple[list[int], dict[str, list[Tensor]]]:
        least = self._magnitude("block_influence").argsort(stable=True).tolist()
        return [], {"influence": [*self.losses.of(without(least[: self.steps], self.n_layers))]}

    def random(self) -> tuple[list[int], dict[str, list[Tensor]]]:
        draws = [Random(number).sample(range(self.n_layers), self.steps) for number in range(_RANDOM)]
        own = self.losses.of([path for draw in draws for path in without(draw, self.n_layers)])
        return [], {"random": [*own.view(_RANDOM, self.steps + 1, -1).mean(0)]}

    def _magnitude(self, name: str) -> Tensor:
        """Sums over the tokens of all prompts, of angular distances over prompts: only their order matters."""
        each = []
        for prompt in self.subject.inputs.prompts:
            found = magnitudes(self.subject.model, prompt)[name]
            each.append((found * len(prompt) if name == "block_influence" else found).double())
            self.passes += 1
            self.on_pass()
        return torch.stack(each).sum(0)


_WAYS = (_Search.greedy, _Search.spans, _Search.influence, _Search.random)
"""Items of a run, so that one that is stopped goes on with the next way, and several processes share them."""
