"""Derivatives of a measurement by what branches put in the place of a site: run as branches are, with gradients.

    branches = [Branch((Given("resid_pre", layer),), measured=[17]) for layer in range(n_layers)]
    points = lambda rows: clean_resid[list(rows)]     # [L, T, d], a layer a branch
    for part in differentiate(model, ids, branches, TargetProbability(), points, lambda rows, gradient: gradient):
        part.branches, part.values, part.reduced      # numbers, [branch] and [branch, token, width]

Branches are planned, packed, measured, checked and retried by the same code as those of `run`. What differs is
the memory: a backward pass keeps the activations of all layers (`memory.kept_bytes`), so the budget counts these too.
Parameters are frozen: gradients flow to the given values and end there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention, Surroundings
from hookdepth.engine.interventions import Patch
from hookdepth.engine.measurement import Measurement
from hookdepth.engine.memory import Budget
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.passes import one_behind, plan_within, run_top, run_within
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.engine.results import on_host
from hookdepth.engine.tokens import Tokens, Where  # noqa: F401 (pdoc resolves inherited fields here)
from hookdepth.errors import HookdepthError, NotFiniteError
from hookdepth.model.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Given(Intervention):
    """A site whose value is given when its pass runs, so that thousands of branches can be planned and none is held.

    Given("resid_post", 3)
    """

    tokenwise: ClassVar[bool] = True

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Only `differentiate` knows the value."""
        raise HookdepthError(f"the value at {self.site} of layer {self.layer} was not given", "use differentiate")


@dataclass
class Derivatives:
    """What one pass gave.

    Attributes:
        branches: their numbers.
        values: [branch], what was measured on them, in float32 on the CPU; clean: [branch], on their clean runs.
        reduced: [branch, …], what `reduce` made of the gradients, on the CPU.
        null_effect, null_where: the noise floor of the pass.
    """

    branches: list[int]
    values: Float[Tensor, " branch"]
    clean: Float[Tensor, " branch"]
    reduced: Tensor
    null_effect: float
    null_where: str | None


def differentiate(
    model: Decoder,
    token_ids: Sequence[int],
    branches: Sequence[Branch],
    measurement: Measurement,
    points: Callable[[Sequence[int]], Float[Tensor, "branch token width"]],
    reduce: Callable[[Sequence[int], Float[Tensor, "branch token width"]], Tensor],
    *,
    budget: Budget | None = None,
    on_pass: Callable[[], object] | None = None,
) -> Iterator[Derivatives]:
    """The measurement of each branch, and its derivative by the value that the branch is given.

        given = [Branch((Given("resid_pre", layer),)) for layer in range(n_layers)]
        size = lambda rows, gradient: gradient.norm(dim=-1)
        found = differentiate(model, ids, given, TargetProbability(), lambda rows: clean_resid[list(rows)], size)
        next(found).reduced     # [branch, token]

    Args:
        model: from `load` or `wrap`.
        token_ids: of the one prompt.
        branches: each with one `Given`, on all tokens, and no cut.
        measurement: one value a branch, of the layers or the output; layers' are added up.
        points: numbers of branches → their values, in float32. They share one leaf.
        reduce: numbers of branches and their gradients, in float32 → what is wanted of these, on any device.
        budget: how large passes may be; what memory teaches is written into it.
        on_pass: called after each pass.

    Yields:
        What each pass gave, in the order in which they run. Between two of them the model is the caller's.

    Raises:
        HookdepthError: a branch that is none of these; not even one fits into memory.
        NotFiniteError: a value or a gradient is not finite.
    """
    for branch in branches:
        if branch.cut is not None or [type(one) for one in branch.interventions] != [Given]:
            raise HookdepthError("a branch to differentiate by needs one Given, and no cut", "give Branch((Given(…),))")
    budget = budget or Budget.of(model, gradients=True)
    plan = partial(plan_within, model, branches, [len(token_ids)], [measurement], budget)

    def run(plan: Plan, top: ForwardPass) -> Iterator[tuple[frozenset[int], tuple[PassResult, Tensor]]]:
        # A graph is used once here, so fused kernels may work in place.
        with model.evaluating(grad=True), model.fused.in_use(True) if model.fused else nullcontext():
            # A clone: what was computed in inference mode can never carry a gradient.
            leaf = points(top.rows).detach().clone().requires_grad_()
            bound = list(branches)
            # Unbound, not indexed: the gradients of all are then put together once, and not one by one into zeros.
            for row, value in zip(top.rows, leaf.unbind(), strict=True):
                (given,) = branches[row].interventions
                bound[row] = replace(branches[row], interventions=(Patch(given.site, given.layer, value),))
            (result,) = run_top(model, [token_ids], bound, plan, top, [measurement])
            (gradient,) = torch.autograd.grad(_sum_of_branches(result, measurement.name), leaf)
        yield top.measured, (result.settled(), reduce(top.rows, gradient.float()))

    # What a pass gave is read when the next one is on its way: so a device with a queue never waits for the host.
    for result, reduced in one_behind(run_within(budget, plan(), plan, run, on_pass)):
        yield _derivatives(result, measurement.name, reduced.cpu())


def _sum_of_branches(result: PassResult, name: str) -> Tensor:
    # No branch reaches another's row, so the gradient of the sum by a branch's value is that of its own measurement.
    own, _ = result.of(name)
    return result.table.by_kind(own).branches.sum()


def _derivatives(result: PassResult, name: str, reduced: Tensor) -> Derivatives:
    found = on_host(result, [name])[name]
    if not torch.isfinite(reduced).all():
        raise NotFiniteError(
            "non-finite gradients, of a finite value", "use a dtype of wider range (--dtype bfloat16 or float32)", 1
        )
    return Derivatives(found.branches, found.values, found.clean, reduced, found.null_effect, found.null_where)
