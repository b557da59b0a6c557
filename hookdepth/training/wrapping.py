"""What a training loop wraps its model in, and how to get at the decoder inside.

DDP, torch.compile (the function, and a module's own `compile()`), PEFT and accelerate, in any order. FSDP2 wraps
nothing: it changes a module's class and leaves its names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder


@dataclass(frozen=True)
class Target:
    """A model as the loop calls it, and what is inside."""

    outer: nn.Module
    core: nn.Module  # without DDP and torch.compile; PEFT's wrapper stays, since it may add tokens
    decoder: Decoder
    compiled: bool  # some part of it is, so hooks that are added to it later never run


def unwrap(model: nn.Module, tokenizer: Any = None) -> Target:
    """Find the decoder in what the training loop calls: unwrap(torch.compile(model)).compiled     # True"""
    hf = core = _without_wrappers(model)
    while callable(get_base := getattr(hf, "get_base_model", None)):  # PEFT
        if (inner := _without_wrappers(get_base())) is hf:
            break
        hf = inner
    return Target(model, core, Decoder(hf, tokenizer), any(map(_is_compiled, model.modules())))


def _without_wrappers(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel):
            what = "nn.DataParallel copies the model anew for every forward pass, and the copies cannot be read"
            raise HookdepthError(what, "use DistributedDataParallel (torchrun), or one device")
        children = model._modules
        inner = children.get("_orig_mod", children.get("module"))  # torch.compile; DDP and engines like it
        if inner is None:
            return model
        model = inner


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def run_eagerly(target: Target) -> Iterator[None]:
    """Compiled parts run as they were written, so that hooks in them run too."""
    if not target.compiled:  # set_stance imports all of the compiler
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def same_randomness(decoder: Decoder) -> Iterator[None]:
    """Python's and torch's random state come back as they were, on every device that the model is on."""
    state = random.getstate()
    places = {decoder.layer_device(layer) for layer in range(decoder.n_layers)} | {decoder.device}
    indices = sorted({place.index or 0 for place in places if place.type != "cpu"})
    kinds = {place.type for place in places} - {"cpu"} or {"cuda"}
    try:
        with torch.random.fork_rng(devices=indices, device_type=kinds.pop()):
            yield
    finally:
        random.setstate(state)


@contextmanager
def autocast_without_memory(decoder: Decoder, keep: bool) -> Iterator[None]:
    """Autocast as it is (`keep`) or off, without its cache.

    Weights that are cast while gradients are off would stay in that cache, and the training forward pass that
    finds them there would give no gradient.
    """
    kind = decoder.device.type
    enabled = keep and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=enabled, cache_enabled=False):
        yield


@contextmanager
def whole_weights(target: Target) -> Iterator[None]:
    """FSDP2: the weights outside the layers are whole while the block runs; a layer gathers its own when it is called.

    The other modules' calls would find shards. Every rank must come here.
    """
    with ExitStack() as stack:
        sharded = _sharded_outside_layers(target.decoder)
        if sharded:
            # The root must have been the first to run, else a layer takes itself for the root.
            ids = torch.zeros(1, 1, dtype=torch.long, device=target.decoder.device)
            target.core(input_ids=ids, use_cache=False)
        for module in sharded:
            module.unshard()
            stack.callback(module.reshard)
        yield


def _sharded_outside_layers(decoder: Decoder) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule  # of torch.distributed, which is not everywhere

    inside = {id(module) for layer in decoder.layers for module in layer.modules()}
    return [m for m in decoder.hf.modules() if isinstance(m, FSDPModule) and id(m) not in inside]


def in_group() -> bool:
    """Whether there are other processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather(values: Tensor) -> list[Tensor]:
    """Every process's values, on the CPU, in order of rank. Waits for the device."""
    if not in_group():
        return [values.cpu()]
    if "nccl" not in torch.distributed.get_backend():
        values = values.cpu()
    everyone = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, values)
    return [each.cpu() for each in everyone]


def is_writer() -> bool:
    """Whether this process is the one that writes files: rank 0, or the only one."""
    return not in_group() or torch.distributed.get_rank() == 0
