"""Analyses that share their passes: which items run together, and whose branches are whose.

for group in groups_of([SkipCurrent(), SkipFuture()], Subject(model, inputs, Settings())):
    partials = [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)]
    group.finish(partials)     # name → tensors
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from hookdepth.analyses.base import Analysis, stacked
from hookdepth.analyses.subject import Measured, OnPass, Partial, Subject, Tensors, noise_floor
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurement import Measurement, zero_where_clean
from hookdepth.engine.passes import measure, plan_for
from hookdepth.engine.plan import Plan, family_of, peak_rows, span_of
from hookdepth.runs.asking import branches_of, collected, measured_by, reduced

_PLANNED = 12  # chunks at most
_SHORT = 4096  # rows × tokens up to which short prompts share a chunk


def groups_of(analyses: Iterable[Analysis], subject: Subject) -> list[Group]:
    """The analyses, those that share passes together, in their order."""
    groups: dict[str, list[Analysis]] = {}
    for analysis in sorted(analyses, key=lambda one: one.order):
        analysis.refuse(subject)
        groups.setdefault(analysis.together or analysis.name, []).append(analysis)
    return [Group(name, members, subject) for name, members in groups.items()]


class Group:
    """Analyses that share passes, on one subject, in chunks of items; `begin` of the first items are known already."""

    def __init__(self, name: str, analyses: Sequence[Analysis], subject: Subject, begin: int = 0) -> None:
        self.name, self.members, self.subject, self.begin = name, tuple(analyses), subject, begin
        self.branching = analyses[0].branching

    @property
    def analyses(self) -> tuple[str, ...]:
        """Names of the results that it gives."""
        return tuple(member.name for member in self.members)

    @property
    def n_chunks(self) -> int:
        """How many chunks of work there are."""
        return len(self.chunks)

    @cached_property
    def chunks(self) -> list[Sequence[int]]:
        """Items by chunk: consecutive prompts that are short enough to fill a pass together, others alone."""
        first = self.members[0]
        items = first.items(self.subject)[self.begin :]
        if not self.branching or first.needs == "probes" or not items:
            return [[item] for item in items]
        lengths = [len(first.tokens(self.subject, item)) for item in items]
        longest = items[max(range(len(lengths)), key=lengths.__getitem__)]
        rows = self._rows(longest, max(lengths))
        return [[items[place] for place in places] for places in _consecutive(lengths, rows)]

    def _rows(self, item: int, length: int) -> int:
        """Rows of one item's clean run, control and branches at the layer that has most; all cuts are one row."""
        own = [branch for member in self.members for branch in branches_of(member, self.subject, item, planned=True)]
        spans = {family_of(branch): span_of(branch, length, self.subject.model.n_layers) for branch in own}
        return 2 + peak_rows(spans.values())

    def branches(self, chunk: int) -> tuple[list[Branch], list[int]]:
        """All branches of a chunk, and the lengths of its prompts: for planning."""
        listed = [
            branch.of_prompt(place)
            for member in self.members
            for place, item in enumerate(self.chunks[chunk])
            for branch in branches_of(member, self.subject, item, planned=True)
        ]
        return listed, [len(self.members[0].tokens(self.subject, item)) for item in self.chunks[chunk]]

    def plans(self) -> tuple[list[tuple[Plan, list[Branch], list[int]]], float]:
        """The plans of some chunks, and for how many each stands: the others are taken to be like them."""
        places = range(0, self.n_chunks, max(1, -(-self.n_chunks // _PLANNED))) if self.branching else range(0)
        most, changes_only = self.subject.settings.max_rows, zero_where_clean(self.measurements)
        found = []
        for branches, lengths in map(self.branches, places):
            if branches:
                plan = plan_for(self.subject.model, branches, lengths, max_rows=most, changes_only=changes_only)
                found.append((plan, branches, lengths))
        return found, self.n_chunks / max(1, len(places))

    def _listed(self, chunk: int) -> Iterator[tuple[Analysis, int, list[Branch]]]:
        for member in self.members:
            for place, item in enumerate(self.chunks[chunk]):
                own = [branch.of_prompt(place) for branch in branches_of(member, self.subject, item)]
                yield member, item, own

    @property
    def measurements(self) -> list[Measurement]:
        """What is measured on any of its branches, each once."""
        return list({m.name: m for member in self.members for m in member.measurements}.values())

    def run(self, chunk: int, on_pass: OnPass) -> Partial:
        """Measure a chunk; tensors are named after analysis and tensor, their first axis is the chunk's items."""
        # What is computed between two passes must not depend on the caller's autocast, defaults and modes either.
        with self.subject.model.evaluating():
            return self._branch(chunk, on_pass) if self.branching else self._measure(chunk, on_pass)

    def _measure(self, chunk: int, on_pass: OnPass) -> Partial:
        (member,) = self.members
        partials = [measured_by(member, self.subject, item, on_pass) for item in self.chunks[chunk]]
        together = _stacked({member.name: [partial.tensors for partial in partials]})
        return Partial(together, sum(own.passes for own in partials), **noise_floor(partials))

    def _branch(self, chunk: int, on_pass: OnPass) -> Partial:
        model, limit = self.subject.model, self.subject.settings.max_rows
        prompts = [self.members[0].tokens(self.subject, item) for item in self.chunks[chunk]]
        listed = list(self._listed(chunk))
        branches = [branch for _, _, own in listed for branch in own]
        found = measure(model, prompts, branches, self.measurements, max_rows=limit, on_pass=on_pass)
        given: dict[str, list[Tensors]] = {member.name: [] for member in self.members}
        begin = 0
        for member, item, own in listed:
            mine = slice(begin, begin := begin + len(own))
            layer = {name: values[mine] for name, values in found.layer.items()}
            output = {name: values[mine] for name, values in found.output.items()}
            both = {**found.clean_layer, **found.clean_output}
            clean = {name: values[mine] for name, values in both.items()}
            given[member.name].append(collected(member, self.subject, item, Measured(own, layer, output, clean)))
        return Partial(_stacked(given), found.passes, found.null_effect, found.null_where)

    def finish(
        self, partials: Sequence[Partial], known: Mapping[str, Sequence[Tensors]] | None = None
    ) -> dict[str, Tensors]:
        """Results by analysis, from the partials of all chunks in order, and the items that were known before."""
        results = {}
        for member in self.members:
            prefix = f"{member.name}/"
            items = [
                {name.removeprefix(prefix): own for name, own in zip(names, values, strict=True)}
                for partial in partials
                for names in [[name for name in partial.tensors if name.startswith(prefix)]]
                for values in zip(*(partial.tensors[name] for name in names), strict=True)
            ]
            with self.subject.model.evaluating():
                results[member.name] = reduced(member, self.subject, [*(known or {}).get(member.name, ()), *items])
        return results


def _stacked(items: dict[str, list[Tensors]]) -> Tensors:
    named: dict[str, list[Tensor]] = {}
    for analysis, listed in items.items():
        for tensors in listed:
            for name, value in tensors.items():
                named.setdefault(f"{analysis}/{name}", []).append(value)
    return {name: stacked(name, values) for name, values in named.items()}


def _consecutive(lengths: Sequence[int], rows: int, row_tokens: int = _SHORT) -> list[range]:
    """Consecutive prompts that are short enough to share passes; the others alone."""
    chunks: list[range] = []
    first = 0
    while first < len(lengths):
        end = first + 1
        while end < len(lengths) and max(lengths[first : end + 1]) * rows * (end + 1 - first) <= row_tokens:
            end += 1
        chunks.append(range(first, end))
        first = end
    return chunks
