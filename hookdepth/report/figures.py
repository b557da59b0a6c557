"""The kinds of figures that an analysis can declare, and the figures of its results.

    figures = [
        Heatmap("{part}.effect", "Row s, column i: …", label="Relative change", limits=(0, 1)),
        Bars("{part}.output", "A bar a layer: …", label="Output change norm"),
        TokenMap("effect.{i}", "Each cell …"),
    ]

Curves over layers (bars and lines) are in `curves`. No analysis is known here, and nothing draws before it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.report.curves import Bars, Lines
from hookdepth.report.hover import effect_map
from hookdepth.report.intervals import Intervals
from hookdepth.report.kind import Assignment, Declaration, Drawing, Kind, Lookup, Picture
from hookdepth.report.patterns import axes_of, fill
from hookdepth.report.scale import Scale, not_finite, reached
from hookdepth.report.token_maps import Strip, TokenMap, WordMap
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Bars",
    "Heatmap",
    "Intervals",
    "Kind",
    "Lines",
    "Strip",
    "TokenMap",
    "Triangles",
    "WordMap",
    "figures_for",
    "pictures_of",
]

Runs = Mapping[str, Mapping[str, Result]]


@dataclass(frozen=True)
class Heatmap(Kind):
    """A map of two axes, such as layer against layer, row 0 at the top as in the paper.

    Heatmap("effect", "Row s, column i: what layer i loses when s is skipped.")

    Attributes:
        rows, columns: what they are, beside the axes.
        limits: where the colours end; None for the largest value. Where many values lie beyond, colours are
            logarithmic, unless `clip` says that the limits hold.
        signed: white at zero; None where there are values below it.
        causal: a row reaches only columns of its own number on, or from so many on; the others are left blank.
        path: a line through the smallest value of each column.
        other: what rows and columns are right of the diagonal, where they are something else.
    """

    rows: str = "Layer"
    columns: str = "Layer"
    limits: tuple[float | None, float | None] | None = None
    clip: bool = False
    signed: bool | None = None
    causal: bool | tuple[int, ...] = False
    path: bool = False
    other: tuple[str, ...] = ()

    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        maps = {label: self._map(result, values) for label, result in results.items()}
        listed = list(maps.values())
        seen = [own[reached(self.causal, own.shape)] if self.causal else own for own in listed]
        scales = [Scale.of(own, self.label, self.signed, self.limits, clip=self.clip) for own in seen]
        scale = reduce(Scale.widest, scales)
        axes = axes_of(declaration.tensors, fill(self.patterns[0], values))[-2:]  # prompts are reduced
        labels = [declaration.labels.get(axis, ()) for axis in axes] if len(maps) == 1 else []
        shown = [effect_map(own, label, scale, labels, self.rows.lower(), self.causal) for label, own in maps.items()]
        return Drawing(shown, [scale.clipped(seen), not_finite(seen)], partial(self._draw, maps, scale, labels))

    def _draw(self, maps: Mapping[str, Tensor], scale: Scale, labels: Sequence[Sequence[str]]) -> Figure:
        from hookdepth.report.drawing.layers import maps_figure

        return maps_figure(maps, scale, self.rows, self.columns, self.path, self.causal, labels, self.other)

    def _limited(self, low: float | None, high: float | None) -> Heatmap:
        return replace(self, limits=(low, high), clip=True)


@dataclass(frozen=True)
class Triangles(Heatmap):
    """Two maps over spans a … b in one: of the first tensor right of the diagonal, of the second on and left of it."""

    def _map(self, result: Result, values: Assignment) -> Tensor:
        upper, lower = (self._tensor(result, fill(pattern, values), 2) for pattern in self.patterns)
        both = torch.full((len(upper), len(upper) + 1), torch.nan)
        rows, columns = torch.triu_indices(len(upper), len(upper))
        both[rows, columns + 1], both[columns, rows] = upper[rows, columns], lower[rows, columns]
        return both


def pictures_of(result: Result, declaration: Declaration, page: bool = False) -> list[tuple[Kind, list[Picture]]]:
    """The figures of a result, kind by kind, not drawn yet; `page`: with those of the interactive page.

    Raises:
        HookdepthError: a tensor has other axes than a figure of it needs, or two figures have one name.
    """
    kinds = [kind for kind in declaration.figures if page or not kind.page_only]
    found = [(kind, kind.pictures(result, declaration)) for kind in kinds]
    names: set[str] = set()
    for kind, pictures in found:
        for picture in pictures:
            if picture.name in names:
                what = f"two figures of {result.analysis} are called {picture.name!r}"
                raise HookdepthError(what, f"give the {type(kind).__name__} of {kind.tensor!r} a name= of its own")
            names.add(picture.name)
    return [(kind, pictures) for kind, pictures in found if pictures]


def figures_for(result: Result, declaration: Declaration | None) -> dict[str, Figure]:
    """All figures of a result, by name; none where nobody knows its analysis."""
    if declaration is None:
        return {}
    return {picture.name: picture.draw() for _, some in pictures_of(result, declaration) for picture in some}


def compared(runs: Runs, lookup: Lookup) -> list[tuple[Declaration, list[tuple[Kind, list[Picture]]]]]:
    """The figures that at least two runs have (one, if one is given), by analysis and kind, not drawn."""
    least = min(2, len(runs))
    declared: dict[str, Declaration] = {}
    for results in runs.values():
        for name, result in results.items():
            known = lookup(result)
            if known is not None:
                declared.setdefault(name, known)
    found = []
    for name, declaration in sorted(declared.items(), key=lambda item: (item[1].order, item[0])):
        own = {label: results[name] for label, results in runs.items() if name in results}
        kinds = [(kind, kind.compare(own, declaration, least)) for kind in declaration.figures if not kind.page_only]
        found.append((declaration, [(kind, pictures) for kind, pictures in kinds if pictures]))
    return [(declaration, kinds) for declaration, kinds in found if kinds]
