"""A kind of figure whose places are not layers: values with their intervals, such as a score for each level.

Ends that are NaN are no interval: the point stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookdepth.report.hover import Values
from hookdepth.report.kind import Assignment, Declaration, Drawing, Kind
from hookdepth.report.patterns import fill, match, series
from hookdepth.report.scale import not_finite
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Intervals(Kind):
    """Points with their intervals, a series for each thing that `*` stands for.

    Intervals("score.*", "How the score grows …", interval="score_interval.*", places="{level}.effect", axis="Level")

    Attributes:
        interval: pattern of the tensors [place, 2] that hold the ends.
        whiskers: what the intervals are, in a few words.
        places: pattern of tensors whose placeholder names the places, in their order.
        axis: what the places are.
        labels: names of the series, by what `*` stands for.
        ends: where the axis begins and ends, whatever the values are; None for where they do.
    """

    interval: str = ""
    whiskers: str = ""
    places: str = ""
    axis: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[float | None, float | None] | None = None

    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        own: dict[str, Tensor] = {}
        places: dict[str, list[str]] = {}
        for run, result in results.items():
            for key, name in series(self.patterns[0], result.tensors).items():
                label = ", ".join(filter(None, (run, self.labels.get(key, key))))
                ends = result.tensors[fill(self.interval, {"*": key})]
                own[label] = torch.cat([self._tensor(result, name, 1)[:, None], ends], dim=1).double()
                places[label] = self._places(result)
        names = list(dict.fromkeys(name for listed in places.values() for name in listed))
        table = torch.full((len(names), 3 * len(own)), torch.nan, dtype=torch.float64)
        for number, (label, points) in enumerate(own.items()):
            table[[names.index(place) for place in places[label]], 3 * number : 3 * number + 3] = points
        columns = [text for label in own for text in (label, "from", "to")]
        shown = Values(self.axis.lower(), names, columns, table, hover=False)
        said = [not_finite([points[:, 0] for points in own.values()])]
        if self.whiskers and any(points[:, 1:].isfinite().any() for points in own.values()):
            said.append(f"whiskers: {self.whiskers}")
        return Drawing([shown], said, partial(self._draw, names, list(own), table))

    def _limited(self, low: float | None, high: float | None) -> Intervals:
        return replace(self, ends=(low, high))

    def _places(self, result: Result) -> list[str]:
        found = (match(self.places, name) for name in result.tensors)
        levels = [next(iter(values.values())) for values in found if values]
        return sorted(levels, key=lambda one: (0, int(one), "") if one.isdecimal() else (1, 0, one))

    def _draw(self, names: list[str], labels: list[str], table: Tensor) -> Figure:
        from hookdepth.report.drawing import style

        figure = style.new_figure(5.2, 3.0)
        axes = figure.subplots()
        drawn = {}
        for number, label in enumerate(labels):
            middle, low, high = table[:, 3 * number : 3 * number + 3].unbind(1)
            beside = min(0.12, 0.8 / len(labels)) * (number - (len(labels) - 1) / 2)
            # An interval of maxima may lie below its own value: samples of examples miss the largest.
            ends = torch.stack([middle - low, high - middle]).clamp(min=0)
            line: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.3}
            colour = style.COLOURS[number % len(style.COLOURS)]
            drawn[label] = axes.errorbar(torch.arange(len(names)) + beside, middle, ends, color=colour, **line)
        axes.set_xticks(range(len(names)), [style.printable(name) for name in names], parse_math=False)
        axes.set_ylim(*self.ends or ())
        axes.set_xlabel(self.axis)
        axes.set_ylabel(self.label)
        style.legend_above(axes, drawn)
        return figure
