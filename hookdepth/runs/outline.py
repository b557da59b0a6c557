"""A model of which only the shape is known: its config, perhaps its tokenizer, no weights.

    outline = load_outline("folder/with/config", device="cpu")     # or a hub id: reads a few kilobytes
    small = miniature(outline, 2)                                     # two of its layers, random weights

An outline plans as the model would. A miniature runs as one slice of it would, on the same device, in the
same dtype and with the same kernels: what a `--dry-run` measures.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch
from torch import nn

from hookdepth.engine.machines import Machine
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.demo import DEMO_NAME, demo_folder
from hookdepth.model.hub import check_source, hub_or_cache, one_line, quiet
from hookdepth.model.loading import bitsandbytes_config, place_of, wanted_dtype
from hookdepth.model.shape import read_config

_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # 4 bit: and a scale for every 64 weights
_VOCAB = 1 << 15  # a miniature's; what unembedding costs is proportional


class Outline(Decoder):
    """A decoder without weights (on the meta device) that says where they would be, and how quantised."""

    def __init__(
        self, hf: nn.Module, tokenizer: Any, place: torch.device, quantize: str, name: str, machine: Machine | None
    ) -> None:
        super().__init__(hf, tokenizer, name=name)
        self.place, self.quantize, self.machine = place, quantize, machine

    @property
    def device(self) -> torch.device:
        """Where the model would be."""
        return self.place

    @property
    def device_name(self) -> str:
        """The machine's, or what is there."""
        return self.machine.label if self.machine else super().device_name

    @property
    def device_memory(self) -> int:
        """The machine's, or what is there."""
        return int(self.machine.memory * 2**30) if self.machine else super().device_memory

    def layer_device(self, layer: int) -> torch.device:
        return self.place

    def describe(self) -> dict[str, Any]:
        """As the model would say it, whose config may not tell yet how it will be quantised."""
        return super().describe() | {"quantization": self.quantize}

    @property
    def weight_bytes(self) -> int:
        """What the weights would take; of a quantised model all matrices of its layers are."""
        total = 0.0
        layers = {id(parameter) for parameter in self.layers.parameters() if parameter.ndim == 2}
        for parameter in self.hf.parameters():
            small = self.quantize != "none" and id(parameter) in layers
            total += parameter.numel() * (_BYTES[self.quantize] if small else parameter.element_size())
        return int(total)


class _Miniature(Decoder):
    def describe(self) -> dict[str, Any]:
        """Not quantised, as far as anybody asks in order to check its kernels: of random weights nothing shows."""
        return super().describe() | {"quantization": "none"}


class Words:
    """Stands in for a tokenizer that is not there: a word, with the space before it, a digit or a sign a token."""

    is_fast = True
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, return_offsets_mapping: bool = False, **_options: Any) -> dict[str, Any]:
        """Token ids that mean nothing; as many as a tokenizer would give, more or less."""
        spans = [found.span() for found in re.finditer(r" ?[^\W\d_]+|\d| ?[^\w\s]|\s|_", text)]
        encoding: dict[str, Any] = {"input_ids": [1] * len(spans)}
        return {**encoding, "offset_mapping": spans} if return_offsets_mapping else encoding

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Nothing to read."""
        return ["?"] * len(ids)


def load_outline(
    name: str = "demo",
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "none",
    attn_implementation: str | None = None,
    revision: str | None = None,
    machine: Machine | None = None,
) -> Outline:
    """The outline of a model; a folder or repository with config.json is enough, and `machine` need not be there.

    Raises:
        HookdepthError: no config there, no such device, unsupported family.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device("cuda") if machine else place_of(device)
    source = str(demo_folder()) if name == "demo" else name
    check_source(source)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with quiet(), nullcontext(True) if os.path.isdir(source) else hub_or_cache() as online:
            there: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not online}
            config = read_config(source, name, revision, **there)
            if (stored := getattr(config, "quantization_config", None)) is not None:
                quantize = _bits(stored)
                del config.quantization_config
            wanted = wanted_dtype(dtype, place)
            if wanted == "auto":
                wanted = getattr(config, "dtype", None) or torch.float32
            with torch.device("meta"):
                hf = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
    except HookdepthError:
        raise
    except Exception as error:  # whatever a config that is none makes of transformers and its validators
        remedy = "give a folder or hub id with the config.json of a causal language model"
        raise HookdepthError(one_line(f"cannot plan for the model {name!r}", error), remedy) from error
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision or "main", **there)
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):  # made of nothing but the config
            tokenizer = Words()
    except (OSError, ValueError, ImportError, KeyError):  # a plan does not need the very tokens
        tokenizer = Words()
    return Outline(hf, tokenizer, place, quantize, DEMO_NAME if name == "demo" else name, machine)


def _bits(config: Any) -> str:
    stored = config if isinstance(config, dict) else config.to_dict()
    if stored.get("load_in_8bit"):
        return "8bit"
    if stored.get("load_in_4bit"):
        return "4bit"
    raise ValueError(f"a checkpoint quantised by {stored.get('quant_method')} cannot be planned for")


def miniature(outline: Outline, n_layers: int) -> Decoder:
    """The first layers of a model with random weights, on its device, in its dtype, quantised as it would be.

    Raises:
        HookdepthError: not even these layers fit into memory.
    """
    from transformers import AutoModelForCausalLM

    _check_room(outline, n_layers)
    config = copy.deepcopy(outline.config)
    whole = outline.n_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:  # the kind of each layer
            setattr(config, key, value[:n_layers])
    config.num_hidden_layers = n_layers
    config.vocab_size = min(_VOCAB, config.vocab_size)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, None)
    how = {"dtype": outline.dtype, "attn_implementation": config._attn_implementation}
    with quiet(), torch.random.fork_rng():
        with outline.place:
            hf = AutoModelForCausalLM.from_config(config, **how)
        if outline.quantize != "none":
            how["device_map"] = {"": str(outline.place)}
            how["quantization_config"] = bitsandbytes_config(outline.quantize, outline.dtype)
            with tempfile.TemporaryDirectory() as folder:
                hf.save_pretrained(folder)
                hf = AutoModelForCausalLM.from_pretrained(folder, **how)
    return _Miniature(hf.eval(), name=f"{n_layers} layers of {outline.name}")


def _check_room(outline: Outline, n_layers: int) -> None:
    """Refuse a miniature that would not fit: a process that runs out of memory may just be ended, without a word."""
    own = sum(parameter.numel() for layer in outline.layers[:n_layers] for parameter in layer.parameters())
    ends = 2 * outline.d_model * min(_VOCAB, int(outline.config.vocab_size))
    need = (own + ends) * outline.dtype.itemsize
    if outline.place.type == "cuda":
        free = torch.cuda.mem_get_info(outline.place)[0]
    else:
        free = psutil.virtual_memory().available
    if need > free:
        raise HookdepthError(
            f"{n_layers} layers of {outline.name!r}, which a dry run times, take {need / 2**30:,.1f} GiB, "
            f"and {outline.place} has {free / 2**30:,.1f} GiB free",
            "plan on a larger device, or with a smaller --dtype",
            1,
        )


@contextmanager
def with_vocabulary(model: Decoder, size: int) -> Iterator[Decoder]:
    """The same model with the first tokens of its vocabulary only, as far as they are predicted."""
    head, whole = model.hf.get_output_embeddings(), model.config.vocab_size
    few = copy.deepcopy(head)
    for name, value in head.named_parameters():
        setattr(few, name, nn.Parameter(value[:size].detach().clone()))
    try:
        model.hf.set_output_embeddings(few)
        model.config.vocab_size = size
        yield model
    finally:
        model.hf.set_output_embeddings(head)
        model.config.vocab_size = whole
