"""Paths that begin alike share what they have in common: which layers are computed where, for whom, and how often.

    trie = Trie(n_layers=30)
    trie.add(0, Branch((LayerPath("0-9,4-9,10-29"),)))     # clean up to layer 9, then a second sweep from layer 4 on
    trie.add(1, Branch((LayerPath("0-9,4-9,11-29"),)))     # the same row, until layer 9
    trie.n_sweeps, trie.visits(1)                          # 2, 26 + 19

A *run* is a piece of a path, layer after layer without a gap, that the row of one branch computes: the first that came
this way. A *state* is a run and a layer of it; where another path parts, it takes up the state that it needs. A
run's sweep is as early as can be: that of the state it starts from or, where it does not lie above that, the next.
Pure data, no tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from hookdepth.engine.branches import Branch
from hookdepth.engine.stages import Stage
from hookdepth.model.sites import AT_OUTPUT


@dataclass(slots=True, eq=False)
class Run:
    """Layers first … last that a row visits one after the other; or, as `together`, several that read one input.

    Attributes:
        key: by which it is found.
        parent: the state that it starts from; None for a root, which is the clean run up to `last` (−1: its embedding).
        sweep: in which it is computed.
        owner: the branch whose row computes it.
        prompt: whose.
        mean: what several layers add is averaged.
    """

    key: Hashable
    parent: State | None
    first: int
    last: int
    together: Stage
    sweep: int
    owner: int
    prompt: int
    mean: bool = False

    def layers(self, last: int) -> Stage | range:
        """Its layers, up to one of them."""
        return self.together or range(self.first, last + 1)


State = tuple[Run, int]


class Trie:
    """The runs of branches with a path, each once: see the module.

    Attributes:
        ways: branch → sweep → the states at which it leaves one run for the next, the first of all a root's.
        ends: branch → its last state.
        most: rows of branches at one layer of a sweep, at most.
    """

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.ways: dict[int, dict[int, list[State]]] = {}
        self.ends: dict[int, State] = {}
        self.most = 0
        self._runs: dict[Hashable, Run] = {}
        self._rows: list[list[int]] = []  # sweep → layer, and last the output → how many

    def add(self, index: int, branch: Branch) -> None:
        """Take in a branch that has a path."""
        path = branch.path
        assert path is not None
        acting: dict[int, tuple[int, ...]] = {}
        for one in branch.interventions if len(branch.interventions) > 1 else ():
            if one is not path:
                acting[one.layer] = (*acting.get(one.layer, ()), id(one))
        clean = path.clean_layers(min(acting, default=self.n_layers))
        key: Hashable = (branch.prompt, path.keep_front, clean)
        root = self._runs.get(key)
        if root is None:
            root = self._runs[key] = Run(key, None, 0, clean - 1, (), 0, index, branch.prompt)
        states = [(root, clean - 1)]
        for first, last, together in path.pieces(clean, acting):
            here = tuple(acting.get(layer) for layer in together or (first,)) if acting else None
            self._follow(states, first, last, (together, here, path.mean and bool(together)), index)
        way = self.ways[index] = {}
        for state in states:
            way.setdefault(state[0].sweep, []).append(state)
        self.ends[index] = states[-1]
        self._count(states[-1][0].sweep, self.n_layers, self.n_layers, 1)  # the row that is unembedded

    def _follow(
        self, states: list[State], first: int, last: int, kind: tuple[Stage, Hashable, bool], index: int
    ) -> None:
        """Go through some layers: as far as a run leads that starts here and is there already, then along new ones."""
        together = kind[0]
        while first <= last:
            state = states[-1]
            key = (state, first, kind)
            run = self._runs.get(key)
            if run is None:
                sweep = state[0].sweep + (first <= state[1])
                run = self._runs[key] = Run(key, state, first, last, together, sweep, index, state[0].prompt, kind[2])
                self._count_run(run, 1)
            reached = last if together else min(last, run.last)
            states.append((run, reached))
            first = reached + 1

    def remove(self, index: int) -> None:
        """Let the branch that came last go again."""
        end, way = self.ends.pop(index), self.ways.pop(index)
        self._count(end[0].sweep, self.n_layers, self.n_layers, -1)
        for run in {run for states in way.values() for run, _ in states if run.owner == index}:
            del self._runs[run.key]
            self._count_run(run, -1)

    def _count_run(self, run: Run, by: int) -> None:
        for layer in run.together:
            self._count(run.sweep, layer, layer, by)
        if not run.together and run.parent is not None:
            self._count(run.sweep, run.first, run.last, by)

    def _count(self, sweep: int, first: int, last: int, by: int) -> None:
        while len(self._rows) <= sweep:
            self._rows.append([0] * (self.n_layers + 1))
        rows = self._rows[sweep]
        for layer in range(first, last + 1):
            rows[layer] += by
            if rows[layer] > self.most:
                self.most = rows[layer]

    @property
    def n_sweeps(self) -> int:
        """Passes that all its paths take."""
        return 1 + max(run.sweep for run, _ in self.ends.values())

    def peak(self, sweep: int) -> int:
        """Most rows of branches at one layer of a sweep."""
        return max(self._rows[sweep]) if sweep < len(self._rows) else 0

    def visits(self, sweep: int) -> int:
        """Rows × layers that a sweep computes for branches."""
        return sum(self._rows[sweep][: self.n_layers]) if sweep < len(self._rows) else 0

    def visits_by_prompt(self) -> Counter[int]:
        """The same of all sweeps, for each prompt."""
        found: Counter[int] = Counter()
        for run in self._runs.values():
            found[run.prompt] += len(run.layers(run.last)) if run.parent is not None else 0
        return found

    def own(self, index: int, sweep: int) -> Iterator[Run]:
        """The runs that a branch's row computes in a sweep."""
        return (run for run, _ in self.ways[index].get(sweep, ()) if run.owner == index and run.parent is not None)

    def seen(self, index: int, sweep: int) -> dict[int, int]:
        """Layers that a branch visits in a sweep → the branch whose row does it."""
        states = self.ways[index].get(sweep, ())
        return {layer: run.owner for run, last in states if run.parent is not None for layer in run.layers(last)}

    def unvisited(self, index: int) -> list[int]:
        """Layers that a branch never visits."""
        states = [state for way in self.ways[index].values() for state in way]
        visited = {layer for run, last in states for layer in run.layers(last)}
        return [layer for layer in range(self.n_layers) if layer not in visited]

    def takes(self, index: int, sweep: int) -> dict[tuple[int, int], State]:
        """Where a branch's row joins in a sweep: (layer, 0 its input | 2 its output) → the state that it takes up.

        It goes on from run to run by itself where the next begins right above its own; it joins everywhere else, at
        each of several layers that read one input, and at the end where its last state lies elsewhere.
        """
        found: dict[tuple[int, int], State] = {}
        for run in self.own(index, sweep):
            assert run.parent is not None
            before, layer = run.parent
            goes_on = (before.owner, before.sweep) == (index, sweep) and before.parent is not None
            if run.together or not goes_on or layer != run.first - 1:
                found |= {(one, 0): run.parent for one in run.together or (run.first,)}
        end, last = self.ends[index], self.n_layers - 1
        if end[0].sweep == sweep and (end[0].parent is None or end[0].owner != index or end[1] != last):
            found[last, AT_OUTPUT] = end
        return found
