"""The command line: arguments → analyses → results → report. Nothing outside this folder prints or exits."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from hookdepth.cli.arguments import parse
from hookdepth.cli.commands import COMMANDS
from hookdepth.errors import HookdepthError

INTERRUPTED = "hookdepth: interrupted; the same command goes on where it stopped"
INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: main(["info", "out/demo"])   # 0"""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    if arguments is None:  # the process is ours, and so is what ends it
        signal.signal(signal.SIGINT, _interrupt)
        if "WORLD_SIZE" in os.environ:  # several processes share the cores: a thread that waits leaves its core to them
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # which OpenMP reads when torch is imported
    try:
        options = parse(list(sys.argv[1:] if arguments is None else arguments))
        return COMMANDS[options.command].do(options)
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
