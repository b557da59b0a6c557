"""A device that is not there: what would a GPU have to wait for, and does everything lie where it must?

    gpu = AbsentGPU(monkeypatch)
    hf_model = gpu.take(hf_model)          # its parameters now lie on "meta"
    with gpu:
        hf_model(ids)                      # computed by the host, behind the scenes
    gpu.waits                              # {"copy in rows.py _layer": 2, …}: who made the host wait for the device

Tensors of the device are meta tensors, and the host keeps what each of their storages would hold: so numbers are
right, and can be compared with those of a plain run. An operation that mixes tensors of the host and of the device
is refused, as a GPU refuses it.
"""

import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hookdepth.engine import ablation, interventions
from hookdepth.model import devices

DEVICE = "meta"
_WAITS = {"_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select", "equal": "equal"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class AbsentGPU(TorchDispatchMode):
    """See the module. Attributes: waits, a count by place; copies, how many there were that need no wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits, self.copies, self.held, self.pinned = Counter(), 0, {}, set()
        monkeypatch.setattr(devices, "_WITH_A_QUEUE", {DEVICE})
        monkeypatch.setattr(devices, "_pinned", self._pin)
        on_host = torch.tensor  # a number of the host becomes a meta tensor without anybody being asked
        monkeypatch.setattr(
            torch, "tensor", lambda given, device=None, **how: on_host(given, **how).to(device or "cpu")
        )
        for module in (interventions, ablation):  # a meta tensor is refused there
            monkeypatch.setattr(module, "real_tensor", lambda _who, given: given)

    def take(self, hf):
        """A model whose parameters and buffers move to the device."""
        for module in hf.modules():
            for kind in (module._parameters, module._buffers):
                for name, value in kind.items():
                    if value is not None:
                        there = self._there(value.detach())
                        kind[name] = (
                            torch.nn.Parameter(there, requires_grad=False) if kind is module._parameters else there
                        )
        return hf

    def _pin(self, tensor):
        pinned = tensor.clone()
        key = pinned.untyped_storage()._cdata
        self.pinned.add(key)
        weakref.finalize(pinned.untyped_storage(), self.pinned.discard, key)
        return pinned

    def _there(self, real):
        """A tensor of the device that holds what a tensor of the host does."""
        made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=DEVICE)
        self._hold(made, real.clone(memory_format=torch.preserve_format))
        return made

    def _hold(self, tensor, real):
        storage = tensor.untyped_storage()
        if storage._cdata in self.held:
            return  # a view, or written in place: the host's own operation has done the same
        own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        own.copy_(real)
        self.held[storage._cdata] = own.untyped_storage()
        weakref.finalize(storage, self.held.pop, storage._cdata, None)

    def _real(self, value):
        if not isinstance(value, Tensor) or value.device.type != DEVICE:
            return torch.device("cpu") if value == torch.device(DEVICE) else value
        own = self.held.get(value.untyped_storage()._cdata)
        assert own is not None, "a tensor that torch made of a list: the host would wait here; send it, or use a slice"
        return torch.empty(0, dtype=value.dtype).set_(own, value.storage_offset(), value.shape, value.stride())

    def _wait(self, kind):
        frame = sys._getframe(2)
        while frame and ("/hookdepth/" not in frame.f_code.co_filename or "site-packages" in frame.f_code.co_filename):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}" if frame else "elsewhere"
        self.waits[f"{kind} in {where}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, leaves = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        onto = kwargs.get("device")
        here = any(t.device.type == DEVICE for t in tensors)
        if not here and (onto is None or torch.device(onto).type != DEVICE):
            return func(*args, **kwargs)
        if name == "_to_copy" and onto is not None and torch.device(onto).type != tensors[0].device.type:
            return self._across(tensors[0], torch.device(onto).type, kwargs)
        if name == "copy_" and tensors[0].device.type != tensors[1].device.type:
            self._wait("copy")
        elif name in _INDEXED:
            for index in args[1]:
                if index is not None and (index.device.type != DEVICE or index.dtype == torch.bool):
                    self._wait("index from the host" if index.device.type != DEVICE else "mask")
        elif any(t.device.type != DEVICE and t.ndim for t in tensors):
            raise RuntimeError(f"{name} of tensors of the host and of the device")
        real = func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        if name in _WAITS:
            self._wait(_WAITS[name])
        if not any(isinstance(one, Tensor) for one in tree_leaves(real)):
            return real
        if name in ("nonzero", "masked_select"):
            return self._there(real)
        made = func(*tree_map(self._moved, args), **kwargs)
        for one, own in zip(tree_leaves(made), tree_leaves(real), strict=True):
            if isinstance(one, Tensor):
                self._hold(one, own)
        return made

    def _moved(self, value):
        """An index of the host goes to the device, which waits for it; a number without axes goes as it is."""
        on_host = isinstance(value, Tensor) and value.device.type != DEVICE and value.ndim
        return self._there(value) if on_host else value

    def _across(self, source, onto, kwargs):
        if kwargs.get("non_blocking") and source.untyped_storage()._cdata in self.pinned:
            self.copies += 1
        else:
            self._wait("copy")
        real = self._real(source).to(kwargs.get("dtype") or source.dtype, copy=True)
        return real if onto != DEVICE else self._there(real)
