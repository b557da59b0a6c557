"""Effective depth over models and difficulty, with regression lines (2512.14064).

Over layers and parameters a point is a run and a definition; over difficulty it is a level of a run whose levels are
numbers, as its summary tells them (`score_by_level`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookdepth.errors import HookdepthError
from hookdepth.report.hover import Values
from hookdepth.report.kind import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "A point is a model, by one definition of its effective depth. Were a deeper model to use its depth for longer "
    "computations, its effective depth would rise with it; a ratio that stays where it is says that it does the same "
    "in more steps. Over difficulty a point is a level of a run, and a line that rises says that harder examples use "
    "deeper layers. Lines are least squares through the points of a definition, or of a run."
)


@dataclass(frozen=True)
class Points:
    """The points of one line: Points("Cosine crossing", ["small", "large"], [30, 32], [20, 19])."""

    label: str
    runs: list[str]
    x: list[float]
    y: list[float]

    def line(self, log: bool = False) -> tuple[float, float, float] | None:
        """Slope, offset and R² of least squares, over log10 x where the axis is; None without two places of x."""
        x, y = (torch.tensor(values, dtype=torch.float64) for values in (self.x, self.y))
        x = x.log10() if log else x
        from_mean = x - x.mean()
        if len(set(x.tolist())) < 2:
            return None
        slope = ((from_mean * (y - y.mean())).sum() / from_mean.square().sum()).item()
        offset = (y.mean() - slope * x.mean()).item()
        rest, spread = (y - slope * x - offset).square().sum().item(), (y - y.mean()).square().sum().item()
        return slope, offset, 1 - rest / spread if spread else 1.0


def scatter_pictures(summaries: Mapping[str, Mapping[str, Any]], telling: Sequence[str] = ()) -> list[Picture]:
    """Effective layers over layers, their ratio over parameters, and over levels, as far as the runs say them.

    Args:
        telling: the analyses that say an effective depth: a remedy where fewer than two runs have one.
    """
    runs = [label for label, own in summaries.items() if any(_found(one) for one in own["effective_depth"].values())]
    levels = _by_level(summaries)
    if max(len(runs), len(levels)) < 2:
        raise HookdepthError(
            f"{len(runs)} of these runs say an effective depth, and a scatter takes two or more",
            f"give runs of several models with {' or '.join(telling) or 'an analysis that says one'}",
        )
    depth = _points(summaries, "n_layers", lambda one: one["index"] + 1)
    size = _points(summaries, "n_parameters", lambda one: one["ratio"])
    pictures = []
    if depth:
        title = "Effective depth over depth"
        pictures.append(_picture("effective-depth", title, "Layers", "Effective depth (layers)", depth))
    if len(levels) > 1:
        title = "Depth score over difficulty"
        pictures.append(_picture("depth-by-difficulty", title, "Level", "Depth score / layers", levels, of="levels"))
    if size:
        caption = "Share of the layers over parameters"
        pictures.append(_picture("effective-ratio", caption, "Parameters", "Effective depth / layers", size, log=True))
    return pictures


def _found(depth: Mapping[str, Any]) -> bool:
    return bool(depth["status"] == "found")


def _points(summaries: Mapping[str, Mapping[str, Any]], key: str, value: Any) -> list[Points]:
    found: dict[str, Points] = {}
    for run, summary in summaries.items():
        x = (summary["model"] or {}).get(key)
        for name, one in summary["effective_depth"].items():
            if _found(one) and isinstance(x, int) and x > 0:
                own = found.setdefault(name, Points(one.get("label", name), [], [], []))
                own.runs.append(run)
                own.x.append(float(x))
                own.y.append(float(value(one)))
    return list(found.values())


def _by_level(summaries: Mapping[str, Mapping[str, Any]]) -> list[Points]:
    """A line a run whose levels are numbers."""
    found = []
    for run, summary in summaries.items():
        for own in (summary.get("analyses") or {}).values():
            scores = {key: y for key, y in ((own.get("numbers") or {}).get("score_by_level") or {}).items() if y}
            if scores and all(level.isdecimal() for level in scores):
                found.append(Points(run, list(scores), [float(level) for level in scores], list(scores.values())))
    return found


def _picture(
    name: str, caption: str, x: str, y: str, points: list[Points], log: bool = False, of: str = "runs"
) -> Picture:
    said = []
    for own in points:
        line = own.line(log)
        per = f"{x.lower()} (log10)" if log else x.lower()
        fit = "no line" if line is None else f"slope {line[0]:.3g} over {per}, R² {line[2]:.2f}"
        said.append(f"{own.label}: {len(own.x)} {of}, {fit}")
    rows = [f"{run}, {own.label}" for own in points for run in own.runs]
    matrix = torch.tensor([pair for own in points for pair in zip(own.x, own.y, strict=True)], dtype=torch.float64)
    shown = Values("run", rows, [x, y], matrix, hover=False)
    return Picture(name, caption, "; ".join(said), [shown], partial(_draw, points, x, y, log, of))


def _draw(points: list[Points], x: str, y: str, log: bool, of: str) -> Figure:
    from hookdepth.report.drawing import style

    figure = style.new_figure(5.6, 3.4)
    axes = figure.subplots()
    for number, own in enumerate(points):
        colour = style.COLOURS[number % len(style.COLOURS)]
        axes.plot(own.x, own.y, "os^Dvp"[number % 6], color=colour, markersize=5, label=own.label)
        if line := own.line(log):
            ends = [min(own.x), max(own.x)]
            places = [torch.tensor(end).log10().item() if log else end for end in ends]
            axes.plot(ends, [line[0] * place + line[1] for place in places], "--", color=colour, linewidth=1.2)
    named: dict[float, set[str]] = {}  # levels are named by the axis
    for run, place in (pair for own in points if of == "runs" for pair in zip(own.runs, own.x, strict=True)):
        named.setdefault(place, set()).add(run)
    for place, runs in named.items():
        text = axes.annotate(
            "",
            (place, 0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            fontsize=6,
        )
        text.set(parse_math=False, text=style.printable(", ".join(sorted(runs))))
    axes.set_ylim(0, 1.08 * max(max(own.y) for own in points))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        axes.set_xscale("log")
    else:  # layers and levels are counted, and so are the layers over layers
        style.layer_axis(axes.xaxis, int(max(max(own.x) for own in points)), None)
        if of == "runs":
            style.layer_axis(axes.yaxis, int(max(max(own.y) for own in points)), None)
    style.legend_above(axes)
    return figure
