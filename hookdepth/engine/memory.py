"""How much memory passes may fill, what a token of a row takes of it, and what happens where it runs out.

room = memory_room(model)                      # bytes
budget = Budget.of(model, gradients=True)      # rows × tokens of a pass, and what a backward pass keeps
fits(lambda: run_one_pass())                   # False: budget.halve(plan), and try again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hookdepth.engine.plan import ROWS_PER_PROMPT, Plan
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.shape import said

# Branches of a pass with gradients: its logits are kept for the backward pass. A GPU wants more rows to be busy: for
# the shape of Llama-3.1-8B, a simulation of an H100 at 128 branches had it idle for a fifth of the time. There a layer
# costs 200 tokens beside its own and never less than 530 (`machines`): 256 rows of a probe of 20 tokens are 5,120, of
# which that is 4 %; at 128 rows it is 8 %, and at a layer where few rows have joined the device waits for the host.
# Its logits then take 256 × 128,256 × 12 bytes = 0.4 GB a position, of a room of 23 GB on 80.
_MOST_WITH_GRADIENTS = {"cuda": 256}
_MOST_ELSEWHERE = 128


@dataclass
class Budget:
    """How large passes may be. Whoever runs passes again and again keeps one, and with it what memory has taught.

        budget = Budget.of(model, max_rows=32)
        budget.halve(plan)     # a pass of the plan did not fit

    Attributes:
        rows: most rows of a pass; None for as many as the rest allows.
        row_tokens: most rows × tokens.
        kept_tokens: most tokens × layers whose activations a backward pass keeps; None where no gradients flow.
    """

    rows: int | None
    row_tokens: int
    kept_tokens: int | None = None

    @classmethod
    def of(
        cls, model: Decoder, max_rows: int | None = None, max_row_tokens: int | None = None, gradients: bool = False
    ) -> Budget:
        """What the memory holds, or less where the caller says so."""
        row_tokens = max_row_tokens or default_row_tokens(model)
        if not gradients:
            return cls(max_rows, row_tokens)
        most = _MOST_WITH_GRADIENTS.get(model.device.type, _MOST_ELSEWHERE) + ROWS_PER_PROMPT
        return cls(min(max_rows or most, most), row_tokens, most_kept_tokens(model))

    def halve(self, plan: Plan) -> None:
        """After a pass of the plan did not fit: half of the largest that it had, since the budget may be far above it.

        Raises:
            HookdepthError: there is nothing left to halve.
        """
        self.row_tokens = min(self.row_tokens, plan.peak_row_tokens) // 2
        if self.kept_tokens is not None:
            self.kept_tokens = min(self.kept_tokens, plan.peak_kept_tokens) // 2
        if not self.row_tokens:
            raise HookdepthError(
                f"not even one branch beside its clean run fits into memory{' with its gradients' * self.gradients}",
                "use shorter prompts, a smaller dtype, --quantize 8bit or --device-map auto",
                1,
            )

    @property
    def gradients(self) -> bool:
        """Whether gradients flow through the passes."""
        return self.kept_tokens is not None


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
    d, inner, heads = model.d_model, model.d_mlp, max(1, model.n_heads)
    kv = 2 * int(said(config, "num_key_value_heads") or heads) * (model.attention_width // heads)
    return size * (6 * d + 3 * inner + 4 * model.attention_width + model.n_layers * kv // 2) + 16 * d


def memory_room(model: Decoder) -> int:
    """Bytes that passes may fill: the same on the same machine, so that packing and results are too.

    memory_room(model) / 2**30   # 3.0 GiB on a CPU, a third of what the weights leave on a GPU

    A third, since `bytes_per_row_token` counts what is named there, once: keys and values are copied where rows join,
    and blocks of other sizes lie unused between those in use (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set
    before CUDA starts, gives these back). More room would gain nothing: of Llama-3.1-8B on 80 GB it is 23 GB, and a row
    of 180 tokens takes 0.054 GB: 420 rows, where 36 fill a pass (`machines`).
    """
    if model.device.type == "cuda":
        total = model.device_memory
        return max(total - model.weight_bytes, total // 8) // 3
    return 3 << 30


def default_row_tokens(model: Decoder) -> int:
    """Rows × tokens that a pass may have.

    default_row_tokens(model) // 180   # rows, of a prompt of 180 tokens
    """
    return max(1024, memory_room(model) // bytes_per_row_token(model))


def most_kept_tokens(model: Decoder) -> int:
    """Tokens of branches × layers that they run through, in a pass whose backward pass needs all their activations.

    most_kept_tokens(model) // (model.n_layers * 180)   # branches born at layer 0 of a prompt of 180 tokens

    On a CPU a third of the room: more only falls out of its caches.
    """
    share = 1 if model.device.type == "cuda" else 3
    return max(1, memory_room(model) // (share * kept_bytes(model)))


def kept_bytes(model: Decoder) -> int:
    """What autograd keeps of one token in one layer.

    plan.peak_kept_tokens * kept_bytes(model)   # bytes
    """
    return model.dtype.itemsize * (16 * model.d_model + 5 * model.d_mlp)
