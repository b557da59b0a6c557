"""GPUs that one might rent, by their data sheets: what a run would take there, told by arithmetic alone.

    MACHINES["h100"].memory     # 79; and `seconds` says how long some work takes there: nothing is measured

A run is bound by its matrix products, or by what all other kernels read and write, which come one after the other;
or, where passes are small, by the host that launches them. In a simulation of the engine's kernels for Llama-3.1-8B on
an H100 eight analyses took 0.8 to 2.1 times as long as said here (most of them longer). No GPU has confirmed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookdepth.engine.work import Work
    from hookdepth.model.decoder import Decoder

_REACHED = 0.75  # of the data sheet's rate, by large products; of its bandwidth nine tenths
_KERNELS, _LAUNCH = 62, 7e-6  # of a layer with its hooks, forward; seconds of the host for each, Python included
_STREAM, _INNER, _LOGITS = 66, 5, 20  # values read and written per token and layer, per unit of width; and per logit


@dataclass(frozen=True)
class Machine:
    """One GPU: Machine("NVIDIA H100", 989, 67, 3350, 80).

    Attributes:
        halves, floats: dense products of 16 bit and of float32, in TFLOP/s.
        bandwidth: of its memory, in GB/s.
        memory: in GiB.
    """

    label: str
    halves: float
    floats: float
    bandwidth: float
    memory: float

    def seconds(self, model: Decoder, work: Work, weights: int) -> float:
        """What some work takes in one process: machine.seconds(outline, work_of(group), weight_bytes(outline))."""
        size = model.dtype.itemsize
        rate = (self.halves if size == 2 else self.floats) * 1e12 * _REACHED
        ways = 1 + (work.backward / work.token_layers if work.token_layers else 0)
        tokens = size * (_STREAM * model.d_model + _INNER * model.d_mlp) * work.token_layers * ways
        logits = size * _LOGITS * work.positions * int(model.config.vocab_size) * ways
        moved = (tokens + logits + weights * work.passes * ways) / (0.9e9 * self.bandwidth)
        return max(sum(work.flops(model)) / rate + moved, work.passes * ways * model.n_layers * _KERNELS * _LAUNCH)

    def holds(self, work: Work, weights: int) -> bool:
        """Whether the weights, and passes beside them, fit into its memory."""
        return weights + work.bytes <= self.memory * 2**30


MACHINES = {
    "h200": Machine("NVIDIA H200", 989, 67, 4800, 131),
    "h100": Machine("NVIDIA H100", 989, 67, 3350, 79),
    "a100": Machine("NVIDIA A100", 312, 19.5, 2039, 79),
    "l40s": Machine("NVIDIA L40S", 362, 91.6, 864, 44),
    "l4": Machine("NVIDIA L4", 121, 30.3, 300, 22),
    "rtx4090": Machine("GeForce RTX 4090", 165, 82.6, 1008, 24),
    "rtx3090": Machine("GeForce RTX 3090", 71, 35.6, 936, 24),
}
