"""Examples that carry a level: which of them are taken, and where their answers are cut (2505.13898, Fig. 7)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hookdepth.data.examples import Dataset, Example
from hookdepth.data.tokens import Probe, make_probe
from hookdepth.errors import HookdepthError

MOST_CUTS, STEP, WHOLE_ANSWER = 4, 4, "mquake"


@dataclass(frozen=True)
class Leveled:
    """An example with its level: Leveled(3, probe, cuts=(29, 25)). Cuts lie in the answer; t − 1 predicts token t."""

    level: int | str
    probe: Probe
    cuts: tuple[int, ...]


def leveled_examples(
    dataset: Dataset, tokenizer: Any, per_level: int, seed: int, max_tokens: int | None = None
) -> tuple[Leveled, ...]:
    """The first examples of each level, levels in rising order, with their cuts.

        leveled_examples(load_examples("demo-levels"), tokenizer, per_level=20, seed=123)[0].level     # 1

    Raises:
        HookdepthError: rows without a level, prompt or answer, or a prompt that does not end between two tokens.
    """
    chosen = [
        (level, make_probe(tokenizer, str(one.prompt), str(one.answer), max_tokens))
        for level, own in by_level(dataset).items()
        for one in own[:per_level]
    ]
    generator, found = random.Random(seed), []
    for level, probe in chosen:
        first, n_answer = probe.answer_positions[0], len(probe.answer_positions)
        offsets = [0] if dataset.name == WHOLE_ANSWER or n_answer <= STEP else list(range(0, n_answer - STEP, STEP))
        generator.shuffle(offsets)
        found.append(Leveled(level, probe, tuple(first + offset for offset in offsets[:MOST_CUTS])))
    return tuple(found)


def by_level(dataset: Dataset) -> dict[int | str, list[Example]]:
    """Examples by level, numbers first and rising: list(by_level(load_examples("demo-levels")))   # [1, 2, 3, 4, 5]"""
    levels: dict[int | str, list[Example]] = {}
    for number, one in enumerate(dataset.examples):
        if one.level is None or not one.prompt or not one.answer:
            lacks = ", ".join(key for key in ("prompt", "answer", "level") if getattr(one, key) in (None, ""))
            remedy = "give one with levels: demo-levels, math, mquake, or a .jsonl file with prompt, answer and level"
            raise HookdepthError(f"row {number + 1} of {dataset.name!r} has no {lacks}", remedy)
        levels.setdefault(one.level, []).append(one)
    return {level: levels[level] for level in sorted(levels, key=lambda level: (isinstance(level, str), level))}
