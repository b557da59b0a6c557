"""One pass: the decoder's own forward call, whose batch the hooks grow and shrink.

    result = run_pass(model, padded_ids, table, branches, measurements, lengths)
    result.layer["effect"]     # [rows of the pass, L]

Within a pass every row meets the same kernels, so differences between rows are effects of what the
branches change and not of the batch they ran in. Hooks only slice, append and reduce; nothing of size
[rows, token, width] outlives its layer, except the keys and values that a suffix pass asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.changing import Readable, changed
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import is_patch, patched_rows
from hookdepth.engine.measured import checked, measured_tokens
from hookdepth.engine.measurement import LayerMeasurement, LayerView, Measurement, OutputMeasurement
from hookdepth.engine.output import measure_output
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.rows import RowTable
from hookdepth.engine.tokens import Where, locate
from hookdepth.engine.travel import Travel
from hookdepth.model.contributions import INNER_SITE
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.model.hooks import middle_change, rescaled
from hookdepth.model.kv_cache import PrefixCache
from hookdepth.model.sites import ORDER
from hookdepth.model.turns import in_this_thread
from hookdepth.model.unembedding import most_logits


def run_pass(
    model: Decoder,
    token_ids: Int[Tensor, "prompt token"],
    table: RowTable,
    branches: Sequence[Branch],
    measurements: Sequence[Measurement],
    lengths: Sequence[int],
    *,
    parent: PassResult | None = None,
    travel: Travel | None = None,
    logit_elements: int | None = None,
    on_hidden: Callable[[Tensor], object] | None = None,
) -> PassResult:
    """Run one pass and measure it.

        run_pass(model, ids, RowTable(pass, …), branches, [LayerEffect()], lengths)

    Args:
        token_ids: the pass's prompts, whole, padded on the right.
        table: its rows.
        branches: all of the plan.
        measurements: what to measure on branches that the pass measures.
        lengths: tokens of the pass's prompts.
        parent: the pass whose keys and values lie left of this one.
        travel: of branches with a path, the states that they left in earlier sweeps.
        logit_elements: most logits held at once; default `most_logits`.
        on_hidden: gets the last hidden states, of the rows of `table.final`; keys and values are then recorded.
    """
    pass_ = table.pass_
    record = table.lent() if on_hidden is None else slice(None)
    cache = PrefixCache(pass_.start, parent.prefix(table) if parent else None, record)
    none = cache if model.prefixes else None  # a mixer's state is in no cache of ours
    layered = [m for m in measurements if isinstance(m, LayerMeasurement) and table.observed_rows()]
    outputs = [m for m in measurements if isinstance(m, OutputMeasurement) and pass_.measured]
    most = logit_elements or most_logits(model.device)
    forward = _Pass(model, table, branches, lengths, layered, travel or Travel())
    forward.through_lens = {layer for measurement in outputs for layer in measurement.lenses}
    with ExitStack() as hooks:
        forward.register(hooks)
        forward.leave_out_unread(hooks)
        # The longest prompt has the pass's whole width; the planner puts only prompts of equal factors together.
        hidden = model.forward(token_ids[:, pass_.start : pass_.stop], none, token_ids.shape[1])
    if on_hidden is not None:
        on_hidden(hidden)
    output = measure_output(model, hidden, token_ids, table, branches, lengths, outputs, most, forward.lenses)
    return PassResult.of_both(table, forward.layer_results(), output, cache.recorded)


class _Pass:
    """The hooks of one forward call and what they remember between two of them."""

    def __init__(
        self,
        model: Decoder,
        table: RowTable,
        branches: Sequence[Branch],
        lengths: Sequence[int],
        measurements: Sequence[LayerMeasurement],
        travel: Travel,
    ) -> None:
        self.model, self.table, self.lengths, self.measurements = model, table, lengths, measurements
        self.travel = travel
        self.measured = measured_tokens(table, table.observed_rows(), branches, lengths)
        self.measured_here = self.measured.to(model.device)
        self.values: dict[str, list[Tensor]] = {m.name: [] for m in measurements}
        self.pre = torch.empty(0)
        self.beside: Tensor | None = None  # what a mixer beside attention adds
        self.contributions: dict[int, Tensor] = {}
        self.through_lens: set[int] = set()
        self.lenses: dict[int, Tensor] = {}
        self.sources = {
            source for edits in table.edits.values() for own in edits.values() for i in own for source in i.sources()
        }

    def register(self, hooks: ExitStack) -> None:
        """Hook the layers where something happens; the stack takes the hooks off again."""
        for layer in range(self.model.n_layers):
            hooks.enter_context(self.model.on("resid_pre", layer, self._body(self.resid_pre, layer)))
            for part in self.model.sites.found.contributions[layer]:
                self._register_inside(hooks, layer, part)
            hooks.enter_context(self.model.on("resid_post", layer, self._body(self.resid_post, layer)))

    def _body(self, body: Callable[..., Tensor | None], *given: Any) -> Callable[..., Tensor | None]:
        return in_this_thread(partial(body, *given))

    def _register_inside(self, hooks: ExitStack, layer: int, part: str) -> None:
        sites, rows, output = self.model.sites, self.table.layers[layer], f"{part}_out"
        inner = INNER_SITE[part] if INNER_SITE.get(part) in sites.of(layer) else output
        narrowed = rows.before(inner) < len(rows.inside)
        changed = [site for site in (inner, output) if (layer, site) in self.table.edits]
        if narrowed:
            hooks.enter_context(sites.on_reads(part, layer, self._body(lambda value: value[: rows.before(inner)])))
        if inner != output and inner in changed:
            hooks.enter_context(sites.on(inner, layer, self._body(self.inner, layer, inner)))
        if narrowed or output in changed or (part == "attn" and (layer, "resid_mid") in self.table.edits):
            hooks.enter_context(sites.on(output, layer, self._body(self.output, layer, part), raw=True))

    def leave_out_unread(self, hooks: ExitStack) -> None:
        """The last layer's MLP runs only at tokens that are unembedded: nothing else reads it. In erasure and
        integrated gradients, where few are, this saves some 5 % of all products."""
        last = self.table.n_layers - 1
        edits = [self.table.edits.get((last, site), {}) for site in ("mlp_out", "resid_post")]
        tokenwise = all(i.tokenwise for site in edits for own in site.values() for i in own)
        read = self.measured.mask.any(0)
        held = self.travel.holds_at(last) or (last, "neurons") in self.table.edits
        if self.measurements or not tokenwise or read.all() or held:
            return
        tokens = read.nonzero().flatten() if read.any() else torch.zeros(1, dtype=torch.long)
        hooks.enter_context(self.model.mlp_only_at(last, send(tokens, self.model.layer_device(last))))

    def resid_pre(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A layer's input: branches born here or inside the layer join."""
        rows = self.table.layers[layer]
        self.travel.before(layer, hidden)
        edited = self._edit_rows(layer, "resid_pre", hidden)
        born = self._born(layer, "resid_pre", hidden, rows.born["resid_pre"])
        inside = rows.inside[hidden.shape[0] + len(rows.born["resid_pre"]) :]
        self.pre = _append(edited, born + [self._clean(layer, hidden, id_)[None] for id_ in inside])
        self.beside = None
        if layer in self.through_lens:  # the one thing of a row and token that outlives its layer
            place = {id_: n for n, id_ in enumerate(rows.inside)}
            here = [place.get(id_, rows.clean_place(self.table.slot[id_])) for id_ in self.table.final]
            self.lenses[layer] = self.pre.index_select(0, send(here, self.pre.device))
        return None if self.pre is hidden else self.pre

    def inner(self, layer: int, site: str, value: Tensor) -> Tensor:
        """What a projection reads: branches born here join, and run through the projection."""
        born = self._born(layer, site, value, self.table.layers[layer].born[site])
        return _append(self._edit_rows(layer, site, value), born)

    def output(self, layer: int, part: str, value: Tensor) -> Tensor | None:
        """What a contribution adds, before the family's factor, for every row of the layer."""
        rows, site = self.table.layers[layer], f"{part}_out"
        scale = self.model.sites.found.contributions[layer][part].scale
        born = self._born(layer, site, value, rows.born[site], scale)
        later = [self._clean(layer, value, id_)[None] for id_ in rows.inside[value.shape[0] + len(rows.born[site]) :]]
        out = _append(self._edit_rows(layer, site, value, scale), born + later)
        if part == "mixer":
            self.beside = out * scale
        if part == "attn" and (layer, "resid_mid") in self.table.edits:
            out = self._middle(layer, out, scale)
        return None if out is value else out

    def _middle(self, layer: int, attn: Tensor, scale: float) -> Tensor:
        """resid_mid is changed by what attention adds to it."""
        before = self.pre if self.beside is None else self.pre + self.beside
        mid, changed = before + attn * scale, attn.clone()
        edited = self._edit_rows(layer, "resid_mid", mid)
        for id_ in self.table.edits[layer, "resid_mid"]:
            n = self.table.layers[layer].inside.index(id_)
            new = middle_change(before[n], attn[n] * scale, mid[n], edited[n])
            changed[n] = rescaled(partial(_instead, new), attn[n], scale)
        return changed

    def resid_post(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A layer's output: the last to be born join, all are measured, and those whose time is up leave."""
        rows = self.table.layers[layer]
        late = rows.born["resid_post"]
        if layer in self.sources:
            self.contributions[layer] = hidden[rows.clean].float() - self.pre[rows.clean].float()
        edited = self._edit_rows(layer, "resid_post", hidden)
        states = self.travel.after(layer, edited)
        born = self._born(layer, "resid_post", hidden, late)
        after = _append(edited, born)
        if self.measurements:
            before = _append(self.pre, [self._clean(layer, self.pre, id_)[None] for id_ in late])
            view = LayerView(layer, before, after, rows.slots, rows.clean, self.model.fused_now)
            for measurement in self.measurements:
                values = checked(measurement, view, (after.shape[0], after.shape[1]))
                self.values[measurement.name].append(self.measured_here.reduce(measurement, values, rows.places))
        if states is not edited:
            after = _append(states, born)
        self.pre = torch.empty(0)
        if rows.keep is not None:
            after = after.index_select(0, rows.keep)
        return None if after is hidden else after

    def _born(self, layer: int, site: str, values: Tensor, ids: list[int], scale: float = 1.0) -> list[Tensor]:
        """New rows, [row, token, …] each: their clean runs', or states of their paths, with what branches change."""
        edits, at_once = self.table.edits.get((layer, site), {}), scale == 1.0 and not self.travel.on_paths
        found: list[Tensor] = []
        for patched, own in groupby(ids, lambda id_: at_once and is_patch(edits.get(id_))):
            group = list(own)
            if patched and len(group) > 1:
                found.append(self._patched(layer, values, group, [edits[id_][0] for id_ in group]))
            else:
                found += [self._one_born(layer, site, values, id_, edits.get(id_), scale)[None] for id_ in group]
        return found

    def _one_born(
        self, layer: int, site: str, values: Tensor, id_: int, own: list[Intervention] | None, scale: float
    ) -> Tensor:
        clean = row = self._clean(layer, values, id_)
        if site in ("resid_pre", "resid_post"):
            row = self.travel.arrival(layer, ORDER.index(site), id_, clean)
        pre = self._clean(layer, self.pre, id_) if site != "resid_pre" else None
        return row if own is None else self._change(row, own, id_, pre, clean, scale)

    def _patched(self, layer: int, values: Tensor, ids: list[int], patches: list[Intervention]) -> Tensor:
        """New rows that are patched and nothing else: a few operations for all, where there may be hundreds of them."""
        wheres = [self._where(patch, id_) for patch, id_ in zip(patches, ids, strict=True)]
        rows = [self.table.layers[layer].clean_place(self.table.slot[id_]) for id_ in ids]
        return patched_rows(values.detach(), rows, patches, wheres)

    def _clean(self, layer: int, values: Tensor, id_: int) -> Tensor:
        """What the layer's values are on a row's clean run: of a branch no gradient flows there, nor is any wanted."""
        return values[self.table.layers[layer].clean_place(self.table.slot[id_])].detach()

    def _where(self, one: Intervention, id_: int) -> Where:
        pass_, until = self.table.pass_, self.table.edited_until[id_]
        return locate(one.tokens, self.lengths[self.table.slot[id_]], pass_.start, until or pass_.stop)

    def _edit_rows(self, layer: int, site: str, values: Tensor, scale: float = 1.0) -> Tensor:
        """Apply what branches change here that have joined before: the first of the layer's rows."""
        edits = self.table.edits.get((layer, site))
        if edits is None:
            return values
        place = {id_: n for n, id_ in enumerate(self.table.layers[layer].inside[: values.shape[0]])}
        changed = values
        for id_, own in edits.items():
            if id_ in place:
                changed = values.clone() if changed is values else changed
                n = place[id_]
                pre = None if site == "resid_pre" else self.pre[n]
                changed[n] = self._change(values[n], own, id_, pre, self._clean(layer, values, id_), scale)
        return changed

    def _change(
        self, raw: Tensor, own: list[Intervention], id_: int, pre: Tensor | None, clean: Tensor, scale: float
    ) -> Tensor:
        pass_, slot = self.table.pass_, self.table.slot[id_]
        tokens = min(self.lengths[slot], pass_.stop) - pass_.start  # of the prompt: an intervention sees no padding
        readable = Readable(pre, clean if scale == 1.0 else clean * scale, self.contributions, slot, tokens)
        return changed(raw, [(one, self._where(one, id_)) for one in own], readable, scale)

    def layer_results(self) -> dict[str, Tensor]:
        """Measurement → [2, row, L] or [2, row, L, token], the rows' and their clean runs', on the first device."""
        device = self.model.device
        return self.travel.merged(
            {name: torch.stack([v.to(device) for v in values], dim=2) for name, values in self.values.items()}
        )


def _instead(new: Tensor, _old: Tensor) -> Tensor:
    return new


def _append(rows: Tensor, born: list[Tensor]) -> Tensor:
    return torch.cat([rows, *born]) if born else rows
