"""What shows a result is said from above: who makes or reads results need not know how they are drawn.

shown_by(lambda result, what, *arguments, **options: …)     # once, by the package itself
show(result, "plot", "kl")
"""

from collections.abc import Callable
from typing import Any

Show = Callable[..., Any]
_SHOWN_BY: list[Show] = []


def shown_by(function: Show) -> None:
    """From now on `function(result, what, …)` says what a result's methods give: shown_by(function)."""
    _SHOWN_BY[:] = [function]


def show(result: Any, what: str, *arguments: Any, **options: Any) -> Any:
    """A table, a figure, a data frame of a result: show(result, "summary")."""
    (function,) = _SHOWN_BY
    return function(result, what, *arguments, **options)
