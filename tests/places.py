"""Several devices on a machine that has one: tensors carry the name of a device, and calls that mix two fail.

    with Places():
        a, b = torch.zeros(3, device="xpu:0"), torch.zeros(3, device="xpu:1")
        a + b                      # RuntimeError: two devices
        a + b.to("xpu:0")         # fine, and its .device is xpu:0

All data lie in the host's memory, so values can be compared; what is faked is the place alone. Every call of
PyTorch's Python interface is checked, as CUDA would check it: zero-dimensional tensors may come from anywhere.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

HOST = torch.device("cpu")


class Places(TorchFunctionMode):
    """See the module. `calls` counts what was checked, `moves` what was moved between two places."""

    def __init__(self):
        super().__init__()
        self.calls = self.moves = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return place_of(args[0])
        if func is torch.device or "device" in getattr(func, "__name__", ""):
            return func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:  # each gradient lies where its input does
            return tuple(put(one, place_of(of)) for one, of in zip(func(*args, **kwargs or {}), args[1], strict=True))
        leaves, spec = tree_flatten((args, kwargs or {}))
        to = [torch.device(leaf) for leaf in leaves if is_device(leaf)]
        leaves = [HOST if is_device(leaf) else leaf for leaf in leaves]
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        target = to[0] if to else HOST if name in ("cpu", "numpy") else None
        places = {place_of(one) for one in tensors if one.dim()}
        if name in ("__getitem__", "__setitem__"):  # CUDA takes their indices from the host, too
            places = {place_of(tensors[0])} | {place for place in places if place != HOST}
        self.calls += 1
        if target is None and len(places) > 1:
            raise RuntimeError(f"{name} was given tensors on two devices: {sorted(map(str, places))}")
        self.moves += target is not None and bool(places - {target})
        args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        here = target or (places.pop() if places else place_of(tensors[0]) if tensors else HOST)
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and place_of(one) != here:
                if target is not None and any(one is given for given in tensors):
                    return put(one.view_as(one), here)  # "moved" where it was: another tensor, another place
                put(one, here)
        return result


def is_device(leaf):
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith(("xpu:", "cpu")))


def place_of(tensor):
    return getattr(tensor, "_place", HOST)


def put(tensor, place):
    tensor._place = torch.device(place)
    return tensor


class Sender(AlignDevicesHook):
    """accelerate's hook as it sends inputs to a module's device; the weights are there already."""

    def init_hook(self, module):
        return module


def spread(hf, places):
    """Put a model's layers on these places in turn, embedding on the first and norm and head on the last."""
    base = hf.model
    modules = [(layer, places[n * len(places) // len(base.layers)]) for n, layer in enumerate(base.layers)]
    modules += [(base.embed_tokens, places[0]), (base.rotary_emb, places[0]), (base.norm, places[-1])]
    modules += [(hf.lm_head, places[-1])]
    for module, place in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            put(tensor, place)
        add_hook_to_module(module, Sender(execution_device=torch.device(place)))
    return hf
