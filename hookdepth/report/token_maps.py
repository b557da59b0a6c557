"""Kinds of figures of layer against token: maps with the tokens written out, and a value a row beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hookdepth.report.hover import curves, token_map
from hookdepth.report.kind import Assignment, Declaration, Drawing, Kind
from hookdepth.report.patterns import assignments, axes_of, fill, probe_of
from hookdepth.report.scale import Rows, Scale, not_finite
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        tensor, probe = self._map(result, values), probe_of(result, values)
        shown, scale = self._shown(tensor), self._scale(tensor)
        tables = [token_map(tensor, probe, self._hidden(tensor), scale=scale)]
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
        maps = {label: (self._map(own, values), probe_of(own, values)) for label, own in results.items()}
        scale = reduce(Scale.widest, [self._scale(tensor) for tensor, _ in maps.values()])
        tables = [token_map(own, probe, self._hidden(own), label) for label, (own, probe) in maps.items()]
        shown = {label: (self._shown(tensor), probe) for label, (tensor, probe) in maps.items()}
        listed = [tensor for tensor, _ in shown.values()]
        said = [scale.clipped(listed), not_finite(listed)]
        return Drawing(tables, said, partial(self._draw_together, shown, scale))

    def over_time(self, history: Mapping[int, Result], declaration: Declaration) -> tuple[str, dict[int, Tensor]]:
        """Layer by layer the mean size over the tokens of the first probe."""
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
        return Scale.of(tensor[:, int(self.without_first) :], self.label, self.signed, self.limits, clip=True)

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


@dataclass(frozen=True)
class WordMap(TokenMap):
    """A map of layer against token of which every cell has a list of words: for the interactive page alone.

    Its tensors are the values, numbers of words, and their shares.
    """

    page_only: ClassVar[bool] = True

    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        found = super().drawing(result, declaration, values)
        known: Mapping[str, str] = probe_of(result, values).get("words", {})
        numbers, shares = (result[fill(pattern, values)].tolist() for pattern in self.patterns[1:])
        words = [
            [[(known.get(str(int(n)), "?"), p) for n, p in zip(*cell, strict=True)] for cell in zip(*row, strict=True)]
            for row in zip(numbers, shares, strict=True)
        ]
        return replace(found, values=[replace(found.values[0], words=words)])
