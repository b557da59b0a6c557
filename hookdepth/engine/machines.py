"""What a pass takes on a machine: the planner's prices, and by the same numbers what a run would take on a GPU.

    cost_of(model)(900, 30)              # of a pass of 900 token-layers in a model of 30: in token-layers
    MACHINES["h100"].memory             # of a GPU that need not be there; `work.seconds(outline, machine)`

A pass of n tokens takes, in each layer, n tokens' time (products at the rate that many rows reach, and what all other
kernels read and write, one after the other), and its weights are read once; and never less than the host needs to
launch the layer's kernels. Plans are made of ratios alone, so they are counted in tokens.

On GPUs the numbers are those of data sheets. In a simulation of the engine's kernels for Llama-3.1-8B on an H100 eight
analyses took 0.8 to 2.1 times as long as said here (most of them longer). No GPU has confirmed it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from hookdepth.model.decoder import Decoder

Amount = TypeVar("Amount", int, float)

_REACHED = 0.75  # of the data sheet's rate, by large products; of its bandwidth nine tenths
_KERNELS, _LAUNCH = 62, 7e-6  # of a layer with its hooks, forward; seconds of the host for each, Python included
_STREAM, _INNER, _LOGITS = 66, 5, 20  # values read and written per token and layer, per unit of width; and per logit
_ENOUGH = 32  # a pass whose tokens take so many times what it costs by itself has nothing more to gain


@dataclass(frozen=True)
class PassCost:
    """The price of a pass, in tokens through a layer.

        PassCost(10)(900, 30)             # 1200: 900, and ten tokens' time in each of 30 layers
        PassCost(10, 100)(900, 30)        # 3000: the device waits for the host

    Attributes:
        start: what each layer takes beside its tokens.
        least: what each layer takes at least.
        full: rows × tokens from which on a pass has nothing to gain from more prompts.
        top: what each layer takes besides, in one more pass from token 0.
    """

    start: int
    least: int = 0
    full: int = 4096
    top: int = 0

    def __call__(self, token_layers: Amount, n_layers: int, passes: int = 1) -> Amount:
        """Of passes that share these token-layers."""
        return max(passes * self.least * n_layers, token_layers + passes * self.start * n_layers)


USUAL = PassCost(32)
"""Of a machine of which nothing is known."""
# A CPU's kernels take longer than to call them. What a pass costs there was seen in the rate of products with few rows,
# which matrix units (16 bit) reach later; `top` in the CPU time of prompts of unequal length, together and apart.
# Beyond 2048 tokens activations fall out of its caches.
_CPU = {4: PassCost(10, full=2048, top=22), 2: PassCost(28, full=2048, top=22)}


@dataclass(frozen=True)
class Machine:
    """One GPU: Machine("NVIDIA H100", 989, 67, 3350, 80).

    Attributes:
        label: what its name begins with, or holds.
        halves, floats: dense products of 16 bit and of float32, in TFLOP/s.
        bandwidth: of its memory, in GB/s.
        memory: in GiB.
    """

    label: str
    halves: float
    floats: float
    bandwidth: float
    memory: float

    def cost(self, model: Decoder) -> PassCost:
        """Of a pass of the model: machine.cost(outline).least."""
        token = self._token(model)
        start = round(model.weight_bytes / model.n_layers / self._bytes / token)
        least = round(_KERNELS * _LAUNCH / token)
        return PassCost(start, least, max(least, _ENOUGH * start))

    def seconds(self, model: Decoder, flops: float, token_layers: float, logits: float, overhead: float) -> float:
        """What all of this takes, one after the other: machine.seconds(outline, 1e15, 1e6, 1e9, 1e4)

        Args:
            flops: of products.
            token_layers, logits: of which other kernels read and write something.
            overhead: of passes beside their tokens, in token-layers.
        """
        moved = model.dtype.itemsize * (_values(model) * token_layers + _LOGITS * logits) / self._bytes
        return flops / (_REACHED * self.rate(model)) + moved + overhead * self._token(model)

    @property
    def _bytes(self) -> float:
        return 0.9e9 * self.bandwidth

    def rate(self, model: Decoder) -> float:
        """FLOP/s of its products by the data sheet, in the model's dtype."""
        return (self.halves if model.dtype.itemsize == 2 else self.floats) * 1e12

    def _token(self, model: Decoder) -> float:
        """Seconds of one token in one layer, where there are many."""
        moved = model.dtype.itemsize * _values(model) / self._bytes
        return 2.0 * matrices(model.layers[0]) / (_REACHED * self.rate(model)) + moved


MACHINES = {
    "h200": Machine("NVIDIA H200", 989, 67, 4800, 131),
    "h100": Machine("NVIDIA H100", 989, 67, 3350, 79),
    "a100": Machine("NVIDIA A100", 312, 19.5, 2039, 79),
    "l40s": Machine("NVIDIA L40S", 362, 91.6, 864, 44),
    "l4": Machine("NVIDIA L4", 121, 30.3, 300, 22),
    "rtx4090": Machine("GeForce RTX 4090", 165, 82.6, 1008, 24),
    "rtx3090": Machine("GeForce RTX 3090", 71, 35.6, 936, 24),
}


def cost_of(model: Decoder) -> PassCost:
    """What a pass costs where the model is: the same on the same machine, so that packing and results are too.

    cost_of(load("demo")).start     # 10 on a CPU in float32

    A GPU that is in no table is taken for an A100: the ratio of its rates lies in the middle.
    """
    if model.device.type != "cuda":
        return _CPU.get(model.dtype.itemsize, _CPU[2])
    return (of_model(model) or MACHINES["a100"]).cost(model)


def of_model(model: Decoder) -> Machine | None:
    """The GPU of the table that a model is on, by its name: of_model(load("demo"))     # None"""
    name = model.device_name
    return next((one for one in MACHINES.values() if re.search(rf"{one.label}\b", name)), None)


def matrices(module: object) -> int:
    """Entries of a module's matrices: what a token is multiplied with."""
    return sum(one.numel() for one in module.parameters() if one.ndim == 2)  # type: ignore[attr-defined]


def _values(model: Decoder) -> int:
    """Read and written of one token in one layer, by kernels that are no products."""
    return _STREAM * model.d_model + _INNER * model.d_mlp
