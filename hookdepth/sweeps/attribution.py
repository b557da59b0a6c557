"""Attribution patching: what a sweep over all sites, layers and positions would give, to first order.

    found = attribute(model, [5, 6, 7], [5, 9, 7], LogitDifference(5, 6), sites=["attn_out", "mlp_out"])
    found["attn_out"]     # [layer, token], beside patch_sweep(model, …, "attn_out", …)["score"]

An activation a of the changed run becomes that of the other, a'. To first order the metric moves by
(a' − a) · ∂metric/∂a, and one backward pass gives the derivatives by all activations. Where the metric bends on the
way, gradients are averaged along it: `steps` runs whose embeddings lie between those of both prompts.

Sources: attribution patching (Nanda, 2023; 2310.10348), EAP-IG (2403.17806).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hookdepth.engine.measurement import OutputMeasurement, OutputView
from hookdepth.engine.passes import padded
from hookdepth.engine.reading import Activations, capture
from hookdepth.engine.tokens import Tokens, as_tokens, positions
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.metrics import masked_reduce
from hookdepth.model.ambient import plainly
from hookdepth.model.decoder import Decoder
from hookdepth.model.turns import in_this_thread
from hookdepth.results import Result
from hookdepth.sweeps.grid import Grid, as_result
from hookdepth.sweeps.pairs import Pair, paired, per_prompt, refuse_equal

_NODES = {"z": "head", "neurons": "neuron"}  # sites of which every node has a value of its own


@plainly
def attribute(
    model: Decoder,
    clean: Any,
    corrupted: Any,
    metric: Any,
    sites: Sequence[str] = ("resid_pre",),
    layers: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    denoise: bool = True,
    align: str = "equal",
    measured: Tokens = (-1,),
) -> Result:
    """What patching every activation would do to a metric, to first order: one forward and one backward pass a pair.

        found = attribute(model, [5, 6, 7, 8], [5, 9, 7, 8], LogitDifference(10, 11), sites=["attn_out", "mlp_out"])
        found["attn_out"]                             # [layer, token], as the score of patch_sweep
        found["clean"], found["corrupted"]            # the metric of both prompts

    Args:
        sites: each a tensor of the result: [layer, token]; of z also by head, of neurons by neuron, with their sums
            over tokens beside them: `z.all_tokens` [layer, head], which `plot` draws, `neurons.all_tokens`.
        steps: None for the first order where the changed run is. A number: gradients are averaged over so many runs
            whose embeddings lie on the way from one prompt to the other (EAP-IG); all are rows of one pass.
        model, clean, corrupted, metric, layers, denoise, align, measured: as in `patch_sweep`.

    Raises:
        HookdepthError: as in `patch_sweep`.
    """
    pairs = paired(model, clean, corrupted, denoise, align)
    metrics = per_prompt(model, metric, len(pairs))
    if isinstance(sites, str) or not isinstance(sites, Sequence) or not sites:
        raise HookdepthError(f"the sites are {shown(sites)}", 'give a list, e.g. ["attn_out", "mlp_out"]')
    if len(set(sites)) < len(sites):
        raise HookdepthError(f"a site is named twice among {', '.join(sites)}", "name each once")
    for own in metrics:
        if own.change:
            problem = f"{own.name!r} compares with a clean run, and an attribution has none"
            raise HookdepthError(problem, "give a metric of the logits alone, such as LogitDifference")
    where = as_tokens(measured, "where a metric is read")
    steps = None if steps is None else whole_number("steps", steps, 1)
    grid = Grid.of(model, sites[0], layers, None, None, [pair.base for pair in pairs])
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    values = []
    for pair, own in zip(pairs, metrics, strict=True):
        one = _Pass(model, pair, own, positions(where, len(pair.base)), positions(where, len(pair.source)))
        changes = one.run(sites, grid.layers, steps or 0)
        values.append(torch.stack([one.base, one.source]))
        for site, change in changes.items():
            found[site].append(_columns(grid, len(pair.base), change / (one.source - one.base)))
    base, source = torch.stack(values, dim=1)
    refuse_equal(base, source)
    maps = {site: (["layer", "token", *_nodes(site)], torch.stack(own)) for site, own in found.items()}
    for site in filter(_nodes, sites):
        each = maps[site][1]
        summed = each.nansum(2).masked_fill(each.isnan().all(2), torch.nan)  # no such head, or neuron: not 0
        maps[f"{site}.all_tokens"] = (["layer", *_nodes(site)], summed)
    both = {"clean": source, "corrupted": base} if denoise else {"clean": base, "corrupted": source}
    said = {"sites": list(sites), "denoise": denoise, "align": align, "steps": steps}
    return as_result(model, grid, "attribution", "Share of the metric, first order", maps, both, said, {})


def _nodes(site: str) -> list[str]:
    return [_NODES[site]] if site in _NODES else []


def _columns(grid: Grid, length: int, change: Tensor) -> Tensor:
    """A pair's values in the columns of the map: the last tokens of all prompts are in the last one."""
    wide = change.new_full((change.shape[0], grid.n_columns, *change.shape[2:]), torch.nan)
    wide[:, grid.n_columns - length :] = change
    return wide


def _stacked(own: Sequence[Tensor]) -> Tensor:
    """Layers, NaN beyond a layer's own heads or neurons where the others have more."""
    widest = max(one.shape[-1] for one in own)
    return torch.stack([pad(one, (0, widest - one.shape[-1]), value=torch.nan) for one in own])


class _Pass:
    """One forward and one backward pass: rows on the way, then the changed run, then the one that gives values."""

    def __init__(
        self, model: Decoder, pair: Pair, metric: OutputMeasurement, base_at: Sequence[int], source_at: Sequence[int]
    ) -> None:
        self.model, self.pair, self.metric, self.at = model, pair, metric, (list(base_at), list(source_at))
        self.known = list(pair.places), list(pair.places.values())
        lengths = len(pair.base), len(pair.source)
        if model.rotary.places and model.rotary.key(lengths[0]) != model.rotary.key(lengths[1]):
            raise HookdepthError(
                f"the rotary factors of {model.name!r} differ between {lengths[0]} and {lengths[1]} tokens",
                "give prompts of equal length",
            )

    def run(self, sites: Sequence[str], layers: Sequence[int], steps: int) -> dict[str, Tensor]:
        """Site → [layer, token, …]: what the metric would move by, NaN at tokens without a counterpart."""
        model = self.model
        rows = [self.pair.base] * (steps + 1) + [self.pair.source]
        with ExitStack() as stack:
            stack.enter_context(model.evaluating(grad=True))
            if steps:
                on_the_way = in_this_thread(lambda hidden: self._between(hidden, steps))
                stack.callback(model.on("resid_pre", 0, on_the_way).remove)
            acts = stack.enter_context(capture(model, *sites, layers=layers, grad=True))
            hidden = model.forward(padded(rows, model.device))
            metric = self._metric(hidden[:-1], 0)
            self.base, self.source = metric[-1].detach().cpu(), self._metric(hidden[-1:], 1)[0].detach().cpu()
            if not metric.requires_grad:
                raise HookdepthError(f"{self.metric.name!r} has no gradient", "give a smooth metric: LogitDifference")
            keys = [(site, layer) for site in sites for layer in layers]
            gradients = torch.autograd.grad(metric[: steps or 1].sum(), [acts[key] for key in keys])
        found = [self._change(acts, key, gradient, steps) for key, gradient in zip(keys, gradients, strict=True)]
        return {site: _stacked(found[n * len(layers) : (n + 1) * len(layers)]) for n, site in enumerate(sites)}

    def _between(self, hidden: Tensor, steps: int) -> Tensor:
        own, other = self.known
        share = (torch.arange(steps, device=hidden.device, dtype=torch.float32) + 0.5) / steps
        way = hidden[-1, other].float() - hidden[-2, own].float()
        moved = hidden[-2, own].float() + share[:, None, None] * way
        hidden = hidden.clone()
        hidden[:steps, own] = moved.to(hidden.dtype)
        return hidden

    def _metric(self, hidden: Tensor, which: int) -> Tensor:
        """The metric of each row, float32."""
        prompt, at = (self.pair.base, self.pair.source)[which], self.at[which]
        if self.metric.needs_target:
            at = [position for position in at if position + 1 < len(prompt)]
        if not at:
            needs = "a next token" if self.metric.needs_target else "a token to be read at"
            raise HookdepthError(f"{self.metric.name!r} needs {needs}", "measure at a token before the last")
        follow = [prompt[position + 1] for position in at] if self.metric.needs_target else None
        targets = None if follow is None else torch.tensor(follow, device=hidden.device)
        values = self.metric.values(OutputView(self.model.unembed(hidden[:, at]), at, targets, 0)).float()
        return masked_reduce(values, torch.ones_like(values, dtype=torch.bool), self.metric.reduce)

    def _change(self, acts: Activations, key: tuple[str, int], gradient: Tensor, steps: int) -> Tensor:
        own, other = self.known
        act = acts[key].detach()
        moved = (act[-1, other].float() - act[-2, own].float()) * gradient[: steps or 1, own].float().mean(0)
        if key[0] != "neurons":
            moved = moved.sum(-1)
        change = moved.new_full((len(self.pair.base), *moved.shape[1:]), torch.nan)
        change[own] = moved
        return change.cpu()
