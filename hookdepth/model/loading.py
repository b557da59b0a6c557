"""Load a model by name: the demo model, a hub id or a local folder.

Weights are read from safetensors only, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from hookdepth.errors import DoesNotRunError, HookdepthError, choose, clipped, environment_number, shown, suggestion
from hookdepth.model.checking import wrap
from hookdepth.model.choices import ALSO_BITS, ALSO_DTYPE, DTYPES, KERNELS, QUANTIZATIONS
from hookdepth.model.decoder import Decoder
from hookdepth.model.demo import DEMO_NAME, demo_folder
from hookdepth.model.hub import NOT_THERE, check_source, hub_or_cache, one_line, quiet
from hookdepth.model.shape import read_config

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    name: str | os.PathLike[str] = "demo",
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    quantize: str = "none",
    attn_implementation: str | None = None,
    revision: str | None = None,
    kernels: str = "plain",
) -> Decoder:
    """Load a model and wrap it.

        model = load("demo", dtype="float32")     # or load("meta-llama/Llama-3.2-1B", device="cuda")

    Args:
        name: `demo`, a folder, or a hub id.
        dtype: auto is the checkpoint's on a GPU, float32 on a CPU.
        device: auto, cpu, cuda or cuda:N.
        device_map: for a model larger than one device: auto (or another of accelerate's), module → device, or a
            JSON file of that; devices are numbers of GPUs, cpu and disk. Excludes `device`.
        quantize: none, 8bit or 4bit, through bitsandbytes.
        attn_implementation: as transformers names them (sdpa, eager, …); default transformers' choice.
        revision: of a hub id.
        kernels: plain, or fused: liger-kernel's and our own, on one GPU; results say so, and by how much they differ.

    Raises:
        HookdepthError: unknown option, no such model, hub unreachable, no such device, unsupported family.
    """
    if not isinstance(name, str | os.PathLike):
        raise HookdepthError(f"the model is {shown(name)}", "give demo, a folder or a hub id, or wrap what you hold")
    name = os.fspath(name)
    choose("dtype", dtype, DTYPES, ALSO_DTYPE)
    choose("quantisation", quantize, QUANTIZATIONS, ALSO_BITS)
    choose("kernels", kernels, KERNELS)
    if revision is not None and (name == "demo" or os.path.isdir(name)):
        raise HookdepthError(f"--revision {revision!r} is of a hub id, and {name!r} is none", "leave it out")
    if device_map is not None and device != "auto":
        raise HookdepthError(f"both --device {device} and --device-map {device_map} are given", "give one of them")
    spread = None if device_map is None else _device_map(device_map)
    place = place_of(device, spread is not None)
    wanted = wanted_dtype(dtype, place)
    source = str(demo_folder()) if name == "demo" else name
    bits = None
    if quantize != "none":
        bits = bitsandbytes_config(quantize, torch.bfloat16 if wanted == "auto" else wanted)
    given = {"attn_implementation": attn_implementation, "revision": revision, "quantization_config": bits}
    options: dict[str, Any] = {"dtype": wanted, "device_map": spread or {"": str(place)}}
    options |= {key: value for key, value in given.items() if value is not None}
    hf, tokenizer = _from_pretrained(name, source, revision, options)
    try:
        model = wrap(hf, tokenizer, name=DEMO_NAME if name == "demo" else name, revision=revision)
        model.use_kernels(kernels)
        return model
    except (RuntimeError, KeyError, DoesNotRunError) as error:
        # A kernel that does not take these shapes, a map that parts tied weights.
        raise HookdepthError(
            one_line(f"the model {name!r} is loaded, but does not run", error.__cause__ or error),
            "try another --dtype, --device or --attn-implementation" + (", or no --quantize" * (quantize != "none")),
            1,
        ) from error


def _device_map(given: str | Mapping[str, Any]) -> Any:
    if not isinstance(given, str):
        return dict(given)
    if given in DEVICE_MAPS:
        return given
    example = '{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", …}'
    remedy = f"use one of {', '.join(DEVICE_MAPS)}, or a JSON file such as {example}"
    if not given.endswith(".json"):
        choose("device map", given, (*DEVICE_MAPS, "FILE.json"))
    try:
        read = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HookdepthError(one_line(f"cannot read the device map {given!r}", error), remedy) from error
    if not isinstance(read, dict) or not all(isinstance(place, int | str) for place in read.values()) or not read:
        raise HookdepthError(f"the device map {given!r} is no object of modules and devices", remedy)
    return read


def _from_pretrained(name: str, source: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = os.path.isdir(source)
    called = clipped(name, 200)
    check_source(source)
    attention = options.get("attn_implementation")
    online = True
    try:
        with quiet(), nullcontext(True) if local else hub_or_cache() as online:
            there: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not online}
            read_config(source, called, revision, **there)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **there, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", **there)
    except HookdepthError:
        raise
    except Exception as error:  # whatever a broken checkpoint makes of transformers, its validators or the hub's
        if attention is not None and "ttention" in str(error):
            what = one_line(f"cannot use --attn-implementation {attention!r} with {called!r}", error)
            raise HookdepthError(what, "use sdpa or eager, or leave it out") from error
        what = one_line(f"cannot load the model {called!r}", error if online else NOT_THERE)
        raise HookdepthError(what, _remedy(source, local, error)) from error
    hf, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers makes them up at random
        what = f"the checkpoint {name!r} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])})"
        raise HookdepthError(what, "give a complete checkpoint of a causal language model")
    return hf, tokenizer


def _remedy(source: str, local: bool, error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "use a smaller model, --quantize 8bit or --device-map auto"
    if local:
        return "give a folder with config.json, tokenizer files and safetensors weights of a causal language model"
    near = "did you mean demo? else " if "/" not in source and suggestion(source, ["demo"]) else ""
    return f"{near}check the id and the network, give a local folder, or use --model demo, which needs no network"


def wanted_dtype(dtype: str, place: torch.device) -> Any:
    """A torch dtype, or "auto": the checkpoint's."""
    if dtype == "auto" and place.type == "cuda":
        return dtype
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def place_of(device: str, spread: bool = False) -> torch.device:
    """The device that --device means in this process; `spread`: a device map says where the model goes."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not spread and (own := own_gpu()) is not None:
        device = f"cuda:{own}"
    kind, _, number = device.partition(":")
    if device != "cpu" and not (kind == "cuda" and (device == "cuda" or (number.isascii() and number.isdecimal()))):
        choose("device", device, ("auto", "cpu", "cuda", "cuda:N"), {"gpu": "cuda", "nvidia": "cuda"})
        raise HookdepthError("the N of 'cuda:N' stands for a number", "give e.g. cuda:0")
    try:
        place = torch.device(device)
    except RuntimeError as error:  # a number that no GPU could have
        raise HookdepthError(f"there is no device {device!r}", "use --device cpu or another GPU") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise HookdepthError(
            f"there is no device {device!r} ({torch.cuda.device_count()} GPUs seen)", "use --device cpu or another GPU"
        )
    return place


def bitsandbytes_config(quantize: str, compute: torch.dtype) -> Any:
    """What transformers takes for 8bit or 4bit, with products in `compute`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HookdepthError(f"--quantize {quantize} needs bitsandbytes", "pip install 'hookdepth[quantize]'")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it casts
    return BitsAndBytesConfig(**{f"load_in_{quantize}": True}, bnb_4bit_compute_dtype=compute)


def own_gpu() -> int | None:
    """The GPU of this process, where a launcher started several on this machine; None where it is alone."""
    here = environment_number("LOCAL_WORLD_SIZE", 1, 1)
    if here == 1:
        return None
    if here > torch.cuda.device_count():
        what = f"{here} processes on this machine, and {torch.cuda.device_count()} GPUs"
        raise HookdepthError(what, "start one process a GPU, or name the device with --device")
    return environment_number("LOCAL_RANK", None, 0, here - 1)
