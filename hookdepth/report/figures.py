"""The kinds of figures that an analysis can declare, and the figures of its results.

    figures = [
        Heatmap("{part}.effect", "Row s, column i: …", label="Relative change", limits=(0, 1)),
        Bars("{part}.output", "A bar a layer: …", label="Output change norm"),
        TokenMap("effect.{i}", "Each cell …"),
    ]

Curves over layers (bars and lines) are in `curves`. No analysis is known here, and nothing draws before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.report.curves import Bars, Lines
from hookdepth.report.hover import curves, effect_map, token_map
from hookdepth.report.kind import Assignment, Declaration, Drawing, Kind, Lookup, Picture
from hookdepth.report.patterns import assignments, axes_of, fill, probe_of
from hookdepth.report.scale import Rows, Scale, not_finite
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Bars",
    "Heatmap",
    "Kind",
    "Lines",
    "Strip",
    "TokenMap",
    "Triangles",
    "compare_figures",
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
        causal: a row reaches only columns of its own number on; the others are left blank.
        path: a line through the smallest value of each column.
        other: what rows and columns are right of the diagonal, where they are something else.
    """

    rows: str = "Layer"
    columns: str = "Layer"
    limits: tuple[float | None, float | None] | None = None
    clip: bool = False
    signed: bool | None = None
    causal: bool = False
    path: bool = False
    other: tuple[str, ...] = ()

    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        """One map: kind.drawing(result, declaration, {"part": "layer"})."""
        return self.together({"": result}, declaration, values)

    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        """The maps of several runs beside each other, on one scale: kind.together(results, declaration, {})."""
        maps = {label: self._map(result, values) for label, result in results.items()}
        listed = list(maps.values())
        seen = [self._seen(own) for own in listed]
        scales = [Scale.of(own, self.label, self.signed, self.limits, clip=self.clip) for own in seen]
        scale = reduce(Scale.widest, scales)
        shown = [effect_map(own, label) for label, own in maps.items()]
        axes = axes_of(declaration.tensors, fill(self.patterns[0], values))
        labels = [declaration.labels.get(axis, ()) for axis in axes] if len(maps) == 1 else []
        return Drawing(shown, [scale.clipped(seen), not_finite(seen)], partial(self._draw, maps, scale, labels))

    def _seen(self, own: Tensor) -> Tensor:
        return own[torch.ones(own.shape, dtype=torch.bool).triu()] if self.causal else own

    def _draw(self, maps: Mapping[str, Tensor], scale: Scale, labels: Sequence[Sequence[str]]) -> Figure:
        from hookdepth.report.drawing.layers import maps_figure

        return maps_figure(maps, scale, self.rows, self.columns, self.path, self.causal, labels, self.other)

    def _limited(self, low: float | None, high: float | None) -> Heatmap:
        return replace(self, limits=(low, high), clip=True)


@dataclass(frozen=True)
class Triangles(Heatmap):
    """Two maps over spans a … b in one: of the first tensor right of the diagonal, of the second on it and left of it.

    Triangles(("repeat.loss", "skip.loss"), "Row a, column b + 1: …", minus="clean_loss")
    """

    def _map(self, result: Result, values: Assignment) -> Tensor:
        upper, lower = (self._tensor(result, fill(pattern, values), 2) for pattern in self.patterns)
        both = torch.full((len(upper), len(upper) + 1), torch.nan)
        rows, columns = torch.triu_indices(len(upper), len(upper))
        both[rows, columns + 1], both[columns, rows] = upper[rows, columns], lower[rows, columns]
        return both


@dataclass(frozen=True)
class Strip:
    """A value a row beside a map of tokens: how far each row may be believed.

    Strip("Relative\nerror", ("error", "converged"), relative_error, ok="converged", tolerance="ig_tolerance")

    Attributes:
        label: under its axis, which is logarithmic.
        tensors: names that stand where the map's own name stands: "error" beside "attn.attribution.0" is
            "attn.error.0". Those with a value a row are in the table.
        value: those tensors → [row]; None where it was not measured.
        ok: the name of the tensor that is 1 in good rows, 0 in rows that get a cross.
        tolerance: name of the setting where the dotted line is; `default` where a result does not have it.
        bad: said of rows with a cross.
    """

    label: str
    tensors: tuple[str, ...]
    value: Callable[[Mapping[str, Tensor]], Tensor | None]
    ok: str = ""
    tolerance: str = ""
    default: float = 0.01
    bad: str = "not\nconverged"


@dataclass(frozen=True)
class TokenMap(Kind):
    """A map of layer against token, layers upward, tokens written out, those of the answer in bold.

    TokenMap("effect.{i}", "Each cell …", label="Change of the answer")

    Attributes:
        signed: white at zero; None where there are values below it.
        limits: where the colours end; None for the largest value.
        without_first: the first token, whose value can dwarf all others, does not count for the colours.
        without_last: the last token, whose state predicts nothing that is measured, is in the table only.
        strip: a value a row beside the map.
    """

    signed: bool | None = None
    limits: tuple[float | None, float | None] | None = None
    without_first: bool = False
    without_last: bool = False
    strip: Strip | None = None

    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        """One map, with its strip where it has one: kind.drawing(result, declaration, {"i": "0"})."""
        tensor, probe = self._map(result, values), probe_of(result, values)
        shown, scale = self._shown(tensor), self._scale(tensor)
        tables = [token_map(tensor, probe, self._hidden(tensor))]
        rows: Rows | None = None
        if self.strip:
            beside = self._beside(result, values)
            per_row = {name.replace("_", " "): own for name, own in beside.items() if own.ndim == 1}
            error = self.strip.value(beside)
            if error is not None:
                tolerance = (result.metadata.get("settings") or {}).get(self.strip.tolerance) or self.strip.default
                rows = Rows(error, beside.get(self.strip.ok), tolerance, self.strip.label, self.strip.bad)
                per_row = {self.strip.label.replace("\n", " ").lower(): error, **per_row}
            if per_row:
                tables.append(curves("layer", per_row))
        said = [scale.clipped([shown]), not_finite([tensor])]
        return Drawing(tables, said, partial(self._draw, shown, probe, scale, rows))

    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        """The maps of several runs below each other on one scale: kind.together(results, declaration, {"i": "0"})."""
        maps = {label: (self._map(own, values), probe_of(own, values)) for label, own in results.items()}
        scale = reduce(Scale.widest, [self._scale(tensor) for tensor, _ in maps.values()])
        tables = [token_map(own, probe, self._hidden(own), label) for label, (own, probe) in maps.items()]
        shown = {label: (self._shown(tensor), probe) for label, (tensor, probe) in maps.items()}
        listed = [tensor for tensor, _ in shown.values()]
        said = [scale.clipped(listed), not_finite(listed)]
        return Drawing(tables, said, partial(self._draw_together, shown, scale))

    def over_time(self, history: Mapping[int, Result], declaration: Declaration) -> tuple[str, dict[int, Tensor]]:
        """Layer by layer the mean size over the tokens of the first probe: kind.over_time({0: result}, declaration)."""
        found = assignments(self.patterns[0], [name for result in history.values() for name in result.tensors])
        if not found or self.over_training is None:
            return "", {}
        name = fill(self.patterns[0], found[0])
        maps = {step: self._shown(result.tensors[name]) for step, result in history.items() if name in result.tensors}
        first = int(self.without_first and next(iter(maps.values())).shape[1] > 1)
        places = "Before layer" if axes_of(declaration.tensors, name)[:1] == ["point"] else "Layer"
        return places, {step: own[:, first:].abs().mean(1) for step, own in maps.items()}

    def _draw(self, shown: Tensor, probe: Mapping[str, Any], scale: Scale, rows: Rows | None) -> Figure:
        from hookdepth.report.drawing.tokens import token_figure

        return token_figure(shown, probe, scale, rows)

    def _draw_together(self, maps: Mapping[str, tuple[Tensor, Mapping[str, Any]]], scale: Scale) -> Figure:
        from hookdepth.report.drawing.tokens import tokens_figure

        return tokens_figure(maps, scale)

    def _scale(self, tensor: Tensor) -> Scale:
        return Scale.of(tensor, self.label, self.signed, self.limits, self.without_first, clip=True)

    def _limited(self, low: float | None, high: float | None) -> TokenMap:
        return replace(self, limits=(low, high))

    def _hidden(self, tensor: Tensor) -> int:
        return int(self.without_last and tensor.shape[1] > 1)

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[:, : tensor.shape[1] - self._hidden(tensor)]

    def _beside(self, result: Result, values: Assignment) -> dict[str, Tensor]:
        """The strip's tensors by their short names: the map's own name, its one literal word, is replaced."""
        words = self.patterns[0].split(".")
        own = next((place for place, word in enumerate(words) if "{" not in word), 0)
        found = {}
        for short in self.strip.tensors if self.strip else ():
            name = fill(".".join([*words[:own], short, *words[own + 1 :]]), values)
            if name in result.tensors:
                found[short] = result.tensors[name]
        return found


def pictures_of(result: Result, declaration: Declaration) -> list[tuple[Kind, list[Picture]]]:
    """The figures of a result, kind by kind, not drawn yet: pictures_of(result, declaration)[0][1][0].name

    Raises:
        HookdepthError: a tensor has other axes than a figure of it needs, or two figures have one name.
    """
    found = [(kind, kind.pictures(result, declaration)) for kind in declaration.figures]
    names: set[str] = set()
    for kind, pictures in found:
        for picture in pictures:
            if picture.name in names:
                raise HookdepthError(
                    f"two figures of {result.analysis} are called {picture.name!r}",
                    f"give the {type(kind).__name__} of {kind.tensor!r} a name= of its own",
                )
            names.add(picture.name)
    return [(kind, pictures) for kind, pictures in found if pictures]


def figures_for(result: Result, declaration: Declaration | None) -> dict[str, Figure]:
    """All figures of a result, by name; none where nobody knows its analysis.

    figures_for(results["logit-lens"], lookup(results["logit-lens"]))   # {"logit-lens-kl": …, …}
    """
    if declaration is None:
        return {}
    return {picture.name: picture.draw() for _, some in pictures_of(result, declaration) for picture in some}


def compared(runs: Runs, lookup: Lookup) -> list[tuple[Declaration, list[tuple[Kind, list[Picture]]]]]:
    """The figures that at least two of the runs have (one, if one is given), by analysis and kind, not drawn yet.

    compared({"small": load_folder("out"), "large": load_folder("out")}, lookup)
    """
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
        kinds = [(kind, kind.compare(own, declaration, least)) for kind in declaration.figures]
        found.append((declaration, [(kind, pictures) for kind, pictures in kinds if pictures]))
    return [(declaration, kinds) for declaration, kinds in found if kinds]


def compare_figures(runs: Runs, lookup: Lookup) -> dict[str, Figure]:
    """Several runs in one figure each: the same curves overlaid, maps side by side on one scale.

    list(compare_figures({"small": load_folder("out"), "large": load_folder("out")}, lookup))
    """
    pictures = (picture for _, kinds in compared(runs, lookup) for _, some in kinds for picture in some)
    return {picture.name: picture.draw() for picture in pictures}
