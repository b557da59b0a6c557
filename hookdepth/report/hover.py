"""The numbers behind a figure: a table under it, and its cells' values on hover over it. No script is needed.

A cell is an SVG path with a title, placed by the position of the figure's axes once it has been drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookdepth.report.scale import Scale, first_columns
from hookdepth.report.tables import Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CELLS = 6500  # of a map whose values are shown on hover: a page of larger ones would be too heavy for a phone


@dataclass(frozen=True)
class Values:
    """What one pair of axes shows: Values("layer", ["0", "1"], ["KL"], torch.tensor([[3.0], [1.0]]))."""

    corner: str  # what the rows are
    rows: Sequence[str]  # their names
    columns: Sequence[str]
    matrix: Tensor  # [row, column]
    is_map: bool = False  # a heat map, a cell for each value; else curves or bars over the rows
    upward: bool = False  # the first row of the map lies at the bottom
    hidden: int = 0  # last columns that are in the table but not in the figure
    title: str = ""  # of the axes, where there are several alike
    hover: bool = True  # whether the rows are at the same places in the figure
    scale: Scale | None = None  # the colours of a map
    first: Sequence[int] = ()  # column that each row of a map can reach
    words: Sequence[Sequence[Sequence[tuple[str, float]]]] = ()  # of each cell: what else it says, with shares

    @property
    def table(self) -> Table:
        """The values as a table, a dash for what is not a number: values.table.rows"""
        numbers = zip(self.rows, self.matrix.tolist(), strict=True)
        rows = [(name, *(number(value, 4) for value in row)) for name, row in numbers]
        return Table((self.corner, *self.columns), rows, self.title)


@dataclass(frozen=True)
class Overlay:
    """What lies over one pair of axes: its place on the picture (CSS), an SVG view, and cells with their texts."""

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


def effect_map(
    values: Tensor,
    title: str = "",
    scale: Scale | None = None,
    labels: Sequence[Sequence[str]] = (),
    corner: str = "layer",
    causal: bool | Sequence[int] = False,
) -> Values:
    """Values of a map of layer against layer, or of places with names: effect_map(result.tensors["layer.effect"])."""
    named = [*labels, (), ()][:2]
    rows, columns = (
        [f"{n} {own[n]}" if n < len(own) and own[n] != str(n) else str(n) for n in range(size)]
        for size, own in zip(values.shape, named, strict=True)
    )
    first = first_columns(causal, len(rows))
    return Values(corner, rows, columns, values, is_map=True, title=title, scale=scale, first=first)


def token_map(
    values: Tensor, probe: Mapping[str, Any], hidden: int = 0, title: str = "", scale: Scale | None = None
) -> Values:
    """Values of a map of layer against token, whose last columns the figure may leave out: token_map(effect, probe)."""
    tokens = [str(token) for token in probe.get("tokens") or ()]
    own = replace(effect_map(values, title, scale), upward=True, hidden=hidden)
    return replace(own, columns=tokens) if len(tokens) == len(own.columns) else own


def overlays(figure: Figure, shown: Sequence[Values]) -> list[Overlay]:
    """The cells' values, to be seen on hover, over a figure that has been drawn: overlays(figure, picture.values)."""
    found = []
    for axes, values in zip(figure.axes, shown, strict=False):
        if values.hover and not (values.is_map and values.matrix.numel() > MOST_CELLS):
            box = axes.get_position()
            place = f"left:{box.x0:.2%};top:{1 - box.y1:.2%};width:{box.width:.2%};height:{box.height:.2%}"
            found.append(Overlay(place, *(_map_cells(values) if values.is_map else _strips(axes, values))))
    return found


def _map_cells(values: Values) -> tuple[str, list[tuple[str, str]]]:
    n_rows, n_columns = len(values.rows), len(values.columns) - values.hidden
    cells = []
    for row, numbers in enumerate(values.matrix[:, :n_columns].tolist()):
        y = n_rows - 1 - row if values.upward else row
        for x, value in enumerate(numbers):
            cells.append((f"M{x} {y}h1v1h-1z", f"{values.rows[row]}, {values.columns[x]}: {number(value)}"))
    return f"0 0 {n_columns} {n_rows}", cells


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
