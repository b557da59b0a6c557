"""Tokens: which a prompt's positions are meant, and where they lie in a pass_."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_choices import LENGTH, some_tokens

from hookdepth import Branch, Identity
from hookdepth.engine.tokens import extent, locate, positions
from hookdepth.errors import HookdepthError


@given(some_tokens(), st.integers(0, LENGTH), st.integers(0, LENGTH))
@settings(max_examples=300)
def test_locate_finds_the_tokens_of_any_launch(tokens, one, other):
    start, stop = min(one, other), max(one, other)
    chosen = [token % LENGTH for token in (range(LENGTH)[tokens] if isinstance(tokens, slice) else tokens)]
    assert list(positions(tokens, LENGTH)) == chosen
    where = locate(tokens, LENGTH, start, stop)
    inside = [(order, position) for order, position in enumerate(chosen) if start <= position < stop]
    assert list(torch.arange(start, stop)[where.local]) == [position for _, position in inside]
    assert list(torch.arange(len(chosen))[where.picked]) == [order for order, _ in inside]


@pytest.mark.parametrize("wrong", [[10], [-11], [0, 99]])
def test_positions_outside_the_prompt_are_refused(wrong):
    with pytest.raises(HookdepthError, match="of a prompt of 10 tokens; give positions from -10 to 9"):
        positions(wrong, LENGTH)


@pytest.mark.parametrize(
    "tokens", [slice(None), slice(3, None), slice(-2, None), slice(6, 1, -2), slice(9, 9), [5], [-1, 0, 3], []]
)
@pytest.mark.parametrize("cut", [None, 4])
def test_extents_are_those_of_the_positions(tokens, cut):
    chosen = positions(tokens, 7)
    assert extent(tokens, 7) == ((min(chosen), max(chosen)) if len(chosen) else None)
    branch = Branch((Identity("resid_pre", 0),), cut=cut, measured=tokens)
    chosen = branch.measured_positions(7)
    assert branch.measured_extent(7) == ((min(chosen), max(chosen)) if len(chosen) else None)
