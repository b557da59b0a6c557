"""The rows of one launch, layer by layer: who joins, who leaves, whose keys come from where.

    table = RowTable(launch, branches, extents, n_layers=30, device=lambda layer: torch.device("cpu"))
    table.layers[3].inside     # ids of the rows that layer 3 computes, in order

Row ids: trunks first, then null branches (each in the order of the launch's prompts), then branches in the
order in which they join. Everything the hooks need is worked out here, before the forward call, so that no
hook looks anything up on the host or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookdepth.branches import Branch
from hookdepth.interventions import Intervention
from hookdepth.plans import NULL, TRUNK, Extent, Launch, family_of

Key = tuple[int, ...]
Edits = list[tuple[int, list[Intervention]]]


@dataclass(frozen=True)
class LayerRows:
    """Row ids at one layer; a list's order is the order of the batch.

    Attributes:
        born_pre, born_attn, born_post: join at the layer's input; there, but without attention of their own;
            at its output.
        inside: all that the layer's MLP computes; outside: all at its output; staying: those that go on.
        trunk: for each of `outside`, the row of its trunk; None where row 0 is everyone's.
        ids, keep: tensors of `outside`, and of the positions of `staying` among them (None: all stay).
    """

    born_pre: list[int]
    born_attn: list[int]
    born_post: list[int]
    inside: list[int]
    outside: list[int]
    staying: list[int]
    trunk: Tensor | None
    ids: Tensor
    keep: Tensor | None

    @property
    def attending(self) -> list[int]:
        """Rows whose attention is computed."""
        return self.inside[: len(self.inside) - len(self.born_attn)]


class RowTable:
    """See the module.

        table = RowTable(launch, branches, extents, n_layers, device)
        table.slot[id]     # which of the launch's prompts a row belongs to
        table.edits[3, "attn_out"]   # [(id, interventions)]

    Args:
        launch: what to run.
        branches, extents: of the whole plan.
        n_layers: L.
        device: layer → the device its rows lie on.
    """

    def __init__(
        self,
        launch: Launch,
        branches: Sequence[Branch],
        extents: Sequence[Extent],
        n_layers: int,
        device: Callable[[int], torch.device],
    ) -> None:
        self.launch = launch
        self.n_layers = n_layers
        self.n_prompts = len(launch.prompts)
        slot_of = {prompt: slot for slot, prompt in enumerate(launch.prompts)}
        trunks = list(range(self.n_prompts))
        self.slot = trunks * 2 + [slot_of[branches[row].prompt] for row in launch.rows]
        self.keys: list[Key] = [(prompt, TRUNK) for prompt in launch.prompts]
        self.keys += [(prompt, NULL) for prompt in launch.prompts]
        self.keys += [family_of(branches[row]) for row in launch.rows]
        self.last = [n_layers - 1] * (2 * self.n_prompts) + [extents[row].last for row in launch.rows]
        births: dict[tuple[int, int], list[int]] = {(0, 0): list(range(self.n_prompts, 2 * self.n_prompts))}
        for id_, row in enumerate(launch.rows, start=2 * self.n_prompts):
            births.setdefault(self._birth(extents[row].birth), []).append(id_)
        self.edits: dict[tuple[int, str], Edits] = {}
        if launch.prefix != "own":
            for id_, row in enumerate(launch.rows, start=2 * self.n_prompts):
                for intervention in branches[row].interventions:
                    site = self.edits.setdefault((intervention.layer, intervention.site), [])
                    if site and site[-1][0] == id_:
                        site[-1][1].append(intervention)
                    else:
                        site.append((id_, [intervention]))
        self.layers: list[LayerRows] = []
        alive = trunks
        for layer in range(n_layers):
            here = self._layer(layer, alive, births, device(layer))
            self.layers.append(here)
            alive = here.staying
        self.final = alive

    def _birth(self, birth: tuple[int, int]) -> tuple[int, int]:
        # Right of a cut nothing is changed: what tells the branch from its trunk are the keys and values
        # left of it, and those of a layer whose attention or MLP output is changed are still the trunk's.
        layer, order = birth
        return (layer, 2) if self.launch.prefix == "own" and order == 1 else birth

    def _layer(
        self, layer: int, alive: list[int], births: dict[tuple[int, int], list[int]], device: torch.device
    ) -> LayerRows:
        born = [births.get((layer, order), []) for order in range(3)]
        inside = alive + born[0] + born[1]
        outside = inside + born[2]
        staying = [id_ for id_ in outside if self.last[id_] > layer or self.last[id_] == self.n_layers - 1]
        keep = None
        if len(staying) < len(outside):
            going_on = set(staying)
            keep = torch.tensor([n for n, id_ in enumerate(outside) if id_ in going_on], device=device)
        trunk = None
        if self.n_prompts > 1:
            trunk = torch.tensor([self.slot[id_] for id_ in outside], device=device)
        ids = torch.tensor(outside, device=device)
        return LayerRows(born[0], born[1], born[2], inside, outside, staying, trunk, ids, keep)

    def prefix_rows(self, layer: int, recorded: RowTable) -> list[int]:
        """For each attending row, the row of `recorded` whose keys and values lie left of it."""
        place = {recorded.keys[id_]: n for n, id_ in enumerate(recorded.layers[layer].attending)}
        own = self.launch.prefix == "own"
        return [
            place[self.keys[id_] if own else (self.launch.prompts[self.slot[id_]], TRUNK)]
            for id_ in self.layers[layer].attending
        ]
