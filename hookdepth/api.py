"""The analyses from Python, in two calls: what `hookdepth run` does, without the command line.

import hookdepth

results = hookdepth.analyse("demo", ["logit-lens", "skip-current"], limit=2)
results["skip-current"].tensors["layer.effect"]     # [L, L]: row skipped, column measured
for name, figure in hookdepth.plot(results["skip-current"]).items():
    figure.savefig(f"{name}.png")
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookdepth.analyses import NAMES, Settings
from hookdepth.analyses.gradients import METHODS, default_tolerance
from hookdepth.data import load_examples
from hookdepth.errors import HookdepthError, choose
from hookdepth.model.decoder import Decoder
from hookdepth.model.loading import load_model
from hookdepth.results import Result
from hookdepth.runs.runner import Run
from hookdepth.runs.session import make_inputs, parse_analyses, parse_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHER_SETTINGS = ("keep_front", "max_rows", "ig_method", "ig_steps", "ig_max_evaluations")


def analyse(
    model: Decoder | str | os.PathLike[str] = "demo",
    analyses: str | Sequence[str] = "all",
    *,
    dataset: str | os.PathLike[str] = "demo",
    limit: int = 10,
    probes: Sequence[tuple[str, str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    seed: int = 123,
    parts: str | Sequence[str] = "layer",
    ig_tolerance: float | None = None,
    **settings: Any,
) -> dict[str, Result]:
    """Run analyses and give their results, by name.

        results = analyse("demo", ["residual-stats"], limit=2)
        results["residual-stats"].tensors["cosine.layer"]     # [L]

    Args:
        model: from `load_model` or `wrap`, with a tokenizer; or what `load_model` takes.
        analyses: "all", one name, or several.
        dataset: `demo`, `gsm8k`, a JSONL file, or a text file with a prompt a line.
        limit: how many of its prompts.
        probes: (prompt, answer) pairs for residual-erasure and integrated-gradients; default the data set's own
            answers, or the two of the paper.
        out: folder that keeps the result files; a run that was stopped goes on there. None: nothing is kept.
        overwrite: replace results of other settings in `out`.
        seed: of the cuts.
        parts: of layer, attn, mlp: what is skipped or attributed.
        ig_tolerance: of integrated gradients, relative to f(x) − f(baseline); default 0.01, 0.1 in 16 bits.
        settings: keep_front, max_rows, ig_method, ig_steps or ig_max_evaluations, as in `analyses.Settings`.

    Returns:
        Analysis → `Result`. What deserves attention (a noise floor that is not 0, prompts too short to be cut)
        is given as a `UserWarning`.

    Raises:
        HookdepthError: an unknown name or setting, unusable data, or a run that failed.

    Source: 2505.13898, one analysis a figure; the README lists them.
    """
    names = parse_analyses(analyses if isinstance(analyses, str) else ",".join(analyses))
    chosen = parse_parts(parts if isinstance(parts, str) else ",".join(parts))
    for name in settings:
        choose("setting", name, _OTHER_SETTINGS)
    choose("method", settings.get("ig_method", METHODS[0]), METHODS)
    if limit < 1:
        raise HookdepthError(f"limit={limit}", "give a whole number of at least 1")
    data = load_examples(dataset)
    decoder = model if isinstance(model, Decoder) else load_model(os.fspath(model))
    if decoder.tokenizer is None:
        raise HookdepthError("this model has no tokenizer", "give one to wrap(model, tokenizer)")
    notes: list[str] = []
    front = settings.get("keep_front", Settings.keep_front)
    inputs = make_inputs(names, data, decoder, notes.append, limit=limit, seed=seed, probes=probes, keep_front=front)
    tolerance = default_tolerance(decoder) if ig_tolerance is None else ig_tolerance
    complete = Settings(parts=chosen, ig_tolerance=tolerance, **settings)
    about = {"name": data.name, "prompts_sha256": data.sha256}
    try:
        with tempfile.TemporaryDirectory(prefix="hookdepth-") as scratch:
            folder = Path(scratch if out is None else out)
            run = Run(decoder, inputs, complete, about, seed, folder, overwrite=overwrite, warn=notes.append)
            return {result.analysis: result for result in run.execute(names)}
    finally:
        for note in notes:
            warnings.warn(note, stacklevel=2)  # here, so that it points at the caller


def plot(result: Result) -> dict[str, Figure]:
    """The figures of a result, by name, as in the report.

        figures = plot(results["logit-lens"])     # {"logit-lens-kl": …, "logit-lens-overlap": …}
        figures["logit-lens-kl"].savefig("kl.png")

    They are matplotlib figures made without pyplot: no window opens, and nothing of its state changes.

    Raises:
        HookdepthError: an analysis that this version does not know.
    """
    from hookdepth.report.declared import lookup
    from hookdepth.report.figures import figures_for

    choose("analysis", result.analysis, NAMES)
    return figures_for(result, lookup(result))
