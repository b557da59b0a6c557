"""What one chunk of work takes on this machine, from timed calls of a miniature through the engine itself.

import time

from hookdepth.runs.outline import miniature
from hookdepth.runs.workload import work_of

work = work_of(task, outline, inputs, settings)
Rates(outline, miniature(outline, LAYERS), inputs, settings, time.perf_counter).seconds(task, work)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hookdepth.analyses import Inputs, Settings, Task
from hookdepth.analyses.erasure import erasure_branches
from hookdepth.analyses.gradients import Path
from hookdepth.analyses.lens import lens_sums
from hookdepth.analyses.stats import residual_sums
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Patch, Skip, Subtract
from hookdepth.engine.measurements import LayerEffect, Measurement, OutputEffect
from hookdepth.engine.passes import plan_for, run_branches
from hookdepth.engine.plan import Plan
from hookdepth.model.decoder import Decoder
from hookdepth.runs.outline import Outline
from hookdepth.runs.workload import PLANNED, Work, nodes_at_once, token_flops, unembedded

LAYERS = 3  # of the miniature
_FLOPS = {"cpu": 3e10, "cuda": 2e12}  # of one timed call


class Rates:
    """Seconds of a task's work, from timed calls of the miniature."""

    def __init__(
        self, outline: Outline, small: Decoder, inputs: Inputs, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.outline, self.small, self.inputs, self.settings, self.clock = outline, small, inputs, settings, clock
        self.vocab = outline.config.vocab_size / small.config.vocab_size
        self.budget = _FLOPS[outline.device.type]

    def seconds(self, task: Task, work: Work) -> float:
        """Of all chunks, one after the other."""
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
        tokens = self._tokens(work.width, rows=LAYERS)
        prompt = [3] * tokens
        per_layer = self._scaled(self._timed(lambda: residual_sums(self.small, prompt)), tokens, work.width)
        per_layer /= tokens * LAYERS
        if task.name == "residual-stats":
            return per_layer * work.token_layers
        points = tokens * (LAYERS + 1)
        whole = self._timed(lambda: lens_sums(self.small, prompt))
        per_point = max(0.0, whole - per_layer * tokens * LAYERS) / points * self.vocab
        return per_layer * work.token_layers + per_point * work.positions

    def _effects(self, task: Task, work: Work) -> float:
        """Skips and direct effects: the branches of a typical chunk, those of one layer standing for all."""
        assert task.branches is not None
        chunks = range(0, task.n_chunks, -(-task.n_chunks // PLANNED))
        chunk = sorted(chunks, key=lambda number: sum(task.branches(number)[1]))[len(chunks) // 2]  # type: ignore[misc]
        branches, lengths = task.branches(chunk)
        longest = max(lengths)
        tokens = self._tokens(longest, rows=8)
        kept = [min(length, tokens) for length in lengths]
        local = task.name == "local"
        deep, late = self._like(branches, kept, local, self.settings.front(task.analyses[0]))
        layers = self._run(deep, kept, [LayerEffect()])
        per_layer = self._scaled(layers / self._plan(deep, kept).work, tokens, longest)
        if local:
            return per_layer * work.token_layers
        plan = self._plan(late, kept)
        whole = self._run(late, kept, [OutputEffect()])
        per_position = (whole - layers / self._plan(deep, kept).work * plan.work) / unembedded(plan, late, kept)
        return per_layer * work.token_layers + max(0.0, per_position) * self.vocab * work.positions

    def _like(
        self, branches: Sequence[Branch], lengths: Sequence[int], local: bool, front: int
    ) -> tuple[list[Branch], ...]:
        """Branches with the same prompts and cuts: as many skips as fill a pass, early ones and late ones."""
        rows = max(2, min(self.outline.n_layers // 2, int(self.budget / self._row_flops(sum(lengths)))))
        keep_front = slice(front, None)
        cuts = list(dict.fromkeys((branch.prompt, branch.cut) for branch in branches))
        cuts = [(prompt, cut) for prompt, cut in cuts if cut is None or cut < lengths[prompt] - 1]
        made: list[list[Branch]] = []
        for layer in (0, LAYERS - 1):
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
        late = [self._moved(branch, Patch("resid_post", LAYERS - 1, empty[0], [0])) for branch in branches]
        # Layers are measured as well, so that none leaves out its MLP.
        per_layer = self._run(early, lengths, [LayerEffect()]) / self._plan(early, lengths).work
        plan = self._plan(late, lengths)
        rest = max(0.0, self._run(late, lengths, [LayerEffect(), OutputEffect()]) - per_layer * plan.work)
        per_position = rest / unembedded(plan, late, lengths) * self.vocab
        return per_layer * work.token_layers + per_position * work.positions

    @staticmethod
    def _moved(branch: Branch, to: Patch) -> Branch:
        (patch,) = branch.interventions
        return replace(branch, interventions=(Patch(to.site, to.layer, to.value, patch.tokens),))

    def _gradients(self, work: Work) -> float:
        probe = max(self.inputs.probes, key=lambda one: len(one.token_ids))
        ids = tuple(3 for _ in probe.token_ids)
        path = Path(self.small, replace(probe, token_ids=ids), "layer")
        rows = min(
            nodes_at_once(self.outline, probe, self.settings),
            int(self.budget / self._row_flops(len(ids))) + 1,
        )
        points = [(layer, path.activation[layer]) for layer in range(LAYERS)]
        deep, middle, late = (self._timed(lambda: path.value_and_gradient([point] * rows)) for point in points)  # noqa: B023
        tokens, answers = max(probe.answer_positions), len(probe.answer_positions)
        # The last layer's MLP runs at the answer's tokens alone: both of these end with it.
        per_layer = max(0.0, deep - middle) / (rows * tokens)
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
