"""The command line: arguments → analyses → results → report. The only module that prints or exits.

    hookdepth run --model demo --dataset demo --out out/demo
    hookdepth report out/demo
    hookdepth compare out/demo out/other
    hookdepth info out/demo/skip-current.safetensors

Exit status: 0 done, 1 the run failed, 2 what was given is unusable (one line on stderr, no traceback).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hookdepth._version import __version__
from hookdepth.errors import HookdepthError, choose, suggestion

if TYPE_CHECKING:
    from hookdepth.results import Result

COMMANDS = ("run", "report", "compare", "info")
EXAMPLES = """\
examples:
  hookdepth run --limit 2 --out out/first         the demo model on two prompts
  hookdepth run --model ORG/NAME --dataset prompts.txt --out out/mine
  hookdepth run --help                            all that can be chosen
  hookdepth report out/first                      the page and figures again
  hookdepth compare out/first out/mine            two runs side by side

A run that was stopped goes on when the same command is given again. Exit
status: 0 done, 1 the run failed, 2 what was given cannot be used."""
ANALYSES = """\
analyses:
  residual-stats        how much do attention and MLP add, in which direction
  logit-lens            when is the prediction there
  skip-current          which later layers notice that a layer is skipped
  skip-future           the same, seen from later tokens only
  local-current, local-future
                        the same two, direct effects only
  residual-erasure      until which layer each token is needed for an answer
  integrated-gradients  which tokens an answer is made of, layer by layer"""


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
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
        return int(options.command(options))
    except HookdepthError as error:
        if not error.told:
            _say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        print("hookdepth: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say
        return 1
    except OSError as error:  # the machine's, wherever it strikes: what was finished is on the disk
        where = f" ({error.filename})" if error.filename else ""
        _say(f"{error.strerror or error}{where}; see to that, then give the same command again")
        return 1


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
    text = "make report.html and the figures of a run's folder again"
    report = commands.add_parser("report", help=text, description=_sentence(text))
    report.add_argument("folder", metavar="DIR", help="the --out folder of a run")
    report.set_defaults(command=_report)
    text = "put the same curves of several runs into one figure each"
    compare = commands.add_parser("compare", help=text, description=_sentence(text))
    compare.add_argument("folders", metavar="DIR", nargs="+", help="the --out folders of two or more runs")
    compare.add_argument("--out", metavar="DIR", default="compare", help="where the page goes (default: compare)")
    compare.set_defaults(command=_compare)
    text = "show metadata and tensors of a result file or folder, as a table"
    info = commands.add_parser("info", help=text, description=_sentence(text))
    info.add_argument("path", metavar="FILE|DIR", help="a .safetensors file of a run, or its folder")
    info.set_defaults(command=_info)
    for command in commands.choices.values():
        options = [option for action in command._actions for option in action.option_strings]
        command.set_defaults(known_options=options)
    return parser


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = commands.add_parser(
        "run",
        usage="hookdepth run --out DIR [options]",
        help="run analyses, write results, figures and the report",
        description="Run analyses on a model and a data set; the same command resumes\na run that was stopped.",
        epilog=ANALYSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run)
    what = run.add_argument_group("what")
    what.add_argument("--model", default="demo", metavar="demo|HUB_ID|FOLDER", help="default: demo")
    what.add_argument(
        "--dataset",
        default="demo",
        metavar="demo|gsm8k|FILE",
        help="JSONL or text; default: demo",
    )
    what.add_argument("--limit", type=_positive, default=10, metavar="N", help="first N prompts (default: 10)")
    what.add_argument("--analyses", default="all", metavar="A,B,…", help="of those below; default: all")
    what.add_argument("--parts", default="layer", metavar="P,…", help="of layer,attn,mlp (default: layer)")
    what.add_argument("--keep-front", type=_count, default=1, metavar="N", help="first tokens left alone (default: 1)")
    what.add_argument(
        "--probe", nargs=2, action="append", metavar=("PROMPT", "ANSWER"), help="repeatable; default: the paper's two"
    )
    what.add_argument("--seed", type=_seed, default=123, metavar="N", help="of the cuts (default: 123)")
    ig = run.add_argument_group("integrated gradients")
    ig.add_argument(
        "--ig-method",
        default="adaptive",
        metavar="NAME",
        help="adaptive (default), riemann (the paper's) or gauss-legendre",
    )
    ig.add_argument("--ig-steps", type=_positive, default=256, metavar="N", help="of the other two (default: 256)")
    ig.add_argument("--ig-tolerance", type=_tolerance, metavar="X", help="of f(x) − f(baseline) (default: 0.01)")
    ig.add_argument(
        "--ig-max-evaluations", type=_evaluations, default=1024, metavar="N", help="a layer (default: 1024)"
    )
    how = run.add_argument_group("how")
    how.add_argument("--dtype", default="auto", metavar="TYPE", help="auto, float32, bfloat16 or float16")
    how.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--device-map", metavar="auto|FILE.json", help="spread a large model, as accelerate does")
    how.add_argument("--quantize", default="none", metavar="BITS", help="none, 8bit or 4bit (bitsandbytes)")
    how.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, … (default: transformers' choice)")
    how.add_argument("--revision", metavar="NAME", help="of a hub id")
    how.add_argument("--max-rows", type=_rows, metavar="N", help="most rows of a pass (default: as many as fit)")
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


def _seed(text: str) -> int:
    return _number(text, None)


def _number(text: str, least: int | None) -> int:
    # isdecimal alone takes other scripts' digits; int() alone refuses more than 4300 of them in words of its own.
    digits = text[1:] if text[:1] in ("+", "-") else text
    number = int(text) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else None
    if number is None or (least is not None and number < least):
        at_least = "" if least is None else f" of at least {least}"
        shown = text if len(text) <= 40 else f"{text[:37]}…"
        raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number{at_least}")
    return number


def _run(options: argparse.Namespace) -> int:
    from hookdepth.runs import session  # imports torch and transformers: --help should not wait for them
    from hookdepth.runs.workers import joined

    with joined() as workers:
        names, parts = workers.together(lambda: _checked(options))
        if options.dry_run:
            if workers.first:
                print(session.describe_plan(options, names, parts))
            return 0
        results = session.run(options, names, parts, _warn if workers.first else lambda line: None, workers)
        return _finish(options, results) if workers.first else 0


def _checked(options: argparse.Namespace) -> tuple[list[str], tuple[str, ...]]:
    from hookdepth.runs import session

    names, parts = session.parse_analyses(options.analyses), session.parse_parts(options.parts)
    session.choose_method(options.ig_method)
    if not options.dry_run:
        _check_out(options.out, names)
    return names, parts


def _finish(options: argparse.Namespace, results: Sequence[Result]) -> int:
    from hookdepth.report.declared import DECLARED, lookup
    from hookdepth.report.page import write_report

    page = write_report(options.out, lookup, DECLARED.values())
    for result in results:
        floor = result.metadata.get("null_effect")
        noise = "" if floor is None else f", noise floor {floor:.2g}"
        cost = f"{result.metadata['wall_time_s']:8.1f} s, {result.metadata['passes']} passes"
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


def _check_out(text: str, names: Sequence[str] = ()) -> None:
    """Refuse, before anything is computed, a folder that could not be written to or reported on afterwards."""
    from hookdepth.results import SUFFIX, read_metadata

    out = Path(text)
    if "\0" in text or not text.strip():
        raise HookdepthError(f"--out {text!r} is no folder of its own", "give a new or existing folder for the results")
    for place in (out, *out.parents):
        if os.path.exists(place):
            if not place.is_dir():
                raise HookdepthError(f"--out {text!r} cannot be a folder: {str(place)!r} is a file", "give a folder")
            if not os.access(place, os.W_OK | os.X_OK):
                raise HookdepthError(f"--out {text!r} cannot be written: {str(place)!r} is read-only", "give another")
            break
    for path in sorted(out.glob(f"*{SUFFIX}")) if os.path.isdir(out) else ():
        if path.stem not in names:  # the run itself looks at those, and may replace them
            read_metadata(path)


def _warn(line: str) -> None:
    print(f"hookdepth: {line}", file=sys.stderr)


def _report(options: argparse.Namespace) -> int:
    from hookdepth.report.declared import DECLARED, lookup
    from hookdepth.report.page import write_report

    print(f"report: {write_report(options.folder, lookup, DECLARED.values())}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hookdepth.report.compare import write_comparison
    from hookdepth.report.declared import DECLARED, lookup

    _check_out(options.out)
    print(f"comparison: {write_comparison(options.folders, options.out, lookup, DECLARED.values())}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from hookdepth.report.tables import describe

    print(describe(options.path))
    return 0
