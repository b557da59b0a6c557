"""Ridge regression with intercept in closed form, from sums over tokens, the ridge chosen on tokens of its own.

    weight, bias = ridge_map((x_train, x_valid), (y_train, y_valid))     # [token, width] each
    prediction = x @ weight + bias

    fit = Fit(Sums(product(x_train, x_train), product(x_valid, x_valid)))    # around means: one eigendecomposition
    weight = fit.map(Sums(product(x_train, y_train), product(x_valid, y_valid)))                    # of one target

Products of tokens are taken in float32, over blocks of tokens whose sums are added in float64. In float64 are the
eigenvectors found, and the sums seen along them, which small eigenvalues divide; the choice of the ridge and the map
itself need no more than float32. Features are divided by their spread first, so that one that is far larger than the
others costs no digits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.reading import points_of
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder

RIDGES = (*(10.0**power for power in range(-9, 2)), torch.inf)  # times the mean eigenvalue; the last is the mean alone
TOKENS_A_FEATURE, SPLIT_SEED, BLOCK, TILE = 4, 123, 8192, 3 << 25
_TIE = 1e-6


@dataclass(frozen=True)
class Sums:
    """xᵀy of features and targets around their means in training, over the tokens that train, that choose the ridge.

    Sums(product(x_train, y_train), product(x_valid, y_valid))
    """

    train: Float[Tensor, "feature width"]
    valid: Float[Tensor, "feature width"]

    def transposed(self) -> Sums:
        """Those of the way back: Sums(product(x, y), product(x_v, y_v)).transposed()"""
        return Sums(self.train.T, self.valid.T)


class Fit:
    """What the maps from one point have in common, of the sums of its features with themselves: see the module."""

    def __init__(self, own: Sums) -> None:
        spread = own.train.diagonal().sqrt()
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        values, vectors = torch.linalg.eigh(own.train / spread / spread[:, None])
        # No feature has a direction of its own below what float32 sums are off: such as of fewer different tokens than
        # features. Divided by it, noise would predict whatever goes along there on tokens that are new.
        noise = (-2 * values.min()).clamp(min=8 * torch.finfo(torch.float32).eps)
        values = torch.where(values > noise, values, torch.zeros_like(values))
        into = (vectors / spread[:, None]).T.contiguous()  # of features that are not divided by it
        self.into = {torch.float64: into, torch.float32: into.float()}
        self.valid_gram = (into @ own.valid @ into.T).float()
        ridges = torch.tensor(RIDGES, dtype=torch.float64, device=into.device) * values.mean().clamp(min=1e-30)
        self.shrink = ((values > 0) / (values + ridges[:, None])).float()  # [ridge, eigenvalue]

    def map(self, sums: Sums) -> Float[Tensor, "feature width"] | None:
        """The map of least validation error, None where the mean alone is best: fit.map(sums)

        Sums may be float32 where digits do not matter.
        """
        into = self.into[torch.float32]
        by_vector = (self.into[sums.train.dtype] @ sums.train).float()
        gain = self.shrink @ (by_vector * (into @ sums.valid.float())).sum(-1)
        cost = ((self.shrink @ (by_vector @ by_vector.T).mul_(self.valid_gram)) * self.shrink).sum(-1)
        squares = cost - 2 * gain  # the error, but for what no ridge changes
        # Of ridges that float32 cannot tell apart the smallest: where nearly all is predicted it errs least.
        best = int((squares <= squares.min() * (1 - _TIE)).int().argmax())
        if best == len(RIDGES) - 1:
            return None
        return into.T @ by_vector.mul_(self.shrink[best][:, None])


def ridge_map(
    features: Sequence[Float[Tensor, "token feature"]], targets: Sequence[Float[Tensor, "token width"]]
) -> tuple[Float[Tensor, "feature width"], Float[Tensor, " width"]]:
    """The map of one target, and its offset: ridge_map((x_train, x_valid), (y_train, y_valid))"""
    mean, offset = (one[0].mean(0, dtype=torch.float64) for one in (features, targets))
    x, y = [one - mean.float() for one in features], [one - offset.float() for one in targets]
    fit = Fit(Sums(*(product(one, one) for one in x)))
    weight = fit.map(Sums(*(product(one, other) for one, other in zip(x, y, strict=True))))
    if weight is None:
        weight = torch.zeros_like(mean[:, None] * offset, dtype=torch.float32)
    return weight, (offset - mean @ weight.double()).float()


def product(left: Float[Tensor, "token a"], right: Float[Tensor, "token b"]) -> Float[Tensor, "a b"]:
    """leftᵀ · right in float64, the products of a block in float32: product(x, y)"""
    first, *others = zip(left.split(BLOCK), right.split(BLOCK), strict=True)
    total = (first[0].T @ first[1]).double()
    for one, other in others:
        total += one.T @ other
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
    return points_of(model, ids)[:, list(positions)].cpu()


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
