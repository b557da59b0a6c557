"""The numbers behind a figure: a table under it, and its cells' values on hover over it. No script is needed.

    values = values_of(result, "logit-lens-kl")     # [Values: rows are layers]
    overlay(figure, values)                         # HTML that lies over the picture

A cell is an SVG path with a title, placed by the position of the figure's axes once it has been drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hookdepth.report.html import table
from hookdepth.report.summary import ANALYSES, PARTS, mean_cosine
from hookdepth.report.tokens import probe_of, relative_error
from hookdepth.results import Result

# The column of a report's figure that runs are compared by, where it is not the first: the mean.
_COMPARED = {"residual-stats-cosine": -1}
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


def curves(corner: str, columns: Mapping[str, Tensor]) -> Values:
    """Values of curves over layers, shorter ones filled up: curves("layer", {"KL": kl})."""
    longest = max(len(value) for value in columns.values())
    matrix = torch.full((longest, len(columns)), float("nan"))
    for column, value in enumerate(columns.values()):
        matrix[: len(value), column] = value.float()
    return Values(corner, [str(row) for row in range(longest)], list(columns), matrix)


def effect_map(effect: Tensor) -> Values:
    """Values of a map of layer against layer: effect_map(result.tensors["layer.effect"])."""
    layers = [str(layer) for layer in range(len(effect))]
    return Values("layer", layers, layers, effect, is_map=True)


def token_map(values: Tensor, probe: Mapping[str, Any]) -> Values:
    """Values of a map of layer against token, whose last column the figure leaves out."""
    n_rows, n_tokens = values.shape
    tokens = [str(token) for token in probe.get("tokens") or range(n_tokens)]
    names = tokens if len(tokens) == n_tokens else [str(token) for token in range(n_tokens)]
    rows = [str(row) for row in range(n_rows)]
    return Values("layer", rows, names, values, is_map=True, upward=True, hidden=int(n_tokens > 1))


def values_of(result: Result, figure: str) -> list[Values]:
    """What each pair of axes of a figure shows, in order: values_of(result, "logit-lens-kl")."""
    tensors, words = result.tensors, figure.removeprefix(f"{result.analysis}-").split("-")
    if result.analysis == "residual-stats":
        stem = {"contribution": "relative_contribution", "cosine": "cosine", "norms": "norm"}[words[0]]
        found = {"residual stream": tensors["norm.resid"]} if words[0] == "norms" else {}
        found |= {part: tensors[f"{stem}.{part}"] for part in PARTS}
        largest = {f"largest {part}": tensors.get(f"{stem}_max.{part}") for part in PARTS}
        found |= {name: value for name, value in largest.items() if value is not None}
        return [curves("layer", found | ({"mean": mean_cosine(tensors)} if words[0] == "cosine" else {}))]
    if result.analysis == "logit-lens":
        name = {"kl": "kl", "overlap": "topk_overlap"}[words[0]]
        return [curves("layer", {name: tensors[name]})]
    if result.analysis == "residual-erasure":
        return [token_map(tensors[f"effect.{words[0]}"], probe_of(result, int(words[0])))]
    if result.analysis == "integrated-gradients":
        return _gradients(result, *words)
    part, kind = words
    values = tensors[f"{part}.{kind}"]
    return [effect_map(values) if kind == "effect" else curves("layer skipped", {"output change": values})]


def _gradients(result: Result, part: str, number: str) -> list[Values]:
    prefix = "" if part == "layer" else f"{part}."
    names = ("completeness_error", "evaluations", "f_input", "f_baseline", "converged")
    own = {name: result.tensors.get(f"{prefix}{name}.{number}") for name in names}
    known = {name: value for name, value in own.items() if value is not None}
    shown = token_map(result.tensors[f"{prefix}attribution.{number}"], probe_of(result, int(number)))
    error = relative_error(known)
    per_layer = {name: value for name, value in known.items() if value.ndim == 1}
    if error is not None:
        per_layer = {"relative error": torch.as_tensor(error), **per_layer}
    return [shown, *([curves("layer", per_layer)] if per_layer else [])]


def compared(runs: Mapping[str, Mapping[str, Result]], figure: str) -> list[Values]:
    """What each pair of axes of a figure of `compare_figures` shows: compared(runs, "logit-lens-kl").

    Maps are one for each run; curves are one table, a column a run.
    """
    analysis = next(name for name in ANALYSES if figure.startswith(name))
    results = {label: own[analysis] for label, own in runs.items() if analysis in own}
    number = figure.rpartition("-")[2]
    prompts = [probe_of(result, int(number)).get("prompt") for result in results.values()] if number.isdigit() else []
    own: dict[str, Values] = {}
    for place, (label, result) in enumerate(results.items()):
        # A run without this part or probe, or whose probe is another, is not in the figure either.
        with suppress(KeyError):
            if not prompts or prompts[place] == prompts[0]:
                own[label] = values_of(result, figure)[0]
    first = next(iter(own.values()))
    if first.is_map:
        return [replace(values, title=label) for label, values in own.items()]
    chosen = {label: values.matrix[:, _COMPARED.get(figure, 0)] for label, values in own.items()}
    together = curves(first.corner, chosen)
    if len({len(values) for values in chosen.values()}) > 1:
        return [replace(together, hover=False)]  # layers of different depths do not lie above each other
    return [together]


def tables(shown: Sequence[Values]) -> str:
    """The values as tables, one for each pair of axes."""
    return "".join(
        (f"<h4>{escape(values.title)}</h4>" if values.title else "")
        + table((values.corner, *values.columns), zip_rows(values.rows, values.matrix.tolist()))
        for values in shown
    )


def zip_rows(names: Sequence[str], rows: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
    """Rows of a table, a dash for what is not a number or where a curve has ended."""
    return [(name, *(number(value, 4) for value in row)) for name, row in zip(names, rows, strict=True)]


def number(value: Any, digits: int = 3) -> str:
    """A value in few characters, a dash where there is none: number(0.123456)   # '0.123'"""
    if value is None or value != value:
        return "—"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def overlay(figure: Figure, shown: Sequence[Values]) -> str:
    """The cells' values, to be seen on hover, over a figure that has been drawn."""
    return "".join(_layer(axes, values) for axes, values in zip(figure.axes, shown, strict=False))


def _layer(axes: Axes, values: Values) -> str:
    n_rows, n_columns = values.matrix.shape
    if not values.hover or (values.is_map and n_rows * n_columns > MOST_CELLS):
        return ""
    box = axes.get_position()
    place = f"left:{box.x0:.2%};top:{1 - box.y1:.2%};width:{box.width:.2%};height:{box.height:.2%}"
    if values.is_map:
        view, cells = f"0 0 {n_columns - values.hidden} {n_rows}", _map_cells(values)
    else:
        view, cells = _strips(axes, values)
    return f'<svg class="over" style="{place}" viewBox="{view}" preserveAspectRatio="none">{cells}</svg>'


def _map_cells(values: Values) -> str:
    columns = values.columns[: len(values.columns) - values.hidden]
    cells = []
    for row, numbers in enumerate(values.matrix.tolist()):
        y = len(values.rows) - 1 - row if values.upward else row
        for x, (column, value) in enumerate(zip(columns, numbers, strict=False)):
            cells.append(_cell(f"M{x} {y}h1v1h-1z", f"{values.rows[row]}, {column}: {number(value)}"))
    return "".join(cells)


def _strips(axes: Axes, values: Values) -> tuple[str, str]:
    """A strip a row across the whole height, or across the whole width where the rows go upward."""
    upward = axes.get_xscale() == "log"  # the strip of errors beside a map of layers
    low, high = sorted(axes.get_ylim() if upward else axes.get_xlim())
    cells = []
    for place, (name, numbers) in enumerate(zip(values.rows, values.matrix.tolist(), strict=True)):
        said = ", ".join(f"{column} {number(value)}" for column, value in zip(values.columns, numbers, strict=True))
        start = f"{(high - place if upward else place - low) - 0.5:.5g}"
        path = f"M0 {start}h1v1h-1z" if upward else f"M{start} 0h1v1h-1z"
        cells.append(_cell(path, f"{values.corner} {name}: {said}"))
    size = f"{high - low:.5g}"
    return (f"0 0 1 {size}" if upward else f"0 0 {size} 1"), "".join(cells)


def _cell(path: str, text: str) -> str:
    return f'<path d="{path}"><title>{escape(text)}</title></path>'
