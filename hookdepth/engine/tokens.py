"""Which tokens of a prompt are meant, and where they lie in a pass that computes only some of them.

positions(slice(1, None), 4)            # range(1, 4)
locate([0, -1], 10, start=4, stop=10)   # Where(local=[5], picked=[1], positions=[9], start=4, length=10)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hookdepth.errors import HookdepthError, shown, whole_number

Tokens = slice | Sequence[int]
"""Positions in a prompt, each once; negative ones count from its end."""


@dataclass(frozen=True)
class Where:
    """The tokens that an intervention acts on, in a pass that may hold only some of a prompt's.

        locate([0, -1], 10, start=4, stop=10).positions   # [9]; index what covers the whole prompt by it

    Attributes:
        local: their positions in the row.
        picked: which of the intervention's own tokens these are.
        positions: their positions in the prompt, in the same order.
        start: position in the prompt of the row's first token; 0 where the row is the whole prompt.
        length: tokens of the whole prompt.
    """

    local: slice | list[int]
    picked: slice | list[int]
    positions: slice | list[int]
    start: int
    length: int


def as_tokens(given: Any, whose: str) -> Tokens:
    """What a user names tokens by, with plain ints; refuse what names none, before any prompt is known.

        as_tokens(torch.tensor([0, 3]), "Patch")   # [0, 3]

    Args:
        given: a slice, or positions: a list, a tuple, a range, an array or a tensor of one axis.
        whose: whom the message is about.

    Raises:
        HookdepthError: anything else, e.g. a single number, a float among the positions, or a mask of bools.
    """
    if isinstance(given, slice):
        parts = (("start", given.start), ("stop", given.stop), ("step", given.step))
        numbers = [None if part is None else whole_number(f"{whose}: the slice's {name}", part) for name, part in parts]
        if numbers[2] == 0:
            raise HookdepthError(f"{whose}: a slice with the step 0", "give another step")
        return slice(*numbers)
    if isinstance(given, range):
        return given
    listed = given.tolist() if getattr(given, "ndim", 0) == 1 else given
    if not isinstance(listed, list) and (isinstance(listed, str | bytes) or not isinstance(listed, Sequence)):
        raise HookdepthError(
            f"{whose}: tokens are {shown(given)}", "give a slice or a list of positions, e.g. slice(1, None) or [-1]"
        )
    return [whole_number(f"{whose}: one of the tokens", token) for token in listed]


def positions(tokens: Tokens, length: int) -> range | list[int]:
    """The positions that `tokens` selects in a prompt of `length` tokens.

        positions(slice(1, None), 4)   # range(1, 4)
        positions([0, -1], 4)          # [0, 3]

    Raises:
        HookdepthError: a position outside the prompt, or one that is named twice (in 4 tokens, 3 and -1 are one).
    """
    if isinstance(tokens, slice):
        return range(*tokens.indices(length))
    return list(_positions(tuple(tokens), length))


def extent(tokens: Tokens, length: int) -> tuple[int, int] | None:
    """The least and the largest of `positions`; None where there is none: extent([0, -1], 4)   # (0, 3)"""
    if isinstance(tokens, slice):
        chosen = range(*tokens.indices(length))
        return (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])) if chosen else None
    return _extent(tuple(tokens), length)


@lru_cache(maxsize=1 << 9)
def _extent(tokens: tuple[int, ...], length: int) -> tuple[int, int] | None:
    chosen = _positions(tokens, length)
    return (min(chosen), max(chosen)) if chosen else None


@lru_cache(maxsize=1 << 9)  # of a long prompt each choice may be long
def _positions(tokens: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Remembered, since checks, plans and passes ask the same of thousands of branches."""
    if len(tokens) and not -length <= min(tokens) <= max(tokens) < length:
        wrong = next(token for token in tokens if not -length <= token < length)
        raise HookdepthError(
            f"token {wrong} of a prompt of {length} tokens", f"give positions from {-length} to {length - 1}"
        )
    chosen = tuple(token % length for token in tokens)
    if len(set(chosen)) < len(chosen):
        twice, _ = Counter(chosen).most_common(1)[0]
        named = [token for token in tokens if token % length == twice]
        raise HookdepthError(
            f"token {twice} of a prompt of {length} tokens is named {len(named)} times ({', '.join(map(str, named))})",
            "name each token once",
        )
    return chosen


def locate(tokens: Tokens, length: int, start: int, stop: int) -> Where:
    """Where the tokens that an intervention names lie in a pass of tokens start..stop−1.

    locate(slice(1, None), 10, 4, 9).local   # slice(0, 5), and picked is slice(3, 8), positions slice(4, 9)
    """
    chosen = positions(tokens, length)
    if isinstance(chosen, list) and chosen and chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        chosen = range(chosen[0], chosen[-1] + 1)  # side by side: a view, where a list would be copied to the device
    if isinstance(chosen, range) and chosen.step == 1:
        low, high = max(chosen.start, start), max(min(chosen.stop, stop), start)
        low = min(low, high)
        local, picked = slice(low - start, high - start), slice(low - chosen.start, high - chosen.start)
        return Where(local, picked, slice(low, high), start, length)
    inside = [(order, position) for order, position in enumerate(chosen) if start <= position < stop]
    own = [position for _, position in inside]
    return Where([position - start for position in own], [order for order, _ in inside], own, start, length)
