"""The numbers behind a figure: a table under it, and its cells' values on hover over it. No script is needed.

    overlays(picture.draw(), picture.values)     # what lies over the picture; draw it first

A cell is an SVG path with a title, placed by the position of the figure's axes once it has been drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookdepth.report.tables import Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CELLS = 6500  # of a map whose values are shown on hover: a page of larger ones would be too heavy for a phone


@dataclass(frozen=True)
class Values:
    """What one pair of axes shows.

    Values("layer", ["0", "1"], ["KL"], torch.tensor([[3.0], [1.0]]))

    Attributes:
        corner: what the rows are.
        rows, columns: their names.
        matrix: the values, [row, column].
        is_map: a heat map, a cell for each value; else curves or bars over the rows.
        upward: the first row of the map lies at the bottom.
        title: of the axes, where there are several alike.
        hover: whether the rows are at the same places in the figure.
        hidden: last columns that are in the table but not in the figure.
    """

    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    matrix: Tensor
    is_map: bool = False
    upward: bool = False
    hidden: int = 0
    title: str = ""
    hover: bool = True

    @property
    def table(self) -> Table:
        """The values as a table, a dash for what is not a number: values.table.rows"""
        numbers = zip(self.rows, self.matrix.tolist(), strict=True)
        rows = [(name, *(number(value, 4) for value in row)) for name, row in numbers]
        return Table((self.corner, *self.columns), rows, self.title)


@dataclass(frozen=True)
class Overlay:
    """What lies over one pair of axes: its place on the picture (CSS), an SVG view, and cells with their texts.

    Overlay("left:10.00%;top:…", "0 0 6 6", [("M0 0h1v1h-1z", "0, 0: 0.5")])
    """

    place: str
    view: str
    cells: Sequence[tuple[str, str]]


def curves(corner: str, columns: Mapping[str, Tensor], hover: bool = True) -> Values:
    """Values of curves over layers, shorter ones filled up: curves("layer", {"KL": kl})."""
    longest = max(len(value) for value in columns.values())
    matrix = torch.full((longest, len(columns)), float("nan"))
    for column, value in enumerate(columns.values()):
        matrix[: len(value), column] = value.float()
    return Values(corner, [str(row) for row in range(longest)], list(columns), matrix, hover=hover)


def effect_map(values: Tensor, corner: str = "layer") -> Values:
    """Values of a map of layer against layer: effect_map(result.tensors["layer.effect"])."""
    rows, columns = ([str(place) for place in range(size)] for size in values.shape)
    return Values(corner, rows, columns, values, is_map=True)


def token_map(values: Tensor, probe: Mapping[str, Any], hidden: int = 0) -> Values:
    """Values of a map of layer against token, whose last columns the figure may leave out: token_map(effect, probe)."""
    n_rows, n_tokens = values.shape
    tokens = [str(token) for token in probe.get("tokens") or range(n_tokens)]
    names = tokens if len(tokens) == n_tokens else [str(token) for token in range(n_tokens)]
    rows = [str(row) for row in range(n_rows)]
    return Values("layer", rows, names, values, is_map=True, upward=True, hidden=hidden)


def titled(values: Mapping[str, Values]) -> list[Values]:
    """Maps under the names of their runs: titled({"small": values})[0].title   # 'small'"""
    return [replace(own, title=label) for label, own in values.items()]


def overlays(figure: Figure, shown: Sequence[Values]) -> list[Overlay]:
    """The cells' values, to be seen on hover, over a figure that has been drawn: overlays(figure, picture.values)."""
    return list(_overlays(figure, shown))


def _overlays(figure: Figure, shown: Sequence[Values]) -> Iterator[Overlay]:
    for axes, values in zip(figure.axes, shown, strict=False):
        n_rows, n_columns = values.matrix.shape
        if not values.hover or (values.is_map and n_rows * n_columns > MOST_CELLS):
            continue
        box = axes.get_position()
        place = f"left:{box.x0:.2%};top:{1 - box.y1:.2%};width:{box.width:.2%};height:{box.height:.2%}"
        if values.is_map:
            yield Overlay(place, f"0 0 {n_columns - values.hidden} {n_rows}", list(_map_cells(values)))
        else:
            view, cells = _strips(axes, values)
            yield Overlay(place, view, cells)


def _map_cells(values: Values) -> Iterator[tuple[str, str]]:
    columns = values.columns[: len(values.columns) - values.hidden]
    for row, numbers in enumerate(values.matrix.tolist()):
        y = len(values.rows) - 1 - row if values.upward else row
        for x, (column, value) in enumerate(zip(columns, numbers, strict=False)):
            yield f"M{x} {y}h1v1h-1z", f"{values.rows[row]}, {column}: {number(value)}"


def _strips(axes: Axes, values: Values) -> tuple[str, list[tuple[str, str]]]:
    """A strip a row across the whole height, or across the whole width where the rows go upward."""
    upward = axes.get_xscale() == "log"  # the strip of errors beside a map of layers
    low, high = sorted(axes.get_ylim() if upward else axes.get_xlim())
    cells = []
    for place, (name, numbers) in enumerate(zip(values.rows, values.matrix.tolist(), strict=True)):
        said = ", ".join(f"{column} {number(value)}" for column, value in zip(values.columns, numbers, strict=True))
        start = f"{(high - place if upward else place - low) - 0.5:.5g}"
        path = f"M0 {start}h1v1h-1z" if upward else f"M{start} 0h1v1h-1z"
        cells.append((path, f"{values.corner} {name}: {said}"))
    size = f"{high - low:.5g}"
    return (f"0 0 1 {size}" if upward else f"0 0 {size} 1"), cells
