"""Texts that branches write: one for every prompt and branch, all of them rows of the same decoding passes.

    from hookdepth import AddVector, Skip, generate

    texts = generate(model, [ids], [Skip(3), AddVector("resid_post", 4, 4.0 * torch.randn(model.d_model))])
    texts[0][1]                    # what the steered run wrote, a text; .tokens are its ids
    texts.clean[0]                 # what the model writes untouched

The engine runs the prompts as it runs any branches, so what a branch shares with its clean run is computed once. From
there on every row reads its own last token: each has its keys and values, laid out so that all rows end at the same
place (`writing`). Only where prompts differ in length is a mask needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hookdepth.engine.arguments import as_prompts, check_limit, listed_branches
from hookdepth.engine.branches import Branch
from hookdepth.engine.choosing import Choice, Row
from hookdepth.engine.forward import run_pass
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import Identity
from hookdepth.engine.memory import Budget, default_row_tokens
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.passes import padded, plan_within, run_within
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.engine.rows import RowTable
from hookdepth.engine.texts import Generated, Generations
from hookdepth.engine.tokens import Tokens, positions
from hookdepth.engine.writing import write, write_again
from hookdepth.errors import HookdepthError, choose, whole_number
from hookdepth.model.ambient import plainly
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder

WHERE = ("both", "prompt", "new")


@plainly
def generate(
    model: Decoder,
    prompts: Any,
    branches: Iterable[Branch | Intervention] = (),
    max_new_tokens: int = 20,
    *,
    where: str = "both",
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Sequence[int | str] = (),
    max_rows: int | None = None,
) -> Generations:
    """What the model writes after each prompt, untouched and on every branch.

        direction = torch.randn(model.d_model)
        steer = [AddVector("resid_post", 3, strength * direction) for strength in (1.0, 2.0, 4.0)]
        texts = generate(model, [ids, ids[:4]], steer, max_new_tokens=8, where="new")
        texts[0][2], texts[0][2].tokens, texts.clean[0]

    Args:
        model: from `load` or `wrap`.
        prompts: texts or token ids.
        max_new_tokens: at most so many.
        branches: interventions, or branches of several; each is run on every prompt. One along a `LayerPath` reads the
            whole text again for each token.
        where: "prompt": what a branch changes, it changes while the prompt is read, and what follows only sees the
            keys and values; "new": on the tokens that it writes alone; "both". A slice without an end reaches the new
            tokens (slice(1, None), the default of a skip), positions and slices that end do not.
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        top_k: draw among so many.
        seed: of the draws. Rows of one prompt draw the same numbers, whatever they run beside, so that texts differ
            because of what a branch changes.
        stop: token ids, or texts, after which a row ends, besides the model's own end of text.
        max_rows: most rows of a pass.

    Raises:
        HookdepthError: what does not fit model, prompts or a growing text; a model whose layers keep
            no keys and values.

    Greedy tokens are those of Hugging Face's `generate` under plain hooks. Where the two likeliest logits lie within
    1e-4 of each other, rounding may decide: `close_call` says at which token.
    """
    checked(model)
    ids = as_prompts(model, prompts)
    new = whole_number("max_new_tokens", max_new_tokens, 1)
    choose("where", where, WHERE)
    choice = Choice.of(model, temperature, top_k, seed, stop)
    given = _as_interventions(branches)
    paths = [any(isinstance(one, LayerPath) for one in own) for own in given]
    if any(paths) and (choice.temperature or where != "both"):
        raise HookdepthError(
            f"a text along a path of layers, with {'temperature' if choice.temperature else 'where'} set",
            'let it take the likeliest tokens, where="both"',
        )
    _check_room(model, ids, new)
    rows, planned = _rows(model, ids, given, new, where)
    prefix = [len(prompt) for prompt in ids]
    # An intervention that goes on acting counts the tokens to come, too; one that ends with the prompt does not.
    lengths = [length + (new if where == "both" else 0) for length in prefix]
    budget = Budget.of(model, check_limit("max_rows", max_rows), _row_tokens(model, max(prefix), new))
    plan = partial(plan_within, model, planned, lengths, [], budget)
    floors: list[float] = [0.0]

    def run(plan: Plan, top: ForwardPass) -> Iterator[tuple[frozenset[int], dict[int, Generated]]]:
        parent: PassResult | None = None
        for pass_ in top.walk():
            table = RowTable(pass_, planned, plan.spans, model.n_layers, model.layer_device)
            own = [lengths[prompt] for prompt in pass_.prompts]
            held: list[Tensor] = []
            padded_ids = padded([ids[prompt] for prompt in pass_.prompts], model.device)
            read = run_pass(model, padded_ids, table, planned, [], own, parent=parent, on_hidden=held.append)
            parent = read if pass_.record else parent
            found: dict[int, Generated] = {}
            if pass_.measured:
                found, floor = write(model, read, held.pop(), rows, new, choice)
                floors.append(floor)
            yield pass_.measured, found

    ordinary = {number for number in range(len(rows)) if not [False, *paths][number % (1 + len(given))]}
    with model.evaluating():
        texts = write_again(model, {n: row for n, row in enumerate(rows) if n not in ordinary}, new, choice, max_rows)
        for found in run_within(budget, first := plan(ordinary), plan, run):
            texts |= found
    width = 1 + len(given)
    by_prompt = [[texts[number * width + n] for n in range(width)] for number in range(len(ids))]
    return Generations([own[0] for own in by_prompt], [own[1:] for own in by_prompt], max(floors), first)


def _as_interventions(branches: Any) -> list[tuple[Intervention, ...]]:
    found = []
    for branch in listed_branches(branches):
        fixed = [name for name in ("cut", "until", "measured") if getattr(branch, name) is not None]
        if fixed or branch.prompt:
            raise HookdepthError(
                f"a branch to generate from has {(fixed or ['prompt'])[0]} set",
                "give its interventions alone: it runs to the end, on every prompt",
            )
        found.append(branch.interventions)
    return found


def _check_room(model: Decoder, prompts: Sequence[Sequence[int]], new: int) -> None:
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    limit = model.context_length
    if limit is not None and longest + new > limit:
        raise HookdepthError(
            f"{new} tokens after a prompt of {longest}, in a context of {limit}", "shorten the prompt or write less"
        )
    if model.rotary.places and model.rotary.key(shortest) != model.rotary.key(longest + new):
        raise HookdepthError(
            f"the rotary factors of {model.name!r} change between {shortest} and {longest + new} tokens, and keys that "
            "were computed before keep the old ones",
            "give prompts of similar length, and let it write less",
        )


def _rows(
    model: Decoder, prompts: Sequence[Sequence[int]], given: Sequence[tuple[Intervention, ...]], new: int, where: str
) -> tuple[list[Row], list[Branch]]:
    """Prompt by prompt the clean row and one for each branch: what it does to new tokens, and how it is prefilled."""
    rows, planned = [], []
    for number, prompt in enumerate(prompts):
        length = len(prompt)
        # Joins where nothing follows: its keys, values and last hidden state are the clean run's.
        clean = (Identity("resid_post", model.n_layers - 1, [length - 1]),)
        for own in ((), *given):
            placed = tuple(_placed(model, one, length, new, where) for one in own)
            read = placed if own and where != "new" else clean
            planned.append(Branch(read, number, measured=[length - 1]))
            rows.append(Row(number, prompt, placed if where != "prompt" else (), length + new))
    return rows, planned


def _placed(model: Decoder, one: Intervention, length: int, new: int, where: str) -> Intervention:
    """The intervention with its tokens counted from the start, so that they mean the same as the text grows."""
    name = type(one).__name__
    if where == "prompt":
        one.check(model, length)
        return one
    if not one.tokenwise or one.sources():
        why = "the clean run, which writes other tokens" if one.sources() else "tokens that it does not change"
        raise HookdepthError(f"{name} reads {why}, and cannot go on acting", 'use where="prompt"')
    tokens: Tokens = one.tokens
    if isinstance(tokens, slice) and tokens.stop is None and (tokens.step or 1) > 0:
        start = tokens.start or 0
        tokens = slice(start if start >= 0 else max(0, length + start), length + new, tokens.step)
    elif where == "new":
        raise HookdepthError(
            f"{name} at layer {one.layer} acts on tokens of the prompt alone, and where is 'new'",
            "give it a slice without an end, e.g. tokens=slice(1, None)",
        )
    else:
        tokens = list(positions(tokens, length))
    placed = copy.copy(one)
    object.__setattr__(placed, "tokens", tokens)
    try:
        placed.check(model, length + new)
    except HookdepthError as error:
        raise HookdepthError(error.problem, f'{error.remedy}, or use where="prompt"') from error
    return placed


def _row_tokens(model: Decoder, longest: int, new: int) -> int:
    # Beside what a pass needs, the keys and values of all layers are held twice while the rows are laid out.
    return max(3 * longest, default_row_tokens(model) * longest // (3 * (longest + new)))
