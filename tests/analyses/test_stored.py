"""Declarations in result files: `hookdepth.analyses.stored`."""

from dataclasses import fields

import pytest

from hookdepth.analyses.registry import known
from hookdepth.analyses.stored import read, written


@pytest.mark.parametrize("name", known())
def test_a_declaration_reads_back_as_it_was_written(name):
    """With every kind of figure, so that a file needs no code to be drawn; functions stay with the code."""
    analysis = known()[name]()
    stored = read(written(analysis))
    assert (stored.name, dict(stored.tensors)) == (analysis.name, dict(analysis.tensors))
    for own, other in zip(analysis.figures, stored.figures, strict=True):
        assert type(own) is type(other)
        same = [one.name for one in fields(own) if getattr(own, one.name) == getattr(other, one.name)]
        assert {"reading", "paper", "name"} <= set(same)
