"""What a run would cost: its work from the plans of its passes, its time from a few seconds of measuring.

What an analysis does is counted, before anything runs (`Analysis.work`, `engine.work`). What that takes is measured:
the analysis itself, on a short sample, through a miniature: a few layers of the model's shape with random weights, on
the same device, in the same dtype. So attention, norms, hooks, measurements and gradients are in the figure as they
are in the run. The sample's work is counted as the run's is, so what differs between them (layers, rows, tokens, an
MLP that nobody reads) is known. Two rates are unknown, the layers' and the unembedding's: with next to no vocabulary
what is left is the layers', and the difference is the unembedding's. (Miniatures of different depths would tell the
two apart as well; but both grow with depth, and so does the noise.)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import Inputs, Measured, Subject, Tensors
from hookdepth.data import Probe
from hookdepth.engine.machines import Machine
from hookdepth.engine.work import Work, work_of_plan
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.runs.outline import Outline, miniature, with_vocabulary
from hookdepth.runs.sharing import Group, groups_of

LAYERS = 3  # of the miniature
_FLOPS = {"cpu": 6e10, "cuda": 2e12}  # of one timed call, if the sample can be made so short
_FEW = 64  # tokens of the small vocabulary; samples are made of these
_SHORTEST = 8  # tokens of a sample, beside those that are left alone


@dataclass(frozen=True)
class Estimate:
    """What the analyses of a group do together: one.group.analyses, one.work.passes, one.seconds."""

    group: Group
    work: Work
    flops: float
    seconds: float  # in one process; 0 where nothing could be measured


def estimate(
    outline: Outline,
    analyses: Sequence[Analysis],
    inputs: Inputs,
    settings: Settings,
    *,
    measure: bool = True,
    machine: Machine | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Estimate]:
    """Work and time of the analyses, those that share their passes together.

        sum(one.seconds for one in estimate(outline, chosen("all"), inputs, Settings()))

    Args:
        measure: run the miniature; without, seconds are 0.
        machine: a GPU whose data sheet says how long it takes; nothing is run.
    """
    groups = groups_of(analyses, Subject(outline, inputs, settings))
    small = miniature(outline, LAYERS) if measure and not machine else None
    estimates = []
    for group in groups:
        work = work_of(group)
        flops, seconds = work.flops(outline), work.seconds(outline, machine) if machine else 0.0
        if small and sum(flops):
            try:
                seconds = sum(f * rate for f, rate in zip(flops, _rates(group, small, clock), strict=True))
            except (HookdepthError, IndexError) as error:  # e.g. it names a layer or a token that the miniature lacks
                note = f"note: no time for {' and '.join(group.analyses)}, which did not run on {small.name} ({error})"
                work += Work(notes=(note,))
        estimates.append(Estimate(group, work, sum(flops), seconds))
    return estimates


def work_of(group: Group) -> Work:
    """The work of all chunks of a group; an outline will do for the model: work_of(group).token_layers."""
    subject, (plans, times) = group.subject, group.plans()
    counted = (work_of_plan(subject.model, *one, group.measurements) for one in plans)
    total = sum(counted, Work()).times(times)
    return sum((member.work(subject) for member in group.members), total)


def _rates(group: Group, small: Decoder, clock: Callable[[], float]) -> tuple[float, float]:
    sample = _sample(group, small)
    _, unembedding = work_of(sample).flops(small)
    whole = _timed(sample, clock) if unembedding else 0.0
    with with_vocabulary(small, _few(small)):
        without = _timed(sample, clock)
        layers, rest = work_of(sample).flops(small)
        per_unembedding = max(0.0, whole - without) / max(1.0, unembedding - rest)
        larger = _sample(group, small)  # what was spent on the vocabulary is there for the layers
        if (more := work_of(larger).flops(small)) != (layers, rest):
            without, (layers, rest) = _timed(larger, clock), more
        return max(0.0, without - rest * per_unembedding) / layers, per_unembedding


def _sample(group: Group, small: Decoder) -> Group:
    """The same analyses on a prompt of usual length, or, where that takes long, on a shorter one; and with their
    branches as often as the model has layers for each of the miniature's: a product of few rows takes as long as one
    of many."""
    first, subject = group.members[0], group.subject
    tokens = round(statistics.mean(map(len, first.texts(subject.inputs))))
    shortest, times = _SHORTEST + first.front(subject.settings), 1

    def made(tokens: int, times: int) -> Group:
        inputs = _shortened(subject.inputs, tokens, _few(small))
        settings = reduce(lambda so_far, member: member.sample(so_far, times), group.members, subject.settings)
        return groups_of([_often(one, times) for one in group.members], Subject(small, inputs, settings))[0]

    def affordable(sample: Group) -> bool:
        return sum(work_of(sample).flops(small)) <= _FLOPS[subject.model.device.type]

    while tokens > shortest and not affordable(made(tokens, 1)):
        tokens = max(shortest, tokens // 2)
    while 2 * times * LAYERS <= subject.model.n_layers and affordable(made(tokens, 2 * times)):
        times *= 2
    return made(tokens, times)


def _often(analysis: Analysis, times: int) -> Analysis:
    """The same with each of its branches several times; its results are those of the first."""

    def collect(subject: Subject, item: int, measured: Measured) -> Tensors:
        own = len(measured.branches) // times
        given = (measured.layer, measured.output, measured.clean)
        first = ({name: v[:own] for name, v in found.items()} for found in given)
        return analysis.collect(subject, item, Measured(measured.branches[:own], *first))

    often = copy.copy(analysis)
    vars(often).update(
        branches=lambda subject, item: analysis.branches(subject, item) * times,
        planned=lambda subject, item: analysis.planned(subject, item) * times,
        collect=collect,
    )
    return often


def _shortened(inputs: Inputs, tokens: int, vocabulary: int) -> Inputs:
    """A prompt of other tokens, with cuts where one's were before, in proportion; and the longest probe's end."""
    ids = tuple(place % vocabulary for place in range(tokens))
    with_cuts = zip(inputs.cuts, map(len, inputs.prompts), strict=False)
    cuts, length = max(with_cuts, default=((), 1), key=lambda one: len(one[0]))
    # No cut lies left of token 8, so that what is left alone at the front never reaches one.
    scaled = tuple(dict.fromkeys(min(tokens - 1, max(8, cut * tokens // length)) for cut in cuts))
    longest = sorted(inputs.probes, key=lambda one: len(one.token_ids))[-1:]
    probes = tuple(_end(probe, tokens, vocabulary) for probe in longest)
    levels = [replace(one, probe=_end(one.probe, tokens, vocabulary)) for one in inputs.levels]
    leveled = [replace(one, cuts=one.probe.answer_positions[: len(one.cuts)]) for one in levels]
    most = sorted(leveled, key=lambda one: len(one.cuts))[-1:]
    asked = tuple(replace(one, token_ids=ids) for one in inputs.questions[:1])
    return Inputs((ids,), (scaled,), (ids,) if inputs.baseline else (), probes, tuple(most), questions=asked)


def _end(probe: Probe, tokens: int, vocabulary: int) -> Probe:
    gone = min(max(0, len(probe.token_ids) - tokens), min(probe.answer_positions) - 1)
    ids = tuple(place % vocabulary for place in range(len(probe.token_ids) - gone))
    positions = tuple(position - gone for position in probe.answer_positions)
    return replace(probe, token_ids=ids, tokens=probe.tokens[gone:], answer_positions=positions)


def _few(small: Decoder) -> int:
    return min(_FEW, int(small.hf.get_input_embeddings().weight.shape[0]) // 2)


def _timed(sample: Group, clock: Callable[[], float], enough: float = 2.0) -> float:
    device = sample.subject.model.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    def once() -> float:
        again = Group(sample.name, sample.members, replace(sample.subject))  # what a subject shares is computed again
        begin = now()
        for chunk in range(again.n_chunks):
            again.run(chunk, lambda: None)
        return now() - begin

    first = once()
    taken = [first] if first > enough else [once()]
    while len(taken) < 3 and sum(taken) < enough:
        taken.append(once())
    return statistics.median(taken)


def describe(outline: Outline, estimates: Sequence[Estimate], notes: Sequence[str] = ()) -> str:
    """A table of the estimates, the totals, and what was assumed: print(describe(outline, estimates))."""
    machine = outline.machine
    place = f"{str(outline.dtype).removeprefix('torch.')} on {machine.label if machine else outline.device}"
    quantized = "" if outline.quantize == "none" else f", {outline.quantize}"
    lines = [f"{outline.name}, {outline.n_layers} layers, {place}{quantized}"]
    lines.append(f"{'':36} {'chunks':>6} {'passes':>9} {'token-layers':>15} {'TFLOP':>9} {'GiB':>6} {'time':>9}")
    for one in estimates:
        work, names = one.work, " and ".join(one.group.analyses)
        cells = f"{one.group.n_chunks:>6} {work.passes:>9,.0f} {work.token_layers:>15,.0f} {one.flops / 1e12:>9,.2f}"
        lines.append(f"{names:36} {cells} {work.bytes / 2**30:>6.1f} {_duration(one.seconds):>9}")
    most = max((one.work.bytes for one in estimates), default=0) / 2**30
    lines.append(
        f"memory: {outline.weight_bytes / 2**30:.1f} GiB of weights, and at most about {most:.1f} GiB beside them"
    )
    flops, seconds = sum(one.flops for one in estimates if one.seconds), sum(one.seconds for one in estimates)
    if seconds:
        rate = f"{flops / seconds / 1e12:.3g} TFLOP/s"
        how = f"{rate} as measured here just now; where the rate is another, {flops / 1e12:,.1f} TFLOP divided by it"
        if machine:
            how = f"{rate}, by the machine's data sheet; nothing was measured"
        lines.append(f"time: about {_duration(seconds)} in one process, without loading and figures ({how})")
    if machine and not all(one.work.fits(outline, machine) for one in estimates):
        lines.append(f"it does not fit: {machine.label} has {machine.memory:.0f} GiB")
    assumed = dict.fromkeys(note for one in estimates for note in one.work.notes)
    return "\n".join([*lines, *assumed, *notes])


def compare(plans: Mapping[str, tuple[Outline, Sequence[Estimate], Sequence[str]]]) -> str:
    """A line a machine, of outlines that have one: print(compare({"h100": (outline, estimates, notes)}))."""
    first = next(iter(plans.values()))[0]
    lines = [
        f"{first.name}, {first.n_layers} layers, {first.weight_bytes / 2**30:.1f} GiB of weights in "
        f"{str(first.dtype).removeprefix('torch.')}; times by data sheets, nothing was measured"
    ]
    lines.append(f"{'':10} {'GiB':>5} {'passes':>9} {'peak GiB':>9} {'time':>10}")
    for name, (outline, estimates, _) in plans.items():
        assert outline.machine is not None
        most = (outline.weight_bytes + max((one.work.bytes for one in estimates), default=0)) / 2**30
        fits = all(one.work.fits(outline, outline.machine) for one in estimates)
        time = _duration(sum(one.seconds for one in estimates)) if fits else "too small"
        passes = sum(one.work.passes for one in estimates)
        lines.append(f"{name:10} {outline.machine.memory:>5.0f} {passes:>9,.0f} {most:>9.1f} {time:>10}")
    assumed = [note for _, estimates, _ in plans.values() for one in estimates for note in one.work.notes]
    noted = [note for _, _, notes in plans.values() for note in notes]
    return "\n".join([*lines, *dict.fromkeys([*assumed, *noted])])


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds else "?"
