"""The analyses from Python, in two calls: what `hookdepth run` does, without the command line.

import hookdepth

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
from typing import TYPE_CHECKING, Any

from hookdepth.analyses.base import Analysis
from hookdepth.data import texts_as_dataset
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.loading import load
from hookdepth.options import refuse_unknown
from hookdepth.results import Result
from hookdepth.runs.config import Config
from hookdepth.runs.start import analyses_of, read_dataset, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    wanted = analyses_of(config, [name for name in options if options[name] is not None])
    notes: list[str] = []
    data = read_dataset(config, wanted, notes.append) if texts is None else texts_as_dataset(texts)
    if texts is not None:
        config = replace(config, limit=len(data.examples))
    decoder = model if isinstance(model, Decoder) else load(os.fspath(model), **config.of_model)
    if decoder.tokenizer is None:
        raise HookdepthError("this model has no tokenizer", "give one to wrap(model, tokenizer)")
    try:
        with tempfile.TemporaryDirectory(prefix="hookdepth-") as scratch:
            kept = config if config.out is not None else replace(config, out=scratch)
            found = run_of(kept, wanted, data, decoder, notes.append).execute(wanted)
    finally:
        for note in notes:
            warnings.warn(note, stacklevel=2)  # here, so that it points at the caller
    alone = isinstance(analyses, Analysis) or (isinstance(analyses, str) and analyses in [one.name for one in wanted])
    return found[0] if alone else {result.analysis: result for result in found}


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
