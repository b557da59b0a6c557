"""The engine: run any branches of any prompts in shared passes, in bounded memory.

    branches = [Branch((Skip(s),)) for s in range(model.n_layers)]
    found = measure(model, [token_ids], branches, [LayerEffect(), OutputEffect()])
    found.layer["effect"]      # [branch, L]: row s skipped, column i measured
    found.null_effect          # the noise floor of this run

A branch differs from its clean run only from the layer at which it is born on, and only right of
the first token that it changes. It joins the batch there, by a hook, and nothing before is computed twice.
What is compared lies in the same pass. A pass that does not fit into memory is run again, whole, after
everything that is left has been planned anew at half the size of the largest pass. (Not by accelerate's
`find_executable_batch_size`: from some version on it takes a tenth off instead of halving, and it cannot
know that a budget is far above what the plan used.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from hookdepth.engine.arguments import as_branches, as_measurements, as_prompts, check_limit, check_targets
from hookdepth.engine.branches import Branch
from hookdepth.engine.forward import run_pass
from hookdepth.engine.grouping import Limits, packed
from hookdepth.engine.machines import cost_of
from hookdepth.engine.measurement import Measurement, zero_where_clean
from hookdepth.engine.memory import Budget, default_row_tokens, fits
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.engine.planner import make_plan
from hookdepth.engine.results import Gathered, Outcome
from hookdepth.engine.rows import RowTable
from hookdepth.engine.travel import SweepTable, Travel
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send

T = TypeVar("T")


def measure(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    measurements: Sequence[Measurement],
    *,
    max_rows: int | None = None,
    max_row_tokens: int | None = None,
    on_pass: Callable[[], object] | None = None,
    hand_on: bool = False,
) -> Outcome:
    """Run branches and measure them against their clean runs: what `hookdepth.run` does with token ids.

        measure(model, [ids], [Branch((Skip(4, "attn"),))], [OutputEffect()]).output["output"]   # [1]

    Args:
        model: from `load` or `wrap`.
        prompts: token ids, one list a prompt, unpadded; a flat list is one prompt.
        branches: counterfactual runs; each names its prompt.
        measurements: what to read off them.
        max_rows, max_row_tokens: most rows, and rows × tokens, of a pass, at least 3: a branch beside its clean run
            and a null branch always runs. Default: a share of the memory.
        on_pass: called after each pass, e.g. to move a progress bar.
        hand_on: branches with cuts start from recorded keys and values even where that does not pay.

    Raises:
        HookdepthError: a branch that does not fit model or prompt, arguments of a wrong kind (before anything runs);
            values of a wrong shape or that are not finite, or a device on which not even one branch fits.
    """
    checked(model)
    prompts = as_prompts(model, prompts)
    branches = as_branches(model, branches, prompts)
    measurements = as_measurements(model, measurements)
    check_targets(branches, prompts, measurements)
    max_rows = check_limit("max_rows", max_rows)
    max_row_tokens = check_limit("max_row_tokens", max_row_tokens)
    budget = Budget.of(model, max_rows, max_row_tokens)
    lengths = [len(prompt) for prompt in prompts]
    gathered = Gathered(model, branches, lengths, measurements)
    plan = partial(plan_within, model, branches, lengths, measurements, budget, hand_on=hand_on)

    def run(plan: Plan, top: ForwardPass) -> Iterator[tuple[frozenset[int], PassResult]]:
        for result in run_top(model, prompts, branches, plan, top, measurements):
            yield result.table.pass_.measured, result.settled()

    with model.evaluating():
        first = plan()
        for result in run_within(budget, first, plan, run, on_pass):
            gathered.add(result)
        return gathered.results(first)


def run_within(
    budget: Budget,
    first: Plan,
    replan: Callable[[set[int]], Plan],
    run: Callable[[Plan, ForwardPass], Iterable[tuple[frozenset[int], T]]],
    on_pass: Callable[[], object] | None = None,
) -> Iterator[T]:
    """The loop of every run, with or without gradients: pass after pass, smaller ones where memory runs out.

    Args:
        budget: halved where a pass does not fit.
        first: the plan to begin with.
        replan: plans these branches, within the budget.
        run: runs a pass that starts at token 0 and those that start from it: of each, the branches that it has
            measured, and what is wanted of it.
        on_pass: called after each pass.
    """
    plan, pending = first, {row for pass_ in first.walk() for row in pass_.measured}
    while plan.passes:
        complete = True
        for top in plan.passes:
            done: list[T] = []
            complete = fits(partial(_run_one, run, plan, top, done, pending, on_pass))
            yield from done  # also where a later pass of these did not fit: what is done stays done
            if not complete:
                break
        if complete:
            return
        budget.halve(plan)
        plan = replan(pending)


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """Each result when the next has been made, and the last at the end: list(one_behind([1, 2])) is [1, 2]."""
    waiting: list[T] = []
    for result in results:
        yield from waiting
        waiting = [result]
    yield from waiting


def _run_one(
    run: Callable[[Plan, ForwardPass], Iterable[tuple[frozenset[int], T]]],
    plan: Plan,
    top: ForwardPass,
    done: list[T],
    pending: set[int],
    on_pass: Callable[[], object] | None,
) -> None:
    for measured, wanted in run(plan, top):
        done.append(wanted)
        pending -= measured
        if on_pass:
            on_pass()


def run_top(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    plan: Plan,
    top: ForwardPass,
    measurements: Sequence[Measurement],
) -> Iterator[PassResult]:
    """Run a pass and those that start from its keys and values, one after the other.

    Gradients flow where the caller enabled them; its graph lives until the caller lets go of a result.
    """
    parent: PassResult | None = None
    device = cache(model.layer_device)  # tables ask for that of every layer
    travel = None if top.sweep is None else Travel(top.sweep.trie)
    for pass_ in top.walk():
        lengths = [len(prompts[prompt]) for prompt in pass_.prompts]
        token_ids = padded([prompts[prompt] for prompt in pass_.prompts], model.device, pass_.stop)
        if travel is None:
            table = RowTable(pass_, branches, plan.spans, model.n_layers, device)
        else:
            table = travel.begin(SweepTable(pass_, branches, plan.spans, model.n_layers, device))
        result = run_pass(model, token_ids, table, branches, measurements, lengths, parent=parent, travel=travel)
        if pass_.record:
            parent = result
        yield result


def plan_within(
    model: Decoder,
    branches: Sequence[Branch],
    lengths: Sequence[int],
    measurements: Sequence[Measurement],
    budget: Budget,
    only: set[int] | None = None,
    hand_on: bool = False,
) -> Plan:
    """The plan of branches that are measured so, within a budget; `only` as in `make_plan`."""
    return plan_for(
        model,
        branches,
        lengths,
        max_rows=budget.rows,
        max_row_tokens=budget.row_tokens,
        max_kept_tokens=budget.kept_tokens,
        changes_only=zero_where_clean(measurements),
        only=only,
        hand_on=hand_on,
    )


def plan_for(
    model: Decoder,
    branches: Sequence[Branch],
    lengths: Sequence[int],
    *,
    max_rows: int | None = None,
    max_row_tokens: int | None = None,
    max_kept_tokens: int | None = None,
    changes_only: bool = True,
    only: set[int] | None = None,
    hand_on: bool = False,
) -> Plan:
    """The plan that `measure` would follow; `changes_only` as in `make_plan`."""
    return make_plan(
        branches,
        lengths,
        model.n_layers,
        max_row_tokens=max_row_tokens or default_row_tokens(model),
        max_rows=max_rows,
        max_kept_tokens=max_kept_tokens,
        cost=cost_of(model),
        changes_only=changes_only,
        only=only,
        keys=_keys(model, lengths),
        prefixes=model.prefixes,
        hand_on=hand_on,
    )


def _keys(model: Decoder, lengths: Sequence[int]) -> list[Hashable] | None:
    """Only prompts of one key share a pass: those of the same rotary factors, where the model lets prompts share."""
    if not model.shares:
        return list(range(len(lengths)))
    return [model.rotary.key(length) for length in lengths] if model.rotary.places else None


def prompts_together(model: Decoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Plain passes of whole prompts: the numbers of those that cost less in a pass that they share, padded.

    prompts_together(model, [[5, 6], [7, 8]])     # [[0, 1]]
    """
    lengths = [len(prompt) for prompt in prompts]
    keys = _keys(model, lengths) or [None] * len(prompts)
    limits = Limits(default_row_tokens(model), len(prompts), cost_of(model), None)
    return packed(lengths, [1] * len(prompts), [model.n_layers] * len(prompts), keys, limits, model.n_layers)


def padded(prompts: Sequence[Sequence[int]], device: torch.device, least: int = 0) -> Tensor:
    """Prompts as one tensor, of at least so many tokens: padded([[5, 6], [7]], model.device)."""
    # In a later sweep only shorter prompts may be left, beside what the longer ones measured in the sweeps before.
    longest = max(least, *(len(prompt) for prompt in prompts))
    # On the right, any token serves: causal attention never looks there, so no mask is needed.
    return send([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device)
