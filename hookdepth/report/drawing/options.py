"""A figure with what a user wants to be otherwise: colours, size, axes of one's own. See `Result.plot`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib.scale
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hookdepth.errors import HookdepthError, choose, shown, suggestion
from hookdepth.report.drawing import style

OPTIONS = ("cmap", "norm", "figsize", "ax", "look")


def drawn_with(draw: Callable[[], Figure], **options: Any) -> Figure:
    """The figure, drawn and then changed: drawn_with(picture.draw, cmap="magma")"""
    for name in options:
        choose("option of a figure", name, ("vmin", "vmax", *OPTIONS))
    wanted = {name: value for name, value in options.items() if value is not None}
    ax, size, look = wanted.get("ax"), wanted.get("figsize"), wanted.get("look")
    if ax is not None and not isinstance(ax, Axes):
        raise HookdepthError(f"ax is {shown(ax)}", "give matplotlib axes")
    if look is not None:
        choose("look", look, style.LOOKS)
    if size is not None and not _is_size(size):
        raise HookdepthError(f"figsize is {shown(size)}", "give width and height in inches, e.g. (3.3, 2.0)")
    if isinstance(wanted.get("norm"), str):
        choose("norm", wanted["norm"], matplotlib.scale.get_scale_names())
    with _inside(ax, size, look):
        figure = draw()
    figure = figure if ax is None else cast(Figure, ax.figure)
    images = [image for axes in figure.axes for image in axes.images if axes is ax or ax is None]
    if not images and (named := [name for name in ("cmap", "norm") if name in wanted]):
        raise HookdepthError(f"this figure has no colours for {named[0]}", "leave it out")
    for image in images:
        if "cmap" in wanted:
            _set("cmap", image.set_cmap, wanted["cmap"], list(matplotlib.colormaps))
        if "norm" in wanted:
            _set("norm", image.set_norm, wanted["norm"], ["log", "linear", "symlog"])
    return figure


def _set(name: str, change: Callable[[Any], object], given: Any, known: list[str]) -> None:
    try:
        change(given)
    except (TypeError, ValueError) as error:
        near = suggestion(str(given), known)
        remedy = f"did you mean {near}?" if near else f"give one of matplotlib's, e.g. {known[0]}"
        raise HookdepthError(f"{name} is {shown(given)}", remedy) from error


def _is_size(given: Any) -> bool:
    pair = isinstance(given, list | tuple) and len(given) == 2
    return pair and all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < 200 for one in given)


@contextmanager
def _inside(ax: Axes | None, size: Any, look: str | None) -> Iterator[None]:
    before = style.NEW.copy()
    style.NEW.update(ax=ax, size=size, look=look)
    try:
        yield
    finally:
        style.NEW.update(before)
