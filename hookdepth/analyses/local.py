"""local-current and local-future: direct effects, not propagated (2505.13898, Fig. 5).

    hookdepth.analyse("demo", "local-current", limit=2)["layer.effect"]     # [L, L]

Entry (s, i), i > s: layer i is given h_i − c_s instead of h_i, everything before being clean; how much does
what it adds change? Each branch is born at the input of layer i and gone after it, so the L(L−1)/2 of them
cost as much as the L propagated skips.
"""

from __future__ import annotations

from functools import cache

import torch

from hookdepth.analyses.skip import EFFECT, LARGEST, LARGEST_OF_CUTS, Effects
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Subtract
from hookdepth.engine.measurements import LayerEffect
from hookdepth.report.figures import Heatmap

_REMOVED = {**EFFECT, "rows": "Layer removed from the input", "columns": "Direct effect @ layer"}


@cache
def _subtract(source: int, layer: int, front: int) -> Subtract:
    return Subtract(source, layer, slice(front, None))


class Direct(Effects):
    """What both have in common: which contributions are taken out of which inputs, and what is measured."""

    options = ("keep_front", "over_prompts", "max_rows")
    together = "local"
    measurements = (LayerEffect(),)
    tensors = {"layer.effect": "layer layer"}

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """Every source out of the input of every later layer, once or at every cut."""
        front = self.front(subject.settings)
        return [
            Branch((_subtract(source, layer, front),), cut=cut, until=layer)
            for layer in range(1, subject.model.n_layers)
            for source in range(layer)
            for cut in self.cuts(subject, item)
        ]

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """[L, L], row taken out, column measured: the maximum over cuts; NaN for a prompt without any."""
        n_layers = subject.model.n_layers
        if not self.cuts(subject, item):
            return {"layer.effect": torch.full((n_layers, n_layers), torch.nan)}
        effect = torch.zeros(n_layers, n_layers)
        changes = [one for branch in measured.branches for one in branch.interventions if isinstance(one, Subtract)]
        if changes:
            layers = torch.tensor([one.layer for one in changes])
            there = measured.layer["effect"].gather(1, layers[:, None]).view(-1, len(self.cuts(subject, item)))
            one_each = slice(None, None, there.shape[1])
            sources = torch.tensor([one.source for one in changes])
            effect[sources[one_each], layers[one_each]] = there.amax(1)
        return {"layer.effect": effect}


class LocalCurrent(Direct):
    """Direct effects on all tokens: analyse(model, "local-current")["layer.effect"]."""

    name = "local-current"
    question = "which later layers read what a layer adds, directly"
    heading = "Direct effects: all tokens"
    paper = "2505.13898, Fig. 5"
    order = 5
    figures = (
        Heatmap(
            "{part}.effect",
            "Row s, column i: the contribution of layer s is taken out of the input of layer i only, "
            "everything between them being as in the clean run. Compared with skipping, this leaves out what "
            "travels through other layers.",
            reduction=LARGEST,
            **_REMOVED,
        ),
    )


class LocalFuture(Direct):
    """Direct effects on later tokens: analyse(model, "local-future")["layer.effect"]."""

    name = "local-future"
    question = "the same, seen from later tokens only"
    heading = "Direct effects: future tokens only"
    paper = "2505.13898, Fig. 5"
    order = 6
    needs = "cuts"
    figures = (
        Heatmap(
            "{part}.effect",
            "The contribution of layer s is taken out of the input of layer i on the tokens before a cut, "
            "and the effect is measured on those after it. Bright cells are layers that read, through attention, "
            "what an earlier layer wrote at earlier tokens.",
            reduction=LARGEST_OF_CUTS,
            **_REMOVED,
        ),
    )
