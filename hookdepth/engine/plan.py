"""Passes and plans as data: what `planner` makes, `rows` reads and `passes` runs.

    from hookdepth.engine.planner import make_plan

    plan = make_plan([Branch((Skip(s),)) for s in range(30)], lengths=[180], n_layers=30)
    for pass in plan.walk():
        pass_.start, pass_.stop, plan.rows_of(pass)     # 0, 180, 32

Nothing here needs a model or a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hookdepth.engine.branches import Branch
from hookdepth.engine.tokens import extent
from hookdepth.engine.trie import Trie
from hookdepth.model.sites import ORDER

_MLP_IS_READ = ORDER.index("neurons")
# From here on a row runs through nothing of its layer that counts.
CLEAN, CONTROL = -2, -1
"""Row numbers of a prompt's clean run and null branch, where other rows carry a branch's index."""
ROWS_PER_PROMPT = 2
"""Rows that a prompt adds to a pass besides its branches: its clean run and its control."""


class Span(NamedTuple):
    """Where a branch differs from its clean run.

    Attributes:
        joins: (layer, place of the site in `sites.ORDER`): where its row joins.
        first, last: first and last layer that it runs through (last < first: output only).
        token, stop: first token that differs, one past the last that is measured.
    """

    joins: tuple[int, int]
    first: int
    last: int
    token: int
    stop: int

    @property
    def layers(self) -> int:
        """Layers its row runs through."""
        return max(0, self.last + 1 - self.first)

    @property
    def kept_layers(self) -> int:
        """Layers whose activations a backward pass needs of its row; that at whose output it joins is one of them."""
        return self.last + 1 - self.joins[0]


def span_of(branch: Branch, length: int, n_layers: int, changes_only: bool = True) -> Span:
    """The span of a branch in a prompt of `length` tokens; `changes_only` as in `make_plan`.

    span_of(Branch((Skip(3),)), 20, 30)   # born after layer 3, runs through 4..29, tokens 1..19
    """
    layer, site = branch.joins()
    order = ORDER.index(site)
    first = layer + (order >= _MLP_IS_READ)
    last = n_layers - 1 if branch.until is None else branch.until
    if not all(i.tokenwise for i in branch.interventions):
        # It may look at any token of the prompt, so a pass must hold all of them.
        return Span((layer, order), first, last, 0, length)
    changed = [where[0] for i in branch.interventions if (where := extent(i.tokens, length))]
    measured = branch.measured_extent(length)
    if not changes_only and measured:
        changed.append(measured[0])
    stop = 1 + measured[1] if measured else (branch.cut or 0)
    return Span((layer, order), first, last, min(changed, default=length), stop)


def family_of(branch: Branch) -> tuple[int, ...]:
    """Branches of one family hold the same intervention objects and live as long: their states left of a cut
    are the same."""
    until = -1 if branch.until is None else branch.until
    return (branch.prompt, until, *(id(intervention) for intervention in branch.interventions))


@dataclass(frozen=True)
class Sweep:
    """Which of the passes of branches with a path: the `number`-th through the layers, of the paths of a trie."""

    trie: Trie = field(repr=False)
    number: int

    @property
    def control_joins(self) -> int:
        """The layer at which controls join: in later sweeps halfway, with a state of the first one, as paths do."""
        return self.trie.n_layers // 2 if self.number else 0


@dataclass(frozen=True)
class ForwardPass:
    """One forward call.

    Attributes:
        prompts: the prompts whose clean runs are its first rows.
        start, stop: the tokens it computes; keys and values left of `start` are handed in.
        rows: indices of branches, in the order in which they join.
        measured: those of `rows` whose measurements are wanted; the others only lend keys and values.
        prefix: "none", "clean" or "own" (see the module).
        suffixes: passes that start from what this one recorded; of a sweep, the later ones.
        sweep: of branches with a path: which part of their ways this is; None for all others.
    """

    prompts: tuple[int, ...]
    start: int
    stop: int
    rows: tuple[int, ...]
    measured: frozenset[int]
    prefix: str = "none"
    suffixes: tuple[ForwardPass, ...] = ()
    sweep: Sweep | None = None

    @property
    def record(self) -> bool:
        """Whether other passes start from its keys and values."""
        return bool(self.suffixes) and self.sweep is None

    def walk(self) -> Iterator[ForwardPass]:
        """This pass and those that start from it, in the order in which they run."""
        yield self
        for suffix in self.suffixes:
            yield from suffix.walk()


@dataclass(frozen=True)
class Plan:
    """Passes for a list of branches, with the work that they do.

    Attributes:
        passes: those that start at token 0 of their prompts; each with its suffixes.
        work: token-layers computed (one token through one layer), null branches and clean runs included.
        least: token-layers in which a branch can differ from its clean run, plus each clean run once.
        spans: per branch.
        cost: what all passes cost, in the time of a token through a layer: their work, and what each costs by itself.
    """

    passes: tuple[ForwardPass, ...]
    work: int
    least: int
    n_layers: int
    spans: tuple[Span, ...] = field(repr=False)
    cost: int

    def walk(self) -> Iterator[ForwardPass]:
        """All passes, in the order in which they run."""
        for top in self.passes:
            yield from top.walk()

    @property
    def n_passes(self) -> int:
        """Forward calls in all."""
        return sum(1 for _ in self.walk())

    @property
    def peak_row_tokens(self) -> int:
        """Largest rows × tokens of a pass: what memory grows with."""
        return max((self.rows_of(pass_) * (pass_.stop - pass_.start) for pass_ in self.walk()), default=0)

    @property
    def peak_kept_tokens(self) -> int:
        """Largest tokens × layers of a pass's branches: what memory grows with where gradients flow."""
        return max((kept_tokens(pass_, self.spans) for pass_ in self.walk()), default=0)

    def rows_of(self, pass_: ForwardPass) -> int:
        """Most rows that a pass has at any layer: clean runs, null branches and branches."""
        own = pass_.sweep.trie.peak(pass_.sweep.number) if pass_.sweep else peak_rows(self.spans[r] for r in pass_.rows)
        return ROWS_PER_PROMPT * len(pass_.prompts) + own

    def table(self) -> str:
        """One line a pass, then the totals."""
        lines = [f"{'pass':>6}  {'prompts':>7}  {'prefix':>6}  {'tokens':>11}  {'rows':>5}  {'token-layers':>12}"]
        for number, pass_ in enumerate(self.walk()):
            span = f"{pass_.start}..{pass_.stop - 1}"
            work = pass_work(pass_, self.spans, self.n_layers)
            head = f"{number:>6}  {len(pass_.prompts):>7}  {pass_.prefix:>6}  {span:>11}"
            lines.append(f"{head}  {self.rows_of(pass_):>5}  {work:>12,}")
        ratio = self.work / max(self.least, 1)
        lines.append(f"work {self.work:,} token-layers, least possible {self.least:,}: {ratio:.2f} times")
        return "\n".join(lines)


def peak_rows(spans: Iterable[Span]) -> int:
    """Most branches alive at one layer: those that live for a layer do not add up."""
    change: dict[int, int] = {}
    for span in spans:
        first = min(span.first, span.last)  # one that runs through no layer joins at the last one's output
        change[first] = change.get(first, 0) + 1
        change[span.last + 1] = change.get(span.last + 1, 0) - 1
    peak = alive = 0
    for layer in sorted(change):
        alive += change[layer]
        peak = max(peak, alive)
    return peak


def kept_tokens(pass_: ForwardPass, spans: Sequence[Span]) -> int:
    """Tokens × layers of a pass's branches that a backward pass keeps."""
    return sum(spans[row].kept_layers for row in pass_.rows) * (pass_.stop - pass_.start)


def pass_work(pass_: ForwardPass, spans: Sequence[Span], n_layers: int) -> int:
    """Token-layers that a pass computes."""
    layers = ROWS_PER_PROMPT * len(pass_.prompts) * n_layers
    if pass_.sweep is None:
        layers += sum(spans[row].layers for row in pass_.rows)
    else:
        layers += pass_.sweep.trie.visits(pass_.sweep.number) - len(pass_.prompts) * pass_.sweep.control_joins
    return layers * (pass_.stop - pass_.start)
