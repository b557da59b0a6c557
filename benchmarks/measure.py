"""Timing that can be believed: warm-up, synchronisation, alternation, medians, and the machine's own limit.

times = alternate({"ours": run_ours, "loop": run_loop}, rounds=3)      # seconds, median of rounds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hookdepth import Decoder
from hookdepth.plans import Plan


def synchronise() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    """One timed call."""
    synchronise()
    begin = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - begin


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int, enough: float = 150.0) -> dict[str, float]:
    """Median seconds of each; every round times all of them, so that drift of the machine hits all alike.

    Rounds end early, but not before the second, once `enough` seconds are spent.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        if number > 1 and sum(map(sum, taken.values())) > enough:
            break
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in taken.items()}


def matmul_rate(model: Decoder, rows: int = 2048) -> float:
    """FLOP/s of this machine, now, on the product that dominates the model: [rows, d] × [d, inner]."""
    d, inner = model.d_model, int(model.config.intermediate_size)
    a = torch.randn(rows, d, device=model.device, dtype=model.dtype)
    b = torch.randn(inner, d, device=model.device, dtype=model.dtype)
    repeats = max(1, int(2e11 if model.device.type == "cuda" else 4e9) // (2 * rows * d * inner))

    def products() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a, b)

    products()
    return 2 * rows * d * inner * repeats / statistics.median(seconds(products) for _ in range(5))


def layer_flops(model: Decoder) -> int:
    """FLOPs of one token through one layer: its matrices; attention's own products are left out of the limit."""
    return 2 * sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)


def unembed_flops(model: Decoder) -> int:
    """FLOPs of one unembedded position."""
    return 2 * model.d_model * int(model.config.vocab_size)


def least_flops(model: Decoder, plan: Plan, positions: int) -> float:
    """What the workload needs at least: states that differ from the trunk, and measured unembeddings."""
    return plan.least * layer_flops(model) + positions * unembed_flops(model)
