"""The peers: what people write by hand with forward hooks, one plain pass per intervention.

    effect, output = skip_loop(hf, ids, cut=None)      # [L, L], [L]

They are written to be fast in their own way (nothing goes to the host, the clean run is made once, hooks
reduce at once), on Llama-shaped models; every one is checked against hookdepth before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

FRONT = 1


def contributions(hf: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Clean run: what each layer adds, float32, and the next-token distributions."""
    clean: list[Tensor] = []

    def note(_module: Any, args: Any, output: Tensor) -> None:
        clean.append(output[0].float() - args[0][0].float())

    with ExitStack() as hooks:
        for layer in hf.model.layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        logits = hf(input_ids=ids, use_cache=False).logits
    return clean, logits[0].float().softmax(-1)


@torch.no_grad()
def skip_loop(hf: Any, ids: Tensor, cuts: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Skip every layer once per cut (None: all tokens): max over cuts of effect [L, L] and output [L]."""
    clean, probabilities = contributions(hf, ids)
    n_layers = len(clean)
    effect = torch.zeros(n_layers, n_layers, device=ids.device)
    out = torch.zeros(n_layers, device=ids.device)
    for cut in cuts:
        for skipped in range(n_layers):
            first = cut or 0

            def hook(
                _module: Any, args: Any, output: Tensor, layer: int, skipped: int = skipped, first: int = first
            ) -> Any:
                resid = output
                if layer == skipped:
                    stop = first or output.shape[1]
                    resid = output.clone()
                    resid[:, FRONT:stop] = args[0][:, FRONT:stop]
                change = clean[layer] - (resid[0].float() - args[0][0].float())
                ratio = change.norm(dim=-1) / clean[layer].norm(dim=-1).clamp(min=1e-6)
                torch.maximum(effect[skipped, layer], ratio[first:].max(), out=effect[skipped, layer])
                return resid

            with ExitStack() as hooks:
                for number, layer in enumerate(hf.model.layers):
                    handle = layer.register_forward_hook(lambda m, a, o, n=number, hook=hook: hook(m, a, o, n))
                    hooks.callback(handle.remove)
                logits = hf(input_ids=ids, use_cache=False).logits[0, first:]
            moved = (logits.float().softmax(-1) - probabilities[first:]).norm(dim=-1).max()
            torch.maximum(out[skipped], moved, out=out[skipped])
    return effect, out


@torch.no_grad()
def erasure_loop(hf: Any, ids: Tensor, answer_positions: Sequence[int], baseline: Tensor) -> Tensor:
    """One pass per (layer point, token): effect [L+1, T]."""
    predicting = torch.tensor(answer_positions, device=ids.device) - 1
    clean = hf(input_ids=ids, use_cache=False).logits[0, predicting].float().softmax(-1)
    n_layers, n_tokens = len(hf.model.layers), ids.shape[1]
    effect = torch.zeros(n_layers + 1, n_tokens, device=ids.device)
    for point in range(n_layers + 1):
        vector = baseline[point].to(ids.device, clean.dtype)
        for token in range(n_tokens):

            def pre(_module: Any, args: Any, vector: Tensor = vector, token: int = token) -> Any:
                hidden = args[0].clone()
                hidden[:, token] = vector.to(hidden.dtype)
                return (hidden, *args[1:])

            def post(_module: Any, _args: Any, output: Tensor, vector: Tensor = vector, token: int = token) -> Tensor:
                output = output.clone()
                output[:, token] = vector.to(output.dtype)
                return output

            if point < n_layers:
                handle = hf.model.layers[point].register_forward_pre_hook(pre)
            else:
                handle = hf.model.layers[-1].register_forward_hook(post)
            logits = hf(input_ids=ids, use_cache=False).logits[0, predicting]
            handle.remove()
            effect[point, token] = (logits.float().softmax(-1) - clean).norm(dim=-1).max()
    return effect


@torch.no_grad()
def lens_all_logits(hf: Any, ids: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """The notebook's way: the logits of all layers are kept, overlaps come from one-hot vectors. KL, overlap [L]."""
    resid: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in hf.model.layers:
            hooks.callback(layer.register_forward_pre_hook(lambda m, args: resid.append(args[0])).remove)
        final = hf(input_ids=ids, use_cache=False).logits
    logs = [hf.lm_head(hf.model.norm(value)).float() for value in resid]
    last = final.float().log_softmax(-1)
    vocab = last.shape[-1]
    real = torch.nn.functional.one_hot(last.topk(k, dim=-1).indices, vocab).sum(-2)
    kl, overlap = [], []
    for logits in logs:
        lens = logits.log_softmax(-1)
        kl.append((lens.exp() * (lens - last)).sum(-1).mean())
        own = torch.nn.functional.one_hot(lens.topk(k, dim=-1).indices, vocab).sum(-2)
        overlap.append((own.unsqueeze(-2).float() @ real.unsqueeze(-1).float() / k).mean())
    return torch.stack(kl), torch.stack(overlap)


def gradients(
    hf: Any, ids: Tensor, answer_positions: Sequence[int], layers: Sequence[int], steps: int, block: int, frozen: bool
) -> Tensor:
    """Integrated gradients in blocks of steps: attribution [len(layers), T].

    `frozen=False` is the notebook's way: gradients reach the weights as well and every position is unembedded.
    `frozen=True` is the best loop of this kind: parameters frozen, only answer positions unembedded.
    """
    for parameter in hf.parameters():
        parameter.requires_grad_(not frozen)
    predicting = torch.tensor(answer_positions, device=ids.device) - 1
    targets = ids[0, predicting + 1]
    rows = []
    for layer in layers:
        total = torch.zeros(ids.shape[1], device=ids.device)
        for begin in range(0, steps, block):
            kept: dict[str, Tensor] = {}
            r = torch.arange(begin, min(begin + block, steps), device=ids.device) / steps

            def grow(_module: Any, _args: Any, output: Tensor, kept: dict[str, Tensor] = kept, r: Tensor = r) -> Tensor:
                clean = output.detach().float()
                mean = clean.mean(dim=1, keepdim=True)
                weights = r[:, None, None]
                kept["path"] = clean - mean
                kept["leaf"] = (clean * weights + mean * (1 - weights)).requires_grad_()
                return kept["leaf"].to(output.dtype)

            handle = hf.model.layers[layer].register_forward_hook(grow)
            if frozen:
                hidden = hf.model(input_ids=ids, use_cache=False).last_hidden_state[:, predicting]
                probabilities = hf.lm_head(hidden).float().softmax(-1)
            else:
                probabilities = hf(input_ids=ids, use_cache=False).logits.float().softmax(-1)[:, predicting]
            handle.remove()
            chosen = probabilities.gather(-1, targets[None, :, None].expand(len(r), -1, 1))
            chosen.sum().backward()
            gradient = kept["leaf"].grad
            assert gradient is not None
            total += (gradient * kept["path"]).sum(-1).sum(0)
            hf.zero_grad(set_to_none=True)
        rows.append(total / steps)
    for parameter in hf.parameters():
        parameter.requires_grad_(True)
    return torch.stack(rows)
