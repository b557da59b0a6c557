"""Maps over training time: layers by steps, a panel a curve."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.report.curves import Curves
from hookdepth.report.drawing.style import GREY, colour_map, layer_axis, new_figure, style
from hookdepth.report.kind import Kind, Lookup
from hookdepth.results import Result


@style()
def training_figure(history: Mapping[str, Mapping[int, Result]], lookup: Lookup) -> Figure:
    """How the layers are used while the model trains: a panel a measure, layer 0 at the top, steps to the right.

        training_figure(load_history("depth"), lookup).savefig("depth.png")

    Colours end at the 98th percentile of a panel, or where the axis of the report's figure does; an arrow at the
    colour bar says that there is more.
    """
    known = {name: lookup(next(iter(results.values()))) for name, results in history.items() if results}
    declared = sorted((own.order, name) for name, own in known.items() if own is not None)
    panels = [
        (kind, places, steps)
        for _, name in declared
        if (own := known[name]) is not None
        for kind in own.figures
        for places, steps in [kind.over_time(history[name], own)]
        if steps
    ]
    if not panels:
        what = f"no curve over layers to draw in {', '.join(history) or 'nothing'}"
        raise HookdepthError(what, "give a folder with an analysis that declares bars, lines or a map of tokens")
    figure = new_figure(6.4, 1.9 * len(panels) + 0.3)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw(figure, axes, *panel)
    grid.flat[-1].set_xlabel("Training step")
    return figure


def _draw(figure: Figure, axes: Axes, kind: Kind, places: str, steps: Mapping[int, Tensor]) -> None:
    values = torch.stack([curve.double() for curve in steps.values()], dim=1).numpy()
    shown = np.ma.masked_invalid(values)
    finite = shown.compressed()
    if isinstance(kind, Curves) and kind.limit is not None:
        limit = kind.axis_end(float(np.max(finite, initial=0.0)))
    else:
        limit = (float(np.quantile(np.abs(finite), 0.98)) if finite.size else 1.0) or 1.0
    signed = isinstance(kind, Curves) and kind.signed  # of a map it is the size
    low = -limit if signed else 0.0
    rows = np.arange(len(values) + 1) - 0.5
    colours = colour_map(signed)
    image = axes.pcolormesh(_edges(list(steps)), rows, shown, cmap=colours, vmin=low, vmax=limit, rasterized=True)
    axes.set_facecolor(GREY)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(True)
    layer_axis(axes.yaxis, len(values), places)
    over, under = bool((finite > limit).any()), bool((finite < low).any())
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}.get((over, under), "neither")
    label = kind.over_training or kind.label
    figure.colorbar(image, ax=axes, label=label, extend=extend, aspect=12, pad=0.01)


def _edges(steps: list[int]) -> np.ndarray:
    """Where one step's column ends and the next begins: half-way, so that gaps in the sampling show their width."""
    centres = np.array(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
