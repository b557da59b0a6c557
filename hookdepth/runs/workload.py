"""How much a task does, from the plans of its passes: no model runs, no weights are needed.

work = work_of(task, outline, inputs, settings)
work.token_layers * token_flops(outline, work.width)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hookdepth.analyses import Inputs, Settings, Task
from hookdepth.analyses.gradients import kept_bytes, most_layer_tokens, most_rows
from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.memory import bytes_per_row_token
from hookdepth.engine.passes import plan_for
from hookdepth.engine.plan import Plan
from hookdepth.model.decoder import Decoder
from hookdepth.model.unembedding import most_logits

NODES = 98  # a layer, of an adaptive path: the mean over layers, weighted by their work, on the demo model
PLANNED = 12  # chunks that are planned; the others are taken to be like them


@dataclass(frozen=True)
class Work:
    """What a task does.

    Attributes:
        passes: forward calls.
        token_layers: tokens of rows through layers, forward.
        positions: unembedded positions of rows.
        bytes: at the peak, beside the weights.
        width: tokens of a typical pass_.
        backward: whether gradients are taken as well.
    """

    passes: int
    token_layers: float
    positions: float
    bytes: float
    width: int
    backward: bool = False


def token_flops(model: Decoder, width: int) -> float:
    """FLOPs of one token through one layer, in a pass of `width` tokens: matrices, and half of all pairs."""
    matrices = sum(parameter.numel() for parameter in model.layers[0].parameters() if parameter.ndim == 2)
    return 2.0 * matrices + 2.0 * model.attention_width * width


def unembed_flops(model: Decoder) -> float:
    """FLOPs of one unembedded position."""
    return 2.0 * model.d_model * int(model.config.vocab_size)


def work_of(task: Task, outline: Decoder, inputs: Inputs, settings: Settings) -> Work:
    """The work of all chunks of a task; an outline will do for the model."""
    n_layers = outline.n_layers
    logits = most_logits(outline.device) * 12.0  # the dtype's, float32's and a difference
    if task.name in ("residual-stats", "logit-lens"):
        tokens = sum(map(len, inputs.prompts))
        longest = max(map(len, inputs.prompts))
        points = tokens * (n_layers + 1) if task.name == "logit-lens" else 0
        room = longest * outline.d_model * outline.dtype.itemsize * (2 * n_layers if points else 6)
        return Work(task.n_chunks, tokens * n_layers, points, room + (logits if points else 0), tokens // task.n_chunks)
    if task.branches is None:
        return _gradient_work(task, outline, inputs, settings)
    plans, positions = [], 0.0
    chosen = range(0, task.n_chunks, -(-task.n_chunks // PLANNED))
    for chunk in chosen:
        branches, lengths = task.branches(chunk)
        if branches:
            plan = plan_for(outline, branches, lengths, max_rows=settings.max_rows)
            plans.append(plan)
            positions += 0 if task.name == "local" else unembedded(plan, branches, lengths)
    if not plans:
        return Work(0, 0, 0, 0, 1)
    scale = task.n_chunks / len(chosen)
    work = scale * sum(plan.work for plan in plans)
    if task.name == "residual-erasure":
        work += n_layers * sum(map(len, inputs.baseline))
    peak = max(plan.peak_row_tokens for plan in plans) * bytes_per_row_token(outline)
    passes = round(scale * sum(plan.n_passes for plan in plans))
    width = round(sum(_width(plan) * plan.work for plan in plans) / sum(plan.work for plan in plans))
    return Work(passes, work, scale * positions, peak + (logits if positions else 0), width)


def unembedded(plan: Plan, branches: Sequence[Branch], lengths: Sequence[int]) -> int:
    """Positions of rows that the passes of a plan unembed.

    unembedded(plan_for(model, branches, [20]), branches, [20])
    """
    total = 0
    for pass_ in plan.walk():
        for prompt in pass_.prompts:
            own = [branches[row] for row in pass_.rows if branches[row].prompt == prompt]
            measured = {position for row in pass_.measured for position in _positions(branches[row], prompt, lengths)}
            inside = sum(pass_.start <= position < pass_.stop for position in measured)
            total += inside * (2 + sum(branch.until is None for branch in own))
    return total


def _positions(branch: Branch, prompt: int, lengths: Sequence[int]) -> Iterable[int]:
    return branch.measured_positions(lengths[prompt]) if branch.prompt == prompt else ()


def _width(plan: Plan) -> float:
    return sum(pass_.stop - pass_.start for pass_ in plan.walk()) / plan.n_passes


def _gradient_work(task: Task, outline: Decoder, inputs: Inputs, settings: Settings) -> Work:
    n_layers = outline.n_layers
    nodes = min(NODES, settings.ig_max_evaluations) if settings.ig_method == "adaptive" else settings.ig_steps
    work = positions = passes = most = 0.0
    for probe in inputs.probes:
        tokens = max(probe.answer_positions)
        depth = n_layers * (n_layers - 1) / 2  # a node of layer l runs through those above it
        work += len(settings.parts) * nodes * depth * tokens
        positions += len(settings.parts) * nodes * n_layers * len(probe.answer_positions)
        passes += len(settings.parts) * nodes * n_layers / nodes_at_once(outline, probe, settings)
        most = max(most, nodes_at_once(outline, probe, settings) * tokens * n_layers / 2 * kept_bytes(outline))
    width = max(len(probe.token_ids) for probe in inputs.probes)
    return Work(round(passes), work, positions, most, width, backward=True)


def nodes_at_once(model: Decoder, probe: Probe, settings: Settings) -> int:
    """Nodes of integrated gradients that fit into a pass_."""
    fit = 2 * most_layer_tokens(model) // (model.n_layers * max(probe.answer_positions))
    return max(1, min(most_rows(settings.max_rows), fit))
