"""What the numbers of a model depend on, as results say it: weights, config and kernels.

Weights are read once, at the speed of memory. A block of 128 KiB becomes two sums modulo 2^64 of its words times
fixed random odd numbers (of the whole words, and of their upper halves): a change of one word always changes
them, any other change does but for chance, in one of about 2^64 cases. SHA-256 over the sums, names, shapes and
dtypes does the rest, so that exchanged blocks, rows and tensors are noticed too. Measured on one core of a server CPU
(AMD EPYC): 4.3 GB/s, beside 1.5 GB/s of SHA-256. On a GPU the sums are taken where the weights lie, and only they
travel.

Nothing is remembered between calls: a training loop changes weights in ways that no version counter shows.
"""

from __future__ import annotations

import hashlib
import platform
import uuid
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth._version import __version__
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import device_name
from hookdepth.model.positions import depends_on_length

_WORDS = 1 << 14  # of 8 bytes, in a block
_IN_CACHE = 8  # blocks that a core's cache holds
_AT_ONCE = 256  # blocks on a GPU, so that it is busy and little memory is taken
PROCESS = uuid.uuid4().hex


def versions() -> dict[str, str]:
    """Of hookdepth and what it computes with: versions()["torch"]"""
    return {
        "hookdepth": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def identity_of(model: Decoder) -> dict[str, Any]:
    """All that the numbers of a model depend on: `Decoder.describe`, its weights, and what was hung onto it: JSON-able.

    `modules_sha256` is over classes and numbers that modules keep beside their weights, `adapters` says which of PEFT's
    adapters act, and how strongly. `hooks` names hooks that are not hookdepth's: what they do cannot be known, so those
    of another process never count as the same. `layer_devices` is there where the layers run on several devices.
    """
    about = {**model.describe(), "weights": weights_digest(model.hf), "modules_sha256": _modules_digest(model.hf)}
    devices = [device_name(model.layer_device(layer)) for layer in range(model.n_layers)]
    if len({*devices, about["device"]}) > 1:
        about["layer_devices"] = devices
    if (experts := getattr(model.config, "_experts_implementation", None)) is not None:
        about["experts_implementation"] = str(experts)
    if adapters := _adapters(model.hf):
        about["adapters"] = adapters
    if hooks := _hooks(model.hf):
        about["hooks"] = hooks
    return about


def _modules_digest(hf: nn.Module) -> str:
    """Over the classes of all modules, and the numbers that they keep beside their weights: an epsilon, a window.

    Of a model as it was loaded the config says them; whoever changes them in a module does not change the config.
    """
    whole = hashlib.sha256()
    for name, module in hf.named_modules():
        kept = {} if depends_on_length(module) else vars(module)
        lasting = {key: value for key, value in kept.items() if not key.startswith("_") and "cached" not in key}
        own = sorted((key, value) for key, value in lasting.items() if type(value) in (int, float))
        whole.update(repr((name, type(module).__qualname__, own)).encode())
    return whole.hexdigest()


def weights_digest(hf: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and sums of every parameter and buffer of a module.

    It does not depend on device, memory layout or the order in which tensors were made. Tied tensors are read once.
    Weights that accelerate keeps elsewhere (CPU memory, disk) are fetched from there one by one; one that nobody knows
    where to find is refused. Quantised weights count as they are packed, with their scales.
    """
    found: list[tuple[str, Tensor]] = []
    read: dict[Any, Tensor] = {}
    with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, tensor in sorted(_named(hf).items()):
            fetched = _fetched(hf, name, tensor)
            for part, plain in _parts(name, fetched):
                place = (plain.device, plain.data_ptr(), plain.shape, plain.stride(), plain.dtype)
                sums = read[place] if place in read else _sums(plain, pool)
                if fetched is tensor:  # what was fetched goes, and the next may come to lie at its place
                    read[place] = sums
                found.append((f"{part} {list(plain.shape)} {plain.dtype}", sums))
    whole = hashlib.sha256()
    for what, sums in found:  # here, and only here, a GPU is waited for
        whole.update(f"{what}\n".encode())
        whole.update(sums.cpu().numpy().tobytes())
    return whole.hexdigest()


def _named(hf: nn.Module) -> dict[str, Tensor]:
    # First, since bitsandbytes repacks weights when it is asked; the scales of its weights are found only here.
    named = {name: value for name, value in hf.state_dict().items() if isinstance(value, Tensor)}
    named |= dict(hf.named_parameters(remove_duplicate=False))
    for owner, module in hf.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            # Rotary factors that follow the length of a text are those of whichever text ran last.
            passing = own.endswith("inv_freq") and "original" not in own and depends_on_length(module)
            if not passing:
                named[f"{owner}.{own}" if owner else own] = buffer
    return named


def _fetched(hf: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "meta":
        return tensor
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):  # the hook lies on the module itself, or on one around it
        hook = getattr(hf.get_submodule(".".join(path[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            stored = getattr(one, "weights_map", None)
            try:
                if stored is not None:
                    return stored[".".join(path[depth:])]
            except KeyError:
                pass  # this map is of other weights: a hook further out may know
    what = f"the weight {name!r} is on the meta device, and nothing says where its values are"
    raise HookdepthError(what, "load the model with from_pretrained, or give hookdepth its folder")


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A plain tensor, or the plain tensors that one of a class of its own (torchao, DTensor) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor.as_subclass(Tensor).detach()
        return
    inner, context = tensor.__tensor_flatten__()
    for attribute in inner:
        yield from _parts(f"{name}.{attribute} {type(tensor).__name__} {context}", getattr(tensor, attribute))


def _sums(tensor: Tensor, pool: Executor) -> Tensor:
    """Two sums a block, as int64 on the tensor's device; the last block is filled up with zeros."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8 or raw.data_ptr() % 8:
        raw = raw.clone()
    n_words, n_blocks = raw.numel() // 8, raw.numel() // 8 // _WORDS
    words = raw[: 8 * n_words].view(torch.int64)
    blocks = words[: n_blocks * _WORDS].view(n_blocks, _WORDS)
    whole = _cpu_sums(blocks, pool) if raw.device.type == "cpu" else _device_sums(blocks)
    rest = raw[8 * n_blocks * _WORDS :]
    last = torch.zeros(8 * _WORDS, dtype=torch.uint8, device=raw.device)
    last[: rest.numel()] = rest
    return torch.cat([whole, _device_sums(last.view(torch.int64)[None])]) if rest.numel() else whole


def _device_sums(blocks: Tensor) -> Tensor:
    keys = _keys(blocks.device)
    sums = [(part * keys).sum(1) for some in blocks.split(_AT_ONCE) for part in (some, some >> 32)]
    pairs = [torch.stack(pair, 1) for pair in zip(sums[::2], sums[1::2], strict=True)]
    return torch.cat(pairs) if pairs else blocks.new_zeros((0, 2))


def _cpu_sums(blocks: Tensor, pool: Executor) -> Tensor:
    keys, sums = _keys(blocks.device), torch.empty((len(blocks), 2), dtype=torch.int64)

    def add(start: int) -> None:
        some = blocks[start : start + _IN_CACHE]
        sums[start : start + _IN_CACHE, 0] = torch.mv(some, keys)
        sums[start : start + _IN_CACHE, 1] = torch.mv(some >> 32, keys)

    list(pool.map(add, range(0, len(blocks), _IN_CACHE)))
    return sums


@cache
def _keys(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits: a word times one of them is another number for every other word."""
    raw = bytearray(hashlib.shake_256(b"hookdepth").digest(8 * _WORDS))
    return (torch.frombuffer(raw, dtype=torch.int64) | 1).to(device)


def _adapters(hf: nn.Module) -> dict[str, Any]:
    marks = ("active_adapters", "disable_adapters", "scaling")
    layers: dict[str, Any] = {name: m for name, m in hf.named_modules() if all(hasattr(m, mark) for mark in marks)}
    return {
        name: {
            "active": list(module.active_adapters),
            "merged": list(getattr(module, "merged_adapters", [])),
            "scaling": {key: float(value) for key, value in dict(module.scaling).items()},
            "off": bool(module.disable_adapters),
        }
        for name, module in layers.items()
    }


def _hooks(hf: nn.Module) -> list[str]:
    found = []
    for name, module in hf.named_modules():
        for number, hook in [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]:
            function = getattr(hook, "func", hook)  # of a partial
            if not str(getattr(function, "__module__", "")).startswith(("transformers.", "accelerate.", "peft.")):
                what = getattr(function, "__qualname__", type(function).__name__)
                found.append(f"{name or 'model'}: {what}, number {number} of process {PROCESS}")
    return found
