"""Things in a row, split: into runs that cost least together, or into passes that each hold as many as fit.

cheapest_runs(3, lambda begin, end: 5 + (end - begin) ** 2)     # [slice(0, 1), slice(1, 3)], 15
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hookdepth.engine.machines import PassCost
from hookdepth.engine.plan import ROWS_PER_PROMPT, Span, peak_rows


@dataclass(frozen=True)
class Limits:
    """What a pass may hold, and what it costs: Limits(1 << 15, 64, USUAL, None).branches(180, 1)     # 62"""

    row_tokens: int
    rows: int
    cost: PassCost
    kept_tokens: int | None
    prefixes: bool = True
    hand_on: bool = False

    def branches(self, tokens: int, prompts: int) -> int:
        """How many branches fit beside the clean runs and null branches of `prompts`; at least one."""
        return max(1, min(self.rows, self.row_tokens // max(tokens, 1)) - ROWS_PER_PROMPT * prompts)


def sums(numbers: Iterable[int]) -> list[int]:
    """Of the first 0, 1, 2, … numbers: sums([4, 2])     # [0, 4, 6]"""
    return list(accumulate(numbers, initial=0))


def cheapest_runs(n: int, cost: Callable[[int, int], int | None]) -> tuple[list[slice], int]:
    """The runs of 0 … n − 1, and what they cost together.

    Args:
        cost: of the run begin … end − 1; None where it is too large, and with it all that begin earlier.
    """
    best, previous = [0] + [1 << 62] * n, [0] * (n + 1)
    for end in range(1, n + 1):
        for begin in range(end - 1, -1, -1):
            if (own := cost(begin, end)) is None:
                break
            if best[begin] + own < best[end]:
                best[end], previous[end] = best[begin] + own, begin
    runs, end = [], n
    while end:
        runs.append(slice(previous[end], end))
        end = previous[end]
    return runs[::-1], best[n]


def packed(
    lengths: Sequence[int],
    rows: Sequence[int],
    layers: Sequence[int],
    keys: Sequence[Hashable],
    limits: Limits,
    n_layers: int,
    fewest: bool = False,
) -> list[list[int]]:
    """Prompts, of similar length and equal key, that cost less in passes that they share: their numbers.

        limits = Limits(1 << 15, 64, PassCost(4, full=40), None)
        packed([9, 30, 8], [1, 1, 1], [4, 4, 4], [None] * 3, limits, 4)     # [[2, 0], [1]]

    Args:
        rows, layers: of each prompt, the rows that it brings, and the layers that these run through in all.
        fewest: as few groups as there can be, whatever a pass costs.
    """
    order = sorted(range(len(lengths)), key=lambda n: (lengths[n], n))
    rows_of, layers_of = sums(rows[n] for n in order), sums(layers[n] for n in order)
    most = min(limits.cost.full, limits.row_tokens)

    def price(begin: int, end: int) -> int | None:
        together, longest = rows_of[end] - rows_of[begin], lengths[order[end - 1]]
        if end - begin > 1 and (
            together * longest > most or together > limits.rows or keys[order[begin]] != keys[order[end - 1]]
        ):
            return None
        if fewest:
            return 1
        return limits.cost(longest * (layers_of[end] - layers_of[begin]), n_layers) + limits.cost.top * n_layers

    return [order[run] for run in cheapest_runs(len(order), price)[0]]


def spread(lives: Sequence[Span], size: int) -> list[slice]:
    """Rows in the order in which they join, dealt out to as few passes as hold them: each pass gets early and late
    ones, so that none has all the rows that run through every layer. spread(lives, 16)     # [slice(0, None, 2), …]"""
    chunks = -(-peak_rows(lives) // size)
    while any(peak_rows(lives[number::chunks]) > size for number in range(chunks)):
        chunks += 1
    return [slice(number, None, chunks) for number in range(chunks)]


def filled(kept: Sequence[int], size: int, most: int) -> list[slice]:
    """With gradients: one pass filled after the other, so that rows that join at the same layer are side by side.

        filled([4, 4, 2], 16, 8)     # [slice(0, 2), slice(2, 3)]

    The whole batch is part of the graph from the first layer at which a row joins. Late rows among themselves keep
    only late layers; dealt out, every pass would keep all of them.

    Args:
        kept: of each row, the tokens × layers whose activations it keeps.
        size: most rows of a pass.
        most: of tokens × layers; one row is always allowed.
    """
    chunks, begin, total = [], 0, 0
    for number, own in enumerate(kept):
        total += own
        if number > begin and (number - begin >= size or total > most):
            chunks.append(slice(begin, number))
            begin, total = number, own
    return [*chunks, slice(begin, len(kept))]
