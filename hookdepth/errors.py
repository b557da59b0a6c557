"""The one error class of the package.

    from hookdepth.errors import HookdepthError

    raise HookdepthError("unknown dtype 'fp8'", "use one of auto, float32, bfloat16, float16")

The command line prints it as one line on stderr and exits with its `exit_status`: 2 where what the
user gave is unusable, 1 where a run that was rightly asked for failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HookdepthError(Exception):
    """Something hookdepth refuses or cannot do, in one line: what, and the remedy.

        raise HookdepthError("no file 'promts.jsonl'", "give an existing file, or one of demo, gsm8k")

    Args:
        problem: what was given and why it does not work, without a full stop.
        remedy: what to do about it, in the imperative.
        exit_status: 2 (default) for unusable input, 1 for a run that failed.
        told: another process of the run says it already.
    """

    def __init__(self, problem: str, remedy: str, exit_status: int = 2, *, told: bool = False) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.exit_status = exit_status
        self.told = told


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` if it is allowed; else raise with the nearest word that is.

    choose("analysis", "skip-curent", ["skip-current", "logit-lens"])
    # HookdepthError: unknown analysis 'skip-curent'; did you mean skip-current? (skip-current, logit-lens)
    """
    options = list(allowed)
    if given in options:
        return given
    near = difflib.get_close_matches(given, options, n=1)
    listed = ", ".join(options)
    remedy = f"did you mean {near[0]}? ({listed})" if near else f"use one of {listed}"
    raise HookdepthError(f"unknown {what} {given!r}", remedy)
