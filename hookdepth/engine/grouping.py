"""Things in a row, split into runs that cost least together.

cheapest_runs(3, lambda begin, end: 5 + (end - begin) ** 2)     # [slice(0, 1), slice(1, 3)], 15
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate


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
