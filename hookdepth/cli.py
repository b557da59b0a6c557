"""The command line: arguments → analyses → results → report. The only module that prints or exits.

    hookdepth run --model demo --dataset demo --out out/demo
    hookdepth report out/demo
    hookdepth compare out/demo out/other
    hookdepth info out/demo/ANALYSIS.safetensors

Exit status: 0 done, 1 the run failed, 2 what was given is unusable (one line on stderr, no traceback).
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hookdepth._version import __version__
from hookdepth.analyses.registry import questions
from hookdepth.analyses.settings import Settings
from hookdepth.errors import HookdepthError, choose, suggestion
from hookdepth.options import Check, flag_of
from hookdepth.runs.config import Config

if TYPE_CHECKING:
    from hookdepth.analyses.base import Analysis
    from hookdepth.results import Result

INTERRUPTED = "hookdepth: interrupted; the same command goes on where it stopped"
INTERRUPTED_STATUS = 130
COMMANDS = ("run", "report", "compare", "merge", "info", "export", "verify", "families", "prune")
EXAMPLES = """\
examples:
  hookdepth run --limit 2 --out out/first         the demo model on two prompts
  hookdepth run --model ORG/NAME --dataset prompts.txt --out out/mine
  hookdepth run --help                            all that can be chosen
  hookdepth report out/first                      the page and figures again
  hookdepth compare out/first out/mine            two runs side by side

A run that was stopped goes on when the same command is given again. Exit
status: 0 done, 1 the run failed, 2 what was given cannot be used."""


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line with the remedy and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise HookdepthError(message, f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    main(["info", "out/demo"])   # 0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    if arguments is None:  # the process is ours, and so is what ends it
        signal.signal(signal.SIGINT, _interrupt)
        if "WORLD_SIZE" in os.environ:  # several processes share the cores: a thread that waits leaves its core to them
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # which OpenMP reads when torch is imported
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
        return int(options.command(options))
    except HookdepthError as error:
        if not error.told:
            _say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        if arguments is None:
            sys.stdout.flush()
            _end()
        print(INTERRUPTED, file=sys.stderr)
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say
        return 1
    except OSError as error:  # the machine's, wherever it strikes: what was finished is on the disk
        where = f" ({error.filename})" if error.filename else ""
        _say(f"{error.strerror or error}{where}; see to that, then give the same command again")
        return 1


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """The first Ctrl-C lets every `finally` run; a second one, which would cut through them, ends the process."""
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(_number: int = 0, _frame: object = None) -> NoReturn:
    """End at once, with one line: nothing is half written, whenever that is, and a third Ctrl-C adds no line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED_STATUS)


def _say(text: str) -> None:
    """One line on stderr, which begins with what is wrong and ends with the remedy however long the names in it."""
    line = " ".join(text.split())
    print(f"hookdepth: {line if len(line) <= 700 else f'{line[:400]} … {line[-250:]}'}", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    if arguments and not arguments[0].startswith("-"):
        choose("command", arguments[0], COMMANDS)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        command = next(word for word in arguments if word in COMMANDS)
        near = suggestion(name, options.known_options) if name.startswith("-") else None
        remedy = f"did you mean {near}?" if near else f"see `hookdepth {command} --help`"
        raise HookdepthError(f"{command} does not take {' '.join(unknown)!r}", remedy)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hookdepth",
        description="What the layers of a language model do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hookdepth {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    report = _add(commands, "report", _report, "make report.html and the figures of a run's folder again")
    report.add_argument("folder", metavar="DIR", help="the --out folder of a run")
    compare = _add(commands, "compare", _compare, "put the same curves of several runs into one figure each")
    compare.add_argument("folders", metavar="DIR", nargs="+", help="the --out folders of two or more runs")
    compare.add_argument("--out", metavar="DIR", default="compare", help="where the page goes (default: compare)")
    scatter = "effective depth over models, too, with regression lines"
    compare.add_argument("--scatter", action="store_true", help=scatter)
    merge = _add(commands, "merge", _merge, "put runs over different prompts, all else equal, together as one")
    merge.add_argument("folders", metavar="DIR", nargs="+", help="the --out folders of two or more runs")
    merge.add_argument("--out", metavar="DIR", required=True, help="a folder for the results")
    info = _add(commands, "info", _info, "show metadata and tensors of a result file or folder, as a table")
    info.add_argument("path", metavar="FILE|DIR", help="a .safetensors file of a run, or its folder")
    export = _add(commands, "export", _export, "write the values of a result file as a table, beside it")
    export.add_argument("path", metavar="FILE", help="a .safetensors file of a run")
    export.add_argument("--to", metavar="csv|parquet", default="csv", help="the format (default: csv)")
    verify = _add(commands, "verify", _verify, "compare the engine with plain single passes on a model")
    for name in ("model", "dtype", "device", "quantize", "attn_implementation", "revision", "seed"):
        own = Config.__dataclass_fields__ if name in Config.__dataclass_fields__ else Settings.__dataclass_fields__
        verify.add_argument(flag_of(own[name]), **_argument(own[name]))
    verify.add_argument("--branches", metavar="N", type=int, default=6, help="of each kind (default: 6)")
    verify.add_argument("--out", metavar="FILE.json", help="the table as JSON, too")
    _add(commands, "families", _families, "list the families of models that work, and their sites")
    prune = _add(commands, "prune", _prune, "write a checkpoint without some of the layers")
    for name in ("model", "dtype", "device"):
        prune.add_argument(f"--{name}", **_argument(Config.__dataclass_fields__[name]))
    prune.add_argument("--keep", metavar="0-9,12-29", required=True, help="the layers that stay")
    prune.add_argument("--out", metavar="DIR", required=True, help="a new folder, which from_pretrained loads")
    for command in commands.choices.values():
        options = [option for action in command._actions for option in action.option_strings]
        command.set_defaults(known_options=options)
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, function: Any, text: str) -> _Parser:
    command = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
    command.set_defaults(command=function)
    return command


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = commands.add_parser(
        "run",
        usage="hookdepth run --out DIR [options]",
        help="run analyses, write results, figures and the report",
        description="Run analyses on a model and a data set; the same command resumes\na run that was stopped.",
        epilog=_analyses(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run)
    groups: dict[str, argparse._ArgumentGroup] = {}
    of_analyses = {one.name for one in fields(Settings)}
    for one in sorted(fields(Config), key=lambda one: one.name in of_analyses):  # the run's own come first
        about = one.metadata
        group = groups.setdefault(about["group"], run.add_argument_group(about["group"]))
        group.add_argument(flag_of(one), dest=one.name, **_argument(one))


def _argument(one: Field[Any]) -> dict[str, Any]:
    """What argparse wants to know of an option. Only what was given is in the namespace: defaults are the config's."""
    about = one.metadata
    shown = one.default if not isinstance(one.default, tuple) else ",".join(one.default)
    said = "default" in about["help"] or isinstance(one.default, bool) or one.default is None
    argument = {"help": about["help"] if said else f"{about['help']} (default: {shown})", "default": argparse.SUPPRESS}
    if "action" not in about["argument"]:
        argument["type"] = _type(about["check"])
    if about["metavar"]:
        argument["metavar"] = about["metavar"]
    return {**argument, **about["argument"]}


def _type(check: Check) -> Callable[[str], Any]:
    def convert(given: str) -> Any:
        try:
            return check(given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{given[:57] + '…' if len(given) > 60 else given!r} {error}") from error

    return convert


def _analyses() -> str:
    """The analyses with their questions, from their own declarations."""
    known = questions()
    width = 2 + max(map(len, known))
    lines = [f"  {name:{width}}{own['question']}" for name, own in known.items()]
    return "\n".join(["analyses:", *lines, "  FILE.py:CLASS".ljust(width + 2) + "an analysis of your own"])


def _run(options: argparse.Namespace) -> int:
    from hookdepth.runs import start  # imports torch and transformers: --help should not wait for them
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

    page, log = report(str(config.out)), read_log(str(config.out))
    for result in results:
        floor = result.metadata.get("null_effect")
        noise = "" if floor is None else f", noise floor {floor:.2g}"
        known = log.get(result.analysis)
        cost = f"{known['wall_time_s']:8.1f} s, {known['passes']} passes" if known else f"{'?':>8} s"
        print(f"{result.analysis:22} {cost}{noise}")
    _say_pages(page)
    noisy = [result for result in results if result.metadata.get("null_effect")]
    if config.strict and noisy:
        worst = max(noisy, key=lambda result: float(result.metadata["null_effect"]))
        raise HookdepthError(
            f"--strict: the noise floor of {worst.analysis} is {worst.metadata['null_effect']:.2g}, not 0 "
            f"({worst.metadata['null_where']})",
            "results are kept; try another --max-rows, --dtype or --attn-implementation",
            1,
        )
    return 0


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


def _report(options: argparse.Namespace) -> int:
    from hookdepth.runs.reporting import report

    _say_pages(report(options.folder))
    return 0


def _say_pages(page: Path) -> None:
    maps = page.with_name("explore.html")
    if maps.exists():
        print(f"maps to point at: {maps}")
    print(f"report: {page}")


def _compare(options: argparse.Namespace) -> int:
    from hookdepth.runs.reporting import comparison

    _check_out(options.out)
    print(f"comparison: {comparison(options.folders, options.out, options.scatter)}")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from hookdepth.model.loading import load
    from hookdepth.runs.pruning import prune

    _check_place(options.out)
    model = load(options.model if "model" in options else "demo", **_given(options, "dtype", "device"))
    folder = prune(model, options.keep, options.out)
    print(f"kept layers {options.keep} of {model.n_layers}: {folder}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from hookdepth.checks import verify
    from hookdepth.model.loading import load
    from hookdepth.results import write_atomic

    if options.out is not None and _check_place(str(Path(options.out).parent)) and os.path.isdir(options.out):
        raise HookdepthError(f"--out {options.out!r} is a folder", "give a file for the table")
    how = ("dtype", "device", "quantize", "attn_implementation", "revision")
    model = load(options.model if "model" in options else "demo", **_given(options, *how))
    found = verify(model, options.branches, **_given(options, "seed"))
    print(found)
    if options.out is not None:
        write_atomic(options.out, f"{found.json()}\n".encode())
    return 0 if found.ok else 1


def _families(options: argparse.Namespace) -> int:
    from hookdepth.model.families import table

    print(table())
    return 0


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if name in options}


def _merge(options: argparse.Namespace) -> int:
    from hookdepth.runs.extending import merge
    from hookdepth.runs.reporting import report

    _check_out(options.out)
    merge(options.folders, options.out, _warn)
    print(f"report: {report(options.out)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from hookdepth.analyses.registry import declared
    from hookdepth.report.notebook import FORMATS, export
    from hookdepth.results import Result

    kind = choose("format", options.to, FORMATS)
    result = Result.load(options.path)
    print(f"table: {export(result, declared(result), Path(options.path).with_suffix(f'.{kind}'))}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from hookdepth.report.tables import describe

    print(describe(options.path))
    return 0
