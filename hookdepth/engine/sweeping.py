"""Which branches with a path run together, and in which sweeps.

    for chain in chains(trie, branches, indices, 32, 180): chain.suffixes     # a sweep, with the later ones

What a pass holds is the rows that run and the states that wait for a later sweep.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hookdepth.engine.branches import Branch
from hookdepth.engine.plan import ForwardPass, Sweep
from hookdepth.engine.trie import Trie

_HELD = 8  # states that wait for a later sweep, for each row that runs: one takes a tenth of its room or less


@contextmanager
def uncollected() -> Iterator[None]:
    """Plan thousands of paths without garbage collections: with uncollected(): chains(…)

    Of the hundreds of thousands of objects, which all stay, they would free none, and take two thirds of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def chains(
    whole: Trie, branches: Sequence[Branch], indices: Sequence[int], size: int, stop: int
) -> Iterator[ForwardPass]:
    """The first sweep of as many branches as fit, with the later ones as its suffixes; and so on for the rest.

    Args:
        whole: the runs of all of them.
        branches: of the whole plan; indices: those with a path.
        size: most rows at once.
        stop: tokens of a pass.
    """
    # Paths of few sweeps first: the others then share their many.
    order = sorted(indices, key=lambda i: (whole.ends[i][0].sweep, branches[i].prompt, i))
    if whole.most <= size and len(order) <= _HELD * size:
        yield _chain(whole, branches, stop)
        return
    trie = Trie(whole.n_layers)
    for index in order:
        trie.add(index, branches[index])
        if len(trie.ways) > 1 and (trie.most > size or len(trie.ways) > _HELD * size):
            trie.remove(index)
            yield _chain(trie, branches, stop)
            trie = Trie(whole.n_layers)
            trie.add(index, branches[index])
    yield _chain(trie, branches, stop)


def _chain(trie: Trie, branches: Sequence[Branch], stop: int) -> ForwardPass:
    passes: list[ForwardPass] = []
    for number in range(trie.n_sweeps):
        rows = tuple(i for i, (run, _) in trie.ends.items() if run.sweep >= number)
        ending = frozenset(i for i in rows if trie.ends[i][0].sweep == number)
        prompts = tuple(sorted({branches[i].prompt for i in rows}))
        passes.append(ForwardPass(prompts, 0, stop, rows, ending, sweep=Sweep(trie, number)))
    return replace(passes[0], suffixes=tuple(passes[1:]))
