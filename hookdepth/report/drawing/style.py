"""What all figures share: style, palette, axes, and how a figure becomes bytes.

    @style()
    def my_figure(values):
        figure = new_figure(6.4, 3.0)
        figure.subplots().plot(values)
        return figure

    Path("mine.png").write_bytes(render(my_figure(values), "png")[0])

No pyplot, no window, nothing taken from or left in the user's matplotlib settings. A part has the same
colour in every figure (Okabe and Ito's palette).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.report.scale import Scale

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, BLACK = "#CC79A7", "#56B4E9", "#8C8C8C", "#222222"
PART_COLOURS = {"attn": BLUE, "mlp": ORANGE, "layer": GREEN}
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)  # of curves that are no part's
FONT = "DejaVu Sans"  # comes with matplotlib: the same everywhere
MISSING = "□"

_STYLE: Any = {
    "font.family": FONT,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
    "svg.hashsalt": "hookdepth",
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults with ours on top, whatever the user's matplotlibrc says; undone afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@style()
def render(figure: Figure, *kinds: str) -> list[bytes]:
    """The figure as each of `png`, `svg`, …, without dates, so that the same figure gives the same bytes."""
    buffers = [io.BytesIO() for _ in kinds]
    lay_out(figure)
    engine = figure.get_layout_engine()
    figure.set_layout_engine(None)  # or it would be laid out twice more for each kind, which takes longer than drawing
    try:
        for buffer, kind in zip(buffers, kinds, strict=True):
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    finally:
        figure.set_layout_engine(engine)
    return [buffer.getvalue() for buffer in buffers]


def lay_out(figure: Figure) -> None:
    """Give everything its place, in half the time that drawing without rendering takes: lay_out(figure)."""
    engine = figure.get_layout_engine()
    if engine is not None and figure.axes and not isinstance(figure, Borrowed):
        engine.execute(figure)


class _Shown(Figure):
    def _repr_png_(self) -> bytes:
        return render(self, "png")[0]


class Borrowed:
    """Axes of the user's own in place of a new figure: what is drawn goes there, and the figure stays as it is."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes

    def subplots(self, *shape: int, squeeze: bool = True, **_options: Any) -> Any:
        """The axes, where one pair is all that is wanted."""
        if math.prod(shape) > 1:
            raise HookdepthError("this figure has several pairs of axes", "leave out ax")
        return self._axes if squeeze else np.array([[self._axes]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._axes.figure, name)


LOOKS = ("paper", "lines", "groups")
NEW: dict[str, Any] = {"ax": None, "size": None, "look": None}
"""What the next figure is to be, where a user says so (`options`)."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that lays itself out: call it under `style()`."""
    if NEW["ax"] is not None:
        return cast(Figure, Borrowed(NEW["ax"]))
    figure = _Shown(figsize=NEW["size"] or (width, height), layout="constrained")
    if NEW["size"] and (engine := figure.get_layout_engine()) is not None:
        cast(Any, engine).set(w_pad=0.08)  # in a narrow figure the layout ends a little beside what it aims at
    return figure


def layer_axis(axis: Axis, n: int, label: str | None = "Layer") -> None:
    """Whole, round layer numbers, few enough to be read."""
    axis.set_major_locator(MaxNLocator(nbins=11, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if n <= 2:
        axis.set_ticks(range(n))
    if label:
        axis.set_label_text(label)


def log_yaxis(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, at 1, 2 and 5 of each decade where they are few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend_above(axes: Axes, named: Mapping[str, Any] | None = None) -> None:
    """The legend above the axes, where it hides nothing; bars first, in as few rows as the figure's width takes.

    By `named`, name → what is drawn, where a user may have given the names, whatever is in them.
    """
    handles, labels = axes.get_legend_handles_labels()
    if named is not None:
        most = int((_legend_room(axes) - _HANDLE) / _LETTER)
        texts = [printable(name) for name in named]
        handles, labels = list(named.values()), [one if len(one) <= most else f"…{one[1 - most :]}" for one in texts]
    if not labels:
        return
    order = sorted(range(len(labels)), key=lambda index: isinstance(handles[index], Line2D))
    legend = axes.legend(
        [handles[index] for index in order],
        [labels[index] if named is None else "named" for index in order],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns_of(labels, axes),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.5,
        handletextpad=0.5,
    )
    # Labels are set afterwards: given to legend() itself, one that begins with an underscore would be left out.
    for text, index in zip(legend.get_texts(), order if named is not None else (), strict=False):
        text.set(parse_math=False, text=labels[index])


def columns_of(labels: Sequence[str], axes: Axes) -> int:
    """How many columns of a legend fit beside each other: columns_of(["Attention", "MLP"], axes)"""
    widths, room = [_HANDLE + _LETTER * len(label) for label in labels], _legend_room(axes)
    for columns in range(len(labels), 1, -1):
        # As matplotlib fills them: each column has a label more than the last ones, where they do not come out even.
        if sum(own.max() for own in np.array_split(np.array(widths), columns)) <= room:
            return columns
    return 1


_HANDLE, _LETTER = 0.4, 0.058  # inches that a legend takes for a line, and for a letter of 8 points


def _legend_room(axes: Axes) -> float:
    return float(axes.figure.get_figwidth()) - 0.8  # type: ignore[union-attr]


def colour_map(signed: bool) -> Colormap:
    """White at zero, or from dark to bright; what is not finite is grey: colour_map(signed=False)."""
    return matplotlib.colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad=GREY)


def heat_map(axes: Axes, values: Tensor, scale: Scale, **options: Any) -> AxesImage:
    """A map in the colours of a scale: heat_map(axes, effect, Scale(0.0, 1.0), aspect="equal")."""
    axes.spines[["top", "right"]].set_visible(True)
    colours = colour_map(scale.signed)
    if scale.log:
        shown = np.ma.masked_invalid(values.clamp(min=scale.low).numpy())
        signed = SymLogNorm(scale.linear or 1.0, vmin=scale.low, vmax=scale.high)
        norm = signed if scale.signed else LogNorm(scale.low, scale.high)
        return axes.imshow(shown, norm=norm, cmap=colours, **options)
    shown = np.ma.masked_invalid(values.numpy())
    return axes.imshow(shown, vmin=scale.low, vmax=scale.high, cmap=colours, **options)


def colour_bar(
    figure: Figure, image: Any, axes: Sequence[Axes], scale: Scale, maps: Sequence[Tensor], **layout: Any
) -> None:
    """The colours of maps, with an arrow and the largest value where some go beyond: colour_bar(figure, image, …)."""
    beyond = torch.cat([scale.beyond(values) for values in maps])
    over, under = bool((beyond > scale.high).any()), bool((beyond < scale.low).any())
    both = "both" if (over and under) or (scale.signed and (over or under)) else ""
    label = f"{scale.label} (largest: {beyond.max().item():.3g})" if over and not scale.signed else scale.label
    label = textwrap.fill(label, max(12, int(8 * figure.get_figheight())))  # letters along three quarters of the height
    extend = both or ("max" if over else "min" if under else "neither")
    figure.colorbar(image, ax=list(axes), label=label, extend=extend, **layout)


def say_below(figure: Figure, text: str) -> None:
    """A quiet line under a figure: say_below(figure, "3 prompts. Noise floor 0")"""
    if text and not isinstance(figure, Borrowed):
        lines = textwrap.wrap(printable(text), max(30, int(17 * figure.get_figwidth())))
        said = figure.supxlabel("\n".join(lines), fontsize=6.5, color="#666666", x=0.01, ha="left")
        said.set_parse_math(False)


def name_places(axis: Axis, labels: Sequence[str], rotation: int = 0, most: int = 40) -> None:
    """Write the names of the places along an axis, as many as can be read: name_places(axes.yaxis, …)."""
    if 0 < len(labels) <= most:
        figure: Any = axis.axes.figure
        room = 0.65 * (figure.get_figheight() if axis is axis.axes.yaxis else figure.get_figwidth())
        shown = range(0, len(labels), math.ceil(len(labels) * 0.09 / room))  # a line of 6 points takes so many inches
        axis.set_ticks(shown, [printable(labels[place][:24]) for place in shown], fontsize=6, parse_math=False)
        axis.set_tick_params(rotation=rotation)


def run_title(axes: Axes, label: str, most: int = 34) -> None:
    """The name of a run over its map, the end of a long one: run_title(axes, "x/" * 40)."""
    text = printable(label)
    axes.set_title(text if len(text) <= most else f"…{text[1 - most :]}", fontsize=9, parse_math=False)


def printable(text: str) -> str:
    """A box for every character that our font cannot draw, arrows for line ends: printable("日\\n") is "□↵"."""
    text = text.replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    return "".join(char if ord(char) in _drawable() and char.isprintable() else MISSING for char in text)


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())
