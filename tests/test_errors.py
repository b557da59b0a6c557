"""The one error class: a line that says what and what to do, and an exit status."""

import pytest

import hookdepth
from hookdepth.errors import HookdepthError, choose


def test_it_says_what_and_the_remedy():
    error = HookdepthError("no file 'promts.jsonl'", "give an existing file")
    assert str(error) == "no file 'promts.jsonl'; give an existing file"
    assert (error.problem, error.remedy, error.exit_status) == ("no file 'promts.jsonl'", "give an existing file", 2)
    assert HookdepthError("full", "free some space", 1).exit_status == 1
    assert hookdepth.HookdepthError is HookdepthError


def test_choose_returns_what_is_allowed():
    assert choose("dtype", "float32", ("auto", "float32")) == "float32"
    assert choose("layer", "b", iter("abc")) == "b"


def test_choose_names_the_nearest():
    with pytest.raises(HookdepthError) as caught:
        choose("analysis", "skip-curent", ["logit-lens", "skip-current"])
    assert str(caught.value) == "unknown analysis 'skip-curent'; did you mean skip-current? (logit-lens, skip-current)"
    assert caught.value.exit_status == 2


def test_choose_lists_all_where_nothing_is_near():
    with pytest.raises(HookdepthError, match=r"^unknown part 'zzz'; use one of layer, attn, mlp$"):
        choose("part", "zzz", ("layer", "attn", "mlp"))
