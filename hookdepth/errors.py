"""What hookdepth refuses or cannot do, as one error class; those that are caught by their kind have their own.

    from hookdepth.errors import HookdepthError

    raise HookdepthError("unknown dtype 'fp8'", "use one of auto, float32, bfloat16, float16")

The command line prints it as one line on stderr and exits with its `exit_status`: 2 where what the
user gave is unusable, 1 where a run that was rightly asked for failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any


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


class NotFiniteError(HookdepthError):
    """A run gave values that are not finite: raise NotFiniteError("non-finite values in the output", "…", 1)."""


class DamagedError(HookdepthError):
    """A file of ours does not hold what it should: raise DamagedError("'out/x.safetensors' has changed", "…")."""


class DoesNotRunError(HookdepthError):
    """The model's own forward pass raised: raise DoesNotRunError("'tiny' cannot run on a short input (…)", "…")."""


def environment_number(name: str, default: int | None, least: int, most: int | None = None) -> int:
    """A whole number that a launcher has put into the environment: environment_number("WORLD_SIZE", 1, 1).

    Raises:
        HookdepthError: it is no whole number of at least `least` and at most `most`, or is missing without a default.
    """
    text = os.environ.get(name) or ("" if default is None else str(default))
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
    if number is None or number < least or (most is not None and number > most):
        known = f"{name}={text[:40]!r}" if text else f"{name} is not set, but other variables of a launcher are"
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        remedy = f"a launcher sets it to a whole number {span}: start the processes with one, or unset its variables"
        raise HookdepthError(f"in the environment, {known}", remedy)
    return number


def choose(what: str, given: Any, allowed: Iterable[str], also: Mapping[str, str] | None = None) -> str:
    """Return `given` if it is allowed; else raise with the nearest word that is.

        choose("reduction", "meen", ["max", "mean"])
        # HookdepthError: unknown reduction 'meen'; did you mean mean? (max, mean)

    Args:
        also: what people call it elsewhere → the word that is meant; suggested, never accepted.
    """
    options = list(allowed)
    if isinstance(given, str) and given in options:
        return given
    listed = ", ".join(options)
    if not isinstance(given, str):
        raise HookdepthError(f"unknown {what} {shown(given)}", f"use one of {listed}")
    near = suggestion(given, options, also)
    remedy = f"did you mean {near}? ({listed})" if near else f"use one of {listed}"
    raise HookdepthError(f"unknown {what} {clipped(given)!r}", remedy)


def whole_number(what: str, given: Any, low: int | None = None, high: int | None = None) -> int:
    """Return the int that is meant; refuse everything that is none (1.5, True, "3", None), and what lies outside.

        whole_number("the layer", 3, 0, 29)   # 3
        whole_number("the layer", 1.5)        # HookdepthError: the layer is 1.5; give a whole number

    What counts as an int is one: an integer of numpy's, a tensor of an integer dtype without axes.
    """
    if type(given) is int and (low is None or given >= low) and (high is None or given <= high):
        return given  # as nearly always; plans have thousands
    wanted = "a whole number"
    if low is not None:
        wanted += f" of at least {low}" if high is None else f" from {low} to {high}"
    # A bool, also one of numpy's or torch's, can be used as an index, but nobody means a number by it.
    is_bool = isinstance(given, bool) or "bool" in str(getattr(given, "dtype", ""))
    try:
        number = index(given) if not is_bool and not getattr(given, "ndim", 0) else None
    except (TypeError, ValueError, RuntimeError):  # no number; a tensor of floats; a tensor without data
        number = None
    if number is None:
        raise HookdepthError(f"{what} is {shown(given)}", f"give {wanted}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise HookdepthError(f"{what} is {number}", f"give {wanted}")
    return number


def shown(given: Any) -> str:
    """A value as a message shows it: on one line, and not longer than a line; a tensor by its shape.

    shown([1.5] * 99)   # '[1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5…'
    """
    if getattr(given, "ndim", 0):
        return f"an array of shape {list(given.shape)}"
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if "__repr__" not in {name for kind in type(given).__mro__[:-1] for name in vars(kind)}:
        return f"an instance of {type(given).__name__}"
    return clipped(" ".join(repr(given).split()))


def clipped(text: str, most: int = 60) -> str:
    """The text, or as much of it as a message has room for: clipped("two words", 4) is "two…"."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def suggestion(given: str, allowed: Iterable[str], also: Mapping[str, str] | None = None) -> str | None:
    """The allowed word that was probably meant: one written otherwise, known by another name, a part, or a near miss.

    suggestion("Resid_Pre", ["z", "resid-pre"])   # 'resid-pre'
    suggestion("bf16", ["float32", "bfloat16"], {"bf16": "bfloat16"})   # 'bfloat16'
    """
    options = list(allowed)
    plain = {_plain(word): word for word in options}
    word = _plain(given)[:80]
    if word in plain:
        return plain[word]
    if also and word in also:
        return also[word]
    inside = [option for key, option in plain.items() if len(word) >= 3 and word in key]
    import difflib

    near = difflib.get_close_matches(word, plain, n=1)
    return inside[0] if inside else plain[near[0]] if near else None


def _plain(word: str) -> str:
    return "".join(char for char in word.casefold() if char.isalnum())


def as_path(given: Any) -> Path:
    """What a user gives as the name of a file or a folder: as_path("out/mine"); as_path(3) is refused."""
    try:
        return Path(given)
    except TypeError as error:
        problem = f"{shown(given)} is no name of a file or a folder"
        raise HookdepthError(problem, 'give a text or a Path, e.g. "out/mine"') from error


def line_in(file: str | os.PathLike[str], error: BaseException) -> str:
    """Where in a file an error comes from, or where the file cannot be read; nothing where it is not in it.

    line_in("half.py", ValueError())     # ''
    """
    file = os.fspath(file)
    import traceback  # as difflib it takes longer than all else here, and help need not wait for either

    frames = reversed(traceback.extract_tb(error.__traceback__))
    lines = [one.lineno for one in frames if one.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    return f" at line {lines[0]} of {file!r}" if lines else ""


def refuse_second_beginning(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise where a text made for another tokenizer, e.g. by a chat template, would begin with BOS twice.

    refuse_second_beginning(tokenizer, "2 + 2 = 4", [5, 7, 5, 8, 9])     # None: it does not
    """
    word, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if word and text.startswith(word) and not text.startswith(word + word) and list(ids[:2]) == [bos, bos]:
        raise HookdepthError(
            f"the text begins with {word!r}, and the tokenizer puts another before it",
            f"leave {word!r} out of the text",
        )
