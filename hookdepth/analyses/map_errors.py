"""How well ridge maps from every point of one stream to every point of another do on tokens that they never saw.

    tables = map_errors([x_train, x_valid, x_test], [y_train, y_valid, y_test], [12, 15], device)   # states
    tables["r2"]      # [source, target]

For the floor the tokens of a target are permuted: in random pairs they change places. By x_s + x_t and x_s − x_t of
every pair, each times √½, instead of the tokens,

    Σ x yᵀ = sumsᵀ sums + differencesᵀ differences          Σ x (y permuted)ᵀ = sumsᵀ sums − differencesᵀ differences

so that the floor costs no product of its own. Both, of points i and j of one model, are those of j and i transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses.ridge import SPLIT_SEED, Fit, Sums, product, tiles
from hookdepth.analyses.subject import Tensors
from hookdepth.metrics import EPS

_BLOCK = 4096  # tokens whose predictions are held at once: an array that the allocator keeps, and does not map anew


@dataclass(frozen=True)
class _Point:
    """A point of a stream around its mean in training, float32 on the device.

    Attributes:
        pairs: of the tokens that train and of those that choose, sums and differences of pairs.
        test: the tokens that test.
        lengths, alone: of their states as they are, and of what the mean in training leaves of them.
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    test: Float[Tensor, "token width"]
    lengths: Float[Tensor, " token"]
    alone: Float[Tensor, " token"]

    def prediction_error(self, features: Tensor, weight: Tensor | None) -> Float[Tensor, " token"]:
        """‖error‖ of each token that tests; without a weight, of the mean alone."""
        if weight is None:
            return self.alone
        both = zip(self.test.split(_BLOCK), features.split(_BLOCK), strict=True)
        return torch.cat([torch.addmm(true, given, weight, alpha=-1).norm(dim=-1) for true, given in both])


class _Stream:
    """The points of a stream, a few at a time, and what was solved of each."""

    def __init__(self, states: Sequence[Tensor], device: torch.device) -> None:
        draw = torch.Generator().manual_seed(SPLIT_SEED)
        self.orders = [torch.randperm(len(one), generator=draw).to(device) for one in states[:2]]
        self.states, self.device = states, device
        self.held: dict[int, _Point] = {}
        self.fits: dict[int, Fit] = {}

    def hold(self, points: Sequence[int]) -> None:
        """Have these, and let go of all others first."""
        self.held = {number: point for number, point in self.held.items() if number in points}
        self.held |= {number: self._read(number) for number in points if number not in self.held}

    def fit(self, number: int) -> Fit:
        """An eigendecomposition a point, however often it is held."""
        if number not in self.fits:
            own = self.held[number]
            self.fits[number] = Fit(_sums(own, own)[0])
        return self.fits[number]

    def _read(self, number: int) -> _Point:
        train, valid, test = (one[:, number].to(self.device).float() for one in self.states)
        mean = train.mean(0, dtype=torch.float64).float()
        pairs = [_in_pairs(one - mean, order) for one, order in zip((train, valid), self.orders, strict=True)]
        lengths, test = test.norm(dim=-1).clamp(min=EPS), test - mean
        return _Point(pairs, test, lengths, test.norm(dim=-1))


class _Errors:
    """The tables [prompt that tests, source, target] as they fill."""

    def __init__(self, counts: Sequence[int], sources: int, targets: int, device: torch.device) -> None:
        self.counts, shape = counts, (len(counts), sources, targets)
        self.tokens = torch.tensor(counts, dtype=torch.float64, device=device)
        self.relative, self.permuted, self.squares = torch.zeros(3, *shape, dtype=torch.float64, device=device)
        self.variance = torch.zeros(targets, dtype=torch.float64, device=device)
        self.own_variance = torch.zeros(len(counts), targets, dtype=torch.float64, device=device)

    def add_target(self, number: int, target: _Point) -> None:
        """Its squares around each prompt's mean, and around that of all: those, and the means' around it."""
        parts = target.test.split(list(self.counts))
        means = torch.stack([own.mean(0, dtype=torch.float64) for own in parts])
        squares = [
            (own - mean.float()).norm(dim=-1).double().square().sum() for own, mean in zip(parts, means, strict=True)
        ]
        tokens = self.tokens[:, None]
        apart = (means - (means * tokens).sum(0) / tokens.sum()).square() * tokens
        self.own_variance[:, number] = torch.stack(squares)
        self.variance[number] = self.own_variance[:, number].sum() + apart.sum()

    def add(self, place: tuple[int, int], maps: Sequence[Tensor | None], given: _Point, target: _Point) -> None:
        """Of one pair, by the map and by that of the floor."""
        rest, floor = (target.prediction_error(given.test, weight) for weight in maps)
        cell = (slice(None), *place)
        self.relative[cell] = self._by_prompt(rest / target.lengths)
        self.permuted[cell] = self._by_prompt(floor / target.lengths)
        self.squares[cell] = self._by_prompt(rest.double().square())

    def _by_prompt(self, values: Tensor) -> Tensor:
        return torch.stack([own.sum() for own in values.double().split(list(self.counts))])

    def tables(self) -> Tensors:
        """Of all tokens, and each prompt's."""
        tokens = self.tokens[:, None, None]
        found = {"r2": 1 - self.squares.sum(0) / self.variance}
        found["per_prompt.r2"] = 1 - self.squares / self.own_variance[:, None]
        for name, sums in {"relative_error": self.relative, "permuted_error": self.permuted}.items():
            found |= {name: sums.sum(0) / tokens.sum(), f"per_prompt.{name}": sums / tokens}
        return {name: value.float().cpu() for name, value in found.items()}


def map_errors(
    source: Sequence[Tensor], target: Sequence[Tensor], counts: Sequence[int], device: torch.device
) -> Tensors:
    """Relative error, R² and the floor of every pair, and each test prompt's, from states [token, point, width].

    Args:
        source, target: the states that train, that choose the ridge and that test; of a model onto itself the same
            object, and half of the sums are taken.
        counts: tokens of each prompt that tests.
    """
    itself, counted = target is source, (source[0].shape[1], target[0].shape[1])
    predictors = _Stream(source, device)
    targets = predictors if itself else _Stream(target, device)
    errors = _Errors(counts, *counted, device)
    for tile in tiles(counted[1], sum(one[:, 0].numel() for one in target)):
        own = range(tile.start, tile.stop)
        targets.hold(own)
        for j in own:
            errors.add_target(j, targets.held[j])
        for i in range(tile.stop if itself else counted[0]):
            predictors.hold([i, *own] if itself else [i])
            for j in range(max(i, tile.start), tile.stop) if itself else own:
                x, y = predictors.held[i], targets.held[j]
                sums, exchanged = _sums(x, y)
                fit = predictors.fit(i)
                errors.add((i, j), [fit.map(sums), fit.map(exchanged)], x, y)
                if itself and i != j:
                    fit = predictors.fit(j)
                    errors.add((j, i), [fit.map(sums.transposed()), fit.map(exchanged.transposed())], y, x)
    return errors.tables()


def _sums(left: _Point, right: _Point) -> tuple[Sums, Sums]:
    """Of both as they are, and with the tokens of `right` exchanged in pairs.

    The latter are float32 throughout: a map of noise needs no more digits.
    """
    plain, exchanged = [], []
    for own, other in zip(left.pairs, right.pairs, strict=True):
        together, apart = (product(one, another) for one, another in zip(own, other, strict=True))
        exchanged.append((together - apart).float())
        plain.append(together.add_(apart))
    return Sums(*plain), Sums(*exchanged)


def _in_pairs(states: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Their sums, and of an odd number the last as it is, which stays in its place; and their differences."""
    half = len(order) // 2
    first, second, last = (states[own] for own in (order[:half], order[half : 2 * half], order[2 * half :]))
    return torch.cat([(first + second) * 0.5**0.5, last]), (first - second) * 0.5**0.5
