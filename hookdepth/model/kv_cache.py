"""Keys and values handed from one pass to the next: the one place that speaks transformers' cache language.

    recorder = PrefixCache(record=slice(None))
    model.forward(token_ids, recorder)                  # recorder.recorded[layer] is (keys, values)
    left = {layer: (keys[:, :, :40], values[:, :, :40]) for layer, (keys, values) in recorder.recorded.items()}
    model.forward(token_ids[:, 40:], PrefixCache(start=40, prefix=left.get))

A pass that starts at token t asks `prefix(layer)` for the keys and values of its rows left of t and puts
them in front of its own. Sliding-window layers keep all keys; the mask, made from `get_mask_sizes`, hides
those outside of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a layer, each [row, kv_head, token, head_width], rotary positions applied."""


class PrefixCache(Cache):
    """A cache that neither grows nor forgets: what is left of `start` comes from outside.

    Args:
        start: number of tokens left of the pass_.
        prefix: layer → keys and values of these tokens, a row for each row of the pass at that layer.
        record: of which rows to keep a layer's keys and values, from token 0 on, in `recorded`.
    """

    def __init__(
        self, start: int = 0, prefix: Callable[[int], KeysValues] | None = None, record: slice | None = None
    ) -> None:
        # Not Cache.__init__: it makes layers that store; this one has none.
        self.layers: list[Any] = []
        self.start = start
        self.prefix = prefix
        self.record = record
        self.recorded: dict[int, KeysValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention module: returns the keys and values that its queries see."""
        if self.prefix is not None:
            keys, values = self.prefix(layer_idx)
            key_states, value_states = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        if self.record is not None:
            keys, values = key_states[self.record], value_states[self.record]
            whole = len(keys) == len(key_states)
            # A view of some rows would hold on to all of them.
            self.recorded[layer_idx] = (keys, values) if whole else (keys.clone(), values.clone())
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens left of the pass: positions start here."""
        return self.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the pass's first query."""
        return self.start

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """(keys in all, position of the first key); before transformers 5 the query is given by its positions."""
        length = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        return self.start + length, 0

    @property
    def is_compileable(self) -> bool:
        """Never: its shapes change with every pass_."""
        return False


class GrowingCache(PrefixCache):
    """Room for the keys and values of rows that write token after token, filled in place from `start` on."""

    def __init__(self, room: dict[int, KeysValues], start: int) -> None:
        super().__init__(start)
        self.room = room

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention module: puts the new ones in their place, and returns all up to them."""
        stop = self.start + key_states.shape[2]
        for room, new in zip(self.room[layer_idx], (key_states, value_states), strict=True):
            room[:, :, self.start : stop] = new
        keys, values = self.room[layer_idx]
        return keys[:, :, :stop], values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        for layer, (keys, values) in self.room.items():
            index = rows.to(keys.device)
            self.room[layer] = (keys.index_select(0, index), values.index_select(0, index))
