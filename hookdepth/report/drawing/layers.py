"""Drawing over layers: bars and lines of a value a layer, maps of layer against layer, of one run or several.

Where depths of runs differ, the axis is relative depth: a layer l is at its middle, (l + 0.5) / L; a point between
layers (what goes into layer l; L is the final residual) at l / L. Where they agree it is the layer's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from hookdepth.report.drawing import style
from hookdepth.report.scale import Scale, first_columns

_LINES = ("-", "--", ":", "-.")
_MARKERS = "sov^Dp*"
_COLUMNS = 3


def colours_of(names: Sequence[str], part: str = "") -> dict[str, str]:
    """A colour a curve, that of its part where it is one: colours_of(["attn", "mlp"])."""
    if len(names) == 1:
        return {names[0]: style.PART_COLOURS.get(part) or style.PART_COLOURS.get(names[0], style.SKY)}
    known = {**style.PART_COLOURS, "resid": style.BLACK}
    others = [colour for colour in style.COLOURS if colour not in (known[name] for name in names if name in known)]
    rest = [name for name in names if name not in known]
    return {name: known.get(name) or others[rest.index(name) % len(others)] for name in names}


def draw_bars(
    axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str], labels: Mapping[str, str], beside: bool = False
) -> list[float]:
    """Overlapping bars, the smaller in front, or beside each other; how far each curve's are from their place."""
    width = 0.9 / len(curves) if beside else 1.1
    offsets = [width * (place - (len(curves) - 1) / 2) * beside for place in range(len(curves))]
    groups = []
    for offset, (name, values) in zip(offsets, curves.items(), strict=True):
        heights = np.nan_to_num(np.asarray(values, dtype=float), posinf=0.0, neginf=0.0)
        at = np.arange(len(heights)) + offset
        groups.append(axes.bar(at, heights, width=width, color=colours[name], label=labels[name]))
    for bars in zip(*groups, strict=False):
        for z, bar in enumerate(sorted(bars, key=lambda bar: -abs(bar.get_height())), start=1):
            bar.set_zorder(z)
    axes.set_xlim(-0.55, len(groups[0]) - 0.45)
    return offsets


def draw_lines(
    axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str], labels: Mapping[str, str], log: bool
) -> None:
    """A line a curve; what a logarithmic axis cannot show is left out: draw_lines(axes, {"kl": kl}, …)."""
    for place, (name, values) in enumerate(curves.items()):
        shown = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
        marker, every = _MARKERS[place % len(_MARKERS)], 1 + len(shown) // 60
        look: dict[str, Any] = {"marker": marker, "markersize": 3, "markevery": every, "linewidth": 1.3}
        axes.plot(shown, color=colours[name], label=labels[name], **look)


def end_axis(axes: Axes, end_of: Callable[[float], float], curves: Sequence[np.ndarray]) -> None:
    """End the axis as the largest value asks for; what is beyond has a triangle and is written out."""
    largest = np.nan_to_num(np.max(curves, axis=0), posinf=0.0, neginf=0.0)
    limit = end_of(float(largest.max()))
    low = min(0.0, axes.get_ylim()[0])
    axes.set_ylim(low, limit)
    clipped = [int(layer) for layer in np.argsort(-largest, kind="stable") if largest[layer] > limit]
    if clipped:
        axes.plot(clipped, [0.97 * limit] * len(clipped), "^", color=style.BLACK, markersize=5, zorder=9)
        listed = ", ".join(f"layer {layer}: {largest[layer]:.3g}" for layer in clipped[:2])
        more = f" and {len(clipped) - 2} more" if len(clipped) > 2 else ""
        axes.plot([], [], "^", color=style.BLACK, markersize=5, label=f"beyond the axis: {listed}{more}")


def mark_layer(axes: Axes, index: int | None, n_layers: int, what: str) -> None:
    """A dashed line at a layer, named in the legend, or that there is none: mark_layer(axes, 2, 30, "")."""
    if index is not None:
        axes.axvline(index, color=style.RED, linestyle="--", linewidth=1.3, zorder=9)
    text = f"{what}: none" if index is None else f"{what}: layer {index} of {n_layers}"
    axes.plot([], [], color=style.RED, linestyle="--", linewidth=1.3, label=text, alpha=float(index is not None))


def draw_runs(axes: Axes, own: Mapping[str, Tensor], label: str, axis: str, points: bool) -> None:
    """A line a run, over layers or, where depths differ, over relative depth: draw_runs(axes, {"small": kl}, …)."""
    lengths = {len(curve) for curve in own.values()}
    handles: list[Line2D] = []
    for number, curve in enumerate(own.values()):
        dashes, colour = _LINES[number // len(style.COLOURS) % len(_LINES)], style.COLOURS[number % len(style.COLOURS)]
        places = relative_depth(len(curve), points) if len(lengths) > 1 else np.arange(len(curve))
        handles += axes.plot(places, curve.numpy(), dashes, color=colour, marker="o", markersize=2.5, linewidth=1.4)
    axes.set_ylabel(label)
    axes.set_xlabel("Relative depth")
    if len(lengths) == 1:
        style.layer_axis(axes.xaxis, lengths.pop(), axis)
    style.legend_above(axes, dict(zip(own, handles, strict=True)))


def relative_depth(n: int, points: bool) -> np.ndarray:
    """Where n layers, or n points around n − 1 layers, lie from 0 to 1: relative_depth(2, False)   # [0.25, 0.75]"""
    return np.arange(n) / max(n - 1, 1) if points else (np.arange(n) + 0.5) / n


def draw_interval(axes: Axes, ends: Tensor, curve: Tensor, colour: str, offset: float = 0.0) -> None:
    """Whiskers of the mean over prompts, with a dot where the curve is something else: draw_interval(axes, ends, …)."""
    mean, low, high = ends.numpy()
    other = bool((ends[0] - curve).abs().nan_to_num().max() > 1e-3 * curve.abs().nan_to_num().max())
    whiskers = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
    dot = "." if other else "none"
    axes.errorbar(
        np.arange(len(mean)) + offset, mean, whiskers, fmt=dot, color=colour, markersize=3, elinewidth=0.8, zorder=6
    )


def maps_figure(
    maps: Mapping[str, Tensor],
    scale: Scale,
    row_label: str,
    column_label: str,
    path: bool = False,
    causal: bool | Sequence[int] = False,
    labels: Sequence[Sequence[str]] = (),
    other: Sequence[str] = (),
) -> Figure:
    """A map, row 0 at the top as in the paper, or those of several runs side by side under their names."""
    columns = min(len(maps), _COLUMNS)
    n_lines = math.ceil(len(maps) / columns)
    longest = max(max(own.shape) for own in maps.values())
    size = 3.6 if longest <= 12 else 4.6 if longest <= 60 else 6.0
    several = len(maps) > 1 or "" not in maps
    figure = style.new_figure(*((3.1 * columns + 0.9, 3.2 * n_lines) if several else (size + 1.0, size)))
    grid = figure.subplots(n_lines, columns, squeeze=False)
    for number, (axes, (label, own)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        long = max(own.shape) > 3 * min(own.shape)
        image = style.heat_map(axes, own, scale, aspect="auto" if long else "equal")
        if causal:  # nothing reaches an earlier layer: paper, not the colour of 0
            if causal is True:
                blank = np.tril(np.ones(own.shape), -1)
                axes.imshow(np.dstack([np.ones((*own.shape, 3)), blank]), aspect="auto" if long else "equal")
            for row, first in enumerate(() if causal is True else first_columns(causal, len(own))):
                axes.add_patch(Rectangle((-0.5, row - 0.5), first, 1, facecolor="white", edgecolor="none"))
        style.layer_axis(axes.yaxis, len(own), row_label if number % columns == 0 else "")
        style.layer_axis(axes.xaxis, own.shape[1], column_label)
        for axis, names, rotation in zip((axes.yaxis, axes.xaxis), labels, (0, 90), strict=False):
            style.name_places(axis, names, rotation)
        if path:
            axes.plot(own.nan_to_num(torch.inf).argmin(0).numpy(), "-o", color=style.RED, markersize=2, linewidth=1)
        if other:
            _other_half(axes, len(own), *other)
        if several:
            style.run_title(axes, label)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    style.colour_bar(figure, image, list(grid.flat), scale, list(maps.values()), fraction=0.05, pad=0.03)
    return figure


def _other_half(axes: Axes, n: int, row_label: str, column_label: str) -> None:
    stairs = np.arange(n)[:, None] + np.array([-0.5, 0.5])
    axes.plot(np.repeat(stairs[:, 1], 2), stairs.ravel(), color=style.BLACK, linewidth=0.8)
    style.layer_axis(axes.secondary_xaxis("top", (partial(np.add, -1), partial(np.add, 1))).xaxis, n, column_label)
    style.layer_axis(axes.secondary_yaxis("right").yaxis, n, row_label)
