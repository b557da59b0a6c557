"""Derivatives of branches, against autograd through a plain forward pass."""

import pytest
import torch
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.engine.branches import Branch
from hookdepth.engine.gradients import Given, differentiate
from hookdepth.engine.interventions import Skip
from hookdepth.engine.measurements import LogitDifference, TargetProbability
from hookdepth.engine.memory import Budget
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError, NotFiniteError

WHERE = [("resid_post", 3), ("resid_pre", 1), ("mlp_out", 0), ("attn_out", 2), ("resid_post", 1)]


@pytest.fixture
def model():
    return hookdepth.wrap(tiny_model("llama-gqa"))


@pytest.fixture
def ids():
    return prompts(1, (9,))[0]


def points(rows):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(WHERE), 9, 64, generator=generator)[list(rows)]


def plain(model, ids, site, layer, value):
    """The difference of two logits at the last two tokens, and its gradient: one hook, one backward pass."""
    leaf = value.clone().requires_grad_()
    handle = model.on(site, layer, lambda hidden: leaf[None].expand_as(hidden))
    try:
        logits = model.hf(torch.tensor([ids])).logits[0, -2:]
    finally:
        handle.remove()
    difference = (logits[:, 5] - logits[:, 7]).mean()
    return difference.item(), torch.autograd.grad(difference, leaf)[0]


@pytest.mark.parametrize("kept_tokens", [None, 1, 60])
def test_values_and_gradients_equal_a_plain_backward_pass(model, ids, kept_tokens):
    budget = Budget.of(model, gradients=True)
    budget.kept_tokens = kept_tokens or budget.kept_tokens
    branches = [Branch((Given(site, layer),), measured=[-2, -1]) for site, layer in WHERE]
    calls, what = [], LogitDifference(5, 7)
    found = differentiate(
        model, ids, branches, what, points, lambda _, g: g, budget=budget, on_pass=lambda: calls.append(1)
    )
    parts = list(found)
    assert len(parts) == len(calls) == {None: 1, 1: 5, 60: 4}[kept_tokens]
    assert sorted(row for part in parts for row in part.branches) == list(range(len(WHERE)))
    for part in parts:
        assert part.null_effect <= 1e-6
        for row, value, gradient in zip(part.branches, part.values, part.reduced, strict=True):
            expected, slope = plain(model, ids, *WHERE[row], points([row])[0])
            assert value.item() == pytest.approx(expected, abs=1e-4)
            torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-5)
            assert slope.abs().max() > 1e-4


def test_gradients_that_are_not_finite_are_refused(model, ids):
    handle = model.layers[3].mlp.register_full_backward_hook(lambda _, into, out: (into[0] * float("nan"),))
    branches = [Branch((Given("resid_post", 1),))]
    try:
        with pytest.raises(NotFiniteError, match="non-finite gradients"):
            list(differentiate(model, ids, branches, TargetProbability(), points, lambda _, g: g))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "branch",
    [Branch((Skip(1),)), Branch((Given("resid_post", 1), Skip(3))), Branch((Given("resid_post", 1),), cut=4)],
    ids=["another intervention", "two of them", "a cut"],
)
def test_other_branches_are_refused(model, ids, branch):
    with pytest.raises(HookdepthError, match="needs one Given, and no cut"):
        list(differentiate(model, ids, [branch], TargetProbability(), points, lambda _, g: g))


def test_a_value_that_was_not_given_is_asked_for(model, ids):
    with pytest.raises(HookdepthError, match="resid_post of layer 1 was not given"):
        measure(model, [ids], [Branch((Given("resid_post", 1),))], [TargetProbability()])
