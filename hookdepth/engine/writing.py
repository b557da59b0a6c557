"""Rows that write: token after token, each with keys and values of its own.

    texts, null_effect = write(model, read, hidden, rows, 20, Choice.of(model, 0.0, None, 0, ()))

The rows of a pass that has read the prompts are laid out anew: keys and values of prompts end at the same place, so
that in every later pass the new token of every row is the last one. Left of a shorter prompt is a gap, which a mask
hides; positions are counted from each prompt's own start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.choosing import Choice, Row, Writing
from hookdepth.engine.measurement import OutputMeasurement, OutputView
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.passes import measure
from hookdepth.engine.rows import RowTable
from hookdepth.engine.texts import Generated
from hookdepth.engine.tokens import locate
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.kv_cache import GrowingCache, KeysValues
from hookdepth.model.sites import ORDER
from hookdepth.model.turns import in_this_thread


def write(
    model: Decoder, read: PassResult, hidden: Tensor, rows: Sequence[Row], new: int, choice: Choice
) -> tuple[dict[int, Generated], float]:
    """Let the measured rows of a pass write: their texts by number, and the noise floor of the logits.

    Args:
        read: the pass that read the prompts; its keys and values are used up.
        hidden: its last hidden states.
        rows: of all branches of the plan.
        new: most tokens to write.
    """
    table = read.table
    measured = table.measured_rows()
    everybody = going = [Writing(rows[number], number) for _, number in measured]
    last = _last_tokens(table, hidden, {row.row.prompt: row.position for row in everybody})
    logits = model.unembed(last[[id_ for id_, _ in measured]]).float()
    clean, control = (model.unembed(last[list(ids)]).float() for ids in (table.clean_ids, table.control_ids))
    longest = max(len(row.row.token_ids) for row in everybody)
    cache = GrowingCache(_laid_out(read, measured, everybody, longest, new), longest)
    with ExitStack() as hooks:
        edits = _Edits(model, going, hooks)
        for step in range(new):
            for row, token in zip(going, choice.next(logits, going), strict=True):
                row.add(token, choice, model)
            if step == new - 1 or all(row.done for row in going):
                break
            if 2 * sum(row.done for row in going) >= len(going):  # most are done: the others go on alone
                keep = [n for n, row in enumerate(going) if not row.done]
                cache.keep(torch.tensor(keep))
                edits.going = going = [going[n] for n in keep]
            cache.start = longest + step
            logits = model.unembed(_read_last(model, going, cache, longest)).float()
    return {row.number: row.text(choice, model) for row in everybody}, (clean - control).abs().max().item()


class _Next(OutputMeasurement):
    """The likeliest token, or by how much its logit is ahead."""

    def __init__(self, name: str) -> None:
        self.name = name

    def values(self, view: OutputView) -> Tensor:
        """The id as a float, which holds those of any vocabulary exactly; or the difference."""
        best = view.logits.float().topk(2).values
        return view.logits.argmax(-1).float() if self.name == "token" else best[..., 0] - best[..., 1]


def write_again(
    model: Decoder, rows: Mapping[int, Row], new: int, choice: Choice, max_rows: int | None
) -> dict[int, Generated]:
    """The same for rows along paths of layers, which read their whole text for each token: texts by number."""
    everybody = going = [Writing(row, number) for number, row in rows.items()]
    for _ in range(new):
        if not (going := [row for row in going if not row.done]):
            break
        prompts = [[*row.row.token_ids, *row.tokens] for row in going]
        branches = [Branch(row.row.interventions, number, measured=[-1]) for number, row in enumerate(going)]
        found = measure(model, prompts, branches, [_Next("token"), _Next("ahead")], max_rows=max_rows).output
        for row, token, ahead in zip(going, found["token"].tolist(), found["ahead"].tolist(), strict=True):
            row.note(ahead)
            row.add(int(token), choice, model)
    return {row.number: row.text(choice, model) for row in everybody}


def _last_tokens(table: RowTable, hidden: Tensor, ends: dict[int, int]) -> Tensor:
    """The last hidden state of every row's prompt, [row, width]; a row that has not joined is its clean run."""
    place = {id_: n for n, id_ in enumerate(table.final)}
    rows = [place.get(id_, place[table.clean_id(id_)]) for id_ in range(table.n_rows)]
    columns = [ends[table.pass_.prompts[slot]] - table.pass_.start for slot in table.slot]
    return hidden[rows, columns]


def _laid_out(
    read: PassResult, measured: Sequence[tuple[int, int]], rows: Sequence[Writing], longest: int, new: int
) -> dict[int, KeysValues]:
    """The keys and values of each row, ending at the same place, with room for new ones."""
    room: dict[int, KeysValues] = {}
    for layer, here in enumerate(read.table.layers):
        if layer not in read.recorded:
            raise HookdepthError(
                f"layer {layer} of this model keeps no keys and values",
                "generate with a model of attention layers alone",
            )
        place = {id_: n for n, id_ in enumerate(here.attending)}
        sources = [place.get(id_, place[read.table.clean_id(id_)]) for id_, _ in measured]
        keys, values = (_aligned(one, sources, rows, longest, new) for one in read.recorded.pop(layer))
        room[layer] = keys, values
    return room


def _aligned(states: Tensor, sources: list[int], rows: Sequence[Writing], longest: int, new: int) -> Tensor:
    laid = states.new_zeros(len(rows), states.shape[1], longest + new, states.shape[3])
    lengths = [len(row.row.token_ids) for row in rows]
    for length in set(lengths):
        mine = [n for n, own in enumerate(lengths) if own == length]
        chosen = states.index_select(0, torch.tensor([sources[n] for n in mine], device=states.device))
        laid[mine, :, longest - length : longest] = chosen[:, :, :length]
    return laid


def _read_last(model: Decoder, rows: Sequence[Writing], cache: GrowingCache, longest: int) -> Tensor:
    """One pass of one token a row: the last hidden states, [row, width]."""
    token_ids = torch.tensor([[row.tokens[-1]] for row in rows], device=model.device)
    positions = torch.tensor([[row.position] for row in rows], device=model.device)
    gaps = torch.tensor([longest - len(row.row.token_ids) for row in rows], device=model.device)
    mask = None
    if gaps.any():
        mask = (torch.arange(cache.start + 1, device=model.device) >= gaps[:, None]).long()
    return model.forward(token_ids, cache, position_ids=positions, attention_mask=mask)[:, -1]


class _Edits:
    """What rows change on the tokens that they write: hooks on the sites where any does."""

    def __init__(self, model: Decoder, going: Sequence[Writing], hooks: ExitStack) -> None:
        self.going, self.pre = going, torch.empty(0)
        places = dict.fromkeys((one.layer, one.site) for row in going for one in row.row.interventions)
        for site in ORDER:  # a layer's input is noted after what changes it
            for layer in (layer for layer, own in places if own == site):
                self._add(hooks, model, site, layer, partial(self._edit, layer, site))
            for layer in {layer for layer, _ in places} if site == "resid_pre" else ():
                self._add(hooks, model, "resid_pre", layer, self._note)

    @staticmethod
    def _add(hooks: ExitStack, model: Decoder, site: str, layer: int, body: Callable[[Tensor], Any]) -> None:
        hooks.enter_context(model.on(site, layer, in_this_thread(body)))

    def _note(self, hidden: Tensor) -> None:
        self.pre = hidden

    def _edit(self, layer: int, site: str, value: Tensor) -> Tensor:
        changed = value.clone()
        for n, row in enumerate(self.going):
            for one in row.row.interventions:
                if (one.layer, one.site) == (layer, site):
                    where = locate(one.tokens, row.row.total, row.position, row.position + 1)
                    own = changed[n] if one.head is None else changed[n][:, one.head]
                    one.apply(own, where, _Around(self.pre[n] if site != "resid_pre" else None))
        return changed


class _Around:
    """What an intervention may read beside a new token: the layer's input, and no clean run, which wrote others."""

    def __init__(self, resid_pre: Tensor | None) -> None:
        self._resid_pre = resid_pre

    def resid_pre(self) -> Tensor:
        assert self._resid_pre is not None, "asked for resid_pre before the layer's input is complete"
        return self._resid_pre

    def clean(self) -> Tensor:
        raise HookdepthError("a new token has no clean run", 'use where="prompt"')

    def contribution(self, layer: int) -> Tensor:
        raise HookdepthError("a new token has no clean run", 'use where="prompt"')
