"""Spans of layers: paths that leave them out or rearrange them, what these cost, and what magnitudes say beforehand.

rearranged("repeat", 1, 2, 4)             # [0, 1, 2, 1, 2, 3]
magnitudes(model, ids)["block_influence"] # [L]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.stats import turns
from hookdepth.analyses.subject import OnPass, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurements import Loss
from hookdepth.engine.passes import measure
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.reading import points_of
from hookdepth.errors import HookdepthError
from hookdepth.metrics import rank_correlation
from hookdepth.model.decoder import Decoder

_NAMED = 5  # spans that a summary names


def rearranged(kind: str, a: int, b: int, n_layers: int) -> list[int | tuple[int, ...]]:
    """The layers of a path: rearranged("repeat", 1, 2, 4)    # [0, 1, 2, 1, 2, 3]"""
    span = range(a, b + 1)
    middles: dict[str, Sequence[int | tuple[int, ...]]] = {
        "skip": (),
        "repeat": (*span, *span),
        "reverse": span[::-1],
        "swap": span[::-1],
        "parallel": (tuple(span),),
    }
    return [*range(a), *middles[kind], *range(b + 1, n_layers)]


def magnitudes(model: Decoder, prompt: Sequence[int], front: int = 0) -> Tensors:
    """Block influence, mean over tokens, [L], and angular distances of the last token, [L, L]: (a, b) of a span a … b.

    magnitudes(model, ids)["block_influence"]     # [L]
    """
    points = points_of(model, prompt, front)
    found = turns(points)
    distance = found["angular_distance.last"][:-1, 1:].float()
    below = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    influence = (found["block_influence"] / points.shape[1]).float()
    return {"block_influence": influence, "angular_distance": distance.masked_fill(below, torch.nan)}


def best(losses: Tensor, clean: float) -> list[dict[str, Any]]:
    """The spans of the lowest losses, from the lowest on."""
    order = losses.nan_to_num(torch.inf).flatten().argsort(stable=True)[:_NAMED].tolist()
    found = [(*divmod(place, losses.shape[1]), losses.flatten()[place].item()) for place in order]
    return [{"first": a, "last": b, "loss": loss, "more": loss - clean} for a, b, loss in found if loss == loss]


def over_lengths(distance: Tensor, losses: Tensor) -> float | None:
    """Mean over lengths of the rank correlation over spans of one length, where there are at least five."""
    n = len(losses)
    found = [rank_correlation(distance.diagonal(more), losses.diagonal(more)) for more in range(1, n - 4)]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known else None


def refuse_unpredicted(subject: Subject, front: int = 0) -> None:
    """Raise where no token of a prompt is both measured and followed by one: refuse_unpredicted(subject, front=1)"""
    for number, prompt in enumerate(subject.inputs.prompts):
        if len(prompt) < front + 2:
            raise HookdepthError(
                f"prompt {number} has {len(prompt)} tokens, and no next token to be predicted after the first {front}",
                "leave it out, or give a smaller --keep-front",
            )


class Losses:
    """Losses of paths on all prompts; counts passes and keeps the largest noise floor."""

    def __init__(self, subject: Subject, on_pass: OnPass) -> None:
        self.subject, self.on_pass = subject, on_pass
        self.passes, self.floor = 0, 0.0
        self.where: str | None = None

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
    return [[layer for layer in range(n_layers) if layer not in order[:step]] for step in range(len(order) + 1)]
