"""Maps over training time: layers by steps, a panel a curve.

Path("depth.png").write_bytes(render(training_figure(load_history("depth"), lookup), "png"))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hookdepth.errors import HookdepthError
from hookdepth.report.drawing.style import GREY, boxed, colour_map, layer_axis, new_figure, render, styled
from hookdepth.report.kind import Lookup, Panel
from hookdepth.results import Result

__all__ = ["render", "training_figure"]


@styled
def training_figure(history: Mapping[str, Mapping[int, Result]], lookup: Lookup) -> Figure:
    """How the layers are used while the model trains: a panel a measure, layer 0 at the top, steps to the right.

        training_figure(load_history("depth"), lookup)

    Colours end at the 98th percentile of a panel, or where the axis of the report's figure does; an arrow at the
    colour bar says that there is more.

    Args:
        history: analysis → step → result.

    Raises:
        HookdepthError: nothing that was measured is a curve over layers.
    """
    panels = _panels(history, lookup)
    if not panels:
        raise HookdepthError(
            f"no curve over layers to draw in {', '.join(history) or 'nothing'}",
            "give a folder with an analysis that declares bars or lines",
        )
    figure = new_figure(6.4, 1.9 * len(panels) + 0.3)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw(figure, axes, panel)
    grid.flat[-1].set_xlabel("Training step")
    return figure


def _panels(history: Mapping[str, Mapping[int, Result]], lookup: Lookup) -> list[Panel]:
    known = {name: lookup(next(iter(results.values()))) for name, results in history.items() if results}
    declared = [(own.order, name, own) for name, own in known.items() if own is not None]
    panels = [
        kind.panel(history[name], own)
        for _, name, own in sorted(declared, key=lambda item: item[:2])
        for kind in own.figures
    ]
    return [panel for panel in panels if panel is not None]


def _draw(figure: Figure, axes: Axes, panel: Panel) -> None:
    values = torch.stack([curve.double() for curve in panel.curves.values()], dim=1).numpy()
    shown = np.ma.masked_invalid(values)
    finite = shown.compressed()
    if panel.end is not None:
        limit = panel.end(float(np.max(finite, initial=0.0)))
    else:
        limit = (float(np.quantile(np.abs(finite), 0.98)) if finite.size else 1.0) or 1.0
    low, colours = (-limit, "RdBu_r") if panel.signed else (0.0, "viridis")
    rows = np.arange(len(values) + 1) - 0.5
    edges = _edges(list(panel.curves))
    image = axes.pcolormesh(edges, rows, shown, cmap=colour_map(colours), vmin=low, vmax=limit, rasterized=True)
    axes.set_facecolor(GREY)
    axes.invert_yaxis()
    boxed(axes)
    layer_axis(axes.yaxis, len(values), panel.rows)
    over, under = bool((finite > limit).any()), bool((finite < low).any())
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}.get((over, under), "neither")
    figure.colorbar(image, ax=axes, label=panel.label, extend=extend, aspect=12, pad=0.01)


def _edges(steps: list[int]) -> np.ndarray:
    """Where one step's column ends and the next begins: half-way, so that gaps in the sampling show their width."""
    centres = np.array(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
