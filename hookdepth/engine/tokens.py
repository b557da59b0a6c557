"""Which tokens of a prompt are meant, and where they lie in a pass that computes only some of them.

positions(slice(1, None), 4)            # range(1, 4)
locate([0, -1], 10, start=4, stop=10)   # Where(local=[5], picked=[1], positions=[9], start=4, length=10)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hookdepth.errors import HookdepthError

Tokens = slice | Sequence[int]
"""Positions in a prompt; negative ones count from its end."""


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


def positions(tokens: Tokens, length: int) -> range | list[int]:
    """The positions that `tokens` selects in a prompt of `length` tokens.

        positions(slice(1, None), 4)   # range(1, 4)
        positions([0, -1], 4)          # [0, 3]

    Raises:
        HookdepthError: a position outside the prompt.
    """
    if isinstance(tokens, slice):
        return range(*tokens.indices(length))
    wrong = [token for token in tokens if not -length <= token < length]
    if wrong:
        raise HookdepthError(
            f"token {wrong[0]} of a prompt of {length} tokens", f"give positions from {-length} to {length - 1}"
        )
    return [token % length for token in tokens]


def locate(tokens: Tokens, length: int, start: int, stop: int) -> Where:
    """Where the tokens that an intervention names lie in a pass of tokens start..stop−1.

    locate(slice(1, None), 10, 4, 9).local   # slice(0, 5), and picked is slice(3, 8), positions slice(4, 9)
    """
    chosen = positions(tokens, length)
    if isinstance(chosen, range) and chosen.step == 1:
        low, high = max(chosen.start, start), max(min(chosen.stop, stop), start)
        low = min(low, high)
        local, picked = slice(low - start, high - start), slice(low - chosen.start, high - chosen.start)
        return Where(local, picked, slice(low, high), start, length)
    inside = [(order, position) for order, position in enumerate(chosen) if start <= position < stop]
    own = [position for _, position in inside]
    return Where([position - start for position in own], [order for order, _ in inside], own, start, length)
