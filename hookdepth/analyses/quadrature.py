"""Integrals along a path from 0 to 1 that know how wrong they are: pure arithmetic, no model.

    path = AdaptivePath(tolerance=0.01)
    while wanted := path.wanted():
        for alpha in wanted:
            path.accept(alpha, f(alpha), gradient(alpha))   # f is a number, gradient a tensor [token]
    path.integral()        # Σ weights · gradient, whose sum should be f(1) − f(0)

Integrated gradients integrate the derivative of f, and f itself comes with every gradient for free. So each
sub-interval tells its own error: |∫ of the derivative − Δf|. Where it is large the interval is halved. Tokens'
errors may cancel in that sum, so each token's integral may be asked to have settled as well.

An interval has three nodes, both ends and the middle, which become ends of its halves: halving costs two nodes and
wastes none. The other half of the interval that it was made from has three, too, one of them the same. What counts is
the integral of the polynomial of degree 4 through all five (over both halves: Boole's rule); how far that of the
parabola through its own three is from it (Simpson's rule) tells the error of a token: twice that is taken for it. On
the demo model this takes nine tenths of the nodes that Simpson's rule needs, for errors that are no larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookdepth.errors import HookdepthError

_SIMPSON = (1 / 6, 4 / 6, 1 / 6)  # at both ends and the middle of an interval
_FIVE = (29 / 180, 124 / 180, 24 / 180, 4 / 180, -1 / 180)  # at them and at the middle and end of the next one
FLOOR = 0.01
"""Tolerances are relative to |f(1) − f(0)| and to the largest attribution, but never to less than this."""
_SAFETY = 2  # the two rules are as far apart as the poorer one is wrong; where f is sharp, so may the better one be
_START = 4  # equal intervals to begin with; even, so that each is one half of a pair

_MOST_STEPS = {
    "riemann": (1_000_000, "steps of a millionth are as fine as float32 tells the points of a path apart"),
    "gauss-legendre": (2048, "the time and memory that finding the nodes takes grow with the cube and the square"),
}


def check_steps(method: str, steps: int) -> None:
    """Refuse more nodes than can be of use, or none: check_steps("riemann", 256)."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise HookdepthError(f"--ig-steps {steps!r} is no number of steps", "give a whole number of at least 1")
    most, why = _MOST_STEPS.get(method, (steps, ""))
    if steps > most:
        raise HookdepthError(
            f"--ig-steps {steps} is more than {method} takes ({why})",
            f"give at most {most}, or use --ig-method adaptive, which takes as many as an answer needs",
        )


def riemann(steps: int) -> tuple[list[float], list[float]]:
    """The paper's left Riemann sum: nodes k/steps, k = 0 … steps−1, equal weights."""
    check_steps("riemann", steps)
    return [k / steps for k in range(steps)], [1 / steps] * steps


def gauss_legendre(steps: int) -> tuple[list[float], list[float]]:
    """Gauss–Legendre nodes and weights on [0, 1]: exact for polynomials of degree 2·steps − 1.

    gauss_legendre(50)    # Captum's default
    """
    check_steps("gauss-legendre", steps)
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(steps)
    return [float(node + 1) / 2 for node in nodes], [float(weight) / 2 for weight in weights]


@dataclass
class AdaptivePath:
    """An integral that is refined where its own error says so.

        AdaptivePath(0.01).wanted()   # the first nodes

    Attributes:
        tolerance: stop when the intervals' errors add up to at most tolerance · max(|f(1) − f(0)|, 0.01),
        token_tolerance: and each token's, as far as the rules tell them, to at most this · max(largest attribution,
            0.01). Infinite by default: where gradients are rounded to 16 bits they never settle.
        max_evaluations: give up after so many nodes.
        min_width: do not halve intervals of this width or less: activations a rounding error apart are one.
    """

    tolerance: float
    max_evaluations: int = 1024
    min_width: float = 0.0
    token_tolerance: float = math.inf
    intervals: list[tuple[float, float]] = field(default_factory=list)
    values: dict[float, tuple[float, Tensor]] = field(default_factory=dict)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self.intervals = [(n / _START, (n + 1) / _START) for n in range(_START)]

    @property
    def evaluations(self) -> int:
        """Nodes evaluated so far."""
        return len(self.values)

    def accept(self, alpha: float, f: float, gradient: Tensor) -> None:
        """Take what was asked for: f and its directional derivative, split over tokens, at a node."""
        self.values[alpha] = (f, gradient)

    def wanted(self) -> list[float]:
        """Nodes to evaluate next; none when the tolerance is met or the evaluations are used up."""
        missing = self._missing()
        if missing or self.exhausted:
            return missing
        opened = self._open()
        halves = [half for a, b in opened for half in ((a, (a + b) / 2), ((a + b) / 2, b))]
        refined = [interval for interval in self.intervals if interval not in set(opened)] + halves
        new = [alpha for alpha in _nodes(halves) if alpha not in self.values]
        if self.evaluations + len(new) > self.max_evaluations:
            self.exhausted = bool(opened)
            return []
        self.intervals = sorted(refined)
        return new

    def integral(self) -> Tensor:
        """∫ of the gradient over the path, [token]; its sum should be f(1) − f(0)."""
        return torch.stack([self._interval_integral(*interval) for interval in self.intervals]).sum(0)

    def errors(self) -> Tensor:
        """[interval, 1 + token]: each interval's |∫ of the derivative − Δf|, then the error of each token's integral
        there; both as a share of what they may add up to."""
        missed = [
            abs(self._interval_integral(a, b).sum().item() - (self.values[b][0] - self.values[a][0]))
            for a, b in self.intervals
        ]
        change = max(abs(self.values[1.0][0] - self.values[0.0][0]), FLOOR)
        tokens = torch.stack([self._token_errors(*interval) for interval in self.intervals])
        largest = max(self.integral().abs().max().item(), FLOOR)
        allowed = self.tolerance * change
        return torch.cat([torch.tensor(missed)[:, None] / allowed, tokens / (largest * self.token_tolerance)], dim=1)

    def _missing(self) -> list[float]:
        return [alpha for alpha in _nodes(self.intervals) if alpha not in self.values]

    def _open(self) -> list[tuple[float, float]]:
        """The fewest intervals without which the errors would add up to three quarters of what they may."""
        errors = self.errors()
        rest = errors.sum(0)
        if rest.max() <= 1:
            return []
        opened = []
        for number in errors[:, rest > 1].amax(1).argsort(descending=True).tolist():
            a, b = self.intervals[number]
            if rest.max() <= 0.75:
                break
            if b - a > self.min_width:
                opened.append((a, b))
                rest = rest - errors[number]
        self.exhausted = not opened
        return opened

    def _token_errors(self, a: float, b: float) -> Tensor:
        return _SAFETY * (self._interval_integral(a, b) - self._sum(_nodes([(a, b)]), _SIMPSON, b - a)).abs()

    def _interval_integral(self, a: float, b: float) -> Tensor:
        width = b - a
        second = a % (2 * width) > 0  # of the halves of the interval that it was made from
        nodes = [(b if second else a) + (-1 if second else 1) * n * width / 2 for n in range(5)]
        return self._sum(nodes, _FIVE, width)

    def _sum(self, nodes: list[float], weights: tuple[float, ...], width: float) -> Tensor:
        known = [self.values[alpha][1].double() for alpha in nodes]
        return sum((weight * width * g for weight, g in zip(weights, known, strict=True)), torch.zeros(()))


def _nodes(intervals: list[tuple[float, float]]) -> list[float]:
    """Ends and middles of all intervals, each once: binary fractions, so equal nodes are equal numbers."""
    return list(dict.fromkeys(node for a, b in intervals for node in (a, (a + b) / 2, b)))
