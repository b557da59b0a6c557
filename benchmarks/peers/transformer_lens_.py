"""TransformerLens 4: `run_with_hooks` for interventions, `run_with_cache` for what is only read.

    Lens(twin(hf)).skip(ids, cuts=[None], layers=[3, 4])      # effect [2, L], output [2]

The bridge is built around a model that is loaded already (`build_bridge_from_module`), in the default mode,
which keeps Hugging Face's weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge.sources import build_bridge_from_module

from benchmarks.peers.hooks import FRONT, all_logits_lens, gap, relative_change


class Lens:
    """One hooked pass per intervention."""

    def __init__(self, hf: Any) -> None:
        self.bridge: Any = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
        self.n_layers = len(hf.model.layers)

    def _pre(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_pre"

    def _post(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_post"

    def _clean(self, ids: Tensor) -> tuple[Any, list[Tensor], Tensor]:
        wanted = {name for n in range(self.n_layers) for name in (self._pre(n), self._post(n))}
        logits, cache = self.bridge.run_with_cache(ids, names_filter=sorted(wanted))
        added = [cache[self._post(n)].float() - cache[self._pre(n)].float() for n in range(self.n_layers)]
        return cache, added, logits[0].float().softmax(-1)

    @torch.no_grad()
    def skip(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Max over cuts of effect [S, L] and output [S]."""
        _, added, probabilities = self._clean(ids)
        effect = torch.zeros(len(layers), self.n_layers, device=ids.device)
        out = torch.zeros(len(layers), device=ids.device)
        for cut in cuts:
            first = cut or 0
            for place, skipped in enumerate(layers):
                before: dict[int, Tensor] = {}
                hooks: list[tuple[str, Any]] = []
                for n in range(self.n_layers):

                    def pre(value: Tensor, hook: Any, n: int = n, before: dict[int, Tensor] = before) -> None:
                        before[n] = value

                    def post(
                        value: Tensor,
                        hook: Any,
                        n: int = n,
                        before: dict[int, Tensor] = before,
                        place: int = place,
                        skipped: int = skipped,
                        first: int = first,
                    ) -> Tensor:
                        if n == skipped:
                            value = value.clone()
                            span = slice(FRONT, first or None)
                            value[:, span] = before[n][:, span]
                        cell = effect[place, n]
                        torch.maximum(cell, relative_change(added[n], before[n], value)[0, first:].max(), out=cell)
                        return value

                    hooks += [(self._pre(n), pre), (self._post(n), post)]
                logits = self.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
                moved = (logits[0, first:].float().softmax(-1) - probabilities[first:]).norm(dim=-1).max()
                torch.maximum(out[place], moved, out=out[place])
        return effect, out

    @torch.no_grad()
    def erasure(self, ids: Tensor, answer: Sequence[int], baseline: Tensor, points: Sequence[int]) -> Tensor:
        """Effect [S, T']."""
        predicting = torch.tensor(answer, device=ids.device) - 1
        clean = self.bridge(ids, return_type="logits")[0, predicting].float().softmax(-1)
        tokens = max(answer)
        effect = torch.zeros(len(points), tokens, device=ids.device)
        for place, point in enumerate(points):
            site = self._pre(point) if point < self.n_layers else self._post(point - 1)
            for token in range(tokens):

                def erase(value: Tensor, hook: Any, point: int = point, token: int = token) -> Tensor:
                    value = value.clone()
                    value[:, token] = baseline[point].to(value)
                    return value

                logits = self.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(site, erase)])
                effect[place, token] = (logits[0, predicting].float().softmax(-1) - clean).norm(dim=-1).max()
        return effect

    @torch.no_grad()
    def patching(self, ids: Tensor, source: Tensor, words: Sequence[int], layers: Sequence[int]) -> Tensor:
        """A hooked pass a layer and token: share of the gap, [S, T]."""
        names = [self._pre(n) for n in range(self.n_layers)]
        first, cache = self.bridge.run_with_cache(source, names_filter=names)
        low = gap(self.bridge(ids, return_type="logits"), words)
        rows = []
        for layer in layers:
            for token in range(ids.shape[1]):

                def put(value: Tensor, hook: Any, layer: int = layer, token: int = token) -> Tensor:
                    value = value.clone()
                    value[:, token] = cache[self._pre(layer)][:, token]
                    return value

                logits = self.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(self._pre(layer), put)])
                rows.append((gap(logits, words) - low) / (gap(first, words) - low))
        return torch.cat(rows).view(len(layers), -1)

    @torch.no_grad()
    def stats(self, ids: Tensor) -> Tensor:
        """Sums over tokens, [6, L]."""
        _, cache = self.bridge.run_with_cache(ids)
        rows = []
        for n in range(self.n_layers):
            x, a, m = (cache[f"blocks.{n}.hook_{site}"] for site in ("resid_pre", "attn_out", "mlp_out"))
            pairs = ((a, x), (m, x + a), (cache[self._post(n)].float() - x.float(), x))
            size = [p.float().norm(dim=-1) / h.float().norm(dim=-1).clamp(min=1e-6) for p, h in pairs]
            cosine = [functional.cosine_similarity(p.float(), h.float(), dim=-1) for p, h in pairs]
            rows.append(torch.stack([*size, *cosine]).sum((1, 2)))
        return torch.stack(rows, 1)

    @torch.no_grad()
    def lens(self, ids: Tensor) -> Tensor:
        """The logit lens on `run_with_cache`'s residuals, all layers' logits kept: sums over tokens, [2, L]."""
        names = [self._pre(n) for n in range(self.n_layers)]
        final, cache = self.bridge.run_with_cache(ids, names_filter=names)
        resid = [cache[name] for name in names]
        return all_logits_lens([self.bridge.unembed(self.bridge.ln_final(value)) for value in resid], final)

    def gradients(self, ids: Tensor, answer: Sequence[int], layers: Sequence[int], steps: int) -> Tensor:
        """Integrated gradients by a hook that puts 16 points of the path in the place of a layer's output."""
        predicting = torch.tensor(answer, device=ids.device) - 1
        rows = []
        for layer in layers:
            total = torch.zeros(ids.shape[1], device=ids.device)
            for begin in range(0, steps, 16):
                r = torch.arange(begin, min(begin + 16, steps), device=ids.device)[:, None, None] / steps
                kept: dict[str, Tensor] = {}

                def grow(value: Tensor, hook: Any, r: Tensor = r, kept: dict[str, Tensor] = kept) -> Tensor:
                    clean = value.detach().float()
                    mean = clean.mean(dim=1, keepdim=True)
                    kept["path"] = clean - mean
                    kept["leaf"] = (clean * r + mean * (1 - r)).requires_grad_()
                    return kept["leaf"].to(value.dtype)

                logits = self.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(self._post(layer), grow)])
                probabilities = logits.float().softmax(-1)[:, predicting]
                targets = ids[0, predicting + 1][None, :, None].expand(len(probabilities), -1, 1)
                probabilities.gather(-1, targets).sum().backward()
                gradient = kept["leaf"].grad
                assert gradient is not None
                total += (gradient * kept["path"]).sum(-1).sum(0)
                self.bridge.zero_grad(set_to_none=True)
            rows.append(total / steps)
        return torch.stack(rows)
