"""Branches: where they are born and measured, and which are refused."""

import pytest
from problems import shapes

from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Identity, Skip
from hookdepth.errors import HookdepthError

LENGTH, MODEL = 10, shapes(6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Branch(()), "a branch without interventions"),
        (lambda: Branch((Skip(9),)).check(MODEL, LENGTH), "layer 9"),
        (
            lambda: Branch((Skip(1),), cut=0).check(MODEL, LENGTH),
            "a cut at 0 in a prompt of 10 tokens; give 1 to 9",
        ),
        (lambda: Branch((Skip(1),), cut=10).check(MODEL, LENGTH), "a cut at 10"),
        (lambda: Branch((Skip(4),), until=3).check(MODEL, LENGTH), "until layer 3 that intervenes at layer 4"),
        (lambda: Branch((Skip(4),), until=6).check(MODEL, LENGTH), "until layer 6"),
        (lambda: Branch((Skip(4),), measured=[12]).check(MODEL, LENGTH), "token 12"),
        (lambda: Branch((Skip(4),), measured=[]).check(MODEL, LENGTH), "measured nowhere"),
        (lambda: Branch((Skip(4),), measured=[1, 2], cut=5).check(MODEL, LENGTH), "measured nowhere"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(HookdepthError, match=says):
        make()


def test_what_is_accepted():
    Branch((Skip(4), Skip(2)), cut=9, until=4, measured=[-1]).check(MODEL, LENGTH)


def test_birth_is_the_first_site_met():
    late, early = Skip(3, "mlp"), Identity("resid_pre", 3)
    assert Branch((late, early)).joins() == (3, "resid_pre")
    assert Branch((Skip(3), late)).joins() == (3, "mlp_out")
    assert Branch((early, Skip(2))).joins() == (2, "resid_post")


def test_measured_positions():
    assert list(Branch((Skip(0),)).measured_positions(4)) == [0, 1, 2, 3]
    assert list(Branch((Skip(0),), cut=2).measured_positions(4)) == [2, 3]
    assert list(Branch((Skip(0),), cut=2, measured=[0, -1]).measured_positions(4)) == [3]
