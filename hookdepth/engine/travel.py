"""Branches along a path: which rows a sweep has, and the states that they leave behind and take up again.

    travel = Travel(trie)
    for pass_ in top.walk():                  # the sweeps of a chunk, in order
        travel.begin(SweepTable(pass_, branches, spans, n_layers, device))

A row that reaches a gap, waits for a later sweep, or parts from another leaves a copy of its state; it goes when the
last one that needs it has taken it. So beside the batch there is at most about a state a path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.plan import ForwardPass, Span
from hookdepth.engine.rows import RowTable
from hookdepth.engine.trie import Run, State, Trie
from hookdepth.model.devices import numbers


class SweepTable(RowTable):
    """The rows of one sweep: every branch that is not yet at its end has one, wherever it visits layers.

    SweepTable(pass_, branches, spans, n_layers, device).takes[id_]     # (layer, 0 | 2) → the state it joins with
    """

    def __init__(
        self,
        pass_: ForwardPass,
        branches: Sequence[Branch],
        spans: Sequence[Span],
        n_layers: int,
        device: Callable[[int], torch.device],
    ) -> None:
        assert pass_.sweep is not None
        self.sweep, trie, number = pass_.sweep, pass_.sweep.trie, pass_.sweep.number
        self.ids = ids = dict(zip(pass_.rows, self._layout(len(pass_.prompts), len(pass_.rows))[2], strict=True))
        self.takes = {id_: trie.takes(row, number) for row, id_ in ids.items()}
        self.seen = {id_: {n: ids[own] for n, own in trie.seen(row, number).items()} for row, id_ in ids.items()}
        self.keep_front = {id_: path.keep_front for row, id_ in ids.items() if (path := branches[row].path)}
        self.together: dict[int, list[tuple[int, Run]]] = {}  # layer → (id, run) of rows that read one input there
        for row, id_ in ids.items():
            for run in trie.own(row, number):
                for layer in run.together:
                    self.together.setdefault(layer, []).append((id_, run))
        super().__init__(pass_, branches, spans, n_layers, device)

    def observed_rows(self) -> list[tuple[int, int]]:
        """All of them: which of their layers they visit here, `seen` tells."""
        return list(self.branch_rows())

    def unvisited(self, row: int) -> list[int]:
        """Layers that a branch never visits."""
        return self.sweep.trie.unvisited(row)

    def _control_joins(self) -> tuple[int, int]:
        return self.sweep.control_joins, 0

    def _joins(self, id_: int, row: int, span: Span) -> list[tuple[int, int]]:
        return list(self.takes[id_])

    def _visits(self, id_: int, layer: int) -> bool:
        return self.seen[id_].get(layer) == id_

    def _measured_places(self, places: Int[Tensor, "layer row"]) -> Int[Tensor, "layer row"]:
        layers = range(self.n_layers)
        ids = range(self.n_rows)
        rows = [[self.seen[id_].get(n, -1) if id_ in self.seen else id_ for id_ in ids] for n in layers]
        seen = numbers(rows)
        return torch.where(seen < 0, -1, places.gather(1, seen.clamp(min=0)))

    def _leaving(self, layer: int, here: list[int]) -> set[int]:
        return {id_ for id_ in here if not self._stays(id_, layer)}

    def _stays(self, id_: int, layer: int) -> bool:
        if id_ not in self.seen or layer == self.n_layers - 1:
            return id_ not in self.seen or self._ends(id_)
        return self.seen[id_].get(layer + 1) == id_ and (layer + 1, 0) not in self.takes[id_]

    def _ends(self, id_: int) -> bool:
        """Whether the row is unembedded in this sweep."""
        return self.pass_.rows[id_ - self.branch_ids.start] in self.pass_.measured


class Travel:
    """The states of a chunk's paths: see the module. Without a trie nothing travels."""

    def __init__(self, trie: Trie | None = None) -> None:
        self.table: SweepTable | None = None
        self.states: dict[Hashable, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}  # of rows that are in one of several parallel layers
        self.found: dict[str, Tensor] = {}
        self.uses: Counter[Hashable] = Counter()
        if trie is not None:
            taken = [trie.takes(index, sweep) for index, way in trie.ways.items() for sweep in way]
            self.uses.update(state for own in taken for state in own.values())
        self.needed: dict[tuple[int, int], list[State]] = {}  # (sweep, layer) → states that are there then
        for key in self.uses:
            run, layer = cast(State, key)
            self.needed.setdefault((run.sweep, layer), []).append((run, layer))

    @property
    def on_paths(self) -> bool:
        """Whether rows join with states of their own, and not as their clean runs."""
        return self.table is not None

    def begin(self, table: SweepTable) -> SweepTable:
        """The next sweep."""
        before, self.table = self.table, table
        if before is not None:
            place = {row: n for n, row in enumerate(before.pass_.rows)}
            rows = torch.tensor([place[row] for row in table.pass_.rows], dtype=torch.long)
            self.found = {name: own.index_select(1, rows.to(own.device)) for name, own in self.found.items()}
        later = [suffix.prompts for suffix in table.pass_.suffixes]
        self.uses.update(prompt for prompts in later for prompt in prompts)
        self.sums = {}
        return table

    def holds_at(self, layer: int) -> bool:
        """Whether a state from a layer's output is needed beside those that go on: then the layer is needed whole."""
        return self.table is not None and (self.table.sweep.number, layer) in self.needed

    def before(self, layer: int, hidden: Tensor) -> None:
        """At a layer's input: keep the states of clean runs and controls from which paths go on."""
        if self.table is None or self.table.sweep.number:
            return
        rows = self.table.layers[layer]
        if layer == 0:  # all other states are kept where they arise, at a layer's output
            self._keep(-1, hidden, {})
        if layer == self.table.n_layers // 2:
            place = {id_: n for n, id_ in enumerate(rows.inside)}
            for slot, prompt in enumerate(self.table.pass_.prompts):
                # At layer 0 the control has not joined; it is its clean run.
                control = place[self.table.control_ids[slot]]
                self._put(prompt, hidden[control if layer else rows.clean_place(slot)])

    def arrival(self, layer: int, order: int, id_: int, clean: Tensor) -> Tensor:
        """What a row joins with; left of its first changed token that is its clean run's value there."""
        if self.table is None:
            return clean
        table = self.table
        if id_ in table.control_ids:
            return self._take(table.pass_.prompts[table.slot[id_]], clean) if table.sweep.number else clean
        row = self._take(table.takes[id_][layer, order], clean)
        front = table.keep_front[id_]
        row = torch.cat([clean[:front], row[front:]]) if front else row
        if any(id_ == other for other, _ in table.together.get(layer, ())):
            self.inputs[id_] = row
        return row

    def after(self, layer: int, after: Tensor) -> Tensor:
        """At a layer's output: the states that go on, where parallel layers are summed; and keep what others need."""
        if self.table is None:
            return after
        table, rows = self.table, self.table.layers[layer]
        place = {id_: n for n, id_ in enumerate(rows.inside)}
        for id_, run in table.together.get(layer, ()):
            here = place[id_]
            # Not what the layer has read: a change at its own input is then a change of what it adds, as in a stage
            # of one layer, whichever of the stage's layers it is.
            read = self.inputs.pop(id_)
            added = after[here].float() - read.float()
            self.sums[id_] = added if layer == run.first else self.sums[id_].to(added.device) + added
            if layer == run.last:
                after = after.clone()
                after[here] = self._summed(id_, run, read, after[rows.clean_place(table.slot[id_])])
        self._keep(layer, after, place)
        return after

    def merged(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What layers gave, [2, row, layer], with what they gave in the sweeps before, where a row does not come by."""
        if self.table is None or not found:
            return found
        ids, layers = self.table.branch_ids, range(self.table.n_layers)
        seen = torch.tensor([[layer in self.table.seen[id_] for layer in layers] for id_ in ids], dtype=torch.bool)
        for name, values in found.items():
            own = values[:, ids.start :]
            if name in self.found:
                here = seen.to(own.device).view(*seen.shape, *[1] * (own.ndim - 3))  # tokens that are not reduced
                own = torch.where(here, own, self.found[name])
            self.found[name] = own
            found[name] = torch.cat([values[:, : ids.start], own], dim=1)
        return found

    def _summed(self, id_: int, run: Run, read: Tensor, clean: Tensor) -> Tensor:
        """The state after parallel layers; `read` is the input of them all."""
        table = self.table
        assert table is not None
        total = self.sums.pop(id_) / (len(run.together) if run.mean else 1)
        state = (read.float() + total).to(read.dtype)
        front = table.keep_front[id_]
        return torch.cat([clean[:front], state[front:]])

    def _keep(self, layer: int, values: Tensor, place: dict[int, int]) -> None:
        table = self.table
        assert table is not None
        for state in self.needed.get((table.sweep.number, layer), ()):
            run, pass_ = state[0], table.pass_
            # Clean runs never leave: in the order of the prompts they are the first of the batch.
            root = run.parent is None
            here = pass_.prompts.index(run.prompt) if root else place[table.ids[run.owner]]
            self._put(state, values[here])

    def _put(self, key: Hashable, state: Tensor) -> None:
        if self.uses[key]:
            self.states[key] = state.clone()  # a view would keep the whole batch

    def _take(self, key: Hashable, like: Tensor) -> Tensor:
        self.uses[key] -= 1
        state = self.states[key] if self.uses[key] else self.states.pop(key)
        return state[: like.shape[0]].to(like.device)  # a later sweep may have fewer tokens of padding
