"""What a run would cost, from the plan of its passes and a few seconds of measuring.

    estimates = estimate(outline, names, inputs, settings)
    print(describe(outline, estimates))

The plan knows the work: token-layers (one token of one row through one layer) and unembedded positions.
What one of them takes is measured, not guessed: the same kinds of passes run on a miniature, three layers of
the model's own shape with random weights, on the same device and in the same dtype, through the same engine.
So attention, norms, hooks, measurements and gradients are in the figure as they are in the run.

Adaptive integrated gradients choose their nodes as they go; `workload.NODES` says what is assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hookdepth.analyses import Inputs, Settings, Task, tasks_for
from hookdepth.runs.outline import Outline, miniature, weight_bytes
from hookdepth.runs.rates import LAYERS, Rates
from hookdepth.runs.workload import Work, token_flops, unembed_flops, work_of


@dataclass(frozen=True)
class Estimate:
    """A task's work and the seconds that it would take in one process."""

    task: Task
    work: Work
    flops: float
    seconds: float


def estimate(
    outline: Outline,
    names: Iterable[str],
    inputs: Inputs,
    settings: Settings,
    *,
    measure: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Estimate]:
    """Work and time of each task.

        sum(one.seconds for one in estimate(outline, ["skip-current"], inputs, Settings()))

    Args:
        measure: run the miniature; without, seconds are 0.
        clock: what seconds are read off.
    """
    tasks = tasks_for(names, outline, inputs, settings)
    small = miniature(outline, LAYERS) if measure else None
    estimates = []
    for task in tasks:
        work = work_of(task, outline, inputs, settings)
        seconds = Rates(outline, small, inputs, settings, clock).seconds(task, work) if small else 0.0
        flops = work.token_layers * token_flops(outline, work.width)
        flops = (flops + work.positions * unembed_flops(outline)) * (2 if work.backward else 1)
        estimates.append(Estimate(task, work, flops, seconds))
    return estimates


def describe(outline: Outline, estimates: Sequence[Estimate], notes: Sequence[str] = ()) -> str:
    """A table of the estimates, and the totals."""
    lines = [f"{outline.name}, {outline.n_layers} layers, {_place(outline)}"]
    lines.append(f"{'':36} {'chunks':>6} {'passes':>9} {'token-layers':>15} {'TFLOP':>9} {'GiB':>6} {'time':>9}")
    for one in estimates:
        work, names = one.work, " and ".join(one.task.analyses)
        cells = f"{one.task.n_chunks:>6} {work.passes:>9,} {work.token_layers:>15,.0f} {one.flops / 1e12:>9,.2f}"
        lines.append(f"{names:36} {cells} {work.bytes / 2**30:>6.1f} {_duration(one.seconds):>9}")
    flops, seconds = sum(one.flops for one in estimates), sum(one.seconds for one in estimates)
    weights = weight_bytes(outline) / 2**30
    most = max((one.work.bytes for one in estimates), default=0) / 2**30
    lines.append(f"memory: {weights:.1f} GiB of weights, and at most about {most:.1f} GiB beside them")
    if seconds:
        rate = flops / seconds / 1e12
        lines.append(
            f"time: about {_duration(seconds)} in one process, without loading and figures ({rate:.3g} TFLOP/s as "
            f"measured here just now; where the rate is another, {flops / 1e12:,.1f} TFLOP divided by it)"
        )
    return "\n".join([*lines, *notes])


def _place(outline: Outline) -> str:
    dtype = str(outline.dtype).removeprefix("torch.")
    return f"{dtype} on {outline.device}" + ("" if outline.quantize == "none" else f", {outline.quantize}")


def _duration(seconds: float) -> str:
    for size, chunk in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {chunk}"
    return f"{seconds:.1f} s" if seconds else "?"
