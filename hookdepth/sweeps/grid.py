"""The cells of a sweep's map, and the map as a result.

Grid.of(model, "resid_pre", None, None, None, [ids]).shape     # (5, 9)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.stored import written
from hookdepth.engine.tokens import as_tokens, positions
from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.report.figures import Bars, Heatmap, Kind
from hookdepth.results import Result

Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """The cells of a map: layers, columns of tokens, heads; an axis of which nobody asked has one place.

    Grid.of(model, "resid_pre", None, None, None, [ids]).shape     # (L, T)

    Where layers differ in how many heads they have (`having`), the map is NaN beyond a layer's own.
    """

    layers: list[int]
    tokens: Any
    heads: list[int] | None
    prompts: Sequence[Sequence[int]]
    n_columns: int
    having: Mapping[int, int]

    @classmethod
    def of(cls, model: Decoder, site: str, layers: Any, tokens: Any, heads: Any, prompts: Any) -> Grid:
        """What a user asks for, made plain."""
        chosen = _numbers("layer", range(model.n_layers) if layers is None else layers, model.n_layers)
        if isinstance(tokens, str):
            choose("choice of tokens", tokens, ["all"])
        elif tokens is not None:
            tokens = as_tokens(tokens, "a sweep")
        counts = {
            1 if tokens == "all" else len(prompt if tokens is None else positions(tokens, len(prompt)))
            for prompt in prompts
        }
        if (len(counts) > 1 and tokens is not None) or 0 in counts:
            raise HookdepthError(f"{shown(tokens)} selects {sorted(counts)} tokens of the prompts", "give positions")
        if heads is not None and site != "z":
            raise HookdepthError(f"heads of the site {site}", "heads are told apart at z")
        having = {layer: model.shape_of("z", layer)[0] if heads is not None else 0 for layer in chosen}
        if heads is not None and not all(having.values()):
            raise model.sites.missing("z", next(layer for layer in chosen if not having[layer]))
        if isinstance(heads, str):
            choose("choice of heads", heads, ["all"])
            heads = range(max(having.values()))
        own = None if heads is None else _numbers("head", heads, max(having.values()))
        return cls(chosen, tokens, own, prompts, max(counts), having)

    @property
    def full(self) -> Cell:
        """Places along all three axes."""
        return len(self.layers), self.n_columns, 1 if self.heads is None else len(self.heads)

    @property
    def axes(self) -> list[str]:
        """The axes that were asked for."""
        return ["layer", *["token"] * (self.tokens != "all"), *["head"] * (self.heads is not None)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a map."""
        return tuple(dict(zip(("layer", "token", "head"), self.full, strict=True))[axis] for axis in self.axes)

    def columns(self, length: int) -> list[list[int]]:
        """For each column the tokens of a prompt that it means; the last token of every prompt is in the last."""
        if self.tokens == "all":
            return [list(range(length))]
        if self.tokens is None:
            return [[n] if n >= 0 else [] for n in range(length - self.n_columns, length)]
        return [[n] for n in positions(self.tokens, length)]

    def cells(self, length: int) -> list[tuple[Cell, int, list[int], int | None]]:
        """Place in the map, layer, tokens and head of each cell."""
        heads = [None] if self.heads is None else self.heads
        every = product(enumerate(self.layers), enumerate(self.columns(length)), enumerate(heads))
        return [
            ((a, b, c), layer, where, head)
            for (a, layer), (b, where), (c, head) in every
            if where and (head is None or head < self.having[layer])
        ]

    def labels(self, model: Decoder) -> dict[str, list[str]]:
        """Names of the places along the axes: layers by number, tokens as they are read where all prompts agree."""
        found = {"layer": [str(layer) for layer in self.layers]}
        columns = [self.columns(len(prompt)) for prompt in self.prompts]
        words = []
        for column in range(self.n_columns):
            ids = {
                prompt[own[column][0]] if own[column] else -1 for prompt, own in zip(self.prompts, columns, strict=True)
            }
            alone = len(ids) == 1 and model.tokenizer is not None
            words.append(str(model.tokenizer.decode([ids.pop()])) if alone else str(column - self.n_columns))
        return found | {"token": words} | ({} if self.heads is None else {"head": [str(head) for head in self.heads]})


def _numbers(what: str, given: Any, count: int) -> list[int]:
    listed = given.tolist() if getattr(given, "ndim", 0) == 1 else given
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
        raise HookdepthError(f"the {what}s are {shown(given)}", f"give a list, e.g. {what}s=[3]")
    numbers = [whole_number(f"a {what}", number, 0, count - 1) for number in listed]
    if len(set(numbers)) < len(numbers):
        raise HookdepthError(f"a {what} is named twice among {shown(given)}", "name each once")
    return numbers


def as_result(
    model: Decoder,
    grid: Grid,
    name: str,
    what: str,
    maps: Mapping[str, tuple[Sequence[str], Tensor]],
    metric: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    floor: Mapping[str, Any],
) -> Result:
    """Maps as a result, means over prompts beside each prompt's own.

    Args:
        what: beside the colours.
        maps: name → axes and [prompt, *axes].
        metric: what it is on prompts as they are, [prompt].
        settings, floor: for the metadata.
    """
    tensors = {key: values.nanmean(0) for key, (_, values) in maps.items()}
    tensors |= {f"per_prompt.{key}": values for key, (_, values) in maps.items()}
    told = Map(name, what, {key: axes for key, (axes, _) in maps.items()}, list(metric), grid.labels(model))
    data = {"n_prompts": len(grid.prompts), "lengths": [len(prompt) for prompt in grid.prompts]}
    known = {"model": model.describe(), "data": data, "settings": dict(settings), "declaration": written(told)}
    return Result(name, tensors | dict(metric), known | dict(floor))


class Map(Analysis):
    """What the result of a sweep says about itself: Map("mine", "Change", {"score": ["layer"]}, [], {})"""

    heading = "A sweep"

    def __init__(
        self,
        name: str,
        what: str,
        maps: Mapping[str, Sequence[str]],
        metric: Sequence[str],
        labels: Mapping[str, Sequence[str]],
    ) -> None:
        axes = {key: " ".join(own) for key, own in maps.items()} | dict.fromkeys(metric, "prompt")
        self.name, self.tensors, self.labels = name, axes, labels  # type: ignore[misc]
        self.figures = tuple(_kind(key, what, own) for key, own in maps.items() if len(own) <= 2)  # type: ignore[misc]


def _kind(key: str, what: str, axes: Sequence[str]) -> Kind:
    rows, *columns = (axis.capitalize() for axis in axes)
    label = what if key == "score" else f"{what}, {key.replace('.all_tokens', ' at all tokens')}"
    if not columns:
        return Bars(key, "A bar a layer.", label=label, axis=rows)
    reading = f"A row a layer, a column a {axes[1]}."
    return Heatmap(key, reading, label=label, rows=rows, columns=columns[0], signed=True)
