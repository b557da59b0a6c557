"""Timing and memory that can be believed: warm-up, synchronisation, peaks that are reset.

seconds, peak, result = once(run)      # peak in bytes beyond what was held before, None where it cannot be read
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def synchronise(device: torch.device) -> None:
    """Wait for the device, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One timed call."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def once(run: Callable[[], Result], device: torch.device) -> tuple[float, int | None, Result]:
    """One timed call, with the memory that it took at its peak beyond what was held before.

    On a GPU: allocated memory. On a CPU: resident memory, whose peak Linux resets on request; elsewhere None.
    """
    free(device)
    before = reset_peak(device)
    synchronise(device)
    begin = time.perf_counter()
    result = run()
    synchronise(device)
    taken = time.perf_counter() - begin
    after = peak_bytes(device)
    return taken, None if before is None or after is None else max(0, after - before), result


def free(device: torch.device) -> None:
    """Give back what nobody holds, so that a peak is the next call's own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: freed blocks go back to the system
    if trim is not None:
        trim(0)


def reset_peak(device: torch.device) -> int | None:
    """Start a new peak; what is held now, or None where peaks cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory held since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
