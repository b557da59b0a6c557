"""An MLP's rows a few at a time, on a CPU: what lies between its matrices then stays in the caches.

    with in_portions([layer.mlp for layer in model.layers]):
        hidden = model.forward(token_ids)    # the same bits, in less time where there are thousands of tokens

A pass has tens of thousands of tokens, and an MLP's inner values are the widest of its layers. Written whole, each is
hundreds of MiB, which the system hands out page by page, and takes back when it is let go, in every layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hookdepth.model.turns import OwnThread

_TOKENS = 1024  # of a portion: from some hundreds on, a product of the demo model's runs at its full rate
_MATRICES = (2, 3)


@contextmanager
def in_portions(mlps: Iterable[nn.Module]) -> Iterator[None]:
    """Let those of these modules that treat each row by itself, and may do so in any number, take portions of rows."""
    with ExitStack() as stack:
        for mlp in mlps:
            if _is_plain(mlp):
                plain = mlp.forward
                mlp.forward = partial(_portion_by_portion, mlp, plain, OwnThread())
                stack.callback(delattr, mlp, "forward")
        yield


def _is_plain(mlp: nn.Module) -> bool:
    """Whether it is a few matrices in float32 on the CPU and what has neither weights nor state: no experts, nothing
    quantised, and nobody has put another call in its place."""
    inside = list(mlp.modules())
    matrices = [one for one in inside if type(one) in (nn.Linear, Conv1D)]
    weights = sum(1 for one in inside if one not in matrices for _ in (*one.parameters(False), *one.buffers(False)))
    taken = any("forward" in vars(one) for one in inside)
    fit = all(one.weight.device.type == "cpu" and one.weight.dtype == torch.float32 for one in matrices)
    return len(matrices) in _MATRICES and not weights and not taken and fit


def _portion_by_portion(mlp: nn.Module, plain: Callable[..., Tensor], mine: OwnThread, hidden: Tensor) -> Tensor:
    tokens = hidden.shape[:-1].numel()
    # A hook inside wants to see all rows at once, and a backward pass keeps all that is between the matrices anyway.
    seen = any(one._forward_hooks or one._forward_pre_hooks for one in mlp.modules() if one is not mlp)
    if not mine or seen or torch.is_grad_enabled() or hidden.ndim != 3 or tokens <= _TOKENS:
        return plain(hidden)
    return torch.cat([plain(rows) for rows in hidden.tensor_split(-(-tokens // _TOKENS))])
