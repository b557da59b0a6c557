"""The state of PyTorch that surrounds every call, and that a measurement must not depend on.

    with plain_state(("cuda",), grad=False):
        ...           # no autocast, no inference mode, new tensors in float32 on the CPU

Autocast, inference mode, gradient mode and a default device belong to the calling thread. The default dtype
belongs to the process: another thread that makes tensors meanwhile sees float32. What decides how a
kernel computes (deterministic algorithms, TF32, the number of threads) is the user's choice and stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_state(kinds: Iterable[str], grad: bool) -> Iterator[None]:
    """Defaults as PyTorch starts with them, gradients on or off; what was there before comes back at the end.

    `kinds` are types of the devices that are used, beside the CPU and CUDA.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in dict.fromkeys(("cpu", "cuda", *kinds)):
            if kind != "meta" and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Both only where they differ: a default device makes every call slower.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield
