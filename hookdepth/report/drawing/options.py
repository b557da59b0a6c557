"""A figure with what a user wants to be otherwise: colours, size, axes of one's own. See `Result.plot`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib.scale
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hookdepth.errors import HookdepthError, choose, shown
from hookdepth.report.drawing import style

OPTIONS = ("cmap", "norm", "figsize", "ax", "look")


def drawn_with(draw: Callable[[], Figure], **options: Any) -> Figure:
    """The figure, drawn and then changed: drawn_with(picture.draw, cmap="magma")

    Raises:
        HookdepthError: an unknown option, or one that this figure does not take.
    """
    for name in options:
        choose("option of a figure", name, ("vmin", "vmax", *OPTIONS))
    wanted = {name: value for name, value in options.items() if value is not None}
    ax, size, look = wanted.get("ax"), wanted.get("figsize"), wanted.get("look")
    if ax is not None and not isinstance(ax, Axes):
        raise HookdepthError(f"ax is {shown(ax)}", "give matplotlib axes")
    if look is not None:
        choose("look", look, style.LOOKS)
    if size is not None and not (isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_length, size))):
        raise HookdepthError(f"figsize is {shown(size)}", "give width and height in inches: (3.3, 2.8)")
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
            choose("colour map", wanted["cmap"], matplotlib.colormaps) if isinstance(wanted["cmap"], str) else None
            image.set_cmap(wanted["cmap"])
        if "norm" in wanted:
            image.set_norm(wanted["norm"])
    return figure


def _is_length(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < 1000


@contextmanager
def _inside(ax: Axes | None, size: Any, look: str | None) -> Iterator[None]:
    before = style.NEW.copy()
    style.NEW.update(ax=ax, size=size, look=look)
    try:
        yield
    finally:
        style.NEW.update(before)
