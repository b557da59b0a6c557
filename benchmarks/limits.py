"""What the machine and the workload allow: rates measured beside the runs, the least work, and the floor in seconds.

    machine = Meter(model)()                                 # FLOP/s and byte/s, of this model's dtype
    floor(model_size(model), Need(token_layers=5e4, positions=5e3), machine).seconds

The floor is the larger of two times, as if the other were hidden behind it: the least products at the rate of
matrix products of the model's own shape; and the least traffic (weights read once, each state that differs
from the clean run read and written once per layer) at the measured bandwidth. Attention's own products,
elementwise work and the softmax of the logits are left out, so nothing can be faster than the floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import seconds
from hookdepth import Decoder


@dataclass(frozen=True)
class Machine:
    """FLOP/s of matrix products and byte/s of memory, for one dtype."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Size:
    """Of a model: FLOPs of a token in a layer and of an unembedded position, bytes of weights and of a state."""

    layer_flops: int
    unembed_flops: int
    weight_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Need:
    """The least that a workload has to do.

    Attributes:
        token_layers: states that differ from the clean run (one token through one layer), and each clean run once.
        positions: measured unembeddings.
        passes: 1 forward, 2 forward and gradients with respect to activations (the same products again).
    """

    token_layers: float
    positions: float
    passes: int = 1

    def __add__(self, other: Need) -> Need:
        """Both, one after the other; in token-layers of forward passes."""
        return Need(
            self.passes * self.token_layers + other.passes * other.token_layers,
            self.passes * self.positions + other.passes * other.positions,
        )


@dataclass(frozen=True)
class Floor:
    """Seconds, and what sets them: compute or memory."""

    seconds: float
    bound: str
    flops: float
    bytes: float


def floor(size: Size, need: Need, machine: Machine) -> Floor:
    """The larger of compute and memory time.

    floor(Size(10, 100, 1000, 8), Need(20, 3), Machine(50.0, 100.0)).seconds   # max(500/50, 1320/100)
    """
    flops = need.passes * (need.token_layers * size.layer_flops + need.positions * size.unembed_flops)
    moved = need.passes * (size.weight_bytes + 2 * need.token_layers * size.state_bytes)
    compute, memory = flops / machine.flops, moved / machine.bandwidth
    return Floor(max(compute, memory), "compute" if compute >= memory else "memory", flops, moved)


def model_size(model: Decoder) -> Size:
    """Counted on the model's parameters."""
    layer = sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)
    unembed = model.d_model * int(model.config.vocab_size)
    itemsize = model.dtype.itemsize
    weights = (layer * model.n_layers + unembed) * itemsize
    return Size(2 * layer, 2 * unembed, weights, model.d_model * itemsize)


# Of a reading: long enough for a clock, and on a GPU to reach the clocks that it keeps under load, near half a second.
_FLOPS, _FLOPS_ON_GPU = 1e10, {2: 3e14, 4: 2e13}
_BYTES, _BYTES_ON_GPU = 1 << 27, 1 << 30


class Meter:
    """Measures the machine as it is at this moment: on one that others use too, rates move by a factor of two within
    a minute, so a floor is made of readings right before and after the runs that are held against it.

        meter = Meter(model)
        meter()      # Machine: the product that dominates the model, [rows, d] × [d, inner], and a large copy
    """

    def __init__(self, model: Decoder, rows: int = 2048) -> None:
        on_gpu = model.device.type == "cuda"
        self.device = model.device
        d, inner = model.d_model, int(model.config.intermediate_size)
        self.a = torch.randn(rows, d, device=model.device).to(model.dtype)
        self.b = torch.randn(inner, d, device=model.device).to(model.dtype)
        self.flops = 2 * rows * d * inner
        self.repeats = max(1, int(_FLOPS_ON_GPU[model.dtype.itemsize] if on_gpu else _FLOPS) // self.flops)
        self.source = torch.ones(_BYTES_ON_GPU if on_gpu else _BYTES, dtype=torch.uint8, device=model.device)
        self.target = torch.empty_like(self.source)
        self()

    def __call__(self) -> Machine:
        """The rates now."""
        times = 1 if self.device.type == "cuda" else 3
        product = statistics.median(seconds(self._products, self.device) for _ in range(times))
        copy = statistics.median(seconds(self._copy, self.device) for _ in range(3))
        return Machine(self.flops * self.repeats / product, 2 * self.source.numel() / copy)

    def _products(self) -> None:
        for _ in range(self.repeats):
            torch.nn.functional.linear(self.a, self.b)

    def _copy(self) -> None:
        self.target.copy_(self.source)


def typical(readings: Sequence[Machine]) -> Machine:
    """The median of each rate: typical([Machine(1.0, 5.0), Machine(2.0, 4.0), Machine(9.0, 3.0)]) is (2.0, 4.0)."""
    return Machine(
        statistics.median(reading.flops for reading in readings),
        statistics.median(reading.bandwidth for reading in readings),
    )
