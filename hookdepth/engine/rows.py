"""The rows of one pass, layer by layer: who joins, who leaves, whose keys come from where.

    table = RowTable(pass, branches, spans, n_layers=30, device=lambda layer: torch.device("cpu"))
    table.layers[3].inside     # ids of the rows that layer 3 computes, in order

Row ids: clean runs first, then null branches (each in the order of the pass's prompts), then branches in the
order in which they join. Everything the hooks need is worked out here, before the forward call, so that no
hook looks anything up on the host or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Intervention
from hookdepth.engine.plan import CLEAN, CONTROL, ForwardPass, Span, family_of

Key = tuple[int, ...]
Edits = list[tuple[int, list[Intervention]]]


@dataclass(frozen=True)
class LayerRows:
    """Row ids at one layer; a list's order is the order of the batch.

    Attributes:
        born_pre, born_attn, born_post: join at the layer's input; there, but without attention of their own;
            at its output.
        inside: all that the layer's MLP computes; outside: all at its output; staying: those that go on.
        clean run: for each of `outside`, the row of its clean run; None where row 0 is everyone's.
        ids, keep: tensors of `outside`, and of the positions of `staying` among them (None: all stay).
    """

    born_pre: list[int]
    born_attn: list[int]
    born_post: list[int]
    inside: list[int]
    outside: list[int]
    staying: list[int]
    clean_row: Tensor | None
    ids: Tensor
    keep: Tensor | None

    @property
    def attending(self) -> list[int]:
        """Rows whose attention is computed."""
        return self.inside[: len(self.inside) - len(self.born_attn)]


class RowTable:
    """See the module.

        table = RowTable(pass, branches, spans, n_layers, device)
        table.slot[id]     # which of the pass's prompts a row belongs to
        table.edits[3, "attn_out"]   # [(id, interventions)]

    Args:
        pass: what to run.
        branches, spans: of the whole plan.
        n_layers: L.
        device: layer → the device its rows lie on.
    """

    def __init__(
        self,
        pass_: ForwardPass,
        branches: Sequence[Branch],
        spans: Sequence[Span],
        n_layers: int,
        device: Callable[[int], torch.device],
    ) -> None:
        self.pass_ = pass_
        self.n_layers = n_layers
        self.n_prompts = len(pass_.prompts)
        slot_of = {prompt: slot for slot, prompt in enumerate(pass_.prompts)}
        clean = list(range(self.n_prompts))
        self.slot = clean * 2 + [slot_of[branches[row].prompt] for row in pass_.rows]
        self.keys: list[Key] = [(prompt, CLEAN) for prompt in pass_.prompts]
        self.keys += [(prompt, CONTROL) for prompt in pass_.prompts]
        self.keys += [family_of(branches[row]) for row in pass_.rows]
        self.last = [n_layers - 1] * (2 * self.n_prompts) + [spans[row].last for row in pass_.rows]
        joining: dict[tuple[int, int], list[int]] = {(0, 0): list(range(self.n_prompts, 2 * self.n_prompts))}
        for id_, row in enumerate(pass_.rows, start=2 * self.n_prompts):
            joining.setdefault(self._joins(spans[row].joins), []).append(id_)
        self.edits: dict[tuple[int, str], Edits] = {}
        if pass_.prefix != "own":
            for id_, row in enumerate(pass_.rows, start=2 * self.n_prompts):
                for intervention in branches[row].interventions:
                    site = self.edits.setdefault((intervention.layer, intervention.site), [])
                    if site and site[-1][0] == id_:
                        site[-1][1].append(intervention)
                    else:
                        site.append((id_, [intervention]))
        self.layers: list[LayerRows] = []
        alive = clean
        for layer in range(n_layers):
            here = self._layer(layer, alive, joining, device(layer))
            self.layers.append(here)
            alive = here.staying
        self.final = alive

    def _joins(self, joins: tuple[int, int]) -> tuple[int, int]:
        # Right of a cut nothing is changed: what tells the branch from its clean run are the keys and values
        # left of it, and those of a layer whose attention or MLP output is changed are still the clean run's.
        layer, order = joins
        return (layer, 2) if self.pass_.prefix == "own" and order == 1 else joins

    def _layer(
        self, layer: int, alive: list[int], joining: dict[tuple[int, int], list[int]], device: torch.device
    ) -> LayerRows:
        born = [joining.get((layer, order), []) for order in range(3)]
        inside = alive + born[0] + born[1]
        outside = inside + born[2]
        staying = [id_ for id_ in outside if self.last[id_] > layer or self.last[id_] == self.n_layers - 1]
        keep = None
        if len(staying) < len(outside):
            going_on = set(staying)
            keep = torch.tensor([n for n, id_ in enumerate(outside) if id_ in going_on], device=device)
        clean_row = None
        if self.n_prompts > 1:
            clean_row = torch.tensor([self.slot[id_] for id_ in outside], device=device)
        ids = torch.tensor(outside, device=device)
        return LayerRows(born[0], born[1], born[2], inside, outside, staying, clean_row, ids, keep)

    def prefix_rows(self, layer: int, recorded: RowTable) -> list[int]:
        """For each attending row, the row of `recorded` whose keys and values lie left of it."""
        place = {recorded.keys[id_]: n for n, id_ in enumerate(recorded.layers[layer].attending)}
        own = self.pass_.prefix == "own"
        return [
            place[self.keys[id_] if own else (self.pass_.prompts[self.slot[id_]], CLEAN)]
            for id_ in self.layers[layer].attending
        ]
