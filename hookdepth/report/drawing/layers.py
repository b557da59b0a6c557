"""Drawing over layers: bars and lines of a value a layer, maps of layer against layer, of one run or several.

    maps_figure({"": effect}, Scale(0.0, 1.0, "Relative change"), "Layer skipped", "Effect @ layer")

Where depths of runs differ, the axis is relative depth: a layer l is at its middle, (l + 0.5) / L; a point between
layers (what goes into layer l; L is the final residual) at l / L. Where they agree it is the layer's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from hookdepth.report.drawing.style import (
    BLACK,
    COLOURS,
    GREY,
    PART_COLOURS,
    RED,
    SKY,
    bar_width,
    boxed,
    colour_bar,
    colour_map,
    layer_axis,
    legend_above,
    literal,
    log_yaxis,
    new_figure,
    printable,
    short,
    styled,
)
from hookdepth.report.scale import Scale

_LINES = ("-", "--", ":", "-.")
_MARKERS = "sov^Dp*"
_COLUMNS = 3


class Curves(Protocol):
    """What drawing asks of a kind of curves, whose class says what each is: Bars("kl", "…")."""

    @property
    def bars(self) -> bool:
        """Bars, or lines."""

    @property
    def label(self) -> str:
        """Of the values."""

    @property
    def axis(self) -> str:
        """Of the layers."""

    @property
    def signed(self) -> bool:
        """Whether zero is a line of its own."""

    @property
    def limit(self) -> float | None:
        """Where the axis ends."""

    @property
    def mean(self) -> bool:
        """Whether the mean of the curves is drawn."""

    @property
    def threshold(self) -> float | Callable[[Tensor], float] | None:
        """Where the dotted line is."""

    @property
    def threshold_label(self) -> str:
        """What the dotted line is."""

    @property
    def mark(self) -> Callable[[Tensor], int | None] | None:
        """Which layer is marked."""

    @property
    def mark_label(self) -> str:
        """What the marked layer is."""

    @property
    def grey_last(self) -> bool:
        """Whether the last bar is grey."""

    @property
    def log(self) -> bool:
        """Whether the axis is logarithmic."""

    def axis_end(self, largest: float) -> float:
        """Where an axis with a limit ends."""

    def compared_curve(self, own: Mapping[str, Tensor]) -> Tensor:
        """The curve that stands for all of them."""

    def label_of(self, name: str, own: Mapping[str, Tensor]) -> str:
        """The name of a curve."""


@styled
def curves_figure(kind: Curves, own: Mapping[str, Tensor], part: str = "", points: bool = False) -> Figure:
    """All curves of one result: curves_figure(Bars("kl", "…"), {"kl": kl}, points=True).

    Args:
        part: whose colour a single curve has.
        points: the last place is none of a layer's.
    """
    n = max(len(curve) for curve in own.values())
    n_layers = n - points
    figure = new_figure(bar_width(n_layers), 3.0 if len(own) > 1 else 2.6)
    axes = figure.subplots()
    colours = colours_of(list(own), part)
    labels = {name: kind.label_of(name, own) if len(own) > 1 else "_" for name in own}
    heights = {name: curve.double().numpy() for name, curve in own.items()}
    if kind.bars:
        draw_bars(axes, heights, colours, labels)
        if kind.grey_last:
            axes.patches[-1].set_color(GREY)
    else:
        draw_lines(axes, heights, colours, labels, kind.log)
    if kind.limit is not None:
        end_axis(axes, kind, list(heights.values()))
    if kind.signed:
        axes.axhline(0, color=BLACK, linewidth=0.8, zorder=5)
    curve = kind.compared_curve(own)
    if kind.mean:
        axes.plot(curve.numpy(), color=BLACK, linewidth=1.2, marker="o", markersize=2.5, zorder=8, label="mean")
    if kind.threshold is not None:
        at = kind.threshold(curve) if callable(kind.threshold) else kind.threshold
        axes.axhline(at, color=BLACK, linestyle=":", linewidth=1.1, zorder=8, label=kind.threshold_label)
    if kind.log:
        log_yaxis(axes)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    layer_axis(axes.xaxis, n, kind.axis)
    axes.set_ylabel(kind.label)
    if kind.mark is not None:
        mark_layer(axes, kind.mark(curve), n_layers, kind.mark_label)
    legend_above(axes)
    return figure


def colours_of(names: Sequence[str], part: str = "") -> dict[str, str]:
    """A colour a curve, that of its part where it is one: colours_of(["attn", "mlp"])."""
    if len(names) == 1:
        return {names[0]: PART_COLOURS.get(part) or PART_COLOURS.get(names[0], SKY)}
    known = {**PART_COLOURS, "resid": BLACK}
    others = [colour for colour in COLOURS if colour not in (known[name] for name in names if name in known)]
    rest = [name for name in names if name not in known]
    return {name: known.get(name) or others[rest.index(name) % len(others)] for name in names}


def draw_bars(axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """Overlapping bars, a group for each curve, the smaller in front: draw_bars(axes, {"kl": kl}, …)."""
    groups = []
    for name, values in curves.items():
        heights = np.nan_to_num(np.asarray(values, dtype=float), posinf=0.0, neginf=0.0)
        groups.append(axes.bar(range(len(heights)), heights, width=1.1, color=colours[name], label=labels[name]))
    sort_zorder(groups)
    n = len(groups[0])
    axes.set_xlim(-0.55, n - 0.45)


def sort_zorder(groups: Sequence[Any]) -> None:
    """At each place, put smaller bars in front of larger ones: sort_zorder(axes.containers)."""
    for bars in zip(*groups, strict=False):
        for z, bar in enumerate(sorted(bars, key=lambda bar: -abs(bar.get_height())), start=1):
            bar.set_zorder(z)


def draw_lines(
    axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str], labels: Mapping[str, str], log: bool
) -> None:
    """A line a curve; what a logarithmic axis cannot show is left out: draw_lines(axes, {"kl": kl}, …)."""
    for place, (name, values) in enumerate(curves.items()):
        shown = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
        marker, every = _MARKERS[place % len(_MARKERS)], 1 + len(shown) // 60
        style: dict[str, Any] = {"marker": marker, "markersize": 3, "markevery": every, "linewidth": 1.3}
        axes.plot(shown, color=colours[name], label=labels[name], **style)


def end_axis(axes: Axes, kind: Curves, curves: Sequence[np.ndarray]) -> None:
    """End the axis where the kind says; what is larger has a triangle and is written out: end_axis(axes, kind, …)."""
    largest = np.nan_to_num(np.max(curves, axis=0), posinf=0.0, neginf=0.0)
    limit = kind.axis_end(float(largest.max()))
    low = min(0.0, axes.get_ylim()[0])
    axes.set_ylim(low, limit)
    clipped = [int(layer) for layer in np.argsort(-largest, kind="stable") if largest[layer] > limit]
    if clipped:
        axes.plot(clipped, [0.97 * limit] * len(clipped), "^", color=BLACK, markersize=5, zorder=9)
        listed = ", ".join(f"layer {layer}: {largest[layer]:.3g}" for layer in clipped[:2])
        more = f" and {len(clipped) - 2} more" if len(clipped) > 2 else ""
        axes.plot([], [], "^", color=BLACK, markersize=5, label=f"beyond the axis: {listed}{more}")


def mark_layer(axes: Axes, index: int | None, n_layers: int, what: str) -> None:
    """A dashed line at a layer, named in the legend, or that there is none: mark_layer(axes, 2, 30, "")."""
    if index is not None:
        axes.axvline(index, color=RED, linestyle="--", linewidth=1.3, zorder=9)
    text = f"{what}: none" if index is None else f"{what}: layer {index} of {n_layers}"
    axes.plot([], [], color=RED, linestyle="--", linewidth=1.3, label=text, alpha=1.0 if index is not None else 0.0)


@styled
def runs_figure(kind: Curves, own: Mapping[str, Tensor], label: str, points: bool = False) -> Figure:
    """One line a run, over layers or, where depths differ, over relative depth: runs_figure(kind, {"small": kl}, …)."""
    lengths = {len(curve) for curve in own.values()}
    relative = len(lengths) > 1
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    handles = []
    for number, curve in enumerate(own.values()):
        style, colour = _LINES[number // len(COLOURS) % len(_LINES)], COLOURS[number % len(COLOURS)]
        places = relative_depth(len(curve), points) if relative else np.arange(len(curve))
        handles += axes.plot(places, curve.numpy(), style, color=colour, marker="o", markersize=2.5, linewidth=1.4)
    axes.set_ylabel(label)
    axes.set_xlabel("Relative depth")
    if not relative:
        layer_axis(axes.xaxis, lengths.pop(), kind.axis)
    if kind.log:
        log_yaxis(axes)
    if kind.signed:
        axes.axhline(0, color=BLACK, linewidth=0.8)
    if kind.limit is not None:
        values = np.concatenate([curve.numpy() for curve in own.values()])
        highest = float(np.max(values[np.isfinite(values)], initial=0.0))
        limit = kind.axis_end(highest)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), limit)
        if highest > limit:
            axes.set_ylabel(f"{label}\n(largest: {highest:.3g})")
    _legend(axes, handles, [printable(name) for name in own])
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
def maps_figure(maps: Mapping[str, Tensor], scale: Scale, row_label: str, column_label: str) -> Figure:
    """A map, or those of several runs side by side under their names: maps_figure({"": effect}, scale, "s", "i")."""
    columns = min(len(maps), _COLUMNS)
    n_lines = math.ceil(len(maps) / columns)
    longest = max(max(own.shape) for own in maps.values())
    size = 3.6 if longest <= 12 else 4.6 if longest <= 60 else 6.0
    several = len(maps) > 1 or "" not in maps
    figure = new_figure(*((3.1 * columns + 0.9, 3.2 * n_lines) if several else (size + 1.0, size)))
    grid = figure.subplots(n_lines, columns, squeeze=False)
    for number, (axes, (label, own)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        image = draw_map(axes, own, scale, row_label if number % columns == 0 else "", column_label)
        if several:
            axes.set_title(short(printable(label)), fontsize=9, parse_math=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    colour_bar(figure, image, list(grid.flat), scale, list(maps.values()), fraction=0.05, pad=0.03)
    return figure


def draw_map(axes: Axes, values: Tensor, scale: Scale, row_label: str, column_label: str) -> Any:
    """A heat map, row 0 at the top as in the paper; what is not finite is grey: draw_map(axes, effect, scale, …)."""
    rows, columns = values.shape
    image = axes.imshow(
        np.ma.masked_invalid(values.numpy()), vmin=scale.low, vmax=scale.high,
        cmap=colour_map("RdBu_r" if scale.signed else "viridis"),
        aspect="equal" if max(rows, columns) <= 3 * min(rows, columns) else "auto",
    )  # fmt: skip
    boxed(axes)
    layer_axis(axes.yaxis, rows, row_label)
    layer_axis(axes.xaxis, columns, column_label)
    return image
