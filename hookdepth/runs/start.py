"""From a config to results: data and model are loaded, analyses run, results written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookdepth import data
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import chosen
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import BASELINE_PROMPTS, Inputs, Subject
from hookdepth.engine.machines import MACHINES, Machine
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.demo import demo_folder
from hookdepth.model.loading import load
from hookdepth.options import flag_of
from hookdepth.results import Result
from hookdepth.runs.config import Config
from hookdepth.runs.runner import Run
from hookdepth.runs.workers import Workers

if TYPE_CHECKING:
    from hookdepth.runs.dry_run import Estimate
    from hookdepth.runs.outline import Outline

DEFAULT_LIMIT, DEFAULT_PER_LEVEL = 10, 20
"""So many prompts are taken where nobody says how many, and so many examples of each level."""


def analyses_of(config: Config, given: Sequence[str] = ()) -> list[Analysis]:
    """The analyses that a config names, in their order; what was `given` and none of them reads is refused."""
    analyses = chosen(config.analyses)
    read = {option for one in analyses for option in one.options}
    needed = {one.needs for one in analyses}
    read |= {option for option, need in (("probes", "probes"), ("seed", "cuts"), ("seed", "levels")) if need in needed}
    for one in fields(Config):
        of_analyses = one.name in ("probes", "seed") or one.name in Settings.__dataclass_fields__
        if one.name in given and of_analyses and one.name not in read:  # it would look as if it did something
            what = f"none of the chosen analyses reads {flag_of(one)}"
            raise HookdepthError(what, "leave it out, or choose one that does")
    return analyses


def read_dataset(config: Config, analyses: Sequence[Analysis], warn: Callable[[str], None]) -> data.Dataset:
    """As much of a data set as a run takes, and a word about the rest where nobody has said how much."""
    by_level = [one.needs == "levels" for one in analyses]
    most = max(config.limit or DEFAULT_LIMIT, BASELINE_PROMPTS)
    dataset = data.load_examples(config.dataset, None if any(by_level) else most)
    if config.limit is None:
        taken = [] if all(by_level) else [dataset.left_out(DEFAULT_LIMIT)]
        largest = max(Counter(one.level for one in dataset.examples).values(), default=0)
        if any(by_level) and largest > DEFAULT_PER_LEVEL:
            taken.append(f"at most {DEFAULT_PER_LEVEL} examples of each level")
        if any(taken):
            what = " and ".join(filter(None, taken))
            warn(f"{what} of {dataset.name!r} are taken; --limit N takes as many as you like")
    return dataset


def run(
    config: Config, analyses: Sequence[Analysis], warn: Callable[[str], None], workers: Workers | None = None
) -> list[Result]:
    """Load model and data, run the analyses, write the results; of several processes the first has them."""
    workers = workers or Workers()

    def prepare() -> tuple[Run, list[Analysis]]:
        dataset = read_dataset(config, analyses, warn)
        model = config.model if isinstance(config.model, Decoder) else load(config.model, **config.of_model)
        return prepared(config, analyses, dataset, model, warn, workers)

    if config.model == "demo":
        workers.of_first(lambda: str(demo_folder()))  # is converted once
    work, usable = workers.together(prepare)
    return work.execute(usable)


def prepared(
    config: Config,
    analyses: Sequence[Analysis],
    dataset: data.Dataset,
    model: Decoder,
    warn: Callable[[str], None],
    workers: Workers | None = None,
) -> tuple[Run, list[Analysis]]:
    """A run of a model and a data set that are there already, and the analyses that they serve."""
    if config.out is None:
        raise HookdepthError("the results have no folder", "give --out")
    usable = _met(config, analyses, dataset, model, warn)
    inputs = make_inputs(config, usable, dataset, model, warn)
    # Of the rows that a run reads whatever its limit is, so that it is the same for every limit.
    about = {"name": dataset.name, "prompts_sha256": dataset.digest(BASELINE_PROMPTS)}
    settings, out, own = config.settings, Path(config.out), workers or Workers()
    return Run(model, inputs, settings, about, config.seed, out, config.overwrite, warn, own), usable


def _met(
    config: Config, analyses: Sequence[Analysis], dataset: data.Dataset, model: Decoder, warn: Callable[[str], None]
) -> list[Analysis]:
    """The analyses whose needs model and data meet, where "every" is asked for; a line for each that is left out."""
    if config.analyses != "every":
        return list(analyses)

    def refusal(one: Analysis) -> str:
        try:
            inputs = make_inputs(config, [one], dataset, model, lambda line: None)
            one.refuse(Subject(model, inputs, config.settings))
        except HookdepthError as error:
            return error.problem
        return ""

    refusals = {one.name: refusal(one) for one in analyses}
    for name, problem in refusals.items():
        if problem:
            warn(f"{name} is left out: {problem}")
    return [one for one in analyses if not refusals[one.name]]


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


def describe_plan(config: Config, analyses: Sequence[Analysis]) -> str:
    """What `--dry-run` prints: passes, work, memory and time of each analysis; no weights are loaded."""
    from hookdepth.runs.dry_run import compare, describe

    if config.on != "all":
        return describe(*_plan(config, analyses, MACHINES.get(config.on or "")))
    return compare({name: _plan(config, analyses, machine) for name, machine in MACHINES.items()})


def _plan(
    config: Config, analyses: Sequence[Analysis], machine: Machine | None
) -> tuple[Outline, list[Estimate], list[str]]:
    from hookdepth.runs.dry_run import estimate
    from hookdepth.runs.outline import Words, load_outline

    # An outline runs no kernels, and is planned for one device.
    how = {name: value for name, value in config.of_model.items() if name not in ("kernels", "device_map")}
    outline = load_outline(config.model, **how, machine=machine)
    notes: list[str] = []
    dataset = read_dataset(config, analyses, lambda line: notes.append(f"note: {line}"))
    analyses = _met(config, analyses, dataset, outline, lambda line: notes.append(f"note: {line}"))
    inputs = make_inputs(config, analyses, dataset, outline, lambda line: None)
    if isinstance(outline.tokenizer, Words):
        notes.append("note: there is no tokenizer; a word, a digit or a sign is taken for a token")
    if config.device_map:
        notes.append("note: planned for one device; --device-map spreads the weights, and moving them takes time")
    settings = config.settings
    if isinstance(settings.target, str):
        kind = {name: config.of_model[name] for name in ("dtype", "device")} | {"machine": machine}
        settings = replace(settings, target=load_outline(settings.target, **kind))
    return outline, estimate(outline, analyses, inputs, settings, machine=machine), notes


def refuse_noise(results: Iterable[Result]) -> None:
    """Raise where a noise floor is not 0, as --strict wants it, with the largest and where it was."""
    noisy = [result for result in results if result.metadata.get("null_effect")]
    if noisy:
        worst = max(noisy, key=lambda result: float(result.metadata["null_effect"]))
        raise HookdepthError(
            f"--strict: the noise floor of {worst.analysis} is {worst.metadata['null_effect']:.2g}, not 0 "
            f"({worst.metadata['null_where']})",
            "what was written stays; try another --max-rows, --dtype or --attn-implementation",
            1,
        )
