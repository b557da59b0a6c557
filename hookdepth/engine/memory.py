"""How much memory passes may fill, what a token of a row takes of it, and what happens where it runs out.

room = memory_room(model)                      # bytes
default_row_tokens(model)                      # rows × tokens of a pass
fits(lambda: run_one_pass())                   # False: try again at half the size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hookdepth.model.decoder import Decoder


def fits(run: Callable[[], None]) -> bool:
    """Run something; False where memory ran out, after what the attempt held has been let go.

    fits(lambda: run_one_pass())   # False: try again at half the size
    """
    try:
        run()
        return True
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)
    return False


def bytes_per_row_token(model: Decoder) -> int:
    """Memory that one token of one row needs at its peak: a layer's activations, float32 differences, and
    the keys and values of half of the layers.

    peak = plan.peak_row_tokens * bytes_per_row_token(model)   # bytes
    """
    config: Any = model.config
    size = model.dtype.itemsize
    d, inner = model.d_model, int(getattr(config, "intermediate_size", 4 * model.d_model))
    heads = int(config.num_attention_heads)
    kv = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * (model.attention_width // heads)
    return size * (6 * d + 3 * inner + 4 * model.attention_width + model.n_layers * kv // 2) + 16 * d


def memory_room(model: Decoder) -> int:
    """Bytes that passes may fill: the same on the same machine, so that packing and results are too.

    memory_room(model) / 2**30   # 3.0 GiB on a CPU, a third of what the weights leave on a GPU
    """
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
        return max(total - weights, total // 8) // 3
    return 3 << 30


def default_row_tokens(model: Decoder) -> int:
    """Rows × tokens that a pass may have.

    default_row_tokens(model) // 180   # rows, of a prompt of 180 tokens
    """
    return max(1024, memory_room(model) // bytes_per_row_token(model))
