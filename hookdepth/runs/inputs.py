"""What the analyses run on: prompts as tokens, their cuts, the baseline's prompts, and probes.

inputs = make_inputs(chosen("logit-lens"), load_examples("demo"), model, print, limit=2, seed=123)
inputs.prompts        # token ids
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hookdepth.analyses.base import BASELINE_PROMPTS, Analysis, Inputs
from hookdepth.analyses.settings import Settings
from hookdepth.data import DEFAULT_PROBES, Dataset, encode, make_probe, sample_cuts
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder

_FIRST_CUT = 8  # what is left of a cut is intervened on, and no cut lies at an earlier token


def make_inputs(
    analyses: Sequence[Analysis],
    dataset: Dataset,
    model: Decoder,
    warn: Callable[[str], None],
    *,
    limit: int,
    seed: int,
    probes: Sequence[tuple[str, str]] | None = None,
    settings: Settings | None = None,
) -> Inputs:
    """Tokenise prompts, baseline and probes, draw the cuts, and see that something is left to be changed and measured.

        make_inputs(chosen("logit-lens"), load_examples("demo"), model, print, limit=2, seed=123).prompts

    Raises:
        HookdepthError: prompts that are too short for what is asked, or too long for the model.
    """
    context = model.context_length

    def tokens(count: int) -> tuple[tuple[int, ...], ...]:
        encoded = tuple(tuple(encode(model.tokenizer, e.text, context)) for e in dataset.examples[:count])
        for number, ids in enumerate(encoded):
            model.check_ids(ids, f"prompt {number} of the data set")
        return encoded

    prompts = tokens(limit)
    cuts = tuple(sample_cuts([len(prompt) for prompt in prompts], seed))
    _check_front(analyses, settings or Settings(), prompts)
    _check_cuts([one.name for one in analyses if one.needs == "cuts"], cuts, warn)
    needing = [one for one in analyses if one.needs == "probes"]
    if not needing:
        return Inputs(prompts, cuts)
    texts = list(probes or _own_probes(dataset, limit) or DEFAULT_PROBES)
    found = tuple(make_probe(model.tokenizer, prompt, answer, context) for prompt, answer in texts)
    # The first ten of the data set whatever the limit, so that baselines of different limits are the same.
    baseline = tokens(BASELINE_PROMPTS) if any(one.baseline for one in needing) else ()
    return Inputs(prompts, cuts, baseline, found)


def _own_probes(dataset: Dataset, limit: int) -> list[tuple[str, str]]:
    return [(e.prompt, e.answer) for e in dataset.examples[:limit] if e.prompt is not None and e.answer]


def _check_cuts(names: Sequence[str], cuts: Sequence[Any], warn: Callable[[str], None]) -> None:
    short = sum(not own for own in cuts)
    if names and short == len(cuts):
        raise HookdepthError(
            f"no prompt is long enough to be cut (13 tokens) for {' and '.join(names)}",
            "give longer prompts, or name the other analyses with --analyses",
        )
    if names and short:
        warn(f"{short} of {len(cuts)} prompts are too short to be cut and do not count in {' and '.join(names)}")


def _check_front(analyses: Sequence[Analysis], settings: Settings, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts of which every token is left alone: a map of zeros would look like a result."""
    longest = max(map(len, prompts))
    for analysis in analyses:
        if "keep_front" not in analysis.options:
            continue
        least = _FIRST_CUT if analysis.needs == "cuts" else longest
        front = analysis.front(settings)
        if front >= least:
            cut = f", a cut may lie at token {_FIRST_CUT}" if analysis.needs == "cuts" else ""
            raise HookdepthError(
                f"--keep-front {front} leaves nothing for {analysis.name} to change or measure "
                f"(the longest prompt has {longest} tokens{cut})",
                "give a smaller number, or longer prompts",
            )
