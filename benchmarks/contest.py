"""One row: ours and every peer checked against each other, then timed in turns.

    record, basis = contest(workload, subject, Meter(subject.model), Effort())
    record["contestants"]["hookdepth"]["seconds"]

Each contestant's first run is its warm-up, its memory is read there, and its numbers are compared with ours; one
whose numbers differ is not timed. A peer that would take longer than `peer_seconds` runs some of the units
(layers), evenly spread, and its time is scaled by the number of passes; the row says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.entries import Contestant, Outcome, Tensors, Workload
from benchmarks.limits import Machine, floor, model_size, typical
from benchmarks.measure import once, seconds
from benchmarks.models import Subject
from hookdepth import Decoder
from hookdepth.engine.machines import of_model
from hookdepth.engine.memory import memory_room

OURS = "hookdepth"
# float32: products of another shape sum in another order; a GPU has more orders to choose from, and an
# overlap moves by whole tokens where two logits tie. bfloat16: what the loops' own rounding does to them.
LARGEST = {"cpu": 1e-4, "cuda": 1e-3}
LARGEST_OVERLAP = 1e-2
# The integrand is sharp at the demo model's early layers: rounding a path's points in another order moved a sum of 32
# steps by 6e-4. Peers that round as we do agree to 1e-7.
LARGEST_ATTRIBUTION = 2e-3
RMS_IN_BFLOAT16 = 0.25


@dataclass(frozen=True)
class Effort:
    """How long to take: rounds at most and at least, seconds for a row (rounds end there), seconds for a peer's run."""

    rounds: int = 3
    row_seconds: float = 30.0
    peer_seconds: float = 3.0
    least_rounds: int = 1


@dataclass
class _Entry:
    run: Callable[[], object]
    record: dict[str, Any]
    taken: list[float]
    scale: float = 1.0


def contest(
    workload: Workload,
    subject: Subject,
    meter: Callable[[], Machine],
    effort: Effort,
    reference: Tensors | None = None,
    trusted: Collection[str] = (),
    cold: Callable[[int], Callable[[], object]] | None = None,
) -> tuple[dict[str, Any], Tensors]:
    """Check and time; the record of the row, and what was compared (the reference of another dtype's row).

    Peers that gave our numbers in float32 are `trusted`: in bfloat16 their difference is shown, not judged. On a
    trained model the integrand of integrated gradients is so sharp that rounding alone moves whole attributions.
    `cold` gives ours for prompts that are so many tokens shorter: a user meets a new length with every prompt, and
    whatever is planned for a shape (kernels, buffers) is planned then.
    """
    device = subject.model.device
    begin = time.perf_counter()
    taken, peak, outcome = once(workload.ours, device)
    basis = workload.check().tensors if workload.check else outcome.tensors
    room = round(memory_room(subject.model) / 2**20)
    ours: dict[str, Any] = {
        "peak_mib": _mib(peak),
        "room_mib": room,
        "from_float32": rms(basis, reference) if reference else None,
    }
    entries = {OURS: _Entry(workload.ours, ours, [taken])}
    records: dict[str, dict[str, Any]] = {OURS: ours}
    for contestant in workload.contestants:
        name = contestant.peer.name
        entry = _try(contestant, basis, reference, subject, effort, name in trusted)
        records[name] = entry.record
        if entry.taken:
            entries[name] = entry
    rounds, machine = _take_turns(entries, effort, begin, device, meter)
    if cold:
        ours["cold_seconds"] = statistics.median(seconds(cold(1 + number), device) for number in range(rounds))
    for entry in entries.values():
        entry.record["seconds"] = entry.scale * statistics.median(entry.taken)
        entry.record["runs"] = [round(entry.scale * value, 5) for value in entry.taken]
    for record in records.values():
        if "seconds" in record:
            record["ratio"] = record["seconds"] / entries[OURS].record["seconds"]
    limit = floor(model_size(subject.model), workload.need(outcome), machine)
    row = {
        "workload": workload.name,
        "model": subject.name,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "floor_s": limit.seconds,
        "bound": limit.bound,
        "gflops": machine.flops / 1e9,
        "gbytes_per_s": machine.bandwidth / 1e9,
        "least_flops": limit.flops,
        "of_floor": limit.seconds / ours["seconds"],
        "mfu": limit.flops / ours["seconds"] / peak_rate(subject.model, machine),
        "interventions_per_s": workload.interventions(outcome) / ours["seconds"],
        "null_effect": outcome.null_effect,
        "rounds": rounds,
        "targets": workload.targets,
        "contestants": records,
    }
    return row, basis


def peak_rate(model: Decoder, machine: Machine) -> float:
    """What the share of peak is of: a known GPU's data sheet, elsewhere what products reached beside the runs."""
    known = of_model(model)
    return machine.flops if known is None else known.rate(model)


def _try(
    contestant: Contestant,
    basis: Tensors,
    reference: Tensors | None,
    subject: Subject,
    effort: Effort,
    trusted: bool,
) -> _Entry:
    """A contestant's checked first run; no times where it is absent, fails, or gives other numbers."""
    run = contestant.run
    if contestant.peer.absent:
        return _Entry(lambda: None, {"status": contestant.peer.absent}, [])
    device = subject.model.device
    try:
        units, (taken, peak, found) = _first_run(contestant, effort, device)
    except Exception as error:  # noqa: BLE001 - a peer that fails loses its own line, no other; the run exits 1
        return _Entry(lambda: None, {"status": f"FAILED: {type(error).__name__}: {error}"[:300]}, [])
    ours = select(basis, units)
    record: dict[str, Any] = {
        "peak_mib": _mib(peak),
        "difference": largest(found, ours),
        "from_float32": rms(found, select(reference, units)) if reference else None,
        "note": _note(contestant, units),
    }
    wrong = "" if trusted else disagreement(found, ours, subject)
    if wrong:
        return _Entry(lambda: None, {**record, "status": f"FAILED: {wrong}: not timed"}, [])
    scale = contestant.scale
    if units:
        scale *= contestant.passes(len(contestant.units)) / contestant.passes(len(units))
    return _Entry(lambda: run(units), record, [taken], scale)


def _first_run(
    contestant: Contestant, effort: Effort, device: torch.device
) -> tuple[list[int], tuple[float, int | None, Tensors]]:
    """Warm-up on one unit, then as many units as the time for a peer allows."""
    if not contestant.units:
        return [], once(lambda: contestant.run([]), device)
    pilot = spread(contestant.units, 1)
    first = once(lambda: contestant.run(pilot), device)
    per_pass = first[0] / contestant.passes(1)
    total = len(contestant.units)
    fits = [n for n in range(1, total + 1) if per_pass * contestant.passes(n) <= effort.peer_seconds]
    units = spread(contestant.units, max(fits, default=1))
    return units, first if units == pilot else once(lambda: contestant.run(units), device)


def spread(units: Sequence[int], n: int) -> list[int]:
    """n of the units, evenly spread: spread(range(30), 2) is [7, 22]."""
    return [units[int((k + 0.5) * len(units) / n)] for k in range(n)]


def _take_turns(
    entries: dict[str, _Entry], effort: Effort, begin: float, device: torch.device, meter: Callable[[], Machine]
) -> tuple[int, Machine]:
    """Every round times all, so that drift of the machine hits all alike; how many rounds, and the machine's rates
    before and after our own runs. First runs, which warm up and whose memory is watched, do not count."""
    readings = []
    round_cost = sum(entry.taken[0] for entry in entries.values())
    done = 0
    while done < effort.rounds:
        if done >= effort.least_rounds and time.perf_counter() - begin + round_cost > effort.row_seconds:
            break
        for name, entry in entries.items():
            if name == OURS:
                readings.append(meter())
            entry.taken.append(seconds(entry.run, device))
            if name == OURS:
                readings.append(meter())
        done += 1
    for entry in entries.values():
        del entry.taken[0]
    return done, typical(readings)


def disagreement(found: Tensors, ours: Tensors, subject: Subject) -> str:
    """Why a peer's numbers are not ours; empty where they are."""
    if subject.model.dtype != torch.float32:
        distance = rms(found, ours)
        return "" if distance <= RMS_IN_BFLOAT16 else f"differs by {distance:.2g} in rms"
    for name, values in ours.items():
        bound = LARGEST[subject.model.device.type]
        bound = LARGEST_OVERLAP if "overlap" in name else LARGEST_ATTRIBUTION if name == "attribution" else bound
        difference = largest({name: found[name]}, {name: values})
        if not difference <= bound:
            return f"{name} differs by {difference:.2g} of its largest entry"
    return ""


def select(tensors: Tensors, units: Sequence[int]) -> Tensors:
    """The entries of some units; all where the work is not split."""
    return {name: values[list(units)] for name, values in tensors.items()} if units else tensors


def largest(a: Tensors, b: Tensors) -> float:
    """Largest difference over the tensor's largest entry."""
    return max(((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max()).item() for n in b)


def rms(a: Tensors, b: Tensors) -> float:
    """‖a − b‖ / ‖b‖, of the worst tensor."""
    compared = [name for name in b if name in a and name != "evaluations"]
    return max((((a[n].double() - b[n].double()).norm() / b[n].double().norm()).item() for n in compared), default=0.0)


def reference_of(workload: Workload) -> Tensors:
    """What results of another dtype are compared with: ours, in a run of its own."""
    outcome: Outcome = (workload.check or workload.ours)()
    return outcome.tensors


def _note(contestant: Contestant, units: Sequence[int]) -> str:
    total = len(contestant.units)
    if units and len(units) < total:
        return f"{len(units)} of {total} {contestant.note} timed, scaled"
    return "" if units else contestant.note


def _mib(peak: int | None) -> float | None:
    return None if peak is None else round(peak / 2**20, 1)
