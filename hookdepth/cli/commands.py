"""What each command takes, does, and prints. What needs torch is imported when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookdepth.errors import HookdepthError, choose

if TYPE_CHECKING:
    from hookdepth.analyses.base import Analysis
    from hookdepth.model.decoder import Decoder
    from hookdepth.results import Result
    from hookdepth.runs.config import Config


@dataclass(frozen=True)
class Command:
    """What a command is for, what it does, and what it takes; `of_run` names options that a run has, too."""

    help: str
    do: Callable[[argparse.Namespace], int]
    takes: tuple[tuple[str, dict[str, Any]], ...]
    of_run: list[str]


COMMANDS: dict[str, Command] = {}
"""By name, in the order in which help shows them."""


def _command(help: str, *takes: tuple[str, dict[str, Any]], of_run: str = "") -> Callable[[Any], Any]:
    def register(do: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        COMMANDS[do.__name__.removeprefix("_")] = Command(help, do, takes, of_run.split())
        return do

    return register


def _argument(name: str, metavar: str, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return name, {"metavar": metavar, "help": text, **more}


_FOLDERS = _argument("folders", "DIR", "the --out folders of two or more runs", nargs="+")


@_command("run analyses, write results, figures and the report")
def _run(options: argparse.Namespace) -> int:
    from hookdepth.runs import start  # imports torch and transformers: --help should not wait for them
    from hookdepth.runs.config import Config
    from hookdepth.runs.workers import joined

    names = {one.name for one in fields(Config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    config = Config(**given)
    if config.out is None:
        raise HookdepthError("the following arguments are required: --out", "see `hookdepth run --help`")
    with joined() as workers:
        analyses = workers.together(lambda: _checked(config, list(given)))
        if config.dry_run:
            if workers.first:
                print(start.describe_plan(config, analyses))
            return 0
        results = start.run(config, analyses, _warn if workers.first else lambda line: None, workers)
        return _finish(config, results) if workers.first else 0


def _checked(config: Config, given: Sequence[str]) -> list[Analysis]:
    from hookdepth.runs.start import analyses_of

    analyses = analyses_of(config, given)
    if not config.dry_run:
        _check_out(str(config.out), [one.name for one in analyses])
    return analyses


def _finish(config: Config, results: Sequence[Result]) -> int:
    from hookdepth.results import read_log
    from hookdepth.runs.reporting import report
    from hookdepth.runs.start import refuse_noise

    page, log = report(str(config.out)), read_log(str(config.out))
    for result in results:
        floor = result.metadata.get("null_effect")
        noise = "" if floor is None else f", noise floor {floor:.2g}"
        known = log.get(result.analysis)
        cost = f"{known['wall_time_s']:8.1f} s, {known['passes']} passes" if known else f"{'?':>8} s"
        print(f"{result.analysis:22} {cost}{noise}")
    _say_pages(page)
    if config.strict:
        refuse_noise(results)
    return 0


@_command(
    "make report.html and the figures of a run's folder again", _argument("folder", "DIR", "the --out folder of a run")
)
def _report(options: argparse.Namespace) -> int:
    from hookdepth.runs.reporting import report

    _say_pages(report(options.folder))
    return 0


@_command(
    "put the same curves of several runs into one figure each",
    _FOLDERS,
    _argument("--out", "DIR", "where the page goes (default: compare)", default="compare"),
    ("--scatter", {"action": "store_true", "help": "effective depth over models, too, with regression lines"}),
)
def _compare(options: argparse.Namespace) -> int:
    from hookdepth.runs.reporting import comparison

    _check_out(options.out)
    print(f"comparison: {comparison(options.folders, options.out, options.scatter)}")
    return 0


@_command(
    "put runs over different prompts, all else equal, together as one",
    _FOLDERS,
    _argument("--out", "DIR", "a folder for the results", required=True),
)
def _merge(options: argparse.Namespace) -> int:
    from hookdepth.runs.extending import merge
    from hookdepth.runs.reporting import report

    _check_out(options.out)
    merge(options.folders, options.out, _warn)
    print(f"report: {report(options.out)}")
    return 0


@_command(
    "show metadata and tensors of a result file or folder, as a table",
    _argument("path", "FILE|DIR", "a .safetensors file of a run, or its folder"),
)
def _info(options: argparse.Namespace) -> int:
    from hookdepth.report.tables import describe

    print(describe(options.path))
    return 0


@_command(
    "write the values of a result file as a table, beside it",
    _argument("path", "FILE", "a .safetensors file of a run"),
    _argument("--to", "csv|parquet", "the format (default: csv)", default="csv"),
)
def _export(options: argparse.Namespace) -> int:
    from hookdepth.analyses.registry import declared
    from hookdepth.report.notebook import FORMATS, export
    from hookdepth.results import Result

    kind = choose("format", options.to, FORMATS)
    result = Result.load(options.path)
    print(f"table: {export(result, declared(result), Path(options.path).with_suffix(f'.{kind}'))}")
    return 0


@_command(
    "compare the engine with plain single passes on a model",
    _argument("--branches", "N", "of each kind (default: 6)", type=int, default=6),
    _argument("--out", "FILE.json", "the table as JSON, too"),
    of_run="model dtype device quantize attn_implementation revision seed",
)
def _verify(options: argparse.Namespace) -> int:
    from hookdepth.checks import verify
    from hookdepth.results import write_atomic

    if options.out is not None and _check_place(str(Path(options.out).parent)) and os.path.isdir(options.out):
        raise HookdepthError(f"--out {options.out!r} is a folder", "give a file for the table")
    found = verify(_loaded(options), options.branches, **({"seed": options.seed} if "seed" in options else {}))
    print(found)
    if options.out is not None:
        write_atomic(options.out, f"{found.json()}\n".encode())
    return 0 if found.ok else 1


@_command("list the families of models that work, and their sites")
def _families(options: argparse.Namespace) -> int:
    from hookdepth.model.families import table

    print(table())
    return 0


@_command(
    "write a checkpoint without some of the layers",
    _argument("--keep", "0-9,12-29", "the layers that stay", required=True),
    _argument("--out", "DIR", "a new folder, which from_pretrained loads", required=True),
    of_run="model dtype device",
)
def _prune(options: argparse.Namespace) -> int:
    from hookdepth.runs.pruning import prune

    _check_place(options.out)
    model = _loaded(options)
    folder = prune(model, options.keep, options.out)
    print(f"kept layers {options.keep} of {model.n_layers}: {folder}")
    return 0


def _loaded(options: argparse.Namespace) -> Decoder:
    from hookdepth.model.loading import load
    from hookdepth.runs.config import Config

    given = vars(options)
    return load(given.get("model", "demo"), **{name: given[name] for name in Config().of_model if name in given})


def _check_out(text: str, names: Sequence[str] = ()) -> None:
    """Refuse, before anything is computed, a folder that could not be written to or reported on afterwards."""
    from hookdepth.results import SUFFIX, read_metadata

    out = _check_place(text)
    for path in sorted(out.glob(f"*{SUFFIX}")) if os.path.isdir(out) else ():
        if path.stem not in names:  # the run itself looks at those, and may replace them
            read_metadata(path)


def _check_place(text: str) -> Path:
    from hookdepth.results import check_folder_name

    out = Path(text)
    check_folder_name(text)
    if "\0" in text or not text.strip():
        raise HookdepthError(f"--out {text!r} is no folder of its own", "give a new or existing folder for the results")
    for place in (out, *out.parents):
        if os.path.exists(place):
            if not place.is_dir():
                raise HookdepthError(f"--out {text!r} cannot be a folder: {str(place)!r} is a file", "give a folder")
            if not os.access(place, os.W_OK | os.X_OK):
                raise HookdepthError(f"--out {text!r} cannot be written: {str(place)!r} is read-only", "give another")
            break
    return out


def _warn(line: str) -> None:
    print(f"hookdepth: {line}", file=sys.stderr)


def _say_pages(page: Path) -> None:
    maps = page.with_name("explore.html")
    if maps.exists():
        print(f"maps to point at: {maps}")
    print(f"report: {page}")
