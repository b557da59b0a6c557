"""Paths that begin alike share what they have in common: which stage is computed where, for whom, and how often.

    trie = Trie(n_layers=30)
    trie.add(0, Branch((LayerPath("0-9,4-9,10-29"),)))     # clean up to layer 9, then a second sweep from layer 4 on
    trie.add(1, Branch((LayerPath("0-9,4-9,11-29"),)))     # the same row, until layer 9
    trie.n_sweeps, trie.visits(1)                          # 2, 6 + 20 + 19

A *node* is a stage of a path, with all that went before: its state is computed once, by the row of the first branch
that came this way. Its sweep is as early as can be: that of the state it starts from, or, where its layers do not lie
above, the next. Pure data, no tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from hookdepth.engine.branches import Branch
from hookdepth.engine.paths import Stage


@dataclass(slots=True, eq=False)
class Node:
    """A state on the way of one or more paths.

    Attributes:
        key: by which its parent knows it.
        parent: the state that its layers read; None for a root, which is a state of the clean run.
        layers: those of its stage; a root has none.
        ready: the layer at whose output the state is there; −1 for the embedding's.
        sweep: in which it is computed.
        owner: the branch whose row computes it.
        prompt: whose.
        mean: what several layers add is averaged.
    """

    key: Hashable
    parent: Node | None
    layers: Stage
    ready: int
    sweep: int
    owner: int
    prompt: int
    mean: bool = False


class Trie:
    """The states of branches with a path, each once: see the module."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.ways: dict[int, list[Node]] = {}
        self.parts: dict[int, dict[int, list[Node]]] = {}  # the same by sweep
        self.rows: Counter[tuple[int, int]] = Counter()
        self.most = 0  # rows at one layer of a sweep, so far
        self._children: dict[Hashable, Node] = {}

    def add(self, index: int, branch: Branch) -> None:
        """Take in a branch that has a path."""
        path = branch.path
        assert path is not None
        acting: dict[int, tuple[int, ...]] = {}
        for one in branch.interventions:
            if one is not path:
                acting[one.layer] = (*acting.get(one.layer, ()), id(one))
        clean = path.clean_stages(min(acting, default=self.n_layers))
        key: Hashable = (branch.prompt, path.keep_front, clean)
        node = self._children.get(key)
        if node is None:
            node = self._children[key] = Node(key, None, (), clean - 1, 0, index, branch.prompt)
        way = [node]
        for stage in path.stages[clean:]:
            here = tuple((layer, acting[layer]) for layer in stage if layer in acting) if acting else ()
            key = (node, stage, mean := path.mean and len(stage) > 1, here)
            child = self._children.get(key)
            if child is None:
                sweep = node.sweep if stage[0] > node.ready else node.sweep + 1
                child = self._children[key] = Node(key, node, stage, stage[-1], sweep, index, branch.prompt, mean)
                for layer in stage:
                    self.rows[sweep, layer] += 1
                    self.most = max(self.most, self.rows[sweep, layer])
            node = child
            way.append(node)
        self.rows[node.sweep, self.n_layers] += 1  # the row that is unembedded
        self.most = max(self.most, self.rows[node.sweep, self.n_layers])
        self.ways[index], self.parts[index] = way, {}
        for node in way:
            self.parts[index].setdefault(node.sweep, []).append(node)

    def remove(self, index: int) -> None:
        """Let the branch that came last go again."""
        way = self.ways.pop(index)
        del self.parts[index]
        self.rows[way[-1].sweep, self.n_layers] -= 1
        for node in way:
            if node.owner == index:
                del self._children[node.key]
                for layer in node.layers:
                    self.rows[node.sweep, layer] -= 1

    @property
    def n_sweeps(self) -> int:
        """Passes that all its paths take."""
        return 1 + max(way[-1].sweep for way in self.ways.values())

    def peak(self, sweep: int) -> int:
        """Most rows of branches at one layer of a sweep."""
        return max(self.rows[sweep, layer] for layer in range(self.n_layers + 1))

    def visits(self, sweep: int) -> int:
        """Rows × layers that a sweep computes for branches."""
        return sum(self.rows[sweep, layer] for layer in range(self.n_layers))

    def visits_by_prompt(self) -> Counter[int]:
        """The same of all sweeps, for each prompt."""
        found: Counter[int] = Counter()
        for node in self._children.values():
            found[node.prompt] += len(node.layers)
        return found

    def seen(self, index: int, sweep: int) -> dict[int, int]:
        """Layers that a branch visits in a sweep → the branch whose row does it."""
        return {layer: node.owner for node in self.parts[index].get(sweep, ()) for layer in node.layers}

    def unvisited(self, index: int) -> list[int]:
        """Layers that a branch never visits."""
        way = self.ways[index]
        visited = {layer for node in way for layer in node.layers} | set(range(way[0].ready + 1))
        return [layer for layer in range(self.n_layers) if layer not in visited]

    def takes(self, index: int, sweep: int) -> dict[tuple[int, int], Node]:
        """Where a branch's row joins in a sweep: (layer, 0 its input | 2 its output) → the state that it takes up.

        It goes on from layer to layer by itself; it joins where it visits a layer and was not in the one before, at
        each layer of several that read one input, and at the end where its last state lies elsewhere.
        """
        found: dict[tuple[int, int], Node] = {}
        for node in self.parts[index].get(sweep, ()):
            if node.owner == index and node.parent is not None:
                before = node.parent
                on = before.parent is not None and (before.owner, before.sweep) == (index, sweep)
                for layer in node.layers:
                    if not on or len(node.layers) > 1 or before.ready != layer - 1:
                        found[layer, 0] = before
        end, last = self.ways[index][-1], self.n_layers - 1
        if end.sweep == sweep and (end.parent is None or end.owner != index or end.ready != last):
            found[last, 2] = end
        return found
