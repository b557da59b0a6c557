"""Where a model's parts lie; and numbers and masks from the host to there, without waiting for what is running.

An ordinary copy waits until all earlier work of the device is done, and then the device waits for the host. From
pinned memory the copy takes its place in the device's queue like any other work.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Key = TypeVar("Key", bound=Hashable)

_WITH_A_QUEUE = {"cuda"}


def numbers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """Whole numbers as a tensor of the host: numbers([0, 4]). Of thousands `torch.tensor` takes five times as long."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def send(values: Sequence[int] | Sequence[Sequence[int]] | Tensor, device: torch.device) -> Tensor:
    """Numbers, or a tensor of the host, on a device: send([[0, 1], [2, 3]], model.device)   # [2, 2]"""
    tensor = values if isinstance(values, Tensor) else numbers(values)
    if device.type not in _WITH_A_QUEUE or tensor.device.type != "cpu":
        return tensor.to(device)
    return _pinned(tensor).to(device, non_blocking=True)


def send_together(wanted: Mapping[Key, tuple[Tensor, torch.device]]) -> dict[Key, Tensor]:
    """Tensors of one dtype and one axis, each on its device, in one copy for each device.

    send_together({"a": (numbers([0, 4]), model.device), "b": (numbers([1]), model.device)})["b"]   # [1]
    """
    found: dict[Key, Tensor] = {}
    for device in {device for _, device in wanted.values()}:
        mine = {key: given for key, (given, own) in wanted.items() if own == device}
        buffer = send(torch.cat(list(mine.values())), device)
        found.update(zip(mine, buffer.split([given.shape[0] for given in mine.values()]), strict=True))
    return found


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()


def device_name(device: torch.device) -> str:
    """A GPU by its name, all others by their kind: device_name(torch.device("cpu"))   # cpu"""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes: runs_on(model.layers[0])"""
    # accelerate's hooks know; they are on the module itself or, where weights are offloaded one by one, inside it.
    own = next(module.parameters()).device
    if own.type != "meta" and not hasattr(module, "_hf_hook"):
        return own
    for part in module.modules():
        place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return own
