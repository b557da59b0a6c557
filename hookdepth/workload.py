"""How much a task does, from the plans of its launches: no model runs, no weights are needed.

work = work_of(task, outline, inputs, settings)
work.token_layers * token_flops(outline, work.width)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hookdepth.analyses import Inputs, Settings, Task
from hookdepth.analyses.integrated_gradients import kept_bytes, most_layer_tokens, most_rows
from hookdepth.branches import Branch
from hookdepth.branching import bytes_per_row_token, plan_for
from hookdepth.data import Probe
from hookdepth.models import Decoder
from hookdepth.plans import Plan
from hookdepth.unembedding import most_logits

NODES = 98  # a layer, of an adaptive path: the mean over layers, weighted by their work, on the demo model
PLANNED = 12  # units that are planned; the others are taken to be like them


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


def token_flops(model: Decoder, width: int) -> float:
    """FLOPs of one token through one layer, in a launch of `width` tokens: matrices, and half of all pairs."""
    matrices = sum(parameter.numel() for parameter in model.layers[0].parameters() if parameter.ndim == 2)
    return 2.0 * matrices + 2.0 * model.attention_width * width


def unembed_flops(model: Decoder) -> float:
    """FLOPs of one unembedded position."""
    return 2.0 * model.d_model * int(model.config.vocab_size)


def work_of(task: Task, outline: Decoder, inputs: Inputs, settings: Settings) -> Work:
    """The work of all units of a task; an outline will do for the model."""
    n_layers = outline.n_layers
    logits = most_logits(outline.device) * 12.0  # the dtype's, float32's and a difference
    if task.name in ("residual-stats", "logit-lens"):
        tokens = sum(map(len, inputs.prompts))
        longest = max(map(len, inputs.prompts))
        points = tokens * (n_layers + 1) if task.name == "logit-lens" else 0
        room = longest * outline.d_model * outline.dtype.itemsize * (2 * n_layers if points else 6)
        return Work(task.n_units, tokens * n_layers, points, room + (logits if points else 0), tokens // task.n_units)
    if task.branches is None:
        return _gradient_work(task, outline, inputs, settings)
    plans, positions = [], 0.0
    chosen = range(0, task.n_units, -(-task.n_units // PLANNED))
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
    for launch in plan.walk():
        for prompt in launch.prompts:
            own = [branches[row] for row in launch.rows if branches[row].prompt == prompt]
            measured = {position for row in launch.measured for position in _positions(branches[row], prompt, lengths)}
            inside = sum(launch.start <= position < launch.stop for position in measured)
            total += inside * (2 + sum(branch.until is None for branch in own))
    return total


def _positions(branch: Branch, prompt: int, lengths: Sequence[int]) -> Iterable[int]:
    return branch.measured_positions(lengths[prompt]) if branch.prompt == prompt else ()


def _width(plan: Plan) -> float:
    return sum(launch.stop - launch.start for launch in plan.walk()) / plan.n_launches


def _gradient_work(task: Task, outline: Decoder, inputs: Inputs, settings: Settings) -> Work:
    n_layers = outline.n_layers
    nodes = min(NODES, settings.ig_max_evaluations) if settings.ig_method == "adaptive" else settings.ig_steps
    work = positions = launches = most = 0.0
    for probe in inputs.probes:
        tokens = max(probe.answer_positions)
        depth = n_layers * (n_layers - 1) / 2  # a node of layer l runs through those above it
        work += len(settings.parts) * nodes * depth * tokens
        positions += len(settings.parts) * nodes * n_layers * len(probe.answer_positions)
        launches += len(settings.parts) * nodes * n_layers / nodes_at_once(outline, probe, settings)
        most = max(most, nodes_at_once(outline, probe, settings) * tokens * n_layers / 2 * kept_bytes(outline))
    width = max(len(probe.token_ids) for probe in inputs.probes)
    return Work(round(launches), work, positions, most, width, backward=True)


def nodes_at_once(model: Decoder, probe: Probe, settings: Settings) -> int:
    """Nodes of integrated gradients that fit into a launch."""
    fit = 2 * most_layer_tokens(model) // (model.n_layers * max(probe.answer_positions))
    return max(1, min(most_rows(settings.max_rows), fit))
