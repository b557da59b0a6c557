"""How well ridge maps from every point of one stream to every point of another do on tokens that they never saw.

tables = map_errors([x_train, x_valid, x_test], [y_train, y_valid, y_test], [12, 15], device)   # states
tables["r2"]      # [source, target]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookdepth.analyses.ridge import SPLIT_SEED, Fit, tiles
from hookdepth.analyses.subject import Tensors
from hookdepth.metrics import EPS


def map_errors(
    source: Sequence[Tensor], target: Sequence[Tensor], counts: Sequence[int], device: torch.device
) -> Tensors:
    """Relative error, R² and the floor of every pair, and each test prompt's, from states [token, point, width].

    Args:
        source, target: the states that train, that choose the ridge and that test.
        counts: tokens of each prompt that tests.
    """
    draw = torch.Generator().manual_seed(SPLIT_SEED)
    orders = [torch.randperm(len(one), generator=draw) for one in target[:2]]
    shape = (len(counts), source[0].shape[1], target[0].shape[1])
    error, squares, permuted = torch.zeros(3, *shape, dtype=torch.float64, device=device)
    fits: dict[int, Fit] = {}  # an eigendecomposition a source, however many tiles there are
    variance, own_variance = torch.zeros(shape[2]), torch.zeros(len(counts), shape[2])
    for own in tiles(shape[2], max(target[0][:, 0].numel(), source[0].shape[2] * target[0].shape[2])):
        y = [one[:, own].to(device).float() for one in target]
        lengths = y[2].norm(dim=-1).clamp(min=EPS)
        mean = y[0].double().mean(0).float()
        y = [one - mean for one in y]
        alone = _by_prompt(y[2].norm(dim=-1) / lengths, counts)
        variance[own] = _squares_around_mean(y[2], [sum(counts)])[0]
        own_variance[:, own] = _squares_around_mean(y[2], counts)
        for i in range(shape[1]):
            x = [one[:, i].to(device).float() for one in source]
            if i in fits:
                fits[i].take(x[0], x[1])
            else:
                fits[i] = Fit(x[0], x[1])
            fit = fits[i]
            test, flat = fit.scaled(x[2]), [one.flatten(1) for one in y[:2]]
            for order in ([], orders):
                for j, weight in enumerate(fit.maps(flat[0], flat[1], y[0].shape[1], order)):
                    place = (slice(None), i, own.start + j)
                    if not weight.any():  # the mean alone
                        rest, relative = y[2][:, j].norm(dim=-1), alone[:, j]
                    else:
                        rest = torch.addmm(y[2][:, j], test, weight, alpha=-1).norm(dim=-1)
                        relative = _by_prompt(rest / lengths[:, j], counts)
                    if order:
                        permuted[place] = relative
                    else:
                        error[place], squares[place] = relative, _by_prompt(rest.double().square(), counts)
            fit.drop()
    whole = {"relative_error": error.sum(0) / sum(counts), "permuted_error": permuted.sum(0) / sum(counts)}
    whole["r2"] = 1 - squares.sum(0).cpu() / variance
    tokens = torch.tensor(counts, device=device)[:, None, None]
    each = {"relative_error": error / tokens, "permuted_error": permuted / tokens}
    each["r2"] = 1 - squares.cpu() / own_variance[:, None]
    found = whole | {f"per_prompt.{name}": value for name, value in each.items()}
    return {name: value.float().cpu() for name, value in found.items()}


def _by_prompt(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums over each prompt's tokens."""
    return torch.stack([own.double().sum(0) for own in values.split(list(counts))])


def _squares_around_mean(states: Tensor, counts: Sequence[int]) -> Tensor:
    """[prompt, point] of [token, point, width], each prompt's around its own mean."""
    parts = (own.double() for own in states.split(list(counts)))
    return torch.stack([(own - own.mean(0)).square().sum((0, 2)) for own in parts]).cpu()
