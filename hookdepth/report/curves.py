"""Kinds of figures whose values are curves over layers: bars and lines, with means, thresholds and marked layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hookdepth.report.hover import curves
from hookdepth.report.kind import Assignment, Declaration, Drawing, Kind
from hookdepth.report.patterns import SERIES_NAMES, assignments, axes_of, fill, series
from hookdepth.report.scale import finite_of, interval_of, not_finite
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_ENDS = ("mean over prompts", "95 % from", "to")


@dataclass(frozen=True)
class Curves(Kind):
    """What bars and lines have in common: curves over layers, a value a place.

    Bars(("kl", "kl_tuned"), "How far …", label="KL divergence (nats)", labels={"kl_tuned": "tuned lens"})

    Attributes:
        axis: what the places along it are: "Layer skipped".
        labels: names of the curves, by what `*` stands for or by tensor.
        signed: zero is a line of its own, and white over training time.
        limit, grow_to: where the axis ends; higher where the largest value is at most `grow_to`, else what is
            larger is marked and written out. None for the largest value.
        mean: also the mean of the curves, which then is what runs are compared by.
        compared: which curve runs are compared by, where there are several; "layer", or the first, if it is not said.
        threshold, threshold_label: a dotted line, at a value or at what a function makes of the curve.
        mark, mark_label: curve → a layer that is marked, or None where there is none.
        ends: where the axis begins and ends, whatever the values are; None for where they do.
        grey_last: the last place is what it is by construction.
        log: a logarithmic axis.
        also: patterns of tensors that are in the table only → their names there: {"max.*": "largest {}"}.
    """

    axis: str = "Layer"
    labels: Mapping[str, str] = field(default_factory=dict)
    signed: bool = False
    limit: float | None = None
    grow_to: float | None = None
    ends: tuple[float | None, float | None] | None = None
    mean: bool = False
    compared: str = ""
    threshold: float | Callable[[Tensor], float] | None = None
    threshold_label: str = "threshold"
    mark: Callable[[Tensor], int | None] | None = None
    mark_label: str = "effective depth"
    grey_last: bool = False
    log: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    bars: ClassVar[bool] = True

    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        own = self._curves_of(result, values)
        columns = {self.label_of(name, own): curve for name, curve in own.items()}
        if self.mean:
            columns["mean"] = self._compared_curve(own)
        for pattern, words in self.also.items():
            for name, tensor in series(fill(pattern, values), result.tensors).items():
                columns[words.format(self.label_of(name, own))] = result.tensors[tensor]
        points = self._are_points(declaration, result, values)
        named = next(iter(self._named(result, values).values()))
        known = {**declaration.labels, **(result.metadata.get("labels") or {})}
        last = axes_of(declaration.tensors, named)[-1:]  # prompts are reduced
        places = [label for axis in last for label in known.get(axis, ())]
        found = {key: interval_of(result, name) for key, name in self._named(result, values).items()}
        intervals = {key: ends for key, ends in found.items() if ends is not None}
        for key, ends in intervals.items():
            label = self.label_of(key, own)
            columns |= {f"{label}, {word}": one for word, one in zip(_ENDS, ends, strict=True)}
        draw = partial(self._draw, own, values.get("part", ""), points, places, intervals)
        said = ["whiskers: 95 % interval of the mean over prompts"] if intervals else []
        return Drawing([curves(self.axis.lower(), columns)], [*self._clipped(own), *said], draw)

    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        own = {label: self._compared_curve(self._curves_of(result, values)) for label, result in results.items()}
        any_one = next(iter(results.values()))
        alike = self._curves_of(any_one, values)
        label = self.label
        if len(alike) > 1:
            label += f"\n({'mean' if self.mean else self.label_of(self._chosen(alike), alike)})"
        draw = partial(self._draw_together, own, label, self._are_points(declaration, any_one, values))
        same = len({len(curve) for curve in own.values()}) == 1  # else layers do not lie above each other
        return Drawing([curves(self.axis.lower(), own, hover=same)], self._clipped(own), draw)

    def over_time(self, history: Mapping[int, Result], declaration: Declaration) -> tuple[str, dict[int, Tensor]]:
        found = assignments(self.patterns[0], [name for result in history.values() for name in result.tensors])
        if not found or self.over_training is None:
            return self.axis, {}
        own = {step: self._curves_of(result, found[0]) for step, result in history.items()}
        steps = {step: self._compared_curve(some) for step, some in own.items() if some}
        first = next(iter(steps))
        points = self._are_points(declaration, history[first], found[0])
        missing = torch.full_like(steps[first], torch.nan)
        return "Before layer" if points else self.axis, {step: steps.get(step, missing) for step in history}

    def _limited(self, low: float | None, high: float | None) -> Curves:
        return replace(self, ends=(low, high), limit=None if high is not None else self.limit)

    def _curves_of(self, result: Result, values: Assignment) -> dict[str, Tensor]:
        return {key: self._tensor(result, name, 1) for key, name in self._named(result, values).items()}

    def _compared_curve(self, own: Mapping[str, Tensor]) -> Tensor:
        """The curve that stands for all of them: their mean, or one."""
        if self.mean:
            return torch.stack([curve.double() for curve in own.values()]).mean(0)
        return own[self._chosen(own)]

    def axis_end(self, largest: float) -> float:
        """Where an axis with a limit ends: Bars("x", "…", limit=1.5, grow_to=3.0).axis_end(2.0)   # 2.1"""
        assert self.limit is not None
        # Where even `grow_to` is not enough, what is larger is clipped rather than flattening all others.
        fits = largest <= self.limit or largest > (self.grow_to or self.limit)
        return self.limit if fits else 1.05 * largest

    def label_of(self, name: str, own: Mapping[str, Tensor]) -> str:
        """The name of a curve: Lines("norm.*", "…").label_of("mlp", own)   # 'MLP'"""
        if name in self.labels:
            return self.labels[name]
        if len(own) == 1 and self.label:
            return self.label.replace("\n", " ")
        return SERIES_NAMES.get(name, name.replace("_", " "))

    def _clipped(self, own: Mapping[str, Tensor]) -> list[str]:
        said = [not_finite(list(own.values()))]
        if self.limit is None:
            return said
        finite = torch.cat([finite_of(curve) for curve in own.values()])
        end = self.axis_end(finite.max().item()) if finite.numel() else self.limit
        count = int((finite > end).sum())
        beyond = f"{count} of {len(finite)} values beyond the axis: up to {finite.max().item():.3g}" if count else ""
        return [beyond, *said]

    def _chosen(self, own: Mapping[str, object]) -> str:
        return next((name for name in (self.compared, "layer") if name in own), next(iter(own)))

    def _named(self, result: Result, values: Assignment) -> dict[str, str]:
        patterns = [fill(pattern, values) for pattern in self.patterns]
        return {key: name for one in patterns for key, name in series(one, result.tensors).items()}

    def _are_points(self, declaration: Declaration, result: Result, values: Assignment) -> bool:
        """Whether places are between layers (what goes into layer l, L for the final residual), as the axes say."""
        named = self._named(result, values)
        return axes_of(declaration.tensors, named[self._chosen(named)]) == ["point"]

    def _draw(
        self, own: Mapping[str, Tensor], part: str, points: bool, places: Sequence[str], intervals: Mapping[str, Tensor]
    ) -> Figure:
        from hookdepth.report.drawing import layers, style

        n = max(len(curve) for curve in own.values())
        n_layers = n - points
        figure = style.new_figure(6.4 if n_layers <= 60 else 8.0, 3.0 if len(own) > 1 else 2.6)
        axes = figure.subplots()
        colours = layers.colours_of(list(own), part)
        labels = {name: self.label_of(name, own) if len(own) > 1 else "_" for name in own}
        heights = {name: curve.double().numpy() for name, curve in own.items()}
        look, offsets = style.NEW["look"] or ("paper" if self.bars else "lines"), [0.0] * len(own)
        if look != "lines":
            offsets = layers.draw_bars(axes, heights, colours, labels, look == "groups")
            if self.grey_last:
                axes.patches[-1].set_color(style.GREY)
        else:
            layers.draw_lines(axes, heights, colours, labels, self.log)
        for name, ends in intervals.items():
            colour = colours[name] if look == "lines" else style.BLACK
            layers.draw_interval(axes, ends, own[name], colour, offsets[list(own).index(name)])
        if self.limit is not None:
            layers.end_axis(axes, self.axis_end, list(heights.values()))
        if self.signed:
            axes.axhline(0, color=style.BLACK, linewidth=0.8, zorder=5)
        curve = self._compared_curve(own)
        if self.mean:
            dots: dict[str, Any] = {"linewidth": 1.2, "marker": "o", "markersize": 2.5}
            axes.plot(curve.numpy(), color=style.BLACK, zorder=8, label="mean", **dots)
        if self.threshold is not None:
            at = self.threshold(curve) if callable(self.threshold) else self.threshold
            axes.axhline(at, color=style.BLACK, linestyle=":", linewidth=1.1, zorder=8, label=self.threshold_label)
        if self.log:
            style.log_yaxis(axes)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        style.layer_axis(axes.xaxis, n, self.axis)
        style.name_places(axes.xaxis, places, 90)
        axes.set_ylim(*self.ends or ())
        axes.set_ylabel(self.label)
        if self.mark is not None:
            layers.mark_layer(axes, self.mark(curve), n_layers, self.mark_label)
        style.legend_above(axes)
        return figure

    def _draw_together(self, own: Mapping[str, Tensor], label: str, points: bool) -> Figure:
        from hookdepth.report.drawing import layers, style

        figure = style.new_figure(6.4, 3.2)
        axes = figure.subplots()
        layers.draw_runs(axes, own, label, self.axis, points)
        if self.log:
            style.log_yaxis(axes)
        if self.signed:
            axes.axhline(0, color=style.BLACK, linewidth=0.8)
        if self.limit is not None:
            highest = max(
                (finite_of(curve).max().item() for curve in own.values() if curve.isfinite().any()), default=0
            )
            limit = self.axis_end(max(0.0, highest))
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), limit)
            if highest > limit:
                axes.set_ylabel(f"{label}\n(largest: {highest:.3g})")
        return figure


@dataclass(frozen=True)
class Bars(Curves):
    """A bar a layer; of several curves, smaller bars in front of larger ones (the seed notebook's Fig. 2)."""


@dataclass(frozen=True)
class Lines(Curves):
    """A line a curve, over layers: Lines("norm.*", "The residual stream grows …", label="Mean norm", log=True)"""

    bars: ClassVar[bool] = False
