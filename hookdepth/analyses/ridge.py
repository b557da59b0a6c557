"""Ridge regression with intercept in closed form: many targets at once, the ridge chosen on tokens of its own.

    fit = Fit(x_train, x_valid)                      # [token, width]: one eigendecomposition
    weight, bias = fit.solve(y_train, y_valid)       # of one target [token, width]: a matrix and an offset
    prediction = x @ weight + bias

Products of tokens are taken in float32, over blocks of tokens whose sums are added in float64; the maps are solved in
float64. Features are divided by their spread first, so that one that is far larger than the others costs no digits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send

RIDGES = (*(10.0**power for power in range(-9, 2)), torch.inf)  # times the mean eigenvalue; the last is the mean alone
TOKENS_A_FEATURE, SPLIT_SEED, BLOCK, TILE = 4, 123, 8192, 1 << 25


class Fit:
    """What many targets have in common: see the module. `train` and `valid` are float32 on the device to compute on."""

    def __init__(self, train: Float[Tensor, "token width"], valid: Float[Tensor, "token_v width"]) -> None:
        self.mean = train.double().mean(0)
        spread = (train - self.mean.float()).double().square().mean(0).sqrt()
        self.spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        self.take(train, valid)
        values, self.vectors = torch.linalg.eigh(_product(self.train, self.train))
        values = values.clamp(min=0)
        self.valid_gram = (self.vectors.T @ _product(self.valid, self.valid) @ self.vectors).float()
        ridges = torch.tensor(RIDGES, dtype=torch.float64, device=train.device) * values.mean().clamp(min=1e-30)
        self.shrink = 1 / (values + ridges[:, None])  # [ridge, eigenvalue]

    def take(self, train: Tensor, valid: Tensor) -> None:
        """Hold the features again, which others may need the room of meanwhile: fit.take(x_train, x_valid)."""
        self.train, self.valid = self.scaled(train), self.scaled(valid)

    def drop(self) -> None:
        """Let go of them; what was solved stays: fit.drop()."""
        self.train = self.valid = self.train[:0]

    def scaled(self, values: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """The features that the maps of `maps` are of: fit.scaled(x_test) @ weight"""
        return (values - self.mean.float()) / self.spread.float()

    def maps(
        self,
        train: Float[Tensor, "token columns"],
        valid: Float[Tensor, "token_v columns"],
        count: int,
        orders: Sequence[Tensor] = (),
    ) -> Float[Tensor, "target feature width"]:
        """Maps from scaled features, float32, for targets side by side whose means in training are taken away.

        Each has the ridge of least validation error; where the mean alone is best, it is all zero.

        Args:
            orders: permutations of the tokens that train and that choose, for the floor.
        """
        features = [self.train, self.valid]
        if orders:
            features = [one[order.to(one.device)] for one, order in zip(features, orders, strict=True)]

        def by_target(product: Tensor) -> Tensor:
            return product.view(len(product), count, -1).transpose(0, 1)

        by_vector = by_target(self.vectors.T @ _product(features[0], train))
        few = by_vector.float()  # a choice needs no more
        seen = by_target(self.vectors.T.float() @ _product(features[1], valid).float())
        shrink = self.shrink.float()
        gain = (few * seen).sum(-1) @ shrink.T
        cost = ((shrink @ (few @ few.mT * self.valid_gram)) * shrink).sum(-1)
        best = (cost - 2 * gain).argmin(1)  # the squared error, but for what no ridge changes
        found = torch.zeros_like(few)
        some = best < len(RIDGES) - 1
        if some.any():
            found[some] = (self.vectors @ (self.shrink[best[some]][:, :, None] * by_vector[some])).float()
        return found

    def solve(
        self, train: Float[Tensor, "token width"], valid: Float[Tensor, "token_v width"]
    ) -> tuple[Float[Tensor, "feature width"], Float[Tensor, " width"]]:
        """The map of one target, and its offset, from features as they are: fit.solve(y_train, y_valid)."""
        mean = train.double().mean(0)
        (scaled,) = self.maps(train - mean.float(), valid - mean.float(), 1)
        weight = scaled.double() / self.spread[:, None]
        return weight.float(), (mean - self.mean @ weight).float()


def _product(left: Float[Tensor, "token a"], right: Float[Tensor, "token b"]) -> Float[Tensor, "a b"]:
    """leftᵀ · right in float64, the products of a block in float32."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for begin in range(0, len(left), BLOCK):
        total += left[begin : begin + BLOCK].T @ right[begin : begin + BLOCK]
    return total


def split_prompts(count: int) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the prompts that train, that choose the ridge, and that test: split_prompts(84)[2]    # 42 of them

    Raises:
        HookdepthError: fewer than three.
    """
    if count < 3:
        raise HookdepthError(f"{count} prompts cannot be split in three", "give more prompts, with --limit N")
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    test, rest = order[: count // 2], order[count // 2 :]
    n_valid = max(1, len(rest) // 3)
    return sorted(rest[n_valid:]), sorted(rest[:n_valid]), sorted(test)


def refuse_few(n_tokens: int, width: int, name: str) -> None:
    """Raise where there are too few training tokens: refuse_few(9000, 576, name)."""
    if n_tokens < TOKENS_A_FEATURE * width:
        raise HookdepthError(
            f"{n_tokens:,} training tokens for {width:,} features are too few for {name}: it takes "
            f"{TOKENS_A_FEATURE * width:,}",
            "give more or longer prompts (--limit N, --dataset demo-text); a third of all tokens trains",
        )


def stream_of(model: Decoder, ids: Sequence[int], positions: Sequence[int]) -> Float[Tensor, "point token width"]:
    """resid_pre[0..L−1] and the final residual at some positions, in the model's dtype on the CPU.

    stream_of(model, ids, [1, 2, 3])   # [L+1, 3, d]
    """
    points: list[Tensor] = []

    def keep(layer: int, sites: LayerSites) -> None:
        points.append(sites.resid_pre[0, list(positions)])
        if layer == model.n_layers - 1:
            points.append(sites.resid_post[0, list(positions)])

    with model.evaluating(), each_layer(model, keep):
        model.forward(send([list(ids)], model.device))
    return torch.stack([point.cpu() for point in points])


def states_of(
    model: Decoder, prompts: Sequence[tuple[Sequence[int], Sequence[int]]], on_pass: Callable[[], object]
) -> Float[Tensor, "token point width"]:
    """Those of several prompts (ids, positions), filled in place: at this size a second copy would not fit.

    states_of(model, [(ids, [1, 2, 3])], lambda: None)   # [3, L+1, d]
    """
    total = sum(len(positions) for _, positions in prompts)
    states = torch.empty(total, model.n_layers + 1, model.d_model, dtype=model.dtype)
    begin = 0
    for ids, positions in prompts:
        states[begin : begin + len(positions)] = stream_of(model, ids, positions).transpose(0, 1)
        begin += len(positions)
        on_pass()
    return states


def tiles(count: int, elements: int, most: int = TILE) -> Iterator[slice]:
    """Slices of so many things of so many elements each that a tile stays small: list(tiles(31, 576 * 576))."""
    size = max(1, most // max(1, elements))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))
