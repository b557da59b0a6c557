"""Drawing maps of layer against token, with tokens written out, of one run or several; those of the answer in bold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from hookdepth.report.drawing import style
from hookdepth.report.scale import Rows, Scale

LONGEST_TOKEN = 14
_READABLE = str.maketrans({" ": "_", "Ġ": "_", "▁": "_", "Ċ": "\n"})
_BEGIN = ("<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<s>", "<bos>", "[CLS]")


def token_label(token: str) -> str:
    """A token as a tick label, special first tokens BOS, long ones cut: token_label(" Yoko")   # '_Yoko'"""
    if token in _BEGIN:
        return "BOS"
    text = style.printable(token.translate(_READABLE))
    return text if len(text) <= LONGEST_TOKEN else f"{text[: LONGEST_TOKEN - 1]}…"


def token_figure(values: Tensor, probe: Mapping[str, Any], scale: Scale, rows: Rows | None = None) -> Figure:
    """A map of layer against token, with a strip beside it where there is one: token_figure(effect, probe, scale)."""
    width, height = _size(values)
    figure = style.new_figure(width + (1.5 if rows else 0), height)
    ratios = [width - 0.6, 1.0] if rows else [1.0]
    grid = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)
    image = _draw_tokens(grid[0, 0], values, probe, scale)
    if rows:
        _draw_rows(grid[0, 1], rows)
    style.colour_bar(figure, image, list(grid[0]), scale, [values], fraction=0.04 if rows else 0.05, pad=0.02)
    return figure


def tokens_figure(maps: Mapping[str, tuple[Tensor, Mapping[str, Any]]], scale: Scale) -> Figure:
    """Maps of several runs below each other, under their names: tokens_figure({"small": (effect, probe)}, scale)."""
    shown = [values for values, _ in maps.values()]
    sizes = [_size(values) for values in shown]
    heights = [min(height, 4.5) for _, height in sizes]
    figure = style.new_figure(max(width for width, _ in sizes), sum(heights))
    grid = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)
    for axes, (label, (values, probe)) in zip(grid.flat, maps.items(), strict=True):
        image = _draw_tokens(axes, values, probe, scale)
        style.run_title(axes, label)
    style.colour_bar(figure, image, list(grid.flat), scale, shown, aspect=40, fraction=0.05, pad=0.02)
    return figure


def _draw_rows(axes: Axes, rows: Rows) -> None:
    values, layers = rows.values.numpy(), np.arange(len(rows.values))
    good = np.ones(len(values), bool) if rows.good is None else rows.good.numpy() > 0.5
    low = rows.tolerance / 100
    shown = np.clip(values, low, None)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, max(1.0, float(np.nanmax(shown, initial=0.0))) * 2)
    axes.axvline(rows.tolerance, color=style.BLACK, linestyle=":", linewidth=1)
    axes.plot(shown[good], layers[good], "o", color=style.GREY, markersize=3)
    axes.plot(shown[~good], layers[~good], "X", color=style.RED, markersize=6, markeredgewidth=0)
    axes.set_xlabel(rows.label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if not good.all():
        axes.set_title(f"✖ {rows.bad}: {int((~good).sum())}", color=style.RED, fontsize=8)


def _draw_tokens(axes: Axes, values: Tensor, probe: Mapping[str, Any], scale: Scale) -> AxesImage:
    image = style.heat_map(axes, values, scale, aspect="auto", origin="lower")
    style.layer_axis(axes.yaxis, len(values))
    n_tokens = values.shape[1]
    tokens = [token_label(token) for token in probe.get("tokens") or map(str, range(n_tokens))]
    axes.set_xticks(range(n_tokens), (tokens + [""] * n_tokens)[:n_tokens])
    answer = set(probe.get("answer_positions") or ())
    room = 72 * 0.6 * axes.figure.get_figwidth() / n_tokens  # type: ignore[union-attr]  # points for a line of text
    size = max(4.0, min(8.0 if n_tokens <= 40 else 7.0, room))
    for position, text in enumerate(axes.get_xticklabels()):
        text.set(rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        text.set(parse_math=False, fontweight="bold" if position in answer else "normal")
    return image


def _size(values: Tensor) -> tuple[float, float]:
    """Width and height in inches at which every token can be read."""
    rows, columns = values.shape
    per_token = 0.24 if columns <= 24 else 0.17
    return max(4.4, 1.6 + per_token * columns), min(max(3.2, 1.0 + 0.14 * rows), 8.0)
