"""Several runs in one figure each: the same curves overlaid, heat maps side by side on one scale.

    compare_figures({"small": load_folder("out/small"), "large": load_folder("out/large")})

Where depths differ, the axis is relative depth: a layer l is at its middle, (l + 0.5) / L; a point between
layers (what goes into layer l; L is the final residual) at l / L. Where they agree it is the layer's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from hookdepth.report import summary
from hookdepth.report.layers import contribution_limit, draw_effect, effect_colour_bar, effect_labels
from hookdepth.report.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    colour_map,
    layer_axis,
    literal,
    new_figure,
    printable,
    styled,
)
from hookdepth.report.tokens import draw_tokens, probe_numbers, probe_of, symmetric_limit, tokens_size
from hookdepth.results import Result

Runs = Mapping[str, Mapping[str, Result]]

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
_LINES = ("-", "--", ":", "-.")
_COLUMNS = 3
_PROBE_MAPS = (
    ("residual-erasure", "effect", "residual-erasure"),
    ("integrated-gradients", "attribution", "integrated-gradients-layer"),
)


@dataclass(frozen=True)
class Curve:
    """A value a layer (or, `points`, a value between layers) that runs are compared by."""

    analysis: str
    needs: str
    label: str
    take: Callable[[Mapping[str, Tensor]], Tensor]
    points: bool = False


def _plain(analysis: str, tensor: str, label: str, points: bool = False) -> Curve:
    return Curve(analysis, tensor, label, lambda tensors: tensors[tensor], points)


_CURVES = {
    "residual-stats-contribution": _plain(
        "residual-stats", "relative_contribution.layer", "Mean relative contribution\nof the layer"
    ),
    "residual-stats-cosine": Curve(
        "residual-stats", "cosine.layer", "Cosine similarity\n(mean of the three)", summary.mean_cosine
    ),
    "logit-lens-kl": _plain("logit-lens", "kl", "KL divergence (nats)", points=True),
    "logit-lens-overlap": _plain("logit-lens", "topk_overlap", "Top-5 overlap", points=True),
}
for _analysis in ("skip-current", "skip-future"):
    for _part in summary.PARTS:
        _CURVES[f"{_analysis}-{_part}-output"] = _plain(_analysis, f"{_part}.output", "Output change norm")


def compare_figures(runs: Runs) -> dict[str, Figure]:
    """A figure for every curve and every effect map that at least two of the runs have (one, if one is given).

    list(compare_figures(runs))   # ["residual-stats-contribution", …, "skip-current-layer-effect"]
    """
    least = min(2, len(runs))
    figures = {}
    for name, curve in _CURVES.items():
        values = _collect(runs, curve.analysis, curve.needs, curve.take)
        if len(values) >= least:
            figures[name] = curves_figure(values, curve)
    for analysis in ("skip-current", "skip-future", "local-current", "local-future"):
        for part in summary.PARTS:
            maps = _collect(runs, analysis, f"{part}.effect")
            if len(maps) >= least:
                figures[f"{analysis}-{part}-effect"] = maps_figure(maps, *effect_labels(analysis))
    return figures | _probe_maps(runs, least)


def _probe_maps(runs: Runs, least: int) -> dict[str, Figure]:
    """Erasure and attribution maps of the probes that runs share, by number and prompt."""
    figures = {}
    for analysis, stem, name in _PROBE_MAPS:
        own = {label: results[analysis] for label, results in runs.items() if analysis in results}
        for n in sorted({n for result in own.values() for n in probe_numbers(result.tensors, stem)}):
            prompts = [probe_of(result, n).get("prompt") for result in own.values()]
            maps = {
                label: (result.tensors[f"{stem}.{n}"], probe_of(result, n))
                for label, result in own.items()
                if f"{stem}.{n}" in result.tensors and probe_of(result, n).get("prompt") == prompts[0]
            }
            if len(maps) >= least:
                figures[f"{name}-{n}"] = tokens_figure(maps, signed=stem == "attribution")
    return figures


def _collect(
    runs: Runs, analysis: str, needs: str, take: Callable[[Mapping[str, Tensor]], Tensor] | None = None
) -> dict[str, Tensor]:
    found = {label: results[analysis].tensors for label, results in runs.items() if analysis in results}
    return {label: take(own) if take else own[needs] for label, own in found.items() if needs in own}


@styled
def curves_figure(values: Mapping[str, Tensor], curve: Curve) -> Figure:
    """One line a run, over layers or, where depths differ, over relative depth."""
    lengths = {len(own) for own in values.values()}
    relative = len(lengths) > 1
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    handles = []
    for number, own in enumerate(values.values()):
        style = _LINES[number // len(_COLOURS) % len(_LINES)]
        colour = _COLOURS[number % len(_COLOURS)]
        places = relative_depth(len(own), curve.points) if relative else np.arange(len(own))
        handles += axes.plot(places, own.numpy(), style, color=colour, marker="o", markersize=2.5, linewidth=1.4)
    axes.set_ylabel(curve.label)
    axes.set_xlabel("Relative depth")
    if not relative:
        layer_axis(axes.xaxis, lengths.pop())
    if curve.needs.startswith("cosine"):
        axes.axhline(0, color=BLACK, linewidth=0.8)
    if curve.needs.startswith("relative_contribution"):
        highest = np.concatenate([own.numpy() for own in values.values()])
        limit = contribution_limit(highest)
        axes.set_ylim(0, limit)
        if (highest > limit).any():
            axes.set_ylabel(f"{curve.label}\n(largest: {np.nanmax(highest):.3g})")
    _legend(axes, handles, [printable(label) for label in values])
    return figure


def _legend(axes: Axes, handles: list[Line2D], labels: list[str]) -> None:
    """Labels as they are: given to legend() itself, one that begins with an underscore would be left out."""
    columns = max(1, min(len(labels), 90 // (8 + max(map(len, labels)))))
    names = [f"run {number}" for number in range(len(labels))]
    legend = axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)
    literal(legend.get_texts())
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def relative_depth(n: int, points: bool) -> np.ndarray:
    """Where n layers, or the n points around n − 1 layers, lie between 0 and 1.

    relative_depth(2, points=False)   # [0.25, 0.75]
    relative_depth(3, points=True)    # [0, 0.5, 1]
    """
    return np.arange(n) / max(n - 1, 1) if points else (np.arange(n) + 0.5) / n


@styled
def maps_figure(maps: Mapping[str, Tensor], row_label: str, column_label: str) -> Figure:
    """Effect maps side by side, all from 0 to 1, under the names of their runs."""
    columns = min(len(maps), _COLUMNS)
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(3.1 * columns + 0.9, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, (axes, (label, effect)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        image = draw_effect(axes, effect, row_label if number % columns == 0 else "", column_label)
        axes.set_title(_short(printable(label)), fontsize=9, parse_math=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    effect_colour_bar(figure, image, list(grid.flat), list(maps.values()))
    return figure


@styled
def tokens_figure(maps: Mapping[str, tuple[Tensor, Mapping[str, Any]]], signed: bool) -> Figure:
    """Maps of layer against token, one below the other on one colour scale, under the names of their runs."""
    limit = max(symmetric_limit(values) if signed else float(values.max()) for values, _ in maps.values())
    scale: dict[str, Any] = {
        "vmin": -limit if signed else 0.0,
        "vmax": limit,
        "cmap": colour_map("RdBu_r" if signed else "viridis"),
    }
    sizes = [tokens_size(values) for values, _ in maps.values()]
    heights = [min(height, 4.5) for _, height in sizes]
    figure = new_figure(max(width for width, _ in sizes), sum(heights))
    grid = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)
    for axes, (label, (values, probe)) in zip(grid.flat, maps.items(), strict=True):
        image = draw_tokens(axes, values, probe, **scale)
        axes.set_title(_short(printable(label)), fontsize=9, parse_math=False)
    label = "Attribution" if signed else "Probability Difference Norm"
    extend = "both" if signed else "neither"
    figure.colorbar(image, ax=list(grid.flat), label=label, extend=extend, aspect=40, fraction=0.05, pad=0.02)
    return figure


def _short(label: str, most: int = 34) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"
