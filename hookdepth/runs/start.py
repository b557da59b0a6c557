"""From a config to results: data and model are loaded, analyses run, results written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import chosen
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import BASELINE_PROMPTS, Subject
from hookdepth.data import Dataset, load_examples
from hookdepth.engine.machines import MACHINES, Machine
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.demo import demo_folder
from hookdepth.model.loading import load
from hookdepth.options import flag_of
from hookdepth.results import Result
from hookdepth.runs.config import Config
from hookdepth.runs.inputs import DEFAULT_LIMIT, DEFAULT_PER_LEVEL, make_inputs
from hookdepth.runs.runner import Run
from hookdepth.runs.workers import Workers

if TYPE_CHECKING:
    from hookdepth.runs.dry_run import Estimate
    from hookdepth.runs.outline import Outline


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


def read_dataset(config: Config, analyses: Sequence[Analysis], warn: Callable[[str], None]) -> Dataset:
    """As much of a data set as a run takes, and a word about the rest where nobody has said how much."""
    by_level = [one.needs == "levels" for one in analyses]
    most = max(config.limit or DEFAULT_LIMIT, BASELINE_PROMPTS)
    dataset = load_examples(config.dataset, None if any(by_level) else most)
    if config.limit is None:
        taken = [] if all(by_level) else [dataset.left_out(DEFAULT_LIMIT)]
        taken += [f"at most {DEFAULT_PER_LEVEL} examples of each level"] if any(by_level) else []
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
    dataset: Dataset,
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
    data = {"name": dataset.name, "prompts_sha256": dataset.digest(BASELINE_PROMPTS)}
    settings, out, own = config.settings, Path(config.out), workers or Workers()
    return Run(model, inputs, settings, data, config.seed, out, config.overwrite, warn, own), usable


def _met(
    config: Config, analyses: Sequence[Analysis], dataset: Dataset, model: Decoder, warn: Callable[[str], None]
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


def describe_plan(config: Config, analyses: Sequence[Analysis]) -> str:
    """What `--dry-run` prints: passes, work, memory and time of each analysis; no weights are loaded."""
    from hookdepth.runs.dry_run import compare, describe

    if config.on != "all":
        return describe(*_plan(config, analyses, MACHINES.get(config.on or "")))
    plans = {name: _plan(config, analyses, machine) for name, machine in MACHINES.items()}
    notes = dict.fromkeys(note for _, _, noted in plans.values() for note in noted)
    return compare({name: (outline, found) for name, (outline, found, _) in plans.items()}, list(notes))


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
