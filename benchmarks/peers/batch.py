"""The whole-batch peer: every intervention is a row of full passes, nothing is shared between rows.

effect, output = WholeBatch(hf).skip(ids, cuts=[None], layers=[3, 4])      # [2, L], [2]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.hooks import FRONT, at_points, clean_run, hooked, relative_change


class WholeBatch:
    """Rows of full passes, `rows` at a time; the clean run is made once."""

    def __init__(self, hf: Any, rows: int = 16) -> None:
        self.hf, self.rows = hf, rows

    def _chunks(self, items: list[Any]) -> list[list[Any]]:
        return [items[begin : begin + self.rows] for begin in range(0, len(items), self.rows)]

    @torch.no_grad()
    def skip(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Max over cuts of effect [S, L] and output [S]."""
        _, added, probabilities = clean_run(self.hf, ids)
        tokens = torch.arange(ids.shape[1], device=ids.device)
        effects, outputs = [], []
        for chunk in self._chunks([(cut or 0, layer) for cut in cuts for layer in layers]):
            measured = tokens >= torch.tensor([cut for cut, _ in chunk], device=ids.device)[:, None]  # [row, token]
            found: list[Tensor] = []

            def after(
                layer: int,
                x: Tensor,
                y: Tensor,
                chunk: list[Any] = chunk,
                measured: Tensor = measured,
                found: list[Tensor] = found,
            ) -> Tensor:
                rows = [row for row, (_, skipped) in enumerate(chunk) if skipped == layer]
                if rows:
                    y = y.clone()
                    for row in rows:
                        span = slice(FRONT, chunk[row][0] or None)
                        y[row, span] = x[row, span]
                found.append((relative_change(added[layer], x, y) * measured).amax(-1))
                return y

            with hooked(self.hf, after=after):
                logits = self.hf(input_ids=ids.expand(len(chunk), -1), use_cache=False).logits
            effects.append(torch.stack(found, 1))
            moved = [(row.float().softmax(-1) - probabilities).norm(dim=-1) for row in logits]
            outputs.append((torch.stack(moved) * measured).amax(-1))
        effect = torch.cat(effects).view(len(cuts), len(layers), -1).amax(0)
        return effect, torch.cat(outputs).view(len(cuts), len(layers)).amax(0)

    @torch.no_grad()
    def local(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> Tensor:
        """Direct effects, max over cuts: [S, L]."""
        inputs, added, _ = clean_run(self.hf, ids)
        tokens = torch.arange(ids.shape[1], device=ids.device)
        effects = []
        for chunk in self._chunks([(cut or 0, layer) for cut in cuts for layer in layers]):
            measured = tokens >= torch.tensor([cut for cut, _ in chunk], device=ids.device)[:, None]
            found: list[Tensor] = []

            def before(layer: int, x: Tensor, chunk: list[Any] = chunk) -> Tensor:
                changed = inputs[layer].repeat(len(chunk), 1, 1)
                for row, (cut, source) in enumerate(chunk):
                    if source < layer:
                        span = slice(FRONT, cut or None)
                        changed[row, span] = (changed[row, span].float() - added[source][0, span]).to(x.dtype)
                return changed

            def after(
                layer: int,
                x: Tensor,
                y: Tensor,
                chunk: list[Any] = chunk,
                measured: Tensor = measured,
                found: list[Tensor] = found,
            ) -> None:
                later = torch.tensor([source < layer for _, source in chunk], device=x.device)
                found.append((relative_change(added[layer], x, y) * measured).amax(-1) * later)

            with hooked(self.hf, before, after):
                self.hf.model(input_ids=ids.expand(len(chunk), -1), use_cache=False)
            effects.append(torch.stack(found, 1))
        return torch.cat(effects).view(len(cuts), len(layers), -1).amax(0)

    @torch.no_grad()
    def erasure(self, ids: Tensor, answer: Sequence[int], baseline: Tensor, points: Sequence[int]) -> Tensor:
        """Effect [S, T']; as many rows more as the prompt is shorter than 180 tokens."""
        predicting = torch.tensor(answer, device=ids.device) - 1
        clean = self.hf(input_ids=ids, use_cache=False).logits[0, predicting].float().softmax(-1)
        tokens = max(answer)
        size = max(1, self.rows * 180 // ids.shape[1])
        items = [(point, token) for point in points for token in range(tokens)]
        effects = []
        for chunk in (items[begin : begin + size] for begin in range(0, len(items), size)):

            def erase(point: int, hidden: Tensor, chunk: list[Any] = chunk) -> Tensor | None:
                rows = [row for row, (at, _) in enumerate(chunk) if at == point]
                if not rows:
                    return None
                hidden = hidden.clone()
                hidden[rows, [chunk[row][1] for row in rows]] = baseline[point].to(hidden)
                return hidden

            with at_points(self.hf, erase):
                hidden = self.hf.model(input_ids=ids.expand(len(chunk), -1), use_cache=False).last_hidden_state
            logits = self.hf.lm_head(hidden[:, predicting])
            effects.append((logits.float().softmax(-1) - clean).norm(dim=-1).amax(-1))
        return torch.cat(effects).view(len(points), tokens)
