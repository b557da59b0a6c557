"""A Hugging Face decoder's norms, rotations and gated MLPs as one kernel each, with their backwards: liger-kernel's.

    for kind, module, forward in replacements(hf_model, differences): ...      # module.forward, while the engine works

What a module computes is found by its structure and then tried: a replacement that does not agree with the module's
own forward, values and gradients, is not made. So the casts are those of Hugging Face's module, whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor, nn

from hookdepth.metrics import differs_by_rounding

Forward = Callable[..., Any]
_CASTS = (("llama", 0.0), ("gemma", 1.0))  # where float32 ends, and what is added to the weight
_ROTATION = "apply_rotary_pos_emb"


def replacements(hf: nn.Module, differences: dict[str, float]) -> Iterator[tuple[str, nn.Module, Forward]]:
    """Kind, module and what its `forward` may be, of all modules for which there is one that agrees.

    Args:
        hf: the model, on a GPU.
        differences: gets, by kind, the largest difference seen between the two, relative to the largest value.
    """
    tried: dict[Any, Any] = {}
    for module in hf.modules():
        if "forward" in vars(module):
            continue  # somebody else has replaced it already
        for kind, find in (("norm", _norm), ("mlp", _mlp), ("rotation", _rotation)):
            shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
            key = (kind, type(module), getattr(module, "variance_epsilon", None), getattr(module, "eps", None), *shapes)
            if key not in tried:
                tried[key] = find(module, partial(_agree, differences, kind))
            if tried[key] is not None:
                yield kind, module, tried[key](module)


def _norm(module: nn.Module, agree: Callable[..., bool]) -> Forward | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return None

    def make(mode: str, offset: float, module: Any) -> Forward:
        return lambda hidden: LigerRMSNormFunction.apply(hidden, module.weight, eps, offset, mode, False)

    for cast in _CASTS:
        if agree(module.forward, make(*cast, module), [_drawn(weight, 2, 3, len(weight))]):
            return partial(make, *cast)
    return None


def _mlp(module: nn.Module, agree: Callable[..., bool]) -> Forward | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Module) for part in parts) or not callable(act):
        return None
    code = getattr(type(module).forward, "__code__", None)
    if code is None or sorted(code.co_names) != ["act_fn", "down_proj", "gate_proj", "up_proj"]:
        return None  # it does more than down(act(gate(x)) · up(x))

    def fused(gate: Tensor, up: Tensor) -> Any:
        return LigerSiLUMulFunction.apply(gate, up)

    like = next(module.parameters())
    if not agree(lambda gate, up: act(gate) * up, fused, [_drawn(like, 2, 3, 64), _drawn(like, 2, 3, 64)]):
        return None
    return lambda module: lambda x: module.down_proj(fused(module.gate_proj(x), module.up_proj(x)))


def _rotation(module: nn.Module, agree: Callable[..., bool]) -> Forward | None:
    """An attention whose forward rotates by a function of its module: the same code, which finds another function."""
    forward = type(module).forward
    size = getattr(module, "head_dim", None)
    plain = getattr(forward, "__globals__", {}).get(_ROTATION)
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names or plain is None or not size:
        return None

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or cos.ndim != 3:
            return plain(q, k, cos, sin, *more, **named)
        return LigerRopeFunction.apply(q, k, cos, sin)

    like = next(module.parameters())
    angle = _drawn(like, 1, 3, int(size) // 2).float().repeat(1, 1, 2)
    cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    q, k = (_drawn(like, 2, 3, heads, int(size)).transpose(1, 2) for heads in (4, 2))

    def turned(rotate: Any, q: Tensor, k: Tensor) -> Any:
        # Copies, laid out as projections give them: the kernel works in place.
        return rotate(*(one.transpose(1, 2).clone().transpose(1, 2) for one in (q, k)), cos, sin)

    if not agree(partial(turned, plain), partial(turned, fused), [q, k]):
        return None
    found = {**forward.__globals__, _ROTATION: fused}
    other = FunctionType(forward.__code__, found, forward.__name__, forward.__defaults__, forward.__closure__)
    other.__kwdefaults__ = forward.__kwdefaults__
    return lambda module: partial(other, module)


def _agree(differences: dict[str, float], kind: str, plain: Forward, fused: Forward, inputs: list[Tensor]) -> bool:
    """Whether two functions of some tensors are the same but for rounding, and so are their gradients."""
    found = []
    with torch.enable_grad():
        for function in (plain, fused):
            given = [one.clone().requires_grad_() for one in inputs]
            try:
                values = function(*given)
            except (TypeError, ValueError, RuntimeError, AssertionError):
                return False  # it takes something else
            values = list(values) if isinstance(values, tuple) else [values]
            if [one.shape for one in values] != [one.shape for one in inputs[: len(values)]]:
                return False
            down = [_drawn(one, *one.shape, seed=1) for one in values]
            found.append([*values, *torch.autograd.grad(values, given, down)])
    worst = 0.0
    for one, other in zip(*found, strict=True):
        size = torch.full_like(one, one.abs().max().item())
        if one.dtype != other.dtype or not differs_by_rounding(one, other, size).all():
            return False
        worst = max(worst, ((one.float() - other.float()).abs().max() / size.float().max()).item())
    differences[kind] = max(differences.get(kind, 0.0), worst)
    return True


def _drawn(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[-1]))
    return made.to(like.device, like.dtype)
