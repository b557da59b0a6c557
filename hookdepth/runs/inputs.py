"""What the analyses run on: prompts as tokens, their cuts, the baseline's prompts, and probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hookdepth import data
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import BASELINE_PROMPTS, Inputs
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.runs.config import Config

DEFAULT_LIMIT, DEFAULT_PER_LEVEL = 10, 20
"""So many prompts are taken where nobody says how many, and so many examples of each level."""


def make_inputs(
    config: Config, analyses: Sequence[Analysis], dataset: data.Dataset, model: Decoder, warn: Callable[[str], None]
) -> Inputs:
    """Tokenise prompts, baseline and probes, and draw the cuts.

        make_inputs(Config(limit=2), chosen("all"), load_examples("demo"), model, print).prompts     # token ids

    Raises:
        HookdepthError: prompts that are too short for what is asked, or too long for the model.
    """
    context = model.context_length

    def tokens(first: int) -> tuple[tuple[int, ...], ...]:
        encoded = tuple(tuple(data.encode(model.tokenizer, e.text, context)) for e in dataset.examples[:first])
        for number, ids in enumerate(encoded):
            model.check_ids(ids, f"prompt {number} of the data set")
        return encoded

    count = config.limit or DEFAULT_LIMIT
    prompts, texts = tokens(count), tuple(one.text for one in dataset.examples[:count])
    cuts = tuple(data.sample_cuts([len(prompt) for prompt in prompts], config.seed))
    _check_cuts([one.name for one in analyses if one.needs == "cuts"], cuts, warn)
    levels: tuple[data.Leveled, ...] = ()
    if any(one.needs == "levels" for one in analyses):
        per_level = config.limit or DEFAULT_PER_LEVEL
        levels = data.leveled_examples(dataset, model.tokenizer, per_level, config.seed, context)
        for one in levels:
            model.check_ids(one.probe.token_ids, f"the example {one.probe.prompt[:40]!r} of level {one.level}")
    asking = any(one.needs == "questions" for one in analyses)
    questions = data.questions_of(dataset, model.tokenizer, count, context) if asking else ()
    found: tuple[data.Probe, ...] = ()
    if any(one.needs == "probes" for one in analyses):
        own = [(e.prompt, e.answer) for e in dataset.examples[:count] if e.prompt is not None and e.answer]
        pairs = config.probes or own or data.DEFAULT_PROBES
        found = tuple(data.make_probe(model.tokenizer, prompt, answer, context) for prompt, answer in pairs)
    # The first ten of the data set whatever the limit, so that baselines of different limits are the same.
    baseline = tokens(BASELINE_PROMPTS) if any(one.baseline for one in analyses) else ()
    return Inputs(prompts, cuts, baseline, found, levels, texts, questions)


def _check_cuts(names: Sequence[str], cuts: Sequence[Any], warn: Callable[[str], None]) -> None:
    short = sum(not own for own in cuts)
    if names and short == len(cuts):
        what = f"no prompt is long enough to be cut (13 tokens) for {' and '.join(names)}"
        raise HookdepthError(what, "give longer prompts, or name the other analyses with --analyses")
    if names and short:
        warn(f"{short} of {len(cuts)} prompts are too short to be cut and do not count in {' and '.join(names)}")
