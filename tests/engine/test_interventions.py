"""Interventions: what each does, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import shapes
from token_choices import some_tokens

from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import AddVector, Erase, Identity, Patch, Scale, Skip, Subtract
from hookdepth.engine.tokens import locate, positions
from hookdepth.errors import HookdepthError

LENGTH, WIDTH = 10, 4
MODEL = shapes(6, WIDTH)
VECTOR = torch.ones(WIDTH)


class Around:
    """A layer's input of twos; earlier contributions of their layer's number."""

    def resid_pre(self):
        return torch.full((LENGTH, WIDTH), 2.0)

    def contribution(self, layer):
        return torch.full((LENGTH, WIDTH), float(layer))


def applied(intervention, start=0, stop=LENGTH, row=None):
    row = torch.arange(float(LENGTH * WIDTH)).view(LENGTH, WIDTH)[start:stop].clone() if row is None else row

    class Here(Around):
        def resid_pre(self):
            return super().resid_pre()[start:stop]

        def contribution(self, layer):
            return super().contribution(layer)[start:stop]

    intervention.apply(row, locate(intervention.tokens, LENGTH, start, stop), Here())
    return row


def untouched():
    return torch.arange(float(LENGTH * WIDTH)).view(LENGTH, WIDTH)


@given(some_tokens(), st.integers(0, LENGTH), st.integers(0, LENGTH))
@settings(max_examples=100)
def test_a_patch_of_a_part_is_the_part_of_a_patch(tokens, one, other):
    start, stop = min(one, other), max(one, other)
    chosen = list(positions(tokens, LENGTH))
    if len(set(chosen)) < len(chosen):
        return  # a token named twice: which of its values wins is not promised
    value = torch.randn(len(chosen), WIDTH)
    patch = Patch("resid_pre", 0, value, tokens)
    expected = untouched()
    for order, position in enumerate(chosen):
        expected[position] = value[order]
    assert torch.equal(applied(patch), expected)
    assert torch.equal(applied(patch, start, stop), expected[start:stop])


def test_what_each_does():
    tokens = [2, -1]
    rest = [0, 1, 3, 4, 5, 6, 7, 8]
    for intervention, expected in (
        (Patch("mlp_out", 0, VECTOR, tokens), torch.ones(2, WIDTH)),
        (Erase("mlp_out", 0, VECTOR, tokens), torch.ones(2, WIDTH)),
        (AddVector("mlp_out", 0, VECTOR, tokens), untouched()[[2, 9]] + 1),
        (Scale("mlp_out", 0, -2.0, tokens), -2 * untouched()[[2, 9]]),
        (Skip(0, "layer", tokens), torch.full((2, WIDTH), 2.0)),
        (Skip(0, "attn", tokens), torch.zeros(2, WIDTH)),
        (Skip(0, "mlp", tokens), torch.zeros(2, WIDTH)),
        (Subtract(3, 5, tokens), untouched()[[2, 9]] - 3),
        (Identity("mlp_out", 0, tokens), untouched()[[2, 9]]),
    ):
        row = applied(intervention)
        assert torch.equal(row[tokens], expected), intervention
        assert torch.equal(row[rest], untouched()[rest]), intervention


def test_default_tokens():
    assert list(positions(Skip(0).tokens, LENGTH)) == list(range(1, LENGTH)), "the first token is left alone"
    assert list(positions(Subtract(0, 1).tokens, LENGTH)) == list(range(1, LENGTH))
    for all_tokens in (Patch("resid_pre", 0, VECTOR), AddVector("resid_pre", 0, VECTOR), Identity("resid_pre", 0)):
        assert list(positions(all_tokens.tokens, LENGTH)) == list(range(LENGTH))


def test_sites_of_skips():
    assert [Skip(0, part).site for part in ("layer", "attn", "mlp")] == ["resid_post", "attn_out", "mlp_out"]
    assert Subtract(0, 1).site == "resid_pre"
    assert Subtract(0, 1).sources() == (0,)
    assert Skip(0).sources() == ()


def test_sums_are_taken_in_float32():
    row = torch.full((1, WIDTH), 256.0, dtype=torch.bfloat16)  # its neighbour is 258
    AddVector("resid_pre", 0, torch.full((WIDTH,), 1.003)).apply(row, locate(slice(None), 1, 0, 1), Around())
    assert row.dtype == torch.bfloat16
    assert row[0, 0].item() == 258.0  # 1.003 is 1 in bfloat16, and 257 would be rounded to 256


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Skip(0, "atn"), "unknown part 'atn'; did you mean attn?"),
        (
            lambda: Skip(6).check(MODEL, LENGTH),
            "Skip at layer 6 of a model of 6 layers; give a layer from 0 to 5",
        ),
        (lambda: Skip(-1).check(MODEL, LENGTH), "layer -1"),
        (lambda: Identity("resid_mif", 0).check(MODEL, LENGTH), "unknown site 'resid_mif'"),
        (lambda: Scale("mlp_out", 0, 2.0, [10]).check(MODEL, LENGTH), "token 10 of a prompt of 10"),
        (lambda: Patch("mlp_out", 0, torch.ones(3)).check(MODEL, LENGTH), r"shape \[3\] for 10 tokens"),
        (lambda: Patch("mlp_out", 0, torch.ones(10, 4), [1]).check(MODEL, LENGTH), r"give \[4\] or \[1, 4\]"),
        (lambda: AddVector("mlp_out", 0, torch.ones(4, 10)).check(MODEL, LENGTH), r"\[4, 10\]"),
        (lambda: Subtract(3, 3).check(MODEL, LENGTH), "give a source before the layer"),
        (lambda: Subtract(-1, 3).check(MODEL, LENGTH), "give a source before the layer"),
        (lambda: Intervention("mlp_out", 0).apply(torch.ones(1, 1), None, None), "says nothing to do"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(HookdepthError, match=says):
        make()


def test_what_is_accepted():
    for value, tokens in ((VECTOR, [1, 2]), (torch.ones(2, WIDTH), [1, 2]), (torch.ones(9, WIDTH), slice(1, None))):
        Patch("resid_pre", 5, value, tokens).check(MODEL, LENGTH)


def test_equal_looking_interventions_are_different_objects():
    assert Skip(1) != Skip(1)
    assert len({Skip(1), Skip(1)}) == 2
