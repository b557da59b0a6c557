"""The rows of one pass, layer by layer: who joins, who leaves, whose keys come from where.

    table = RowTable(pass_, branches, spans, n_layers=30, device=lambda layer: torch.device("cpu"))
    table.clean_ids, table.control_ids, table.branch_ids     # range(0, 1), range(1, 2), range(2, 32)
    table.layers[3].inside                                   # ids of the rows that layer 3 computes, in order

A row has an id, which is the same at every layer, and at each layer a place in the batch. `RowTable` alone knows
which ids and places belong to clean runs, controls and branches; everybody else asks it. Everything that the hooks
need is worked out here, before the forward call, so that no hook looks anything up on the host or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.plan import CLEAN, CONTROL, ForwardPass, Span, family_of
from hookdepth.model.devices import numbers, send_together
from hookdepth.model.sites import AT_OUTPUT, ORDER

Key = tuple[int, ...]
Edits = dict[int, list[Intervention]]


@dataclass(frozen=True)
class LayerRows:
    """Row ids at one layer; a list's order is the order of the batch.

    Attributes:
        born: site → those that join there, in the order of the sites. One that joins inside the layer is there from its
            input on, but what comes before its site is its clean run's, and not computed.
        inside: all but those that join at its output; outside: all at its output; staying: those that go on.
        clean: the places of the clean runs, in the order of the pass's prompts, wherever in the layer.
        places: [2, row], for every row of the pass, here or not: the place of its value at the layer's output (its
            clean run's, while it has not joined or where it has left), and the place of its clean run's.
        slots: for each of `outside`, which of the clean runs is its own; None where there is only one.
        keep: the places of `staying` in `outside`; None where all stay.
    """

    born: dict[str, list[int]]
    inside: list[int]
    outside: list[int]
    staying: list[int]
    clean: slice
    places: Int[Tensor, "2 row"]
    slots: Int[Tensor, " here"] | None
    keep: Int[Tensor, " staying"] | None

    def clean_place(self, slot: int) -> int:
        """The place of the clean run of one of the pass's prompts."""
        return self.clean.start + slot

    def before(self, site: str) -> int:
        """How many of `inside` are computed before a site: the first ones, since the others join there or later."""
        later = ORDER[ORDER.index(site) : -1]
        return len(self.inside) - sum(len(self.born[other]) for other in later)

    @property
    def attending(self) -> list[int]:
        """Rows whose attention is computed."""
        return self.inside[: self.before("z")]


class _Laid(NamedTuple):
    """The first fields of `LayerRows`."""

    born: dict[str, list[int]]
    inside: list[int]
    outside: list[int]
    staying: list[int]


@dataclass(frozen=True)
class ByKind:
    """Values of all rows of a pass: the clean run and the control of each prompt, and the branches in their order."""

    clean: Tensor
    control: Tensor
    branches: Tensor


class RowTable:
    """See the module.

        table = RowTable(pass_, branches, spans, n_layers, device)
        table.slot[table.branch_ids[0]]     # which of the pass's prompts a row belongs to
        table.edits[3, "attn_out"]   # id → its interventions there

    Args:
        pass_: what to run.
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
        self.clean_ids, self.control_ids, self.branch_ids = self._layout(len(pass_.prompts), len(pass_.rows))
        self.n_rows = len(self.clean_ids) + len(self.control_ids) + len(self.branch_ids)
        self.slot = [0] * self.n_rows
        self.keys: list[Key] = [()] * self.n_rows
        self.last = [n_layers - 1] * self.n_rows
        self.edited_until: list[int | None] = [None] * self.n_rows
        for ids, kind in ((self.clean_ids, CLEAN), (self.control_ids, CONTROL)):
            for slot, (id_, prompt) in enumerate(zip(ids, pass_.prompts, strict=True)):
                self.slot[id_], self.keys[id_] = slot, (prompt, kind)
        slot_of = {prompt: slot for slot, prompt in enumerate(pass_.prompts)}
        # Controls join as a branch does, at the first place where one can: they meet the same code.
        joining: dict[tuple[int, int], list[int]] = {self._control_joins(): list(self.control_ids)}
        for id_, row in self.branch_rows():
            self.slot[id_], self.keys[id_] = slot_of[branches[row].prompt], family_of(branches[row])
            self.last[id_] = spans[row].last
            if pass_.prefix == "none" and row in pass_.measured:
                # Measured right of its cut in the pass that changes what is left of it, where no other can go on.
                self.edited_until[id_] = branches[row].cut
            for place in self._joins(id_, row, spans[row]):
                joining.setdefault(place, []).append(id_)
        self.edits = self._edits(branches)
        laid: list[_Laid] = []
        self.final = list(self.clean_ids)  # the decoder's own embedding made them; all others join by a hook
        for layer in range(n_layers):
            laid.append(self._layer(layer, self.final, joining))
            self.final = laid[-1].staying
        found = {(layer, "places"): own for layer, own in enumerate(self._places(laid))}
        if len(self.clean_ids) > 1:
            own = numbers(self.slot)[_flat(laid)[2]].split([len(rows.outside) for rows in laid])
            found |= {(layer, "slots"): slots for layer, slots in enumerate(own)}
        found |= {(layer, "keep"): _kept(rows) for layer, rows in enumerate(laid) if rows.staying != rows.outside}
        sent = send_together({key: (own, device(key[0])) for key, own in found.items()})
        clean = slice(0, len(self.clean_ids))  # they never leave, so they are the first everywhere
        self.layers = [
            LayerRows(
                *own, clean, sent[n, "places"].unflatten(0, (2, -1)), sent.get((n, "slots")), sent.get((n, "keep"))
            )
            for n, own in enumerate(laid)
        ]

    @staticmethod
    def _layout(n_prompts: int, n_branches: int) -> tuple[range, range, range]:
        """The ids of clean runs and controls, a prompt each in the pass's order, and of branches as they join."""
        controls = range(n_prompts, n_prompts + n_prompts)
        return range(n_prompts), controls, range(controls.stop, controls.stop + n_branches)

    def branch_rows(self) -> Iterator[tuple[int, int]]:
        """(id, index of the branch) of the pass's branches, in the order in which they join."""
        return zip(self.branch_ids, self.pass_.rows, strict=True)

    def measured_rows(self) -> list[tuple[int, int]]:
        """(id, index of the branch) of those whose measurements are wanted."""
        return [(id_, row) for id_, row in self.branch_rows() if row in self.pass_.measured]

    def observed_rows(self) -> list[tuple[int, int]]:
        """(id, index of the branch) of those whose layers are measured here."""
        return self.measured_rows()

    def unvisited(self, row: int) -> list[int]:
        """Layers that a branch never visits."""
        return []

    def clean_id(self, id_: int) -> int:
        """The clean run of a row."""
        return self.clean_ids[self.slot[id_]]

    def of_prompt(self, slot: int) -> list[int]:
        """All rows of one of the pass's prompts."""
        return [id_ for id_ in range(self.n_rows) if self.slot[id_] == slot]

    def by_kind(self, values: Tensor) -> ByKind:
        """Views of values of all rows, [row, …]: no copy, and gradients flow through."""
        kinds = (self.clean_ids, self.control_ids, self.branch_ids)
        return ByKind(*(values[ids.start : ids.stop] for ids in kinds))

    def _edits(self, branches: Sequence[Branch]) -> dict[tuple[int, str], Edits]:
        edits: dict[tuple[int, str], Edits] = {}
        # Right of a cut a branch changes nothing: what it changed reaches it through keys and values.
        for id_, row in self.branch_rows() if self.pass_.prefix != "own" else ():
            for intervention in branches[row].interventions:
                if not self._visits(id_, intervention.layer):
                    continue
                edits.setdefault((intervention.layer, intervention.site), {}).setdefault(id_, []).append(intervention)
        return edits

    def _control_joins(self) -> tuple[int, int]:
        return 0, 0

    def _visits(self, id_: int, layer: int) -> bool:
        return True

    def _leaving(self, layer: int, here: list[int]) -> set[int]:
        """Those of the rows at a layer's output that do not go on."""
        return set() if layer == self.n_layers - 1 else {id_ for id_ in here if self.last[id_] == layer}

    def _measured_places(self, places: Int[Tensor, "layer row"]) -> Int[Tensor, "layer row"]:
        """Of the places of all rows, those of the rows whose values count as theirs; −1 where there is none."""
        return places

    def _joins(self, id_: int, row: int, span: Span) -> list[tuple[int, int]]:
        # Right of a cut nothing is changed: what tells the branch from its clean run are the keys and values
        # left of it, and those of a layer whose attention or MLP output is changed are still the clean run's.
        layer, order = span.joins
        return [(layer, AT_OUTPUT if self.pass_.prefix == "own" and order else order)]

    def _layer(self, layer: int, alive: list[int], joining: dict[tuple[int, int], list[int]]) -> _Laid:
        born = {site: joining.get((layer, order), []) for order, site in enumerate(ORDER)}
        inside = alive + [id_ for site in ORDER[:-1] for id_ in born[site]]
        outside = inside + born["resid_post"]
        leaving = self._leaving(layer, outside)
        return _Laid(born, inside, outside, [id_ for id_ in outside if id_ not in leaving] if leaving else outside)

    def _places(self, laid: Sequence[_Laid]) -> Int[Tensor, "layer places"]:
        """`LayerRows.places` of all layers, by few operations: there may be hundreds of rows at each."""
        layers, order, ids = _flat(laid)
        own = torch.full((len(laid), self.n_rows), -1)
        own[layers, ids] = order
        own, clean = self._measured_places(own), numbers(self.slot).expand(own.shape)
        return torch.cat([torch.where(own < 0, clean, own), clean], dim=1)

    def lent(self) -> slice | None:
        """The places of rows whose keys and values later passes start from."""
        if not self.pass_.record:
            return None
        own = any(suffix.prefix == "own" for suffix in self.pass_.suffixes)
        return slice(None) if own else slice(len(self.clean_ids))

    def prefix_rows(self, layer: int, recorded: RowTable) -> list[int]:
        """For each attending row, the row of `recorded` whose keys and values lie left of it."""
        attending = self.layers[layer].attending
        if self.pass_.prefix == "own":
            place = {recorded.keys[id_]: n for n, id_ in enumerate(recorded.layers[layer].attending)}
            return [place[self.keys[id_]] for id_ in attending]
        clean = [recorded.pass_.prompts.index(prompt) for prompt in self.pass_.prompts]
        return [clean[self.slot[id_]] for id_ in attending]


def _flat(laid: Sequence[_Laid]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row at every layer's output, layer after layer: the layer, its place there and its id."""
    counts = numbers([len(rows.outside) for rows in laid])
    layers = torch.arange(len(laid)).repeat_interleave(counts)
    order = torch.arange(len(layers)) - (counts.cumsum(0) - counts)[layers]
    return layers, order, numbers([id_ for rows in laid for id_ in rows.outside])


def _kept(rows: _Laid) -> Int[Tensor, " staying"]:
    staying = set(rows.staying)
    return numbers([place for place, id_ in enumerate(rows.outside) if id_ in staying])
