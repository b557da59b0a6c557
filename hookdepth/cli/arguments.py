"""Arguments → what was asked for: the options of a run are the fields of its config.

parse(["run", "--limit", "1", "--out", "out"]).limit     # 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from hookdepth._version import __version__
from hookdepth.cli.commands import COMMANDS
from hookdepth.errors import HookdepthError, choose, suggestion
from hookdepth.options import flag_of

if TYPE_CHECKING:
    from dataclasses import Field

    from hookdepth.options import Check

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
    parser = _Parser(
        prog="hookdepth",
        description="What the layers of a language model do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hookdepth {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    if arguments and not arguments[0].startswith("-"):
        choose("command", arguments[0], COMMANDS)
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about.help, description=f"{about.help[:1].upper()}{about.help[1:]}.")
        command.set_defaults(command=name)
        if name not in arguments:  # its options need not be made, nor what they are made of be imported
            continue
        if name == "run":
            _add_options_of_run(command)
        for option in about.of_run:
            from hookdepth.runs.config import Config

            field = Config.__dataclass_fields__[option]
            command.add_argument(flag_of(field), **_argument(field))
        for argument, how in about.takes:
            command.add_argument(argument, **how)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name, command = unknown[0].partition("=")[0], commands.choices[options.command]
        near = suggestion(name, command._option_string_actions) if name.startswith("-") else None
        remedy = f"did you mean {near}?" if near else f"see `{command.prog} --help`"
        raise HookdepthError(f"{options.command} does not take {' '.join(unknown)!r}", remedy)
    return options


def _add_options_of_run(command: _Parser) -> None:
    from hookdepth.analyses.headlines import questions
    from hookdepth.analyses.settings import Settings
    from hookdepth.runs.config import Config

    known = questions()
    width = 2 + max(map(len, known))
    lines = [f"  {name:{width}}{question}" for name, question in known.items()]
    command.epilog = "\n".join(["analyses:", *lines, "  FILE.py:CLASS".ljust(width + 2) + "an analysis of your own"])
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.usage = "hookdepth run --out DIR [options]"
    command.description = "Run analyses on a model and a data set; the same command resumes\na run that was stopped."
    groups: dict[str, argparse._ArgumentGroup] = {}
    of_analyses = {one.name for one in fields(Settings)}
    for one in sorted(fields(Config), key=lambda one: one.name in of_analyses):  # the run's own come first
        about = one.metadata
        group = groups.setdefault(about["group"], command.add_argument_group(about["group"]))
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
