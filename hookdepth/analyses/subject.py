"""What an analysis is given, and the forms in which it gives its numbers.

subject = Subject(model, inputs, Settings())
partial = Partial({"kl": kl_sums}, passes=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from hookdepth.analyses.settings import Settings
from hookdepth.data import Leveled, Probe, Question
from hookdepth.engine.branches import Branch
from hookdepth.model.decoder import Decoder

Tensors = dict[str, Tensor]
OnPass = Callable[[], object]
BASELINE_PROMPTS = 10
"""So many of the first prompts make the baseline of residual erasure, as in the notebook."""


@dataclass(frozen=True)
class Inputs:
    """Token ids that the analyses run on.

        Inputs(prompts=((5, 8, 3),))

    Attributes:
        prompts: of the analyses over prompts.
        cuts: per prompt, where the analyses that need cuts cut it.
        baseline: prompts whose token mean is the uninformative residual.
        probes: prompt and answer, for the analyses of single answers.
        levels: examples that carry a level, each with its cuts.
        texts: what the prompts were made of, where they were texts.
        questions: prompts that the model answers in its own words, with what is right.
    """

    prompts: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...] = ()
    baseline: tuple[tuple[int, ...], ...] = ()
    probes: tuple[Probe, ...] = ()
    levels: tuple[Leveled, ...] = ()
    texts: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What an analysis is run on: Subject(model, inputs, Settings())."""

    model: Decoder
    inputs: Inputs
    settings: Settings

    @cached_property
    def shared(self) -> dict[str, Any]:
        """A place for what several items need and one of them computes: subject.shared["baseline"]."""
        return {}


@dataclass
class Partial:
    """What some items gave.

        Partial({"kl": kl_sums}, passes=1)

    Attributes:
        tensors: by a name that the analysis's `reduce` knows.
        passes: forward calls.
        null_effect, null_where: the noise floor; None where nothing was intervened on.
    """

    tensors: Tensors
    passes: int
    null_effect: float | None = None
    null_where: str | None = None


@dataclass(frozen=True)
class Measured:
    """What the engine measured on the branches of one item, in their order.

    measured.layer["effect"], measured.output["output"]     # [branch, L], [branch]
    """

    branches: Sequence[Branch]
    layer: Tensors
    output: Tensors
    clean: Tensors = field(default_factory=dict)  # of either kind, on each branch's clean run


def noise_floor(partials: Sequence[Partial]) -> dict[str, Any]:
    """The largest noise floor of all and where it is, as metadata; nothing where nothing was intervened on.

    noise_floor([Partial({}, 1, 0.0), Partial({}, 1, 2e-6, "output")])["null_where"]   # 'output'
    """
    measured = [partial for partial in partials if partial.null_effect is not None]
    if not measured:
        return {}
    worst = max(measured, key=lambda partial: partial.null_effect or 0.0)
    return {"null_effect": worst.null_effect, "null_where": worst.null_where}
