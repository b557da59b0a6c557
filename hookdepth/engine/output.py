"""Unembedding: the last hidden states of a pass become logits, and these become one number a row.

    output = measure_output(model, hidden, token_ids, table, branches, lengths, [OutputEffect()], most_logits(device))
    own, clean = output["output"]     # [row] each

Logits are the largest thing that a pass makes: rows × tokens × vocabulary. So they are made a prompt at a time, only
at tokens at which the prompt is measured, and no more of them at once than `logit_elements`.

Four kinds of index meet here. A *row id* is the row's everywhere in the pass; a *place* is where it stands in the batch
that came out of the last layer, and then among the rows of one prompt, whose clean run comes first; a *column* is a
token of the pass, counted from its start; a *position* is a token of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.measured import MeasuredTokens, checked, measured_tokens
from hookdepth.engine.measurement import OutputMeasurement, OutputView
from hookdepth.engine.rows import RowTable
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send


def measure_output(
    model: Decoder,
    hidden: Float[Tensor, "here token width"],
    token_ids: Int[Tensor, "prompt token"],
    table: RowTable,
    branches: Sequence[Branch],
    lengths: Sequence[int],
    measurements: Sequence[OutputMeasurement],
    logit_elements: int,
    lenses: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Measurement → the rows' values and their clean runs'; arguments as in `forward.run_pass`.

    [2, row, token of the pass] where tokens are not reduced.

    Args:
        hidden: what the decoder's call gave, after the final norm: the rows of `table.final`.
        logit_elements: most logits held at once.
        lenses: layer → its input, of the rows of `hidden`, where a measurement asks for it.
    """
    if not measurements:
        return {}
    # Where a measurement compares with the token that follows, the prompt's last token has nothing to compare with.
    tokens_of = {
        needs_target: measured_tokens(table, table.measured_rows(), branches, lengths, needs_target)
        for needs_target in {m.needs_target for m in measurements}
    }
    found: dict[str, list[tuple[list[int], Tensor]]] = {m.name: [] for m in measurements}
    for slot in range(len(table.pass_.prompts)):
        rows = _rows_of(table, slot, hidden, lenses or {})
        for measurement, values in _prompt(model, rows, token_ids[slot], measurements, tokens_of, logit_elements):
            found[measurement.name].append((rows.ids, values))
    return {name: _by_id(parts, table.n_rows) for name, parts in found.items()}


def _by_id(parts: list[tuple[list[int], Tensor]], n_rows: int) -> Tensor:
    """Values of some rows and of the others, put in the order of row ids."""
    order = [0] * n_rows
    for n, id_ in enumerate(id_ for ids, _ in parts for id_ in ids):
        order[id_] = n
    values = torch.cat([values for _, values in parts], dim=1)
    return values.index_select(1, send(order, values.device))


@dataclass
class _PromptRows:
    """The rows of one prompt.

    Attributes:
        slot, prompt, start: which of the pass's prompts it is, which of all, and the pass's first token.
        ids: of all its rows; places: [2, row], where in `hidden` each is, and where its clean run is. A branch that did
            not live to the end is its clean run.
        hidden: of those that lived, the clean run first; lenses: layer → its input, of the same.
    """

    slot: int
    prompt: int
    start: int
    ids: list[int]
    places: Int[Tensor, "2 row"]
    hidden: Float[Tensor, "here token width"]
    lenses: Mapping[int, Tensor]


def _rows_of(table: RowTable, slot: int, hidden: Tensor, lenses: Mapping[int, Tensor]) -> _PromptRows:
    clean = table.clean_ids[slot]
    batch = {id_: place for place, id_ in enumerate(table.final) if table.slot[id_] == slot}
    alive = [clean, *(id_ for id_ in batch if id_ != clean)]  # `OutputView` promises the clean run as row 0
    place = {id_: n for n, id_ in enumerate(alive)}
    ids = table.of_prompt(slot)
    places = [[place.get(id_, place[clean]) for id_ in ids], [place[clean]] * len(ids)]
    wanted = [batch[id_] for id_ in alive]

    def chosen(values: Tensor) -> Tensor:
        everyone = wanted == list(range(values.shape[0]))
        return values if everyone else values.index_select(0, send(wanted, values.device))

    pass_, there = table.pass_, {layer: chosen(values) for layer, values in lenses.items()}
    return _PromptRows(slot, pass_.prompts[slot], pass_.start, ids, send(places, hidden.device), chosen(hidden), there)


def _prompt(
    model: Decoder,
    rows: _PromptRows,
    token_ids: Int[Tensor, " token"],
    measurements: Sequence[OutputMeasurement],
    tokens_of: dict[bool, MeasuredTokens],
    logit_elements: int,
) -> Iterator[tuple[OutputMeasurement, Float[Tensor, "2 row"]]]:
    hidden, n_here = rows.hidden, rows.hidden.shape[0]
    # The rows of a prompt are not all measured at the same tokens. Each is unembedded wherever one of them is, which
    # keeps the product one dense matrix; `MeasuredTokens.reduce` leaves out what is not a row's own.
    columns = {kind: tokens.mask[rows.ids].any(0).nonzero().flatten().tolist() for kind, tokens in tokens_of.items()}
    widest = max(columns.values(), key=len)  # one holds the other: they differ by the prompt's last token
    followed = set(columns.get(True, ()))
    values: dict[str, list[Tensor]] = {m.name: [hidden.new_zeros(n_here, 0).float()] for m in measurements}
    size = max(1, logit_elements // (n_here * int(model.config.vocab_size)))
    for begin in range(0, len(widest), size):
        chunk = widest[begin : begin + size]
        logits = model.unembed(hidden.index_select(1, send(chunk, hidden.device)))
        # Only the prompt's last token can be without a next one, and it is the last of the chunk too. So the columns
        # with a target are the first ones, and a slice (no copy of the logits) gives them.
        following = [rows.start + column + 1 for column in chunk if column in followed]
        targets = token_ids.to(logits.device).index_select(0, send(following, logits.device))

        def lens(layer: int, chunk: Sequence[int] = chunk) -> Tensor:
            resid = rows.lenses[layer].index_select(1, send(list(chunk), rows.lenses[layer].device))
            return model.unembed(model.norm(resid.to(hidden.device)))

        positions = [rows.start + column for column in chunk]
        whole = OutputView(logits, positions, None, rows.prompt, lens=lens if rows.lenses else None)
        whole.fused = model.fused_now
        views = {False: whole, True: whole.followed_by(targets)}
        for measurement in measurements:
            view = views[measurement.needs_target]
            if view.positions:
                values[measurement.name].append(checked(measurement, view, (n_here, len(view.positions))))
        del view, whole, views, logits
    for measurement in measurements:
        found = torch.cat([one.to(hidden.device) for one in values[measurement.name]], dim=1)
        own = tokens_of[measurement.needs_target].of(rows.ids, columns[measurement.needs_target])
        reduced = own.reduce(measurement, found, rows.places)
        if measurement.reduce is None:  # a value a token of the pass, as layer measurements give them
            every = reduced.new_zeros(*reduced.shape[:-1], hidden.shape[1])
            reduced = every.index_copy_(-1, send(columns[measurement.needs_target], every.device), reduced)
        yield measurement, reduced
