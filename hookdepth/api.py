"""The calls that a notebook makes: branches of one's own, and what `hookdepth run` does, without the command line.

import hookdepth

model = hookdepth.load("demo")
hookdepth.run(model, "The capital of France is", [hookdepth.Skip(4), hookdepth.Skip(5)])["output"]     # [branch]

results = hookdepth.analyse("demo", ["logit-lens", "skip-current"], limit=2)
results["skip-current"]["layer.effect"]     # [L, L]: row skipped, column measured
for name, figure in hookdepth.plot(results["skip-current"]).items():
    figure.savefig(f"{name}.png")
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import Inputs
from hookdepth.data import texts_as_dataset
from hookdepth.engine.arguments import (
    as_branches,
    as_measurements,
    as_prompts,
    check_acts,
    check_limit,
    check_targets,
    is_one,
    listed_branches,
)
from hookdepth.engine.measurements import LayerEffect, OutputEffect
from hookdepth.errors import HookdepthError, as_path
from hookdepth.model.ambient import plainly
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder
from hookdepth.model.loading import load
from hookdepth.options import refuse_unknown
from hookdepth.results import Result
from hookdepth.runs.branches import Branches
from hookdepth.runs.branches import measured as run_here
from hookdepth.runs.config import Config
from hookdepth.runs.runner import Run
from hookdepth.runs.start import analyses_of, prepared, read_dataset, refuse_noise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@plainly
def analyse(
    model: Decoder | str | os.PathLike[str] = "demo",
    analyses: str | Analysis | Sequence[str | Analysis] = "all",
    texts: str | Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Run analyses and give their results.

        analyse("demo", "residual-stats", limit=2)["cosine.layer"]     # [L]
        results = analyse("demo", ["residual-stats", "logit-lens"], limit=2)
        results["logit-lens"]["kl"]     # [L+1]

    Args:
        model: from `load` or `wrap`, with a tokenizer; or what `load` takes.
        analyses: a name, an `Analysis` of one's own, or several of them; "all" are the notebook's eight.
        texts: prompts, instead of a data set.
        options: those of `hookdepth run`, with the same names and defaults (`hookdepth run --help`, `Config`): limit,
            dataset, parts, seed, probes, keep_front, ig_method, … Without `out` nothing is kept; with it, a run that
            was stopped goes on there.

    Returns:
        Of one name, or one analysis, its `Result`; of several a dict, by name. What deserves attention (a noise floor
        that is not 0, prompts too short to be cut) is given as a `UserWarning`.

    Raises:
        HookdepthError: an unknown name or option, unusable data, or a run that failed.

    Source: 2505.13898, one analysis a figure; the README lists them.
    """
    refuse_unknown(options, Config)
    if texts is not None and {"dataset", "limit"} & set(options):
        raise HookdepthError("texts are given besides dataset= or limit=", "give texts alone, as many as are meant")
    config = Config(analyses=analyses, **options)
    given = [name for name in options if options[name] is not None]
    _refuse_what_does_nothing(model, config, given)
    wanted = analyses_of(config, given)
    notes: list[str] = []
    data = read_dataset(config, wanted, notes.append) if texts is None else texts_as_dataset(texts)
    if texts is not None:
        config = replace(config, limit=len(data.examples))
    decoder = model if isinstance(model, Decoder) else load(model, **config.of_model)
    if decoder.tokenizer is None:
        raise HookdepthError("this model has no tokenizer", "give one to wrap(model, tokenizer)")
    try:
        with tempfile.TemporaryDirectory(prefix="hookdepth-") as scratch:
            kept = config if config.out is not None else replace(config, out=scratch)
            work, wanted = prepared(kept, wanted, data, decoder, notes.append)
            found = work.execute(wanted)
    finally:
        for note in notes:
            warnings.warn(note, stacklevel=3)  # here, so that it points at the caller; `plainly` stands between
    if config.strict:
        refuse_noise(found)
    alone = isinstance(analyses, Analysis) or (isinstance(analyses, str) and analyses in [one.name for one in wanted])
    return found[0] if alone else {result.analysis: result for result in found}


def _refuse_what_does_nothing(model: Any, config: Config, given: Sequence[str]) -> None:
    if config.dry_run:
        raise HookdepthError("dry_run=True plans, and analyse measures", "use `hookdepth run --dry-run`")
    loading = [name for name in given if name in config.of_model]
    if isinstance(model, Decoder) and loading:
        what = f"{loading[0]}= says how a model is loaded, and this one is there already"
        raise HookdepthError(what, f"give it to load(…, {loading[0]}=…)")


@plainly
def run(
    model: Decoder,
    prompts: Any,
    branches: Any,
    measurements: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    measured: Any = None,
    over_prompts: str | None = None,
    max_rows: int | None = None,
    overwrite: bool = False,
) -> Result:
    """Run branches of prompts in shared passes, and measure each against its clean run.

        r = run(model, "The capital of France is", [Skip(layer) for layer in range(model.n_layers)])
        r["effect"], r.clean["output"], r.noise     # [branch, L], [branch], 0.0

    Args:
        model: from `load` or `wrap`.
        prompts: a text, token ids, or a list of these. A text or ids alone are one prompt; of a list, every branch
            runs on every prompt, and results begin with an axis of prompts.
        branches: interventions, or branches, or one of them. Where one names another prompt than the first, each runs
            on its own prompt only, and results begin with the axis of branches.
        measurements: what to read off them; default `LayerEffect()` and `OutputEffect()`.
        out: folder that keeps results (`run.safetensors`), and chunks while it runs: the same call goes on there.
        measured: tokens at which branches are measured that do not say so themselves, e.g. [-1].
        over_prompts: max, mean or median over prompts; each prompt's own are then `per_prompt.…`.
        max_rows: most rows of a pass; default as many as fit.
        overwrite: replace results of other settings in `out`.

    Raises:
        HookdepthError: what is no prompt, branch or measurement, or does not fit; before anything runs.
    """
    checked(model)
    one = isinstance(prompts, str) or is_one(prompts)
    ids = as_prompts(model, prompts)
    own = listed_branches(branches)
    if measured is not None:
        own = [branch if branch.measured is not None else replace(branch, measured=measured) for branch in own]
    bound = as_measurements(model, (LayerEffect(), OutputEffect()) if measurements is None else measurements)
    for what, listed in (("prompts", ids), ("branches", own), ("measurements", bound)):
        if not listed:
            raise HookdepthError(f"there are no {what}", "give at least one")
    layout = "own" if any(branch.prompt for branch in own) else "one" if one else "every"
    for number in range(len(ids) if layout == "every" else 1):
        there = own if layout == "own" else [replace(branch, prompt=number) for branch in own]
        check_targets(fitting := as_branches(model, there, ids), ids, bound)
        check_acts(fitting, ids)
    check_limit("max_rows", max_rows)
    mine = Branches(model, ids, own, bound, layout, kept=out is not None)
    if out is None:
        found = run_here(mine, max_rows)
    elif layout == "own":
        raise HookdepthError(
            "out= for branches that name their prompts", "leave out=, or give branches of every prompt"
        )
    else:
        found = _kept(mine, ids, as_path(out), max_rows, overwrite)
    return found if over_prompts is None else found.over_prompts(over_prompts)


def _kept(mine: Branches, ids: Sequence[Sequence[int]], out: Path, max_rows: int | None, overwrite: bool) -> Result:
    inputs, data = Inputs(tuple(map(tuple, ids))), {"name": "prompts", "prompts_sha256": None}
    notes: list[str] = []
    try:
        work = Run(mine.model, inputs, Settings(max_rows=max_rows), data, 0, out, overwrite, notes.append)
        return work.execute([mine])[0]
    finally:
        for note in notes:
            warnings.warn(note, stacklevel=4)  # at the caller of `run`; `plainly` stands between


def plot(result: Result) -> dict[str, Figure]:
    """The figures of a result, by name, as in the report.

        figures = plot(results["logit-lens"])     # {"logit-lens-kl": …, "logit-lens-overlap": …}
        figures["logit-lens-kl"].savefig("kl.png")

    They are matplotlib figures made without pyplot: no window opens, and nothing of its state changes.

    Raises:
        HookdepthError: an analysis that this version does not know.
    """
    from hookdepth.analyses.registry import declared, known
    from hookdepth.report.figures import figures_for  # matplotlib: who only computes need not wait for it

    declaration = declared(result)
    if declaration is None:
        raise HookdepthError(f"nobody knows the analysis {result.analysis!r}", f"use one of {', '.join(known())}")
    return figures_for(result, declaration)
