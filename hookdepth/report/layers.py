"""Figures over layers: bars and lines of a value a layer, heat maps of layer against layer.

effect_figure(result.tensors["layer.effect"], *effect_labels("skip-current")).savefig("effect.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hookdepth.report import summary
from hookdepth.report.style import (
    BLACK,
    GREY,
    PART_COLOURS,
    PART_LABELS,
    RED,
    SKY,
    bar_width,
    boxed,
    colour_map,
    layer_axis,
    legend_above,
    log_yaxis,
    new_figure,
    styled,
)

CONTRIBUTION_LIMIT = 1.5  # of the paper's Fig. 2a
GROW_TO = 3.0  # a larger value is clipped rather than letting it flatten all others


def sort_zorder(groups: Sequence[Any]) -> None:
    """At each place, put smaller bars in front of larger ones."""
    for bars in zip(*groups, strict=True):
        for z, bar in enumerate(sorted(bars, key=lambda bar: -abs(bar.get_height())), start=1):
            bar.set_zorder(z)


def draw_bars(axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """Overlapping bars, a group for each curve, the smaller in front: the notebook's Fig. 2."""
    groups = []
    for name, values in curves.items():
        heights = np.nan_to_num(np.asarray(values, dtype=float))
        groups.append(axes.bar(range(len(heights)), heights, width=1.1, color=colours[name], label=labels[name]))
    sort_zorder(groups)
    n = len(groups[0])
    axes.set_xlim(-0.55, n - 0.45)
    layer_axis(axes.xaxis, n)


def mark_layer(axes: Axes, index: int | None, n_layers: int, what: str = "effective depth") -> None:
    """A dashed line at a layer, named in the legend; where there is no such layer the legend says so."""
    if index is not None:
        axes.axvline(index, color=RED, linestyle="--", linewidth=1.3, zorder=9)
    text = f"{what}: none" if index is None else f"{what}: layer {index} of {n_layers}"
    axes.plot([], [], color=RED, linestyle="--", linewidth=1.3, label=text, alpha=1.0 if index is not None else 0.0)


@styled
def contribution_figure(stats: Mapping[str, Tensor]) -> Figure:
    """Mean relative contribution of attention, MLP and both (2505.13898, Fig. 2a).

    The axis ends at 1.5 as in the paper, higher where values up to 3 need it; what is larger still is
    clipped, marked with a triangle and written out.
    """
    curves = {part: stats[f"relative_contribution.{part}"].double().numpy() for part in PART_LABELS}
    n_layers = len(curves["layer"])
    figure = new_figure(bar_width(n_layers), 3.0)
    axes = figure.subplots()
    draw_bars(axes, curves, PART_COLOURS, PART_LABELS)
    largest = np.nan_to_num(np.max(list(curves.values()), axis=0))
    limit = contribution_limit(largest)
    axes.set_ylim(0, limit)
    axes.set_ylabel("Mean relative contribution")
    clipped = [int(layer) for layer in np.argsort(-largest, kind="stable") if largest[layer] > limit]
    if clipped:
        axes.plot(clipped, [0.97 * limit] * len(clipped), "^", color=BLACK, markersize=5, zorder=9)
        listed = ", ".join(f"layer {layer}: {largest[layer]:.3g}" for layer in clipped[:2])
        more = f" and {len(clipped) - 2} more" if len(clipped) > 2 else ""
        axes.plot([], [], "^", color=BLACK, markersize=5, label=f"beyond the axis: {listed}{more}")
    legend_above(axes)
    return figure


def contribution_limit(values: np.ndarray) -> float:
    """Where the axis of relative contributions ends: 1.5; the largest value, where that is at most 3.

    contribution_limit(np.array([0.4, 16.9]))   # 1.5: layer 1 is clipped
    """
    top = float(np.nanmax(values, initial=0.0))
    return CONTRIBUTION_LIMIT if top <= CONTRIBUTION_LIMIT or top > GROW_TO else 1.05 * top


@styled
def cosine_figure(stats: Mapping[str, Tensor]) -> Figure:
    """Cosine of each contribution with the residual stream it is added to (2505.13898, Fig. 2b), and their mean."""
    curves = {part: stats[f"cosine.{part}"].double().numpy() for part in PART_LABELS}
    mean = summary.mean_cosine(stats)
    figure = new_figure(bar_width(len(mean)), 3.0)
    axes = figure.subplots()
    draw_bars(axes, curves, PART_COLOURS, PART_LABELS)
    axes.axhline(0, color=BLACK, linewidth=0.8, zorder=5)
    axes.plot(mean.numpy(), color=BLACK, linewidth=1.2, marker="o", markersize=2.5, zorder=8, label="mean")
    axes.set_ylabel("Cosine similarity")
    mark_layer(axes, summary.last_crossing(mean), len(mean))
    legend_above(axes)
    return figure


@styled
def norms_figure(stats: Mapping[str, Tensor]) -> Figure:
    """Mean norm of the residual stream before each layer (L is the final one) and of what is added to it."""
    resid = stats["norm.resid"]
    figure = new_figure(bar_width(len(resid)), 3.0)
    axes = figure.subplots()
    lines = {"Residual stream": (resid, BLACK)}
    lines |= {PART_LABELS[part]: (stats[f"norm.{part}"], PART_COLOURS[part]) for part in PART_LABELS}
    for marker, (label, (values, colour)) in zip("sov^", lines.items(), strict=True):
        positive = np.where(values.numpy() > 0, values.numpy(), np.nan)
        every = 1 + len(resid) // 60
        axes.plot(positive, color=colour, marker=marker, markersize=3, markevery=every, linewidth=1.3, label=label)
    log_yaxis(axes)
    axes.set_ylabel("Mean norm")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    layer_axis(axes.xaxis, len(resid))
    legend_above(axes)
    return figure


@styled
def kl_figure(lens: Mapping[str, Tensor]) -> Figure:
    """KL(lens ‖ final prediction) of every layer (2505.13898, Fig. 4a), with the effective depth."""
    return _lens_figure(
        lens["kl"], "KL divergence (nats)", summary.first_below_share(lens["kl"]),
        summary.KL_SHARE * lens["kl"].max().item(), "half of the largest",
    )  # fmt: skip


@styled
def overlap_figure(lens: Mapping[str, Tensor]) -> Figure:
    """Top-5 overlap of lens and final prediction (2505.13898, Fig. 4b), with the effective depth."""
    overlap = lens["topk_overlap"]
    threshold = summary.OVERLAP_THRESHOLD
    return _lens_figure(overlap, "Top-5 overlap", summary.first_above(overlap), threshold, f"threshold {threshold}")


def _lens_figure(values: Tensor, label: str, depth: int | None, threshold: float, threshold_label: str) -> Figure:
    n_layers = len(values) - 1
    figure = new_figure(bar_width(n_layers), 2.6)
    axes = figure.subplots()
    draw_bars(axes, {"lens": values.numpy()}, {"lens": SKY}, {"lens": "_"})
    axes.patches[-1].set_color(GREY)  # the final residual itself: 0 or 1 by construction
    axes.axhline(threshold, color=BLACK, linestyle=":", linewidth=1.1, zorder=8, label=threshold_label)
    axes.set_ylabel(label)
    mark_layer(axes, depth, n_layers)
    legend_above(axes)
    return figure


@styled
def output_figure(output: Tensor, part: str) -> Figure:
    """‖softmax − softmax‖₂ when each layer is skipped (2505.13898, Fig. 3, right)."""
    figure = new_figure(bar_width(len(output)), 2.6)
    axes = figure.subplots()
    draw_bars(axes, {part: output.numpy()}, PART_COLOURS, PART_LABELS)
    axes.set_xlabel("Layer skipped")
    axes.set_ylabel("Output change norm")
    return figure


@styled
def effect_figure(effect: Tensor, row_label: str, column_label: str) -> Figure:
    """Effect of each layer (rows) on each later one (columns) (2505.13898, Fig. 3 and 5)."""
    size = 3.6 if len(effect) <= 12 else 4.6 if len(effect) <= 60 else 6.0
    figure = new_figure(size + 1.0, size)
    image = draw_effect(figure.subplots(), effect, row_label, column_label)
    effect_colour_bar(figure, image, figure.axes, [effect])
    return figure


def effect_labels(analysis: str) -> tuple[str, str]:
    """What the rows and the columns of an analysis' effect map are.

    effect_labels("skip-current")   # ("Layer skipped", "Effect @ layer")
    """
    if analysis.startswith("local-"):
        return "Layer removed from the input", "Direct effect @ layer"
    return "Layer skipped", "Effect @ layer"


def draw_effect(axes: Axes, effect: Tensor, row_label: str | None, column_label: str | None) -> Any:
    """A heat map of relative changes from 0 to 1, layer 0 at the top as in the paper; what is not finite is grey."""
    image = axes.imshow(np.ma.masked_invalid(effect.numpy()), vmin=0, vmax=1, cmap=colour_map("viridis"))
    boxed(axes)
    layer_axis(axes.yaxis, len(effect), row_label)
    layer_axis(axes.xaxis, len(effect), column_label)
    return image


def effect_colour_bar(figure: Figure, image: Any, axes: Sequence[Axes], effects: Sequence[Tensor]) -> None:
    """The colour bar of relative changes; with an arrow, and the largest value, where values exceed 1."""
    largest = max(float(np.nanmax(effect.numpy(), initial=0.0)) for effect in effects)
    clipped = largest > 1 + 1e-6
    label = f"Relative change (largest: {largest:.3g})" if clipped else "Relative change"
    figure.colorbar(image, ax=list(axes), label=label, extend="max" if clipped else "neither", fraction=0.05, pad=0.03)
