"""How well ridge maps from every point of one stream to every point of another do on tokens that they never saw.

tables = map_errors([x_train, x_valid, x_test], [y_train, y_valid, y_test], [12, 15], device)   # states
tables["r2"]      # [source, target]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hookdepth.analyses.base import Tensors
from hookdepth.analyses.ridge import SPLIT_SEED, Fit, tiles
from hookdepth.metrics import EPS


def map_errors(source: list[Tensor], target: list[Tensor], counts: Sequence[int], device: torch.device) -> Tensors:
    """Relative error, R² and the floor of every pair, and each test prompt's, from states [point, token, width].

        map_errors(source, target, [12, 15], device)["relative_error"]

    Args:
        source, target: the states that train, that choose the ridge and that test.
        counts: tokens of each prompt that tests.
    """
    draw = torch.Generator().manual_seed(SPLIT_SEED)
    orders = [torch.randperm(one.shape[1], generator=draw) for one in target]
    shape = (len(counts), len(source[0]), len(target[0]))
    error, squares, permuted = torch.zeros(3, *shape, dtype=torch.float64, device=device)
    size = max(target[0][0].numel(), source[0].shape[2] * target[0].shape[2])
    for i in range(shape[1]):
        x = [one[i].to(device).float() for one in source]
        fit = Fit(x[0], x[1])
        for own in tiles(shape[2], size):
            y = [one[own].to(device).float() for one in target]
            for j, (relative, square) in enumerate(_tested(fit, x[2], y), own.start):
                error[:, i, j], squares[:, i, j] = _by_prompt(relative, counts), _by_prompt(square, counts)
            mixed = [one[:, order.to(device)] for one, order in zip(y, orders, strict=True)]
            for j, (relative, _) in enumerate(_tested(fit, x[2], mixed), own.start):
                permuted[:, i, j] = _by_prompt(relative, counts)
    variance = _squares_around_mean(target[2], [sum(counts)])
    whole = {"relative_error": error.sum(0) / sum(counts), "permuted_error": permuted.sum(0) / sum(counts)}
    whole["r2"] = 1 - squares.sum(0).cpu() / variance
    tokens = torch.tensor(counts, device=device)[:, None, None]
    own_r2 = 1 - squares.cpu() / _squares_around_mean(target[2], counts)[:, None]
    each = {"relative_error": error / tokens, "permuted_error": permuted / tokens, "r2": own_r2}
    found = whole | {f"per_prompt.{name}": value for name, value in each.items()}
    return {name: value.float().cpu() for name, value in found.items()}


def _tested(fit: Fit, x: Tensor, y: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each target ‖error‖/‖target‖ and ‖error‖² of every token that tests."""
    for weight, bias, true in zip(*fit.solve(y[0], y[1]), y[2], strict=True):
        rest = true - bias
        if weight.any():  # where the mean alone is best there is nothing to multiply
            rest -= x @ weight
        length = rest.norm(dim=-1).double()
        yield length / true.norm(dim=-1).double().clamp(min=EPS), length.square()


def _by_prompt(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.stack([own.sum() for own in values.split(list(counts))])


def _squares_around_mean(states: Tensor, counts: Sequence[int]) -> Tensor:
    """[prompt, point] of [point, token, width], each prompt's around its own mean."""
    parts = [[own.double() for own in point.split(list(counts))] for point in states]
    return torch.tensor([[((own - own.mean(0)) ** 2).sum() for own in point] for point in parts]).T
