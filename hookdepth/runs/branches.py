"""Branches and measurements of a user's own over prompts: an analysis that is made on the spot, for `hookdepth.run`.

own = Branches(model, [[5, 6, 7]], [Branch((Skip(4),))], [KL()], "every")
measured(own, max_rows=None)["kl"]     # [prompt, branch]

So it runs in chunks, resumes, and is drawn, reported, compared, merged and exported as every analysis is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.source import digest_of
from hookdepth.analyses.stored import declaration_of
from hookdepth.analyses.subject import Inputs, Measured, Subject, Tensors, noise_floor
from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.measurement import LayerMeasurement, Measurement
from hookdepth.engine.passes import measure
from hookdepth.engine.paths import LayerPath
from hookdepth.model.decoder import Decoder
from hookdepth.report.figures import Bars, Heatmap, Kind
from hookdepth.results import CLEAN, Result
from hookdepth.runs.saying import bar_over
from hookdepth.runs.sharing import Group

_LONGEST_LABEL = 40


class Branches(Analysis):
    """See the module. `layout` is "one" prompt (its axis is left out), "every" branch on every prompt, or each branch
    on its "own"; `kept` results stand under a digest of what branches and measurements are.
    """

    name = "run"
    question = "what do these branches change?"
    heading = "Branches of one's own"
    options = ("max_rows",)

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[Branch],
        measurements: Sequence[Measurement],
        layout: str,
        kept: bool = False,
    ) -> None:
        self._model, self._prompts, self._branches = model, prompts, branches
        self._measurements, self._layout = tuple(measurements), layout
        if kept:
            self.branches_sha256 = digest_of([*branches, *measurements])
        self._longest = max(map(len, prompts))
        self.longest = self._longest if any(one.reduce is None for one in measurements) else None

    @property
    def model(self) -> Decoder:
        """Whose layers they are."""
        return self._model

    @property
    def measurements(self) -> tuple[Measurement, ...]:  # type: ignore[override]
        """What is read off the branches."""
        return self._measurements

    @property
    def tensors(self) -> dict[str, str]:  # type: ignore[override]
        """Each measurement, and what it is on the branches' clean runs."""
        axes = {}
        for one in self._measurements:
            words = ["prompt"] * (self._layout == "every") + ["branch"]
            words += ["layer"] * isinstance(one, LayerMeasurement) + ["token"] * (one.reduce is None)
            axes[one.name] = axes[f"{CLEAN}{one.name}"] = " ".join(words)
        return axes

    @property
    def figures(self) -> tuple[Kind, ...]:  # type: ignore[override]
        """A map or bars of each; the clean runs' are in the file only."""
        found: list[Kind] = []
        for one in self._measurements:
            words = self.tensors[one.name].split()[self._layout == "every" :]
            label, over = one.name.replace("_", " "), f"{_WORDS[one.reduce]} over tokens" if one.reduce else ""
            if len(words) == 1:
                found.append(Bars(one.name, "A bar a branch.", label=label, axis="Branch", reduction=over))
            elif len(words) == 2:
                rows, columns = (word.capitalize() for word in words)
                reading = f"A row a branch, a column a {words[1]}."
                known: dict[str, Any] = {"label": label, "rows": rows, "columns": columns, "reduction": over}
                first = tuple(map(_first_layer, self._branches)) if one.change and words[1] == "layer" else False
                found.append(Heatmap(one.name, reading, **known, causal=first))
        return tuple(found)

    @property
    def labels(self) -> dict[str, list[str]]:  # type: ignore[override]
        """What the branches do, the prompts' beginnings, and the tokens of a prompt that is alone."""
        found = {"branch": [label_of(branch) for branch in self._branches]}
        texts = [self._words(prompt) for prompt in self._prompts]
        if self._layout == "every":
            joined = ("".join(words) for words in texts)
            found["prompt"] = [t if len(t) <= _LONGEST_LABEL else f"{t[: _LONGEST_LABEL - 1]}…" for t in joined]
        elif self._layout == "one":
            found["token"] = texts[0]
        return found

    def _words(self, prompt: Sequence[int]) -> list[str]:
        tokenizer = self._model.tokenizer
        return [f"{token} " if tokenizer is None else str(tokenizer.decode([token])) for token in prompt]

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        return [replace(branch, prompt=0) for branch in self._branches]

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """Each measurement's values and the clean runs', as long as the longest prompt's where tokens are left."""
        own = {**measured.layer, **measured.output}
        found = own | {f"{CLEAN}{name}": values for name, values in measured.clean.items()}
        return {name: self._padded(name, values) for name, values in found.items()}

    def _padded(self, name: str, values: Tensor) -> Tensor:
        if not self.tensors[name].endswith("token"):
            return values
        return torch.nn.functional.pad(values, (0, self._longest - values.shape[-1]), value=torch.nan)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        if self._layout == "one":
            return dict(items[0])
        return {name: torch.stack([own[name] for own in items]) for name in items[0]}

    def each(self, tensors: Mapping[str, Tensor]) -> list[Tensors]:
        count = min(map(len, tensors.values())) if self._layout == "every" else 0
        return [{name: values[item] for name, values in tensors.items()} for item in range(count)]

    def facts(self) -> dict[str, Any]:
        """What a result says where nothing was written: model, data, and what its axes are."""
        data = {
            "name": "prompts",
            "n_prompts": len(self._prompts),
            "lengths": [len(prompt) for prompt in self._prompts],
            "tokens_sha256": hashlib.sha256(json.dumps([list(one) for one in self._prompts]).encode()).hexdigest(),
        }
        return {"model": self._model.describe(), "data": data, **declaration_of(self)}


_WORDS = {"max": "largest", "min": "smallest", "mean": "mean", "sum": "sum"}


def _first_layer(branch: Branch) -> int:
    """Before it, every change is 0 by construction."""
    return branch.joins()[0] if branch.path is None else 0


def label_of(branch: Branch) -> str:
    """A branch in a few words: label_of(Branch((Skip(4, "attn"),)))   # 'Skip attn_out 4'"""
    words = " + ".join(_named(one) for one in branch.interventions)
    return words if branch.cut is None else f"{words} before {branch.cut}"


def _named(one: Intervention) -> str:
    if isinstance(one, LayerPath):
        return f"layers {one}"
    where = "" if one.tokens == slice(None) or isinstance(one.tokens, slice) else f" {list(one.tokens)}"
    return f"{type(one).__name__} {one.site} {one.layer}{where}"


def measured(own: Branches, max_rows: int | None) -> Result:
    """Run them here and now, and keep nothing: measured(own, None)["kl"]"""
    model, prompts = own._model, own._prompts
    if own._layout == "own":
        found = measure(model, prompts, own._branches, own.measurements, max_rows=max_rows)
        clean = {**found.clean_layer, **found.clean_output}
        given = Measured(own._branches, found.layer, found.output, clean)
        subject = Subject(model, Inputs(()), Settings())
        floor: Mapping[str, Any] = {"null_effect": found.null_effect, "null_where": found.null_where}
        return Result(own.name, own.collect(subject, 0, given), {**own.facts(), **floor})
    inputs = Inputs(tuple(map(tuple, prompts)))
    group = Group(own.name, [own], Subject(model, inputs, Settings(max_rows=max_rows)))
    with bar_over(group, len(prompts) > 1) as bar:
        partials = [group.run(chunk, bar.update) for chunk in range(group.n_chunks)]
    return Result(own.name, group.finish(partials)[own.name], {**own.facts(), **noise_floor(partials)})
