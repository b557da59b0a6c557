"""What an analysis is: one class that declares itself, and that everybody else reads.

    class HalfMlp(Analysis):
        name = "half-mlp"
        question = "which layers could do with half of their MLP?"
        measurements = (OutputEffect(),)
        tensors = {"output": "layer"}
        figures = (Bars("output", "A bar a layer: how far the prediction moves when its MLP adds half."),)

        def branches(self, subject, item):
            return [Branch((Scale("mlp_out", layer, 0.5),)) for layer in range(subject.model.n_layers)]

        def collect(self, subject, item, measured):
            return {"output": measured.output["output"]}

    hookdepth.analyse("demo", HalfMlp(), limit=2)

From the declaration come the names that `--analyses` knows and `--help` explains, what a result depends on, what a
file must hold, figures, tables, pages, comparisons, and what a dry run counts. An analysis is measured item by item
(a prompt, or a probe); an item depends on nothing but model, inputs and settings, so that items may run in any order,
in any process, and be read back from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from hookdepth.analyses.settings import Settings
from hookdepth.analyses.source import own_values
from hookdepth.analyses.subject import Inputs, Measured, OnPass, Partial, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurement import Measurement
from hookdepth.engine.work import Work, plain_work
from hookdepth.errors import HookdepthError, clipped
from hookdepth.metrics import over_prompts
from hookdepth.report.figures import Kind
from hookdepth.results import PER_PROMPT, Result

NEEDS = ("prompts", "cuts", "probes", "levels", "questions")


class Analysis:
    """Base of all analyses. See the module for an example of one's own.

        HalfMlp().question     # 'which layers could do with half of their MLP?'

    A subclass gives `branches` and `collect`, and the engine runs them; or, where nothing branches, `measure`.

    Attributes:
        name: on the command line, and of the result file.
        question: what it answers, for `--help`.
        heading, paper: of its section in the report, and where the paper has it.
        order: its place among the others, in a run and in the report.
        in_all: whether `--analyses all` means it, too.
        needs: "prompts", "cuts" (prompts that are cut into tokens < t and ≥ t), "probes" (prompts with an answer) or
            "levels" (those with a level besides) or "questions" (answered by the model itself).
        baseline: whether the data set's first prompts matter besides.
        options: the fields of `Settings` that its numbers depend on.
        keep_front: what the option of that name is where nobody gives it.
        together: analyses that say the same word here share their passes.
        measurements: what the engine measures on its branches.
        tensors: name → axes, by words: layer, point (one more than layers), token{i}, prompt, width, or your own.
            Names may hold placeholders ({part}, {i}); axes that end in "?" are of tensors that may be missing.
        figures: how they are drawn and read.
        labels: what the places along an axis are called, by the axis' word, where they are not numbers.
    """

    name: ClassVar[str]
    question: ClassVar[str] = ""
    heading: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    order: ClassVar[float] = 100.0
    in_all: ClassVar[bool] = False
    needs: ClassVar[str] = "prompts"
    baseline: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("over_prompts", "max_rows")
    keep_front: ClassVar[int] = 0
    together: ClassVar[str] = ""
    measurements: ClassVar[Sequence[Measurement]] = ()
    tensors: ClassVar[Mapping[str, str]] = {}
    figures: ClassVar[Sequence[Kind]] = ()
    labels: ClassVar[Mapping[str, Sequence[str]]] = {}

    @property
    def branching(self) -> bool:
        """Whether the engine runs its branches."""
        return type(self).branches is not Analysis.branches

    def items(self, subject: Subject) -> Sequence[int]:
        """What is measured one by one: numbers of prompts, of probes, or of examples with a level."""
        return range(len(self.texts(subject.inputs)))

    def tokens(self, subject: Subject, item: int) -> tuple[int, ...]:
        """The token ids that the branches of an item run on."""
        return self.texts(subject.inputs)[item]

    def texts(self, inputs: Inputs) -> Sequence[tuple[int, ...]]:
        """The token ids of all items."""
        if self.needs == "probes":
            return [probe.token_ids for probe in inputs.probes]
        if self.needs == "questions":
            return [one.token_ids for one in inputs.questions]
        return [one.probe.token_ids for one in inputs.levels] if self.needs == "levels" else inputs.prompts

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """The branches of one prompt or probe."""
        raise HookdepthError(
            f"{type(self).__name__} measures nothing", "give it `branches` and `collect`, or `measure`"
        )

    def planned(self, subject: Subject, item: int) -> list[Branch]:
        """Branches that take as long: what a plan is made of, where the true ones would need the model's weights."""
        return self.branches(subject, item)

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """The tensors of one prompt or probe, from what its branches gave."""
        raise HookdepthError(f"{type(self).__name__} has branches, but no `collect`", "say what becomes of them")

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """The tensors of one prompt or probe, where nothing branches; `on_pass` is called after each forward pass."""
        raise HookdepthError(
            f"{type(self).__name__} measures nothing", "give it `branches` and `collect`, or `measure`"
        )

    def work(self, subject: Subject) -> Work:
        """What it does beside running its branches, whose work is read off their plans: for a dry run.

        Without branches, and without a word of its own on it, that is a forward pass of each prompt or probe.
        """
        if self.branching:
            return Work()
        note = f"note: {self.name} does not say what it does; one forward pass of each of its {self.needs} is counted"
        items = [self.tokens(subject, item) for item in self.items(subject)]
        return plain_work(subject.model, items) + Work(notes=(note,))

    def sample(self, settings: Settings, times: int) -> Settings:
        """Settings with which a dry run times it: of the same kinds of passes, but no more than a few. The larger
        `times`, the more may be done; branches are there so many times anyway."""
        return settings

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """One result from all items: of prompts as `over_prompts` says, beside each one's own; of probes by number."""
        if self.needs == "probes":
            return {f"{name}.{item}": value for item, own in enumerate(items) for name, value in own.items()}
        values = {name: stacked(name, [own[name] for own in items]) for name in items[0]}
        how = subject.settings.over_prompts
        result = {} if how == "none" else {name: over_prompts(own, how) for name, own in values.items()}
        return result | {f"{PER_PROMPT}{name}": own for name, own in values.items()}

    def each(self, tensors: Mapping[str, Tensor]) -> list[Tensors]:
        """What each prompt gave, read off a result: items that `reduce` makes the result of again."""
        own = {name.removeprefix(PER_PROMPT): v for name, v in tensors.items() if name.startswith(PER_PROMPT)}
        count = min((len(values) for values in own.values()), default=0)
        return [{name: values[item] for name, values in own.items()} for item in range(count)]

    def numbers(self, result: Result) -> dict[str, Any]:
        """What it has for `summary.json`: JSON-able."""
        return {}

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """What else its result says about itself, beside the tensors: JSON-able."""
        return {}

    def notes(self, result: Result) -> list[str]:
        """Sentences for the report that depend on the numbers."""
        return []

    def refuse(self, subject: Subject) -> None:
        """Raise where model and inputs are such that it cannot be measured, before anything is computed."""
        if "keep_front" in self.options:
            self._refuse_front(subject, self.front(subject.settings))

    def _refuse_front(self, subject: Subject, front: int) -> None:
        """A prompt of which nothing is changed or measured would look like one on which nothing matters."""
        cuts = {"cuts": subject.inputs.cuts, "levels": [one.cuts for one in subject.inputs.levels]}.get(self.needs)
        texts = self.texts(subject.inputs)
        ends = [min(cuts[n] if cuts else (), default=len(prompt)) for n, prompt in enumerate(texts)]
        short = [number for number, end in enumerate(ends) if front >= end]
        if short:
            first, least = short[0], min(ends)
            here = "it has {} tokens" if ends[first] == len(texts[first]) else "it is cut at token {}"
            others = f", nor of {clipped(', '.join(map(str, short[1:])), 30)}" if len(short) > 1 else ""
            raise HookdepthError(
                f"--keep-front {front} leaves nothing of prompt {first} for {self.name} to change or measure "
                f"({here.format(ends[first])}){others}",
                f"give --keep-front {least - 1} at most, or leave such prompts out",
            )

    def measured_tokens(self, subject: Subject) -> list[int]:
        """How many tokens of each prompt are not left alone."""
        return [len(prompt) - self.front(subject.settings) for prompt in subject.inputs.prompts]

    def front(self, settings: Settings) -> int:
        """How many tokens at the start are left alone."""
        return self.keep_front if settings.keep_front is None else settings.keep_front

    def used(self, subject: Subject) -> dict[str, Any]:
        """The options that it reads, with the values that they have in the end."""
        values = {option: getattr(subject.settings, option) for option in self.options}
        return values | ({"keep_front": self.front(subject.settings)} if "keep_front" in self.options else {})

    def identity(self, subject: Subject) -> dict[str, Any]:
        """Everything that its numbers depend on, besides model, seed, versions and machine."""
        inputs = subject.inputs
        settings = self.used(subject) | own_values(self)
        if self.needs == "cuts":
            settings["cuts"] = inputs.cuts
        known: dict[str, Any] = {"settings": settings}
        if self.needs == "levels":
            settings["levels"] = [(one.level, one.cuts) for one in inputs.levels]
        if self.needs == "questions":
            settings["questions"] = [(one.answer, one.most_tokens) for one in inputs.questions]
        prompts = (inputs.baseline if self.baseline else ()) if self.needs == "probes" else self.texts(inputs)
        known["data"] = {
            "n_prompts": len(prompts),
            "lengths": [len(prompt) for prompt in prompts],
            "prompts": [hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16] for prompt in prompts],
            "tokens_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }
        if inputs.texts and self.needs in ("prompts", "cuts"):  # so that a report can show them
            known["data"]["texts"] = [text if len(text) <= 300 else f"{text[:299]}…" for text in inputs.texts]
        if self.needs == "probes":
            known["probes"] = [asdict(probe) for probe in inputs.probes]
        return known


def stacked(name: str, values: Sequence[Tensor]) -> Tensor:
    """What several items gave, as one tensor: stacked("kl", [kl, kl])    # [2, L+1]

    Raises:
        HookdepthError: their shapes differ.
    """
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(map(list, shapes))[:2]))
        raise HookdepthError(f"{name} has shape {found} in one run", "give the same shape for every prompt", 1)
    return torch.stack(list(values))


def token_means(items: Sequence[Tensors], tokens: Sequence[int], largest: str = " ") -> Tensors:
    """Means over all tokens of all prompts, from the means over each prompt's tokens, which stand beside them.

        token_means([{"kl": kl}, {"kl": kl}], [180, 95])["per_prompt.kl"]     # [2, L+1]

    Args:
        tokens: how many each prompt's means are over: a long prompt counts for more.
        largest: names that begin so are not means, but maxima.
    """
    counts = torch.tensor(tokens, dtype=torch.float64)
    result: Tensors = {}
    for name in items[0]:
        values = torch.stack([own[name] for own in items])
        mean = (torch.tensordot(counts, values.double(), 1) / counts.sum()).float()
        whole = values.amax(0) if name.startswith(largest) else mean
        result |= {name: whole, f"{PER_PROMPT}{name}": values.float()}
    return result
