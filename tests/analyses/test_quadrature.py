"""Integrals with known values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookdepth.analyses.quadrature import AdaptivePath, check_steps, gauss_legendre, riemann
from hookdepth.errors import HookdepthError


def solve(function, derivative, **options):
    """Integrate the derivative, given as one token's gradient; the integral should be f(1) − f(0)."""
    path = AdaptivePath(**{"tolerance": 0.01, **options})
    while wanted := path.wanted():
        for alpha in wanted:
            path.accept(alpha, function(alpha), torch.tensor([derivative(alpha)]))
    return path


def sharp(alpha):
    """A step of width 0.001 at 0.3: what uniform sums miss."""
    return 1 / (1 + math.exp(-(alpha - 0.3) / 0.001)) if abs(alpha - 0.3) < 0.5 else float(alpha > 0.3)


def sharp_slope(alpha):
    return sharp(alpha) * (1 - sharp(alpha)) / 0.001


def test_fixed_rules_integrate_what_they_should():
    nodes, weights = riemann(4)
    assert nodes == [0.0, 0.25, 0.5, 0.75]
    assert weights == [0.25] * 4
    nodes, weights = gauss_legendre(5)
    for degree in range(10):
        total = sum(w * x**degree for x, w in zip(nodes, weights, strict=True))
        assert total == pytest.approx(1 / (degree + 1), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "steps", "says"),
    [
        ("gauss-legendre", 60_000, "give at most 2048"),
        ("riemann", 3 * 10**8, "give at most 1000000"),
        ("riemann", 0, "is no number of steps"),
        ("gauss-legendre", -3, "is no number of steps"),
        ("adaptive", 1.5, "is no number of steps"),
        ("riemann", True, "is no number of steps"),
        ("riemann", "256", "is no number of steps"),
    ],
)
def test_numbers_of_steps_beyond_reason_are_refused(method, steps, says):
    with pytest.raises(HookdepthError, match=says):
        check_steps(method, steps)
    rule = {"riemann": riemann, "gauss-legendre": gauss_legendre}.get(method)
    if rule:
        with pytest.raises(HookdepthError, match=says):
            rule(steps)


def test_the_most_steps_are_taken():
    check_steps("adaptive", 10**9)  # which does not read it
    nodes, weights = gauss_legendre(2048)
    assert sum(w * x**7 for x, w in zip(nodes, weights, strict=True)) == pytest.approx(1 / 8, rel=1e-12)
    nodes, weights = riemann(1_000_000)
    assert sum(weights) == pytest.approx(1)


def test_a_cubic_needs_no_refinement():
    path = solve(lambda a: a**4 / 4, lambda a: a**3)
    assert path.integral().item() == pytest.approx(0.25, abs=1e-12)
    assert path.evaluations == 9  # four intervals, ends shared


def test_degree_five_is_integrated_exactly_over_both_halves():
    path = solve(lambda a: a**6 / 6, lambda a: a**5, tolerance=1.0)
    assert path.evaluations == 9
    assert path.integral().item() == pytest.approx(1 / 6, abs=1e-12)


def test_a_sharp_step_is_found_and_resolved():
    path = solve(sharp, sharp_slope)
    assert path.integral().item() == pytest.approx(1.0, abs=0.01)
    assert path.evaluations < 100
    nodes, weights = riemann(256)
    missed = sum(w * sharp_slope(x) for x, w in zip(nodes, weights, strict=True))
    assert abs(missed - 1) > 0.03, "the uniform sum should miss this step, or the test shows nothing"
    # The nodes are where the step is.
    near = [alpha for alpha in path.values if abs(alpha - 0.3) < 0.05]
    assert len(near) > path.evaluations / 2


@given(st.floats(0.5, 30), st.floats(0, 6.3), st.floats(0.001, 0.1))
def test_errors_add_up_to_at_most_the_tolerance(frequency, phase, tolerance):
    path = solve(
        lambda a: math.sin(frequency * a + phase),
        lambda a: frequency * math.cos(frequency * a + phase),
        tolerance=tolerance,
    )
    change = math.sin(frequency + phase) - math.sin(phase)
    assert not path.exhausted
    assert abs(path.integral().item() - change) <= tolerance * max(abs(change), 0.01) + 1e-6


def test_evaluations_are_bounded_and_exhaustion_is_said():
    path = solve(sharp, lambda a: 7.0, max_evaluations=40)  # a derivative that is not f's never converges
    assert path.exhausted
    assert path.evaluations <= 40
    assert path.wanted() == []


def test_intervals_are_not_halved_below_the_narrowest():
    path = solve(sharp, lambda a: 7.0, min_width=1 / 64)
    assert path.exhausted
    assert min(b - a for a, b in path.intervals) == 1 / 64


def test_nodes_are_asked_for_once():
    asked = []
    path = AdaptivePath(tolerance=0.001)
    while wanted := path.wanted():
        asked += wanted
        for alpha in wanted:
            path.accept(alpha, sharp(alpha), torch.tensor([sharp_slope(alpha)]))
    assert len(asked) == len(set(asked)) == path.evaluations


def test_errors_of_tokens_that_cancel_in_the_sum_are_resolved():
    path = AdaptivePath(tolerance=0.01, token_tolerance=0.0025)
    while wanted := path.wanted():
        for alpha in wanted:
            slope = 1 / (0.1 * math.pi) / (1 + ((alpha - 0.3) / 0.1) ** 2)  # its integral: 0.852
            path.accept(alpha, alpha, torch.tensor([1 + slope, -slope]))  # f(α) = α: completeness sees nothing
    bump = (math.atan(7) + math.atan(3)) / math.pi
    assert path.integral().tolist() == pytest.approx([1 + bump, -bump], abs=0.0025 * (1 + bump))
    assert 9 < path.evaluations < 50
