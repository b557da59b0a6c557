"""layer-accuracy: does the answer survive where a layer is skipped, or where layers are visited in another order?

    hookdepth.analyse("demo", "layer-accuracy", dataset="demo-facts", limit=2)["accuracy"]     # [branch]

The model answers each question greedily, untouched and on every branch: all layers skipped one by one, on the prompt
and on what it writes, then the sequences of `--paths`. Right is an exact match with the data set's answer
(`data.questions`). Skipping a layer can leave losses low and answers wrong; 2505.13898 leaves open how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.data.questions import is_right
from hookdepth.engine.decoding import generate
from hookdepth.engine.interventions import Skip
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.work import Work, overhead_of
from hookdepth.metrics import wilson_interval
from hookdepth.report.figures import Bars
from hookdepth.results import Result

_NONE = -1.0  # in place of a token, after the last


class LayerAccuracy(Analysis):
    """Share of right answers by layer skipped, and by path: analyse(model, "layer-accuracy", dataset="demo-facts")."""

    name = "layer-accuracy"
    question = "whether answers survive that a layer is skipped"
    heading = "Answers without a layer"
    order = 18
    needs = "questions"
    options = ("keep_front", "paths", "max_rows")
    tensors = {
        "accuracy": "branch",
        "accuracy_interval": "branch end",
        "clean_accuracy": "",
        "clean_accuracy_interval": "end",
        "per_prompt.tokens": "_ run token",
    }
    figures = (
        Bars(
            "accuracy",
            "A bar a layer: the share of questions that are still answered right when it is skipped; after the layers, "
            "in the order in which they were given, the paths.",
            label="Accuracy",
            axis="Layer skipped, or path",
            ends=(0.0, 1.0),
            reduction="exact match, mean over questions",
            over_training=None,
        ),
    )

    def runs(self, subject: Subject) -> list[Skip | LayerPath]:
        """Each layer skipped, then the paths."""
        front = self.front(subject.settings)
        skips = [Skip(layer, tokens=slice(front, None)) for layer in range(subject.model.n_layers)]
        return [*skips, *(LayerPath(path, keep_front=front) for path in subject.settings.paths)]

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """The tokens of a question's answers, the untouched model's first."""
        asked, longest = subject.inputs.questions[item], max(one.most_tokens for one in subject.inputs.questions)
        found = generate(
            subject.model, [asked.token_ids], self.runs(subject), asked.most_tokens, max_rows=subject.settings.max_rows
        )
        on_pass()
        tokens = torch.full((1 + len(found[0]), longest), _NONE)
        for row, text in zip(tokens, [found.clean[0], *found[0]], strict=True):
            row[: len(text.tokens)] = torch.tensor(text.tokens, dtype=torch.float32)
        where = "logits after the prompt" if found.null_effect else None
        return Partial({"tokens": tokens}, found.plan.n_passes + asked.most_tokens, found.null_effect, where)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Shares of right answers with their 95 % intervals, and each question's own."""
        tokens = torch.stack([own["tokens"] for own in items])
        pairs = zip(self.answers(subject, tokens), subject.inputs.questions, strict=True)
        right = torch.tensor([[is_right(text, asked.answer) for text in texts] for texts, asked in pairs]).float()
        interval = wilson_interval(right.sum(0), len(right))
        return {
            "accuracy": right[:, 1:].mean(0),
            "accuracy_interval": interval[1:],
            "clean_accuracy": right[:, 0].mean(),
            "clean_accuracy_interval": interval[0],
            "per_prompt.accuracy": right[:, 1:],
            "per_prompt.clean_accuracy": right[:, 0],
            "per_prompt.tokens": tokens,
        }

    def answers(self, subject: Subject, tokens: Tensor) -> list[list[str]]:
        """The texts of [prompt, run, token]."""
        decode = subject.model.tokenizer.decode
        return [
            [decode([int(token) for token in own.tolist() if token >= 0], skip_special_tokens=True) for own in runs]
            for runs in tokens
        ]

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """The answers: of each question what is right, what the model wrote, and what each branch wrote."""
        texts = self.answers(subject, tensors["per_prompt.tokens"])
        asked = [one.answer for one in subject.inputs.questions]
        said = [{"right": right, "clean": own[0], "branches": own[1:]} for right, own in zip(asked, texts, strict=True)]
        branches = [*map(str, range(subject.model.n_layers)), *subject.settings.paths]
        labels = {"labels": {"branch": branches}} if subject.settings.paths else {}
        return {"answers": said, "branches": branches, **labels}

    def work(self, subject: Subject) -> Work:
        """Of each question: the prompt along every branch, then a token of every branch at a time."""
        total, n_layers = Work(), subject.model.n_layers
        for asked in subject.inputs.questions:
            length, new, rows = len(asked.token_ids), asked.most_tokens, n_layers + 1
            skipped = (rows / 2 * length + rows * new) * n_layers
            paths = len(subject.settings.paths) * 3 * new * (length + new / 2) * n_layers
            overhead = overhead_of(subject.model, skipped + paths, 1 + new)
            total += Work(1 + new, skipped + paths, rows * new, width=length + new, overhead=overhead)
        return total

    def sample(self, settings: Settings, times: int) -> Settings:
        """Without paths, which are of the whole model's layers."""
        return replace(settings, paths=())

    def refuse(self, subject: Subject) -> None:
        """Questions must be longer than what is left alone, and paths visit layers that there are."""
        super().refuse(subject)
        for path in self.runs(subject)[subject.model.n_layers :]:
            for asked in subject.inputs.questions:
                path.check(subject.model, len(asked.token_ids))

    def numbers(self, result: Result) -> dict[str, Any]:
        """How much is right untouched, how much at worst, and where."""
        if "accuracy" not in result.tensors:
            return dict.fromkeys(("clean_accuracy", "lowest_accuracy", "lowest_at", "unharmed"))
        accuracy, clean = result["accuracy"], result["clean_accuracy"]
        return {
            "clean_accuracy": round(float(clean), 4),
            "lowest_accuracy": round(float(accuracy.min()), 4),
            "lowest_at": result.metadata.get("branches", range(len(accuracy)))[int(accuracy.argmin())],
            "unharmed": int((accuracy >= clean).sum()),
        }

    def notes(self, result: Result) -> list[str]:
        """The share of right answers of the untouched model."""
        if "clean_accuracy_interval" not in result.tensors:
            return []
        low, high = result["clean_accuracy_interval"].tolist()
        share = float(result["clean_accuracy"])
        return [f"Untouched, the model answers {share:.0%} right (95 % interval {low:.0%} to {high:.0%})."]
