"""From branches to passes: which rows run together, from which token on, at which cost.

    plan = make_plan(branches, lengths=[180, 120], n_layers=30)
    print(plan.table())           # passes, rows, token-layers, work against the least possible
    plan.work / plan.least        # 1.06

Nothing here needs a model or a tensor. A pass is one forward call of the decoder; its rows are, for each
of its prompts, the clean run, a null branch that changes nothing, and branches, which join
where they first differ from their clean run. There are three kinds of pass:

* *whole*: starts at token 0. It may record keys and values for others.
* *own prefix*: the tokens ≥ t of branches with a cut t. By causality their states left of t are those of the
  same branches without a cut, so a whole pass of the uncut branches serves every cut.
* *clean prefix*: branches that change nothing left of some token start there, with the clean run's keys and
  values in front, of a whole pass. Which tokens share a pass is chosen by dynamic programming over what passes cost.

What a pass costs is the machine's to say (`machines`). Where its tokens cost little beside it, as those of a small
model on a GPU do, fewer passes do more work: prompts, tokens and cuts are then run together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hookdepth.engine.branches import Branch
from hookdepth.engine.grouping import Limits, cheapest_runs, filled, packed, spread, sums
from hookdepth.engine.machines import USUAL, PassCost
from hookdepth.engine.plan import (
    ROWS_PER_PROMPT,
    ForwardPass,
    Plan,
    Span,
    family_of,
    pass_work,
    peak_rows,
    span_of,
)
from hookdepth.engine.sweeping import chains, uncollected
from hookdepth.engine.trie import Trie

_MIN_SAVING = 0.9  # starting right of token 0, or leaving cuts to one pass, must cost at most this share


def make_plan(
    branches: Sequence[Branch],
    lengths: Sequence[int],
    n_layers: int,
    *,
    max_row_tokens: int = 1 << 15,
    max_rows: int | None = None,
    cost: PassCost = USUAL,
    max_kept_tokens: int | None = None,
    changes_only: bool = True,
    only: Iterable[int] | None = None,
    keys: Sequence[Hashable] | None = None,
    prefixes: bool = True,
    hand_on: bool = False,
) -> Plan:
    """Pack branches into passes.

        make_plan([Branch((Skip(s),)) for s in range(30)], [180], 30).n_passes   # 1

    Args:
        branches: any, of any of the prompts.
        lengths: tokens per prompt.
        n_layers: L.
        max_row_tokens: most rows × tokens of a pass (a single branch with its clean run is always allowed).
        max_rows: most rows of a pass.
        cost: what a pass costs; `machines.cost_of` a model says it.
        max_kept_tokens: where gradients flow, most tokens × layers of a pass's branches (one branch is always allowed).
        changes_only: what is measured is 0 left of the first token that a branch changes, so that these tokens
            need not be computed; otherwise all that is measured is.
        only: plan these indices alone (what is left after a pass did not fit).
        keys: per prompt; only prompts of one key share a pass. Default: all may.
        prefixes: whether a pass may start from another's keys and values. Where not, every pass starts at token 0, and
            a branch with a cut has a row of its own, which is changed left of the cut and measured right of it.
        hand_on: where branches have cuts, whether passes start from keys and values even if that does not pay.
    """
    chosen = list(range(len(branches))) if only is None else sorted(only)
    spans = tuple(span_of(branch, lengths[branch.prompt], n_layers, changes_only) for branch in branches)
    limits = Limits(max_row_tokens, max_rows or 1 << 30, cost, max_kept_tokens, prefixes, hand_on)
    builder = _Builder(branches, lengths, spans, n_layers, limits, keys or [None] * len(lengths))
    by_prompt: dict[int, list[int]] = {}
    for index in chosen:
        by_prompt.setdefault(branches[index].prompt, []).append(index)
    passes = [pass_ for pack in builder.packs(by_prompt) for pass_ in builder.passes(pack)]
    works = [pass_work(pass_, spans, n_layers) for top in passes for pass_ in top.walk()]
    return Plan(tuple(passes), sum(works), builder.least(by_prompt), n_layers, spans, builder.costs(passes))


@dataclass
class _Builder:
    branches: Sequence[Branch]
    lengths: Sequence[int]
    spans: Sequence[Span]
    n_layers: int
    limits: Limits
    keys: Sequence[Hashable]
    on_paths: int = 0  # token-layers of branches with a path, each stage that they share once

    @cached_property
    def _layers(self) -> list[int]:
        return [span.layers for span in self.spans]

    @cached_property
    def _family(self) -> list[tuple[int, ...]]:
        return [family_of(branch) for branch in self.branches]

    def packs(self, by_prompt: dict[int, list[int]]) -> list[dict[int, list[int]]]:
        """Group prompts, of similar length and equal key, that cost less in passes that they share."""
        if len(by_prompt) < 2:
            return [by_prompt] if by_prompt else []
        prompts = sorted(by_prompt)
        lives = [[self.spans[group[0]] for group in self._families(by_prompt[p]).values()] for p in prompts]
        together = packed(
            [self.lengths[p] for p in prompts],
            [ROWS_PER_PROMPT + peak_rows(own) for own in lives],
            [ROWS_PER_PROMPT * self.n_layers + sum(span.layers for span in own) for own in lives],
            [self.keys[p] for p in prompts],
            self.limits,
            self.n_layers,
            # A pack of branches with paths takes many passes, one a sweep, so the fewest packs are best.
            fewest=any(self.branches[i].path is not None for indices in by_prompt.values() for i in indices),
        )
        return [{prompts[n]: by_prompt[prompts[n]] for n in pack} for pack in together]

    def _cost(self, token_layers: int, passes: int = 1) -> int:
        return self.limits.cost(token_layers, self.n_layers, passes)

    def costs(self, tops: Iterable[ForwardPass]) -> int:
        return sum(self._cost(pass_work(one, self.spans, self.n_layers)) for top in tops for one in top.walk())

    def passes(self, pack: dict[int, list[int]]) -> list[ForwardPass]:
        """All passes of a pack of prompts."""
        paths = [i for indices in pack.values() for i in indices if self.branches[i].path is not None]
        found = self._sweeps(paths)
        pack = {p: [i for i in indices if self.branches[i].path is None] for p, indices in pack.items()}
        if not any(pack.values()):
            return found
        passes = self._sharing(pack)
        if not self.limits.hand_on and any(pass_.prefix == "own" for top in passes for pass_ in top.suffixes):
            alone = replace(self, limits=replace(self.limits, prefixes=False))._sharing(pack)
            if self.costs(alone) <= _MIN_SAVING * self.costs(passes):
                passes = alone
        return found + passes

    def _sharing(self, pack: dict[int, list[int]]) -> list[ForwardPass]:
        """Passes of a pack's branches without a path, which hand on keys and values where they may."""
        every = [i for indices in pack.values() for i in indices]
        cut_families = {self._family[i] for i in every if self.branches[i].cut is not None}
        tied = dict.fromkeys(i for i in every if cut_families and self._family[i] in cut_families)
        free = [i for i in every if i not in tied]
        # With gradients all passes are whole: keys and values handed on would hold on to the graph that made them.
        may_share = self.limits.kept_tokens is None and self.limits.prefixes
        shared = self._clean_prefixed(free) if free and may_share else None
        if shared is None:
            return self._whole([*tied, *free])
        return [*(self._whole([*tied]) if tied else ()), shared]

    @uncollected()
    def _sweeps(self, indices: Sequence[int]) -> list[ForwardPass]:
        """Of branches with a path: the first sweep of as many as fit, with the later ones as its suffixes."""
        if not indices:
            return []
        stop = max(self.spans[i].stop for i in indices)
        size = self.limits.branches(stop, len({self.branches[i].prompt for i in indices}))
        whole = Trie(self.n_layers)
        for index in indices:
            whole.add(index, self.branches[index])
        for prompt, visits in whole.visits_by_prompt().items():
            self.on_paths += visits * max(self.spans[i].stop for i in indices if self.branches[i].prompt == prompt)
        return list(chains(whole, self.branches, indices, size, stop))

    def _families(self, indices: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Branches that share a row: each of another cut. Equal ones (measured elsewhere) get rows of their own."""
        if not self.limits.prefixes:
            return {(index,): [index] for index in indices}
        families: dict[tuple[int, ...], list[int]] = {}
        taken: set[tuple[tuple[int, ...], int | None]] = set()
        for index in indices:
            key, cut = self._family[index], self.branches[index].cut
            while (key, cut) in taken:
                key = (*key, 0)
            taken.add((key, cut))
            families.setdefault(key, []).append(index)
        return families

    def _whole(self, indices: Sequence[int]) -> list[ForwardPass]:
        """Passes from token 0, with a suffix pass for every cut of their branches."""
        families = self._families(indices)
        # A family's row is its uncut branch, or, where only cut ones are wanted, the first of these.
        carrier = {k: min(group, key=lambda i: (self.branches[i].cut is not None, i)) for k, group in families.items()}
        order = sorted(families, key=lambda key: (self.spans[carrier[key]].joins, carrier[key]))
        # The suffix passes of a cut hold as many rows, on tokens that may be more than those left of it.
        tokens = max(max(self._stop(families[key]), self._widest_suffix(families[key])) for key in order)
        size = self.limits.branches(tokens, len({self.branches[i].prompt for i in indices}))
        lives = [self.spans[carrier[key]] for key in order]
        kept = self.limits.kept_tokens
        chunks = (
            spread(lives, size) if kept is None else filled([life.kept_layers * tokens for life in lives], size, kept)
        )
        return [self._whole_pass([(carrier[key], families[key]) for key in order[chunk]]) for chunk in chunks]

    def _widest_suffix(self, group: Sequence[int]) -> int:
        if not self.limits.prefixes:
            return 0
        cuts = [(cut, self.spans[i].stop) for i in group if (cut := self.branches[i].cut) is not None]
        return max((stop - cut for cut, stop in cuts), default=0)

    def _stop(self, group: Sequence[int]) -> int:
        """One past the last token that a family's row must compute from token 0."""
        if not self.limits.prefixes:
            return self.spans[group[0]].stop
        tokenwise = all(i.tokenwise for i in self.branches[group[0]].interventions)  # a family holds the same ones
        return max((tokenwise and self.branches[i].cut) or self.spans[i].stop for i in group)

    def _whole_pass(self, members: Sequence[tuple[int, list[int]]]) -> ForwardPass:
        rows = tuple(row for row, _ in members)
        stop = max(self._stop(group) for _, group in members)
        if not self.limits.prefixes:
            return ForwardPass(self._prompts(rows), 0, stop, rows, frozenset(rows))
        uncut = frozenset(i for _, group in members for i in group if self.branches[i].cut is None)
        cuts = sorted({cut for _, group in members for i in group if (cut := self.branches[i].cut) is not None})
        suffixes = []
        for cut in cuts:
            at_cut = [i for _, group in members for i in group if self.branches[i].cut == cut]
            last = max(self.spans[i].stop for i in at_cut)
            suffixes.append(ForwardPass(self._prompts(at_cut), cut, last, tuple(at_cut), frozenset(at_cut), "own"))
        return ForwardPass(self._prompts(rows), 0, stop, rows, uncut, "none", tuple(suffixes))

    def _prompts(self, indices: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({self.branches[i].prompt for i in indices}))

    def _clean_prefixed(self, indices: Sequence[int]) -> ForwardPass | None:
        """Branches grouped by first token, to start from the keys and values of the clean runs: of a pass of clean
        runs alone, or of the first group, where it starts at token 0. None where that saves too little."""
        stop = max(self.spans[i].stop for i in indices)
        prompts = self._prompts(indices)
        by_token: dict[int, list[int]] = {}
        for index in indices:
            by_token.setdefault(min(self.spans[index].token, max(stop - 1, 0)), []).append(index)
        overhead = ROWS_PER_PROMPT * len(prompts) * self.n_layers
        first, *others = sorted(by_token)
        groups, cost = self._group({0: by_token[first], **{t: by_token[t] for t in others}}, stop, len(prompts))
        if first:
            apart, more = self._group(by_token, stop, len(prompts))
            more += self._cost(stop * overhead)
            groups, cost = min((groups, cost), ([(0, []), *apart], more), key=lambda found: found[1])
        if cost > _MIN_SAVING * self._cost(stop * (overhead + sum(self._layers[i] for i in indices))):
            return None
        passes = []
        for start, members in groups:
            chunks = max(1, -(-len(members) // self.limits.branches(stop - start, len(prompts))))
            for number in range(chunks):
                rows = tuple(sorted(members[number::chunks], key=lambda i: (self.spans[i].joins, i)))
                passes.append(ForwardPass(self._prompts(rows), start, stop, rows, frozenset(rows), "clean"))
        needed = stop if passes[0].rows else max(start for start, _ in groups)
        return replace(passes[0], prompts=prompts, stop=needed, prefix="none", suffixes=tuple(passes[1:]))

    def _group(
        self, by_token: dict[int, list[int]], stop: int, prompts: int
    ) -> tuple[list[tuple[int, list[int]]], int]:
        """Split the first tokens into runs, a pass each, that cost least together (token-layers)."""
        tokens = sorted(by_token)
        overhead = ROWS_PER_PROMPT * prompts * self.n_layers
        rows = sums(len(by_token[token]) for token in tokens)
        layers = sums(sum(self._layers[i] for i in by_token[token]) for token in tokens)

        def price(begin: int, end: int) -> int | None:
            together, width = rows[end] - rows[begin], stop - tokens[begin]
            most = self.limits.branches(width, prompts)
            if end - begin > 1 and together > most:
                return None
            passes = -(-together // most)
            return self._cost(width * (layers[end] - layers[begin] + passes * overhead), passes)

        runs, cost = cheapest_runs(len(tokens), price)
        return [(tokens[run][0], [i for token in tokens[run] for i in by_token[token]]) for run in runs], cost

    def least(self, by_prompt: dict[int, list[int]]) -> int:
        """Token-layers in which states can differ from the clean run's, and each clean run once."""
        total = self.on_paths
        for indices in by_prompt.values():
            total += self.n_layers * max(self.spans[i].stop for i in indices)
            indices = [i for i in indices if self.branches[i].path is None]
            cuts = {i: cut for i in indices if (cut := self.branches[i].cut) is not None}
            for index in indices:
                span = self.spans[index]
                total += self._layers[index] * max(0, span.stop - cuts.get(index, span.token))
            for group in self._families(indices).values() if cuts else ():
                if all(i in cuts for i in group):  # only cut branches: their prefix is needed as well
                    span = self.spans[group[0]]
                    total += span.layers * max(0, max(cuts[i] for i in group) - span.token)
        return total
