"""An option exists once: a field of a dataclass, with its help text and its check. Nothing here needs torch.

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Settings(Options):
        limit: int = option(10, "first N prompts", whole(1), "N")

    Settings(limit=0)       # HookdepthError: limit=0 is not a whole number of at least 1; …

The command line is made from the same fields (`cli`), so that both say the same, and refuse the same.
A check takes what was given, a text of the command line or a value from Python, and returns the value or raises
`ValueError` with the rest of the sentence "limit=0 …".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from numbers import Integral, Real
from typing import Any

from hookdepth.errors import HookdepthError, choose, clipped

Check = Callable[[Any], Any]


def option(
    default: Any, help: str, check: Check, metavar: Any = "", *, group: str = "what", flag: str = "", **argument: Any
) -> Any:
    """A field that is an option.

        steps: int = option(256, "steps of the sum", whole(1), "N")

    Args:
        default: what it is where nobody gives it; None is never checked.
        help: what `--help` says, without the default.
        check: what is given → its value; raises ValueError.
        metavar, group: how and where `--help` shows it.
        flag: on the command line, where it is not the field's name.
        argument: further arguments of argparse's `add_argument`.
    """
    about = {"help": help, "check": check, "metavar": metavar, "group": group, "argument": argument, "flag": flag}
    return field(default=default, metadata=about)


class Options:
    """Base of dataclasses whose fields are options: all are checked when an instance is made."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # a subclass is a dataclass
            given = getattr(self, one.name)
            if given is not one.default or one.default is MISSING:
                object.__setattr__(self, one.name, checked(one.name, given, one.metadata["check"], flag_of(one)))


def flag_of(one: Field[Any]) -> str:
    """How the command line calls an option: flag_of(fields(Settings)[1]) is "--keep-front"."""
    return str(one.metadata["flag"] or f"--{one.name.replace('_', '-')}")


def checked(name: str, given: Any, check: Check, flag: str) -> Any:
    """The value of an option; what is wrong with it is said in one line.

    checked("limit", 3, whole(1), "--limit")       # 3
    """
    try:
        return check(given)
    except ValueError as error:
        remedy = f"see `hookdepth run --help` for {flag}"
        raise HookdepthError(f"{name}={clipped(repr(given))} {error}", remedy) from error


def whole(least: int | None = None) -> Check:
    """A whole number, perhaps of at least so much: whole(1)("12") is 12."""

    def check(given: Any) -> int:
        number = _whole(given)
        if number is None or (least is not None and number < least):
            raise ValueError("is not a whole number" + ("" if least is None else f" of at least {least}"))
        return number

    return check


def _whole(given: Any) -> int | None:
    if isinstance(given, str):
        # isdecimal alone takes other scripts' digits; int() alone refuses more than 4300 of them in words of its own.
        digits = given[1:] if given[:1] in ("+", "-") else given
        return int(given) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else None
    return int(given) if isinstance(given, Integral) and not isinstance(given, bool) else None


def between(low: float, high: float) -> Check:
    """A number between two others: between(0, 1)("0.1") is 0.1."""

    def check(given: Any) -> float:
        try:
            number = float(given) if isinstance(given, str | Real) and not isinstance(given, bool) else math.nan
        except ValueError:
            number = math.nan
        if not low < number < high:
            raise ValueError(f"is not a number between {low} and {high}")
        return number

    return check


def one_of(what: str, *allowed: str, also: Mapping[str, str] | None = None) -> Check:
    """One of some words; a near miss is named, never taken: one_of("device", "cpu", "cuda")("cpu")."""
    return lambda given: choose(what, given, allowed, also)


def some_of(what: str, *allowed: str, also: Mapping[str, str] | None = None) -> Check:
    """Some of some words, each once and in their order: some_of("part", "layer", "attn", "mlp")("mlp,attn")."""

    def check(given: Any) -> tuple[str, ...]:
        listed = given.split(",") if isinstance(given, str) else given
        if not isinstance(listed, Sequence) or not any(str(word).strip() for word in listed):
            raise HookdepthError(f"--{what}s names none", f"use some of {', '.join(allowed)}")
        words = [word.strip() if isinstance(word, str) else word for word in listed]
        chosen = {choose(what, word, allowed, also) for word in words if word != ""}
        return tuple(word for word in allowed if word in chosen)

    return check


def text(given: Any) -> str:
    """A text, or a path: text(Path("out"))."""
    if not isinstance(given, str | os.PathLike):
        raise ValueError("is no text")
    return os.fspath(given)


def switch(given: Any) -> bool:
    """On or off: switch(True)."""
    if not isinstance(given, bool):
        raise ValueError("is neither True nor False")
    return given


def pairs(given: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of texts: pairs([("2 + 2 = ", "4")])."""
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not listed or not all(_is_pair(one) for one in listed):
        raise ValueError("is no list of pairs of prompt and answer")
    return tuple((prompt, answer) for prompt, answer in listed)


def _is_pair(one: Any) -> bool:
    is_list = isinstance(one, Sequence) and not isinstance(one, str)
    return is_list and len(one) == 2 and all(isinstance(word, str) for word in one)


def refuse_unknown(given: Iterable[str], kind: type) -> None:
    """Raise for names that are no options of a dataclass, and say the nearest: refuse_unknown(["limit"], Config)."""
    for name in given:
        choose("option", name, [one.name for one in fields(kind)])
