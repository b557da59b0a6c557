"""Sweeps: one change at every layer, token or head, each a branch, all in the same passes.

    patch_sweep(model, [5, 6, 7], [5, 9, 7], "resid_pre", LogitDifference(5, 6))["score"]     # [layer, token]
    skip_sweep(model, ids, LogitDifference(5, 6))["score"]                                    # [layer]
    ablate_sweep(model, ids, "mlp_out", LogitDifference(5, 6), tokens=None)["score"]          # [layer, token]

What they give is a `Result`: it plots, with tokens written out, and can be saved, tabulated and exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookdepth.engine.ablation import Ablate
from hookdepth.engine.arguments import as_prompts, check_limit
from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import Identity, Patch, Skip
from hookdepth.engine.measurement import OutputMeasurement, OutputView
from hookdepth.engine.passes import measure
from hookdepth.engine.reading import capture
from hookdepth.engine.tokens import Tokens
from hookdepth.model.ambient import plainly
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder
from hookdepth.results import Result
from hookdepth.sweeps.grid import Cell, Grid, as_result
from hookdepth.sweeps.pairs import Pair, paired, per_prompt, refuse_equal

_HELD = 1 << 28  # bytes of activations that are kept to be patched in
Changes = dict[Cell, Intervention | None]
"""What is done in each cell of a map; None where it changes nothing. A cell that is missing has no value."""


@plainly
def patch_sweep(
    model: Decoder,
    clean: Any,
    corrupted: Any,
    site: str,
    metric: Any,
    layers: Sequence[int] | None = None,
    tokens: Tokens | str | None = None,
    heads: Sequence[int] | str | None = None,
    denoise: bool = True,
    *,
    align: str = "equal",
    measured: Tokens = (-1,),
    max_rows: int | None = None,
) -> Result:
    """Activation patching: how much of the metric an activation carries, for every layer, token and head.

        found = patch_sweep(model, [5, 6, 7, 8], [5, 9, 7, 8], "resid_pre", LogitDifference(10, 11))
        found["score"]               # [layer, token]
        found["clean"], found["corrupted"], found["per_prompt.score"]

    Denoising runs the corrupted prompt and puts in what the clean one has there: 0 where that changes nothing, 1 where
    it brings back all of the clean run's metric. Noising is the other way round, and 1 where all of it is lost.

    Args:
        model: from `load` or `wrap`.
        clean, corrupted: a text or token ids, or a list of them, pair by pair.
        site: resid_pre, z, attn_out, mlp_out, resid_post, ….
        metric: a measurement of the output, such as `LogitDifference`; or a list, one a pair.
        layers: default all.
        tokens: None for each by itself, positions for some, "all" for all of them at once.
        heads: of the site z: "all" or some, each by itself. None: no axis of heads, all of them at once.
        denoise: which way.
        align: "equal": prompts of a pair have as many tokens. "ends": they may differ in length; tokens that they share
            from the beginning and from the end are patched, the others are NaN.
        measured: where the metric is read; default the last token.
        max_rows: most rows of a pass.

    Raises:
        HookdepthError: prompts that do not fit together, a metric that cannot tell them apart, or what does not fit.
    """
    pairs = paired(model, clean, corrupted, denoise, align)
    metrics = per_prompt(model, metric, len(pairs))
    grid = Grid.of(model, site, layers, tokens, heads, [pair.base for pair in pairs])
    held = max(len(pair.source) for pair in pairs) * len(grid.layers) * model.d_model * model.dtype.itemsize
    size, parts = max(1, _HELD // held), []
    for begin in range(0, len(pairs), size):
        some = pairs[begin : begin + size]
        own = metrics[begin : begin + size]
        changes = [_patches(model, grid, site, pair) for pair in some]
        bases, sources = [pair.base for pair in some], [pair.source for pair in some]
        parts.append(_run(model, grid, bases, sources, [*own, *own], changes, measured, max_rows))
    found = _joined(parts)
    refuse_equal(found.base, found.other)
    shape = (-1, *[1] * (found.values.ndim - 1))
    score = (found.values - found.base.view(shape)) / (found.other - found.base).view(shape)
    both = (found.other, found.base) if denoise else (found.base, found.other)
    said = {"site": site, "denoise": denoise, "align": align}
    what = f"Share of the metric {'brought back' if denoise else 'lost'}"
    prompts = dict(zip(("clean", "corrupted"), both, strict=True))
    return as_result(model, grid, "patch-sweep", what, {"score": (grid.axes, score)}, prompts, said, found.floor)


@plainly
def skip_sweep(
    model: Decoder,
    prompts: Any,
    metric: Any,
    part: str = "layer",
    layers: Sequence[int] | None = None,
    tokens: Tokens | str | None = "all",
    *,
    measured: Tokens = (-1,),
    max_rows: int | None = None,
) -> Result:
    """What a metric loses or gains where a layer, or a part of it, is skipped: metric of the branch − of the clean run.

        skip_sweep(model, ids, LogitDifference(5, 6), "mlp")["score"]     # [layer]

    Args:
        part: layer, attn or mlp.
        tokens: where it is skipped: "all", None for each token by itself, or positions.
        prompts, metric, layers, measured, max_rows: as in `patch_sweep`.

    Raises:
        HookdepthError: what does not fit the model or the prompts.
    """

    def change(layer: int, where: list[int], head: int | None) -> Intervention:
        return Skip(layer, part, where)

    return _changed(model, prompts, metric, "skip-sweep", "layer", change, layers, tokens, None, measured, max_rows)


@plainly
def ablate_sweep(
    model: Decoder,
    prompts: Any,
    site: str,
    metric: Any,
    layers: Sequence[int] | None = None,
    tokens: Tokens | str | None = "all",
    heads: Sequence[int] | str | None = None,
    value: float | str = 0.0,
    *,
    measured: Tokens = (-1,),
    max_rows: int | None = None,
) -> Result:
    """What a metric loses or gains where a site is ablated: metric of the branch − of the clean run.

        ablate_sweep(model, ids, "attn_out", LogitDifference(5, 6))["score"]     # [layer]
        ablate_sweep(model, ids, "z", LogitDifference(5, 6), heads="all", value="mean")["score"]     # [layer, head]

    Args:
        site: resid_pre, z, attn_out, mlp_out, resid_post, ….
        value: what it is set to: a number, or "mean", over the tokens of the prompt.
        prompts, metric, layers, tokens, heads, measured, max_rows: as in `patch_sweep`.

    Raises:
        HookdepthError: what does not fit the model or the prompts.
    """

    def change(layer: int, where: list[int], head: int | None) -> Intervention:
        return Ablate(site, layer, head, value, where)

    return _changed(model, prompts, metric, "ablate-sweep", site, change, layers, tokens, heads, measured, max_rows)


def _changed(
    model: Decoder,
    prompts: Any,
    metric: Any,
    name: str,
    site: str,
    change: Any,
    layers: Any,
    tokens: Any,
    heads: Any,
    measured: Tokens,
    max_rows: int | None,
) -> Result:
    ids = as_prompts(checked(model), prompts)
    metrics = per_prompt(model, metric, len(ids))
    grid = Grid.of(model, site, layers, tokens, heads, ids)
    changes = [{cell: change(*own) for cell, *own in grid.cells(len(one))} for one in ids]
    found = _run(model, grid, ids, [], metrics, changes, measured, max_rows)
    score = found.values - found.base.view(-1, *[1] * (found.values.ndim - 1))
    maps, clean = {"score": (grid.axes, score)}, {"clean": found.base}
    return as_result(model, grid, name, "Change of the metric", maps, clean, {"site": site}, found.floor)


class _EachItsOwn(OutputMeasurement):
    """A metric for each prompt."""

    name = "metric"

    def __init__(self, metrics: Sequence[OutputMeasurement]) -> None:
        self.metrics, self.reduce, self.needs_target = metrics, metrics[0].reduce, metrics[0].needs_target

    def values(self, view: OutputView) -> Tensor:
        return self.metrics[view.prompt].values(view)


@dataclass(frozen=True)
class _Found:
    """values [prompt, *axes]; base, other: the metric of the prompts, and of those that gave values."""

    values: Tensor
    base: Tensor
    other: Tensor
    floor: Mapping[str, Any]


def _run(
    model: Decoder,
    grid: Grid,
    bases: Sequence[list[int]],
    sources: Sequence[list[int]],
    metrics: Sequence[OutputMeasurement],
    changes: Sequence[Changes],
    measured: Tokens,
    max_rows: int | None,
) -> _Found:
    """All cells of all prompts, and the prompts as they are, in the same passes."""
    prompts = [*bases, *sources]
    nothing = Identity("resid_post", model.n_layers - 1, [-1])
    branches = [Branch((nothing,), number, measured=measured) for number in range(len(prompts))]
    places = []
    for number, cells in enumerate(changes):
        wanted = {cell: one for cell, one in cells.items() if one is not None}
        places += [(number, *cell) for cell in wanted]
        branches += [Branch((one,), number, measured=measured) for one in wanted.values()]
    found = measure(model, prompts, branches, [_EachItsOwn(metrics)], max_rows=check_limit("max_rows", max_rows))
    own, rest = found.output["metric"].split([len(prompts), len(places)])
    table = torch.full((len(bases), *grid.full), torch.nan)
    for number, cells in enumerate(changes):
        for layer, column, head in (cell for cell, one in cells.items() if one is None):
            table[number, layer, column, head] = own[number]
    for place, value in zip(places, rest, strict=True):
        table[place] = value
    floor = {"null_effect": found.null_effect, "null_where": found.null_where}
    return _Found(table.view(len(bases), *grid.shape), own[: len(bases)], own[len(bases) :], floor)


def _joined(parts: Sequence[_Found]) -> _Found:
    worst = max(parts, key=lambda part: part.floor["null_effect"])
    values, base, other = (torch.cat([getattr(one, name) for one in parts]) for name in ("values", "base", "other"))
    return _Found(values, base, other, worst.floor)


def _patches(model: Decoder, grid: Grid, site: str, pair: Pair) -> Changes:
    with model.evaluating(), capture(model, site, layers=grid.layers) as acts:
        model.forward(torch.tensor([pair.source], device=model.device))
    changes: Changes = {}
    for cell, layer, where, head in grid.cells(len(pair.base)):
        known = [token for token in where if token in pair.places]
        if known and pair.is_same(max(known)):
            changes[cell] = None  # causal attention: both runs have the same activations up to there
        elif known:
            value = acts[site, layer][0][[pair.places[token] for token in known]]
            changes[cell] = Patch(site, layer, value if head is None else value[:, head], known, head)
    return changes
