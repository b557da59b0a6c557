"""What an analysis is to the runner: chunks of work that are measured one by one, then reduced together.

    task.run(0, lambda: None)   # Partial: what the first chunk gave
    task.finish(partials)       # {"skip-current": {"layer.effect": [L, L], …}}

A chunk depends on nothing but the model, the inputs and the settings, so chunks may run in any order, in any
process, or be read back from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.passes import BranchResults
from hookdepth.errors import HookdepthError

Tensors = dict[str, Tensor]
OnPass = Callable[[], object]
BASELINE_PROMPTS = 10
"""So many of the first prompts make the baseline of residual erasure, as in the notebook."""


KEEP_FRONT = {
    "residual-stats": 0,
    "logit-lens": 0,
    "skip-current": 1,
    "skip-future": 1,
    "local-current": 1,
    "local-future": 1,
}
"""First tokens that are left alone where nothing is given; to the other analyses it means nothing."""


@dataclass(frozen=True)
class Inputs:
    """Token ids that the analyses run on.

    Attributes:
        prompts: of the analyses over prompts.
        cuts: per prompt, where skip-future and local-future cut it.
        baseline: prompts whose token mean is the uninformative residual.
        probes: prompt and answer, for the analyses of single answers.
    """

    prompts: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...] = ()
    baseline: tuple[tuple[int, ...], ...] = ()
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What changes the numbers, besides model and inputs.

    Attributes:
        parts: layer, attn, mlp: what is skipped or attributed.
        keep_front: tokens at the start that are neither changed nor measured; None for each analysis's own number.
        max_rows: most rows of a pass; None for as many as fit.
        ig_method, ig_steps, ig_tolerance, ig_max_evaluations: of integrated-gradients; steps of the methods
            that have a fixed number, tolerance and most evaluations per layer of the adaptive one.
    """

    parts: tuple[str, ...] = ("layer",)
    keep_front: int | None = None
    max_rows: int | None = None
    ig_method: str = "adaptive"
    ig_steps: int = 256
    ig_tolerance: float = 0.01
    ig_max_evaluations: int = 1024

    def front(self, analysis: str) -> int:
        """How many first tokens an analysis leaves alone: Settings().front("skip-current") is 1."""
        return KEEP_FRONT[analysis] if self.keep_front is None else self.keep_front


@dataclass
class Partial:
    """What one chunk gave.

    Attributes:
        tensors: by a name that the task's `finish` knows.
        passes: forward calls.
        null_effect, null_where: the noise floor per analysis; None where nothing was intervened on.
    """

    tensors: Tensors
    passes: int
    null_effect: float | None = None
    null_where: str | None = None


def tokens_after(front: int, prompts: Sequence[Sequence[int]], analysis: str) -> int:
    """How many tokens are measured in all, where the first ones of each prompt are left out.

        tokens_after(1, [(5, 8, 3), (7, 2)], "logit-lens")   # 3

    Raises:
        HookdepthError: nothing is left of a prompt.
    """
    for number, prompt in enumerate(prompts):
        if len(prompt) <= front:
            raise HookdepthError(
                f"--keep-front {front} leaves nothing of prompt {number} for {analysis} to measure "
                f"({len(prompt)} tokens)",
                "give a smaller number, or leave that prompt out",
            )
    return sum(len(prompt) - front for prompt in prompts)


@dataclass(frozen=True)
class Task:
    """Analyses that share their passes.

    Attributes:
        name: for the progress bar.
        analyses: names of the results that `finish` gives.
        n_chunks: how many chunks there are.
        run: (chunk, on_pass) → Partial; `on_pass` is called after each forward call.
        finish: all partials in order → analysis → tensors.
        branches: chunk → (branches, lengths) of its passes, for planning; None where none branch.
    """

    name: str
    analyses: tuple[str, ...]
    n_chunks: int
    run: Callable[[int, OnPass], Partial]
    finish: Callable[[Sequence[Partial]], dict[str, Tensors]]
    branches: Callable[[int], tuple[list[Branch], list[int]]] | None = field(default=None)


def partial_of(results: BranchResults, tensors: Tensors) -> Partial:
    """A partial with the passes and noise floor of an engine run."""
    return Partial(tensors, results.passes, results.null_effect, results.null_where)


def chunks_of(lengths: Sequence[int], rows: int, row_tokens: int = 4096) -> list[range]:
    """Consecutive prompts that are short enough to share passes; the others alone.

    chunks_of([12, 11, 200], rows=32)   # [range(0, 2), range(2, 3)]
    """
    chunks: list[range] = []
    first = 0
    while first < len(lengths):
        end = first + 1
        while end < len(lengths) and max(lengths[first : end + 1]) * rows * (end + 1 - first) <= row_tokens:
            end += 1
        chunks.append(range(first, end))
        first = end
    return chunks


def noise_floor(partials: Sequence[Partial]) -> dict[str, Any]:
    """The largest noise floor of all chunks and where it is, as metadata; nothing where nothing was intervened on.

    noise_floor([Partial({}, 1, 0.0), Partial({}, 1, 2e-6, "output")])["null_where"]   # 'output'
    """
    measured = [partial for partial in partials if partial.null_effect is not None]
    if not measured:
        return {}
    worst = max(measured, key=lambda partial: partial.null_effect or 0.0)
    return {"null_effect": worst.null_effect, "null_where": worst.null_where}
