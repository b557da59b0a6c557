"""What `hookdepth run` does between its arguments and its results.

results = run(options, ["logit-lens"], ("layer",), warn=print)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hookdepth.analyses import BASELINE_PROMPTS, KEEP_FRONT, NAMES, NEED_CUTS, NEED_PROBES, Inputs, Settings
from hookdepth.analyses.gradients import METHODS, default_tolerance
from hookdepth.analyses.quadrature import check_steps
from hookdepth.data import DEFAULT_PROBES, Dataset, encode, load_examples, make_probe, sample_cuts
from hookdepth.errors import HookdepthError, choose
from hookdepth.model.decoder import PARTS, Decoder
from hookdepth.model.demo import demo_folder
from hookdepth.model.loading import load_model
from hookdepth.results import Result
from hookdepth.runs.dry_run import describe, estimate
from hookdepth.runs.outline import Words, load_outline
from hookdepth.runs.runner import Run
from hookdepth.runs.workers import Workers
from hookdepth.runs.workload import NODES

DEFAULT_LIMIT = 10
"""So many prompts are taken where nobody says how many."""
_ALSO_ANALYSIS = {"ig": "integrated-gradients", "stats": "residual-stats", "patching": "residual-erasure"}


def parse_analyses(text: str) -> list[str]:
    """Names of analyses from the command line, in the order in which they run.

    parse_analyses("skip-current,logit-lens")   # ['logit-lens', 'skip-current']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HookdepthError("--analyses names none", f"use all, or some of {', '.join(NAMES)}")
    for name in names:
        if name != "all":
            choose("analysis", name, NAMES, _ALSO_ANALYSIS)
    return [name for name in NAMES if name in names or "all" in names]


def parse_parts(text: str) -> tuple[str, ...]:
    """Parts from the command line, each once: parse_parts("attn,mlp")."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise HookdepthError("--parts names none", f"use some of {', '.join(PARTS)}")
    for part in parts:
        choose("part", part, PARTS, {"all": ",".join(PARTS), "both": "attn,mlp", "ffn": "mlp", "block": "layer"})
    return tuple(part for part in PARTS if part in parts)


def run(
    options: argparse.Namespace,
    names: Sequence[str],
    parts: tuple[str, ...],
    warn: Callable[[str], None],
    workers: Workers | None = None,
) -> list[Result]:
    """Load model and data, run the analyses, write the results; of several processes the first has them."""
    workers = workers or Workers()

    def prepare() -> Run:
        dataset = read_dataset(options.dataset, options.limit, warn)
        model = _load(options)
        return Run(
            model,
            _inputs(options, names, dataset, model, warn),
            make_settings(options, model, parts),
            about(dataset),
            options.seed,
            Path(options.out),
            overwrite=options.overwrite,
            warn=warn,
            workers=workers,
        )

    if options.model == "demo":
        workers.of_first(lambda: str(demo_folder()))  # is converted once
    return workers.together(prepare).execute(names)


def read_dataset(name: str | os.PathLike[str], limit: int | None, warn: Callable[[str], None]) -> Dataset:
    """As much of a data set as a run takes, and a word about the rest where nobody has said how many prompts.

        read_dataset("demo", 2, print)

    Args:
        limit: how many prompts are asked for; None for the default, 10.
    """
    dataset = load_examples(name, max(limit or DEFAULT_LIMIT, BASELINE_PROMPTS))
    if limit is None and (cut := dataset.left_out(DEFAULT_LIMIT)):
        warn(f"{cut} of {dataset.name!r} are taken; --limit N takes as many as you like")
    return dataset


def about(dataset: Dataset) -> dict[str, str]:
    """What results say about a data set, beside the tokens of their own prompts: about(dataset)["name"].

    The digest is of the rows that a run reads whatever its limit is, so that it is the same for every limit.
    """
    return {"name": dataset.name, "prompts_sha256": dataset.digest(BASELINE_PROMPTS)}


def make_settings(options: argparse.Namespace, model: Decoder, parts: tuple[str, ...]) -> Settings:
    """Settings of the analyses from the command line's options."""
    return Settings(
        parts=parts,
        keep_front=options.keep_front,
        max_rows=options.max_rows,
        ig_method=choose_method(options.ig_method),
        ig_steps=options.ig_steps,
        ig_tolerance=options.ig_tolerance or default_tolerance(model),
        ig_max_evaluations=options.ig_max_evaluations,
    )


def choose_method(name: str) -> str:
    """The method of integrated gradients, checked before anything is loaded: choose_method("adaptive")."""
    return choose("method", name, METHODS, {"gauss": "gauss-legendre", "paper": "riemann"})


def check_settings(names: Sequence[str], keep_front: int | None, ig_method: str, ig_steps: int) -> None:
    """Refuse, before anything is loaded, settings that no chosen analysis reads, or that none could run with.

    check_settings(["logit-lens"], 2, "adaptive", 256)
    """
    if keep_front is not None and (not isinstance(keep_front, int) or isinstance(keep_front, bool) or keep_front < 0):
        raise HookdepthError(f"--keep-front {keep_front!r} is no number of tokens", "give a whole number of at least 0")
    if keep_front is not None and not set(names) & set(KEEP_FRONT):
        raise HookdepthError(
            f"--keep-front means nothing to {' and '.join(names)}",
            f"leave it out, or add one of {', '.join(KEEP_FRONT)} to --analyses",
        )
    check_steps(ig_method, ig_steps)


def _load(options: argparse.Namespace) -> Decoder:
    return load_model(options.model, device_map=options.device_map, **_model_options(options))


def _model_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "device", "quantize", "attn_implementation", "revision")
    return {name: getattr(options, name) for name in names}


def _inputs(
    options: argparse.Namespace, names: Sequence[str], dataset: Dataset, model: Decoder, warn: Callable[[str], None]
) -> Inputs:
    chosen = {
        "limit": options.limit or DEFAULT_LIMIT,
        "seed": options.seed,
        "probes": options.probe,
        "keep_front": options.keep_front,
    }
    return make_inputs(names, dataset, model, warn, **chosen)


def make_inputs(
    names: Sequence[str],
    dataset: Dataset,
    model: Decoder,
    warn: Callable[[str], None],
    *,
    limit: int,
    seed: int,
    probes: Sequence[tuple[str, str]] | None = None,
    keep_front: int | None = None,
) -> Inputs:
    """Tokenise prompts, baseline and probes, draw the cuts, and see that `keep_front` leaves something to change.

    make_inputs(["logit-lens"], load_examples("demo"), model, print, limit=2, seed=123).prompts
    """
    context = model.context_length

    def tokens(count: int) -> tuple[tuple[int, ...], ...]:
        encoded = tuple(tuple(encode(model.tokenizer, e.text, context)) for e in dataset.examples[:count])
        for number, ids in enumerate(encoded):
            model.check_ids(ids, f"prompt {number} of the data set")
        return encoded

    prompts = tokens(limit)
    cuts = tuple(sample_cuts([len(prompt) for prompt in prompts], seed))
    _check_front(keep_front, names, prompts)
    if set(names) & set(NEED_CUTS):
        short = [number for number, own in enumerate(cuts) if not own]
        if len(short) == len(cuts):
            raise HookdepthError(
                "no prompt is long enough to be cut (13 tokens) for skip-future and local-future",
                "give longer prompts, or name the other analyses with --analyses",
            )
        if short:
            warn(f"{len(short)} of {len(cuts)} prompts are too short to be cut and do not count in *-future")
    if not set(names) & set(NEED_PROBES):
        return Inputs(prompts, cuts)
    texts = list(probes or _own_probes(dataset, limit) or DEFAULT_PROBES)
    found = tuple(make_probe(model.tokenizer, prompt, answer, context) for prompt, answer in texts)
    # The first ten of the data set whatever the limit, so that baselines of different limits are the same.
    return Inputs(prompts, cuts, tokens(BASELINE_PROMPTS), found)


def _own_probes(dataset: Dataset, limit: int) -> list[tuple[str, str]]:
    return [(e.prompt, e.answer) for e in dataset.examples[:limit] if e.prompt is not None and e.answer]


def _check_front(keep_front: int | None, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts of which every token is left alone: a map of zeros would look like a result."""
    longest, settings = max(map(len, prompts)), Settings(keep_front=keep_front)
    # A cut lies at token 8 at the least; what is left of it is intervened on.
    for least, ending in ((longest, "-current"), (8, "-future")):
        touched = [name for name in names if name.endswith(ending)]
        front = max((settings.front(name) for name in touched), default=0)
        if front >= least:
            raise HookdepthError(
                f"--keep-front {front} leaves nothing for {' and '.join(touched)} to change "
                f"(the longest prompt has {longest} tokens{', a cut may lie at token 8' if least == 8 else ''})",
                "give a smaller number, or longer prompts",
            )


def describe_plan(options: argparse.Namespace, names: Sequence[str], parts: tuple[str, ...]) -> str:
    """What `--dry-run` prints: passes, work, memory and time of each analysis; no weights are loaded."""
    outline = load_outline(options.model, **_model_options(options))
    notes: list[str] = []
    dataset = read_dataset(options.dataset, options.limit, lambda line: notes.append(f"note: {line}"))
    inputs = _inputs(options, names, dataset, outline, lambda line: None)
    settings = make_settings(options, outline, parts)
    if isinstance(outline.tokenizer, Words):
        notes.append("note: there is no tokenizer; a word, a digit or a sign is taken for a token")
    if options.device_map:
        notes.append("note: planned for one device; --device-map spreads the weights, and moving them takes time")
    if "integrated-gradients" in names and settings.ig_method == "adaptive":
        notes.append(
            f"note: adaptive integrated gradients take as many nodes as they need, here {NODES} a layer are assumed; "
            f"with --ig-max-evaluations {settings.ig_max_evaluations} it may be up to "
            f"{settings.ig_max_evaluations / NODES:.0f} times as many"
        )
    return describe(outline, estimate(outline, names, inputs, settings), notes)
