"""What a config says, and whether it describes a model that could exist: asked before anything is built from it.

What transformers makes of a config with no heads, or with a thousand million layers, is an error of some other
place, or nothing for hours.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hookdepth.errors import HookdepthError

# Field → the most that is believed. The largest models known have 126 layers, a width of 18,432 and 262,144 tokens.
_MOST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 40,
}
_ALWAYS = ("num_hidden_layers", "hidden_size", "vocab_size")
_REMEDY = "correct its config.json"


def read_config(source: str, name: str, revision: str | None, **there: Any) -> Any:
    """A model's config, once it is sure that its sizes are some; `name` is what errors call the model."""
    from transformers import AutoConfig, PretrainedConfig

    # As it is written first: transformers itself divides by what stands there.
    stored, _ = PretrainedConfig.get_config_dict(source, revision=revision or "main", **there)
    if isinstance(stored, dict):
        own = stored["text_config"] if isinstance(stored.get("text_config"), dict) else stored
        _check({field: own[field] for field in _MOST if field in own and own[field] is not None}, name)
    config: Any = AutoConfig.from_pretrained(source, revision=revision or "main", **there)
    text = config.get_text_config()
    sizes = {field: said(text, field) for field in _MOST}
    _check({field: size for field, size in sizes.items() if size is not None or field in _ALWAYS}, name)
    _check_heads(sizes, name)
    return config


def said(config: Any, field: str) -> Any:
    """What a config says of the whole model; None where it says nothing, or something of each layer."""
    return None if field in (getattr(config, "per_layer_attributes", None) or ()) else getattr(config, field, None)


def described(config: Any) -> dict[str, Any]:
    """A digest of a config but for what differs by machine; its quantisation, and the attention that it asks for."""
    whole = config.to_dict()
    quantization = whole.pop("quantization_config", None) or {}
    for machine_dependent in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        whole.pop(machine_dependent, None)
    method = quantization.get("quant_method")
    bits = [name for name in ("8bit", "4bit") if quantization.get(f"load_in_{name}")]
    return {
        "config_sha256": hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest(),
        "quantization": " ".join([str(getattr(method, "value", method)), *bits]) if quantization else "none",
        "attn_implementation": str(getattr(config, "_attn_implementation", "unknown")),
    }


def _check(sizes: dict[str, Any], name: str) -> None:
    for field, value in sizes.items():
        if isinstance(value, list):
            continue  # one for each layer
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[field]:
            what = f"the config of {name!r} has {field} = {value!r}"
            raise HookdepthError(f"{what}, which is no whole number from 1 to {_MOST[field]}", _REMEDY)


def _check_heads(sizes: dict[str, Any], name: str) -> None:
    heads = sizes["num_attention_heads"]
    parts = [("num_attention_heads", heads, "num_key_value_heads", sizes["num_key_value_heads"])]
    if sizes["head_dim"] is None:
        parts.append(("hidden_size", sizes["hidden_size"], "num_attention_heads", heads))
    for field, whole, by, part in parts:
        if isinstance(whole, int) and isinstance(part, int) and whole % part:
            what = f"the config of {name!r} has {field} = {whole}, which {by} = {part} does not divide"
            raise HookdepthError(what, _REMEDY)
