"""The state of PyTorch that surrounds every call, and that a measurement must not depend on.

Autocast, inference mode, gradient mode and a default device belong to the calling thread. The default dtype
belongs to the process: another thread that makes tensors meanwhile sees float32. What decides how a
kernel computes (deterministic algorithms, TF32, the number of threads) is the user's choice and stays. The one
exception is cuDNN's attention: it makes a plan for every shape that it has not met, batch included, and here every
layer has another batch. For the shape of Llama-3.1-8B that is seconds at every new length of a prompt (PyTorch puts
cuDNN first on Hopper). It is off while the engine works, unless the user has turned off all other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from hookdepth.errors import HookdepthError

P = ParamSpec("P")
R = TypeVar("R")


def plainly(call: Callable[P, R]) -> Callable[P, R]:
    """The same function in plain state: what it makes beside its passes depends on no default of its caller either."""

    @wraps(call)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain_state((), grad=torch.is_grad_enabled()):
            return call(*args, **kwargs)

    return plain


@contextmanager
def plain_state(kinds: Iterable[str], grad: bool) -> Iterator[None]:
    """Defaults as PyTorch starts with them on devices of these kinds, gradients on or off; the caller's at the end."""
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
        stack.enter_context(_attention_without_plans())
        yield


@contextmanager
def plain_model(hf: nn.Module, name: str, grad: bool) -> Iterator[None]:
    """A model in evaluation mode, its parameters frozen, nothing compiled; as it was before at the end."""
    if grad and any(parameter.is_inference() for parameter in hf.parameters()):
        what = f"the weights of {name!r} were made in inference mode, and no gradient flows through them"
        raise HookdepthError(what, "load the model outside of torch.inference_mode()")
    modules = list(hf.modules())
    with ExitStack() as stack:
        if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules):
            # Compiled code may not see hooks that come later, and every pass has other shapes.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        training = [module for module in modules if module.training]
        for module in training:
            stack.callback(setattr, module, "training", True)
        for parameter in hf.parameters() if grad else ():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        if training:
            hf.eval()
        yield


@contextmanager
def _attention_without_plans() -> Iterator[None]:
    kernels = torch.backends.cuda
    others = kernels.flash_sdp_enabled() or kernels.mem_efficient_sdp_enabled() or kernels.math_sdp_enabled()
    if not (kernels.cudnn_sdp_enabled() and others):
        yield
        return
    kernels.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        kernels.enable_cudnn_sdp(True)
