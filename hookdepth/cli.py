"""The command line: arguments → analyses → results → report. The only module that prints or exits.

    hookdepth run --model demo --dataset demo --out out/demo
    hookdepth report out/demo
    hookdepth compare out/demo out/other
    hookdepth info out/demo/skip-current.safetensors

Exit status: 0 done, 1 the run failed, 2 what was given is unusable (one line on stderr, no traceback).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hookdepth._version import __version__
from hookdepth.errors import HookdepthError

if TYPE_CHECKING:
    from hookdepth.results import Result

ANALYSES_HELP = "all, or names separated by commas"


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line with the remedy and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise HookdepthError(message, f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    main(["info", "out/demo"])   # 0
    """
    try:
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except HookdepthError as error:
        if not error.told:
            _warn(" ".join(str(error).split()))
        return error.exit_status
    except KeyboardInterrupt:
        print("hookdepth: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hookdepth", description="What the layers of a language model do.")
    parser.add_argument("--version", action="version", version=f"hookdepth {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    report = commands.add_parser("report", help="make report.html and the figures of a run's folder again")
    report.add_argument("folder", metavar="DIR")
    report.set_defaults(command=_report)
    compare = commands.add_parser("compare", help="the same curves of several runs in one figure each")
    compare.add_argument("folders", metavar="DIR", nargs="+")
    compare.add_argument("--out", metavar="DIR", default="compare", help="where the page goes (default: compare)")
    compare.set_defaults(command=_compare)
    info = commands.add_parser("info", help="metadata and tensors of a result file or folder, as a table")
    info.add_argument("path", metavar="FILE|DIR")
    info.set_defaults(command=_info)
    return parser


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = commands.add_parser(
        "run",
        help="run analyses, write results, figures and the report",
        description="Run analyses on a model and a data set; the same command resumes a run that was stopped.",
    )
    run.set_defaults(command=_run)
    what = run.add_argument_group("what")
    what.add_argument("--model", default="demo", metavar="demo|HUB_ID|FOLDER", help="default: demo")
    what.add_argument("--dataset", default="demo", metavar="demo|gsm8k|FILE", help="JSONL or text; default: demo")
    what.add_argument("--limit", type=_positive, default=10, metavar="N", help="first N prompts (default: 10)")
    what.add_argument("--analyses", default="all", metavar="A,B,…", help=ANALYSES_HELP)
    what.add_argument("--parts", default="layer", metavar="P,…", help="of layer,attn,mlp (default: layer)")
    what.add_argument("--keep-front", type=_count, default=1, metavar="N", help="first tokens left alone (default: 1)")
    what.add_argument(
        "--probe", nargs=2, action="append", metavar=("PROMPT", "ANSWER"), help="repeatable; default: the paper's two"
    )
    what.add_argument("--seed", type=int, default=123, help="of the cuts (default: 123)")
    ig = run.add_argument_group("integrated gradients")
    ig.add_argument(
        "--ig-method", default="adaptive", help="adaptive (default), riemann (the paper's) or gauss-legendre"
    )
    ig.add_argument("--ig-steps", type=_positive, default=256, metavar="N", help="of the other two (default: 256)")
    ig.add_argument("--ig-tolerance", type=_tolerance, metavar="X", help="of f(x) − f(baseline) (default: 0.01)")
    ig.add_argument(
        "--ig-max-evaluations", type=_evaluations, default=1024, metavar="N", help="a layer (default: 1024)"
    )
    how = run.add_argument_group("how")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--device-map", metavar="auto|FILE.json", help="spread a large model, as accelerate does")
    how.add_argument("--quantize", default="none", help="none, 8bit or 4bit (bitsandbytes)")
    how.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, … (default: transformers' choice)")
    how.add_argument("--revision", help="of a hub id")
    how.add_argument("--max-rows", type=_rows, metavar="N", help="most rows of a launch (default: as many as fit)")
    where = run.add_argument_group("where")
    where.add_argument("--out", required=True, metavar="DIR", help="folder for results, figures and report.html")
    where.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    where.add_argument("--strict", action="store_true", help="fail where the noise floor is not 0")
    where.add_argument("--dry-run", action="store_true", help="print work, memory and time, load no weights, and stop")


def _positive(text: str) -> int:
    return _number(text, 1)


def _count(text: str) -> int:
    return _number(text, 0)


def _rows(text: str) -> int:
    return _number(text, 3)


def _evaluations(text: str) -> int:
    return _number(text, 9)  # the adaptive method begins with as many


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _number(text: str, least: int) -> int:
    if not text.lstrip("+-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from hookdepth import session  # imports torch and transformers: --help should not wait for them
    from hookdepth.processes import joined

    with joined() as team:
        names, parts = team.together(lambda: _checked(options))
        if options.dry_run:
            if team.first:
                print(session.describe_plan(options, names, parts))
            return 0
        results = session.run(options, names, parts, _warn if team.first else lambda line: None, team)
        return _finish(options, results) if team.first else 0


def _checked(options: argparse.Namespace) -> tuple[list[str], tuple[str, ...]]:
    from hookdepth import session

    names, parts = session.parse_analyses(options.analyses), session.parse_parts(options.parts)
    out = Path(options.out)
    if out.exists() and not out.is_dir() and not options.dry_run:
        raise HookdepthError(f"--out {str(out)!r} is a file", "give a folder")
    return names, parts


def _finish(options: argparse.Namespace, results: Sequence[Result]) -> int:
    from hookdepth.report import write_report

    page = write_report(options.out)
    for result in results:
        floor = result.metadata.get("null_effect")
        noise = "" if floor is None else f", noise floor {floor:.2g}"
        cost = f"{result.metadata['wall_time_s']:8.1f} s, {result.metadata['launches']} launches"
        print(f"{result.analysis:22} {cost}{noise}")
    print(f"report: {page}")
    noisy = [result for result in results if result.metadata.get("null_effect")]
    if options.strict and noisy:
        worst = max(noisy, key=lambda result: float(result.metadata["null_effect"]))
        raise HookdepthError(
            f"--strict: the noise floor of {worst.analysis} is {worst.metadata['null_effect']:.2g}, not 0 "
            f"({worst.metadata['null_where']})",
            "results are kept; try another --max-rows, --dtype or --attn-implementation",
            1,
        )
    return 0


def _warn(line: str) -> None:
    print(f"hookdepth: {line}", file=sys.stderr)


def _report(options: argparse.Namespace) -> int:
    from hookdepth.report import write_report

    print(f"report: {write_report(options.folder)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hookdepth.report import write_comparison

    print(f"comparison: {write_comparison(options.folders, options.out)}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from hookdepth.tables import describe

    print(describe(options.path))
    return 0
