"""What a run would cost, from the plan of its launches and a few seconds of measuring.

    estimates = estimate(outline, names, inputs, settings)
    print(describe(outline, estimates))

The plan knows the work: token-layers (one token of one row through one layer) and unembedded positions.
What one of them takes is measured, not guessed: the same kinds of launches run on a miniature, two layers of
the model's own shape with random weights, on the same device and in the same dtype, through the same engine.
So attention, norms, hooks, measurements and gradients are in the figure as they are in the run.

Adaptive integrated gradients choose their nodes as they go; `NODES` says what is assumed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hookdepth.analyses import Inputs, Settings, Task, tasks_for
from hookdepth.analyses.erasure import erasure_branches
from hookdepth.analyses.integrated_gradients import MAX_ROWS, Path, kept_bytes
from hookdepth.analyses.lens import lens_sums
from hookdepth.analyses.stats import residual_sums
from hookdepth.branching import bytes_per_row_token, memory_room, plan_for, run_branches
from hookdepth.data import Probe
from hookdepth.interventions import Branch, Patch, Skip, Subtract
from hookdepth.measurements import LayerEffect, Measurement, OutputEffect
from hookdepth.models import Decoder
from hookdepth.outline import Outline, miniature, weight_bytes
from hookdepth.planning import Launch, Plan

NODES = 64  # a layer, of an adaptive path: the mean over layers, weighted by their work, on the demo model
_PLANNED = 12  # units that are planned; the others are taken to be like them
_LAYERS = 2  # of the miniature
_FLOPS = {"cpu": 3e10, "cuda": 2e12}  # of one timed call


@dataclass(frozen=True)
class Work:
    """What a task does.

    Attributes:
        launches: forward calls.
        token_layers: tokens of rows through layers, forward.
        positions: unembedded positions of rows.
        bytes: at the peak, beside the weights.
        width: tokens of a typical launch.
        backward: whether gradients are taken as well.
    """

    launches: int
    token_layers: float
    positions: float
    bytes: float
    width: int
    backward: bool = False


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
    small = miniature(outline, _LAYERS) if measure else None
    estimates = []
    for task in tasks:
        work = _work(task, outline, inputs, settings)
        seconds = _Rates(outline, small, inputs, settings, clock).seconds(task, work) if small else 0.0
        flops = work.token_layers * token_flops(outline, work.width)
        flops = (flops + work.positions * unembed_flops(outline)) * (2 if work.backward else 1)
        estimates.append(Estimate(task, work, flops, seconds))
    return estimates


def describe(outline: Outline, estimates: Sequence[Estimate], notes: Sequence[str] = ()) -> str:
    """A table of the estimates, and the totals."""
    lines = [f"{outline.name}, {outline.n_layers} layers, {_place(outline)}"]
    lines.append(f"{'':36} {'units':>6} {'launches':>9} {'token-layers':>15} {'TFLOP':>9} {'GiB':>6} {'time':>9}")
    for one in estimates:
        work, names = one.work, " and ".join(one.task.analyses)
        cells = f"{one.task.n_units:>6} {work.launches:>9,} {work.token_layers:>15,.0f} {one.flops / 1e12:>9,.2f}"
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


def token_flops(model: Decoder, width: int) -> float:
    """FLOPs of one token through one layer, in a launch of `width` tokens: matrices, and half of all pairs."""
    matrices = sum(parameter.numel() for parameter in model.layers[0].parameters() if parameter.ndim == 2)
    heads = int(model.config.num_attention_heads)
    head_width = int(getattr(model.config, "head_dim", None) or model.d_model // heads)
    return 2.0 * matrices + 2.0 * heads * head_width * width


def unembed_flops(model: Decoder) -> float:
    """FLOPs of one unembedded position."""
    return 2.0 * model.d_model * int(model.config.vocab_size)


def _place(outline: Outline) -> str:
    dtype = str(outline.dtype).removeprefix("torch.")
    return f"{dtype} on {outline.device}" + ("" if outline.quantize == "none" else f", {outline.quantize}")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds else "?"


# The work of a task.


def _work(task: Task, outline: Outline, inputs: Inputs, settings: Settings) -> Work:
    n_layers = outline.n_layers
    logits = (1 << 24 if outline.device.type == "cpu" else 1 << 28) * 12.0  # the dtype's, float32's and a difference
    if task.name in ("residual-stats", "logit-lens"):
        tokens = sum(map(len, inputs.prompts))
        longest = max(map(len, inputs.prompts))
        points = tokens * (n_layers + 1) if task.name == "logit-lens" else 0
        room = longest * outline.d_model * outline.dtype.itemsize * (2 * n_layers if points else 6)
        return Work(task.n_units, tokens * n_layers, points, room + (logits if points else 0), tokens // task.n_units)
    if task.branches is None:
        return _gradient_work(task, outline, inputs, settings)
    plans, positions = [], 0.0
    chosen = range(0, task.n_units, -(-task.n_units // _PLANNED))
    for unit in chosen:
        branches, lengths = task.branches(unit)
        if branches:
            plan = plan_for(outline, branches, lengths, max_rows=settings.max_rows)
            plans.append(plan)
            positions += 0 if task.name == "local" else unembedded(plan, branches, lengths)
    if not plans:
        return Work(0, 0, 0, 0, 1)
    scale = task.n_units / len(chosen)
    work = scale * sum(plan.work for plan in plans)
    if task.name == "residual-erasure":
        work += n_layers * sum(map(len, inputs.baseline))
    peak = max(plan.peak_row_tokens for plan in plans) * bytes_per_row_token(outline)
    launches = round(scale * sum(plan.n_launches for plan in plans))
    width = round(sum(_width(plan) * plan.work for plan in plans) / sum(plan.work for plan in plans))
    return Work(launches, work, scale * positions, peak + (logits if positions else 0), width)


def unembedded(plan: Plan, branches: Sequence[Branch], lengths: Sequence[int]) -> int:
    """Positions of rows that the launches of a plan unembed.

    unembedded(plan_for(model, branches, [20]), branches, [20])
    """
    total = 0
    for launch in _launches(plan):
        for prompt in launch.prompts:
            own = [branches[row] for row in launch.rows if branches[row].prompt == prompt]
            measured = {position for row in launch.measured for position in _positions(branches[row], prompt, lengths)}
            inside = sum(launch.start <= position < launch.stop for position in measured)
            total += inside * (2 + sum(branch.until is None for branch in own))
    return total


def _positions(branch: Branch, prompt: int, lengths: Sequence[int]) -> Iterable[int]:
    return branch.measured_positions(lengths[prompt]) if branch.prompt == prompt else ()


def _launches(plan: Plan) -> list[Launch]:
    return [launch for top in plan.launches for launch in top.walk()]


def _width(plan: Plan) -> float:
    launches = _launches(plan)
    return sum(launch.stop - launch.start for launch in launches) / len(launches)


def _gradient_work(task: Task, outline: Outline, inputs: Inputs, settings: Settings) -> Work:
    n_layers = outline.n_layers
    nodes = min(NODES, settings.ig_max_evaluations) if settings.ig_method == "adaptive" else settings.ig_steps
    work = positions = launches = most = 0.0
    for probe in inputs.probes:
        tokens = max(probe.answer_positions)
        depth = n_layers * (n_layers - 1) / 2  # a node of layer l runs through those above it
        work += len(settings.parts) * nodes * depth * tokens
        positions += len(settings.parts) * nodes * n_layers * len(probe.answer_positions)
        launches += len(settings.parts) * nodes * n_layers / _nodes_at_once(outline, probe, settings)
        most = max(most, _nodes_at_once(outline, probe, settings) * tokens * n_layers / 2 * kept_bytes(outline))
    width = max(len(probe.token_ids) for probe in inputs.probes)
    return Work(round(launches), work, positions, most, width, backward=True)


def _nodes_at_once(model: Decoder, probe: Probe, settings: Settings) -> int:
    room = memory_room(model) // (3 * kept_bytes(model))
    fit = 2 * room // (model.n_layers * max(probe.answer_positions))
    return max(1, min(settings.max_rows - 2 if settings.max_rows else MAX_ROWS, MAX_ROWS, fit))


# What one unit of work takes.


class _Rates:
    """Seconds of a task's work, from timed calls of the miniature."""

    def __init__(
        self, outline: Outline, small: Decoder, inputs: Inputs, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.outline, self.small, self.inputs, self.settings, self.clock = outline, small, inputs, settings, clock
        self.vocab = outline.config.vocab_size / small.config.vocab_size
        self.budget = _FLOPS[outline.device.type]

    def seconds(self, task: Task, work: Work) -> float:
        """Of all units, one after the other."""
        if not work.token_layers:
            return 0.0
        if task.name in ("residual-stats", "logit-lens"):
            return self._plain(task, work)
        if task.name == "integrated-gradients":
            return self._gradients(work)
        if task.name == "residual-erasure":
            return self._erasure(work)
        return self._effects(task, work)

    def _plain(self, task: Task, work: Work) -> float:
        tokens = self._tokens(work.width, rows=_LAYERS)
        prompt = [3] * tokens
        per_layer = self._scaled(self._timed(lambda: residual_sums(self.small, prompt)), tokens, work.width)
        per_layer /= tokens * _LAYERS
        if task.name == "residual-stats":
            return per_layer * work.token_layers
        points = tokens * (_LAYERS + 1)
        whole = self._timed(lambda: lens_sums(self.small, prompt))
        per_point = max(0.0, whole - per_layer * tokens * _LAYERS) / points * self.vocab
        return per_layer * work.token_layers + per_point * work.positions

    def _effects(self, task: Task, work: Work) -> float:
        """Skips and direct effects: the branches of a typical unit, those of one layer standing for all."""
        assert task.branches is not None
        units = range(0, task.n_units, -(-task.n_units // _PLANNED))
        unit = sorted(units, key=lambda number: sum(task.branches(number)[1]))[len(units) // 2]  # type: ignore[misc]
        branches, lengths = task.branches(unit)
        longest = max(lengths)
        tokens = self._tokens(longest, rows=8)
        kept = [min(length, tokens) for length in lengths]
        local = task.name == "local"
        deep, late = self._like(branches, kept, local)
        layers = self._run(deep, kept, [LayerEffect()])
        per_layer = self._scaled(layers / self._plan(deep, kept).work, tokens, longest)
        if local:
            return per_layer * work.token_layers
        plan = self._plan(late, kept)
        whole = self._run(late, kept, [OutputEffect()])
        per_position = (whole - layers / self._plan(deep, kept).work * plan.work) / unembedded(plan, late, kept)
        return per_layer * work.token_layers + max(0.0, per_position) * self.vocab * work.positions

    def _like(self, branches: Sequence[Branch], lengths: Sequence[int], local: bool) -> tuple[list[Branch], ...]:
        """Branches with the same prompts and cuts: as many skips as fill a launch, early ones and late ones."""
        rows = max(2, min(self.outline.n_layers // 2, int(self.budget / self._row_flops(sum(lengths)))))
        keep_front = slice(self.settings.keep_front, None)
        cuts = list(dict.fromkeys((branch.prompt, branch.cut) for branch in branches))
        cuts = [(prompt, cut) for prompt, cut in cuts if cut is None or cut < lengths[prompt] - 1]
        made: list[list[Branch]] = []
        for layer in (0, 1):
            made.append([])
            for prompt in dict.fromkeys(prompt for prompt, _ in cuts):
                for _ in range(rows):
                    one = Subtract(0, 1, keep_front) if local else Skip(layer, "layer", keep_front)
                    until = 1 if local else None
                    own = [cut for number, cut in cuts if number == prompt]
                    made[-1] += [Branch((one,), prompt=prompt, cut=cut, until=until) for cut in own]
        return tuple(made)

    def _erasure(self, work: Work) -> float:
        probe = max(self.inputs.probes, key=lambda one: len(one.token_ids))
        lengths = [len(probe.token_ids)]
        empty = torch.zeros(self.outline.n_layers + 1, self.small.d_model)
        branches = erasure_branches(probe, empty)
        # In the model they are born all the way up; half of them from the bottom on do as much.
        most = int(2 * self.budget / self._row_flops(lengths[0] // 2 + 1))
        branches = branches[: max(lengths[0], min(len(branches) // 2, most))]
        early = [self._moved(branch, Patch("resid_pre", 0, empty[0], [0])) for branch in branches]
        late = [self._moved(branch, Patch("resid_post", _LAYERS - 1, empty[0], [0])) for branch in branches]
        return self._two_points(early, late, lengths, work)

    @staticmethod
    def _moved(branch: Branch, to: Patch) -> Branch:
        (patch,) = branch.interventions
        return replace(branch, interventions=(Patch(to.site, to.layer, to.value, patch.tokens),))

    def _two_points(self, early: list[Branch], late: list[Branch], lengths: list[int], work: Work) -> float:
        """Layers and unembedding of the same branches apart: what runs through all layers, and through none."""
        outputs: list[Measurement] = [OutputEffect()]
        plans = self._plan(early, lengths), self._plan(late, lengths)
        times = self._run(early, lengths, outputs), self._run(late, lengths, outputs)
        per_layer = max(0.0, times[0] - times[1]) / (plans[0].work - plans[1].work)
        rest = max(0.0, times[1] - per_layer * plans[1].work)
        per_position = rest / unembedded(plans[1], late, lengths) * self.vocab
        return per_layer * work.token_layers + per_position * work.positions

    def _gradients(self, work: Work) -> float:
        probe = max(self.inputs.probes, key=lambda one: len(one.token_ids))
        ids = tuple(3 for _ in probe.token_ids)
        path = Path(self.small, replace(probe, token_ids=ids), "layer")
        rows = min(
            _nodes_at_once(self.outline, probe, self.settings),
            int(self.budget / self._row_flops(len(ids))) + 1,
        )
        points = [(layer, path.activation[layer]) for layer in (0, 1)]
        deep, late = (self._timed(lambda: path.value_and_gradient([point] * rows)) for point in points)  # noqa: B023
        tokens, answers = max(probe.answer_positions), len(probe.answer_positions)
        per_layer = max(0.0, deep - late) / (rows * tokens)
        per_position = late / ((rows + 2) * answers) * self.vocab
        return per_layer * work.token_layers + per_position * work.positions

    def _tokens(self, wanted: int, rows: int) -> int:
        """Tokens of a timed prompt: as many as wanted, or as the budget allows."""
        return max(16, min(wanted, int(self.budget / (rows * token_flops(self.outline, wanted)))))

    def _row_flops(self, tokens: int) -> float:
        return tokens * token_flops(self.outline, tokens)

    def _scaled(self, seconds: float, measured: int, wanted: int) -> float:
        """Where a shorter prompt was timed: attention's share grows with the tokens."""
        return seconds * token_flops(self.outline, wanted) / token_flops(self.outline, measured)

    def _plan(self, branches: list[Branch], lengths: list[int]) -> Plan:
        return plan_for(self.small, branches, lengths, max_rows=self.settings.max_rows)

    def _run(self, branches: list[Branch], lengths: list[int], measured: list[Measurement]) -> float:
        prompts = [[3 + n % 100 for n in range(length)] for length in lengths]
        limit = self.settings.max_rows
        return self._timed(lambda: run_branches(self.small, prompts, branches, measured, max_rows=limit))

    def _timed(self, run: Callable[[], object], enough: float = 2.0) -> float:
        """Median seconds of a few calls, after one to warm up; fewer where they take long."""

        def once() -> float:
            self._synchronise()
            begin = self.clock()
            run()
            self._synchronise()
            return self.clock() - begin

        first = once()
        taken = [first] if first > enough else [once()]
        while len(taken) < 3 and sum(taken) < enough:
            taken.append(once())
        return statistics.median(taken)

    def _synchronise(self) -> None:
        if self.outline.device.type == "cuda":
            torch.cuda.synchronize(self.outline.device)
