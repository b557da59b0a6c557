"""Heat maps over training time: layers by steps.

Path("depth.png").write_bytes(render(training_figure(load_history("depth")), "png"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hookdepth.report import summary
from hookdepth.report.layers import contribution_limit
from hookdepth.report.style import GREY, boxed, colour_map, layer_axis, new_figure, render, styled
from hookdepth.results import Result

__all__ = ["render", "training_figure"]


@dataclass(frozen=True)
class _Panel:
    analysis: str
    label: str
    take: Callable[[Mapping[str, Tensor]], Tensor]
    rows: str = "Layer"
    signed: bool = False
    limit: Callable[[np.ndarray], float] | None = None


_PANELS = (
    _Panel(
        "residual-stats",
        "Relative contribution\nof the layer",
        lambda t: t["relative_contribution.layer"],
        limit=contribution_limit,
    ),
    _Panel("residual-stats", "Cosine similarity\n(mean of the three)", summary.mean_cosine, signed=True),
    _Panel("logit-lens", "Logit lens:\nKL divergence (nats)", lambda t: t["kl"], "Before layer"),
    _Panel(
        "skip-current",
        "Layer skipped:\noutput change norm",
        lambda t: t.get("layer.output", torch.full((1,), torch.nan)),
        "Layer skipped",
    ),
)


@styled
def training_figure(history: Mapping[str, Mapping[int, Result]]) -> Figure:
    """How the layers are used while the model trains: a panel a measure, layer 0 at the top, steps to the right.

        training_figure(load_history("depth"))

    Colours end at the 98th percentile of a panel, those of relative contributions where the report's axis does; an
    arrow at the colour bar says that there is more.

    Args:
        history: analysis → step → result.
    """
    panels = [panel for panel in _PANELS if history.get(panel.analysis)]
    figure = new_figure(6.4, 1.9 * len(panels) + 0.3)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    for axes, panel in zip(grid.flat, panels, strict=True):
        results = history[panel.analysis]
        values = torch.stack([panel.take(result.tensors).double() for result in results.values()], dim=1)
        _draw(figure, axes, panel, list(results), values.numpy())
    grid.flat[-1].set_xlabel("Training step")
    return figure


def _draw(figure: Figure, axes: Axes, panel: _Panel, steps: list[int], values: np.ndarray) -> None:
    shown = np.ma.masked_invalid(values)
    finite = shown.compressed()
    top = float(np.quantile(np.abs(finite), 0.98)) if finite.size else 1.0
    limit = panel.limit(finite) if panel.limit else top or 1.0
    low, colours = (-limit, "RdBu_r") if panel.signed else (0.0, "viridis")
    rows = np.arange(len(values) + 1) - 0.5
    image = axes.pcolormesh(_edges(steps), rows, shown, cmap=colour_map(colours), vmin=low, vmax=limit, rasterized=True)
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
