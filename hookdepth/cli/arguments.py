"""Arguments → what was asked for: the options of a run are the fields of its config.

parse(["run", "--limit", "1", "--out", "out"]).limit     # 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn

from hookdepth._version import __version__
from hookdepth.analyses.registry import questions
from hookdepth.analyses.settings import Settings
from hookdepth.errors import HookdepthError, choose, suggestion
from hookdepth.options import Check, flag_of
from hookdepth.runs.config import Config

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


def parse(arguments: list[str]) -> argparse.Namespace:
    """What was asked for: parse(["report", "out"]).command   # 'report'"""
    parser, commands = _parser()
    if arguments and not arguments[0].startswith("-"):
        choose("command", arguments[0], commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        command = next(word for word in arguments if word in commands)
        near = suggestion(name, options.known_options) if name.startswith("-") else None
        remedy = f"did you mean {near}?" if near else f"see `hookdepth {command} --help`"
        raise HookdepthError(f"{command} does not take {' '.join(unknown)!r}", remedy)
    return options


def _parser() -> tuple[_Parser, Mapping[str, _Parser]]:
    parser = _Parser(
        prog="hookdepth",
        description="What the layers of a language model do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hookdepth {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    report = _add(commands, "report", "make report.html and the figures of a run's folder again")
    report.add_argument("folder", metavar="DIR", help="the --out folder of a run")
    compare = _add(commands, "compare", "put the same curves of several runs into one figure each")
    compare.add_argument("folders", metavar="DIR", nargs="+", help="the --out folders of two or more runs")
    compare.add_argument("--out", metavar="DIR", default="compare", help="where the page goes (default: compare)")
    scatter = "effective depth over models, too, with regression lines"
    compare.add_argument("--scatter", action="store_true", help=scatter)
    merge = _add(commands, "merge", "put runs over different prompts, all else equal, together as one")
    merge.add_argument("folders", metavar="DIR", nargs="+", help="the --out folders of two or more runs")
    merge.add_argument("--out", metavar="DIR", required=True, help="a folder for the results")
    info = _add(commands, "info", "show metadata and tensors of a result file or folder, as a table")
    info.add_argument("path", metavar="FILE|DIR", help="a .safetensors file of a run, or its folder")
    export = _add(commands, "export", "write the values of a result file as a table, beside it")
    export.add_argument("path", metavar="FILE", help="a .safetensors file of a run")
    export.add_argument("--to", metavar="csv|parquet", default="csv", help="the format (default: csv)")
    verify = _add(commands, "verify", "compare the engine with plain single passes on a model")
    for name in ("model", "dtype", "device", "quantize", "attn_implementation", "revision", "seed"):
        own = Config.__dataclass_fields__ if name in Config.__dataclass_fields__ else Settings.__dataclass_fields__
        verify.add_argument(flag_of(own[name]), **_argument(own[name]))
    verify.add_argument("--branches", metavar="N", type=int, default=6, help="of each kind (default: 6)")
    verify.add_argument("--out", metavar="FILE.json", help="the table as JSON, too")
    _add(commands, "families", "list the families of models that work, and their sites")
    prune = _add(commands, "prune", "write a checkpoint without some of the layers")
    for name in ("model", "dtype", "device"):
        prune.add_argument(f"--{name}", **_argument(Config.__dataclass_fields__[name]))
    prune.add_argument("--keep", metavar="0-9,12-29", required=True, help="the layers that stay")
    prune.add_argument("--out", metavar="DIR", required=True, help="a new folder, which from_pretrained loads")
    for command in commands.choices.values():
        options = [option for action in command._actions for option in action.option_strings]
        command.set_defaults(known_options=options)
    return parser, commands.choices


def _add(commands: argparse._SubParsersAction[_Parser], name: str, text: str) -> _Parser:
    command = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
    command.set_defaults(command=name)
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
    run.set_defaults(command="run")
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
