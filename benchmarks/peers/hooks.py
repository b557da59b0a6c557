"""The peers written by hand with PyTorch hooks: one pass per intervention.

    effect, output = HookLoop(hf).skip(ids, cuts=[None], layers=[3, 4])      # [2, L], [2]

They are written to be fast in their own way (nothing goes to the host, the clean run is made once, hooks
reduce at once), on Llama-shaped models. What all peers have in common: `skip`, `local`, `erasure`, `stats`,
`lens` and `gradients`, as far as they do it, of one prompt, for any of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FRONT = 1
EPS = 1e-6
Edit = Callable[[int, Tensor], Tensor | None]
"""(layer, its input) → its input from now on."""
Hook = Callable[[int, Tensor, Tensor], Tensor | None]
"""(layer, its input, its output) → its output from now on."""


@contextmanager
def hooked(hf: Any, before: Edit | None = None, after: Hook | None = None) -> Iterator[None]:
    """Hooks on every layer, removed at the end.

    with hooked(hf, after=lambda layer, x, y: x if layer == 3 else None): hf(ids)
    """

    def pre(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, args: Any) -> Any:
            changed = before(layer, args[0]) if before else None
            return None if changed is None else (changed, *args[1:])

        return hook

    def post(layer: int) -> Callable[..., Any]:
        return lambda _module, args, output: after(layer, args[0], output) if after else None

    with ExitStack() as stack:
        for layer, module in enumerate(hf.model.layers):
            if before:
                stack.callback(module.register_forward_pre_hook(pre(layer)).remove)
            if after:
                stack.callback(module.register_forward_hook(post(layer)).remove)
        yield


def at_points(hf: Any, edit: Edit) -> AbstractContextManager[None]:
    """Hooks on the L + 1 layer points: every layer's input, and the last one's output.

    with at_points(hf, lambda point, x: zeros if point == 3 else None): hf(ids)
    """
    last = len(hf.model.layers) - 1

    def after(layer: int, _x: Tensor, y: Tensor) -> Tensor | None:
        return edit(last + 1, y) if layer == last else None

    return hooked(hf, edit, after)


def clean_run(hf: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Layer inputs, what each layer adds (float32), next-token distributions; each of one row."""
    inputs: list[Tensor] = []
    added: list[Tensor] = []

    def note(_layer: int, before: Tensor, output: Tensor) -> None:
        inputs.append(before)
        added.append(output.float() - before.float())

    with hooked(hf, after=note):
        logits = hf(input_ids=ids, use_cache=False).logits
    return inputs, added, logits[0].float().softmax(-1)


def relative_change(clean: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """‖change of what a layer adds‖ / ‖what it adds‖, [row, token]."""
    return (clean - (after.float() - before.float())).norm(dim=-1) / clean.norm(dim=-1).clamp(min=EPS)


class HookLoop:
    """One hooked pass per intervention; gradients in the notebook's way, in blocks of 16 steps: they reach the weights
    as well, and every position is unembedded."""

    block, frozen, together = 16, False, 1

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    @torch.no_grad()
    def skip(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Skip each of `layers` once per cut (None: all tokens): max over cuts of effect [S, L] and output [S]."""
        _, added, probabilities = clean_run(self.hf, ids)
        effect = torch.zeros(len(layers), len(added), device=ids.device)
        out = torch.zeros(len(layers), device=ids.device)
        for cut in cuts:
            first = cut or 0
            for place, skipped in enumerate(layers):

                def after(
                    layer: int, x: Tensor, y: Tensor, place: int = place, skipped: int = skipped, first: int = first
                ) -> Tensor:
                    if layer == skipped:
                        stop = first or y.shape[1]
                        y = y.clone()
                        y[:, FRONT:stop] = x[:, FRONT:stop]
                    cell = effect[place, layer]
                    torch.maximum(cell, relative_change(added[layer], x, y)[0, first:].max(), out=cell)
                    return y

                with hooked(self.hf, after=after):
                    logits = self.hf(input_ids=ids, use_cache=False).logits[0, first:]
                moved = (logits.float().softmax(-1) - probabilities[first:]).norm(dim=-1).max()
                torch.maximum(out[place], moved, out=out[place])
        return effect, out

    @torch.no_grad()
    def local(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> Tensor:
        """Take each of `layers` out of the clean input of every later layer, a pass per cut: max over cuts, [S, L]."""
        inputs, added, _ = clean_run(self.hf, ids)
        effect = torch.zeros(len(layers), len(added), device=ids.device)
        for cut in cuts:
            first = cut or 0
            for place, source in enumerate(layers):

                def before(layer: int, _x: Tensor, source: int = source, first: int = first) -> Tensor | None:
                    if layer <= source:
                        return None
                    x = inputs[layer].clone()
                    span = slice(FRONT, first or None)
                    x[:, span] = (x[:, span].float() - added[source][:, span]).to(x.dtype)
                    return x

                def after(
                    layer: int, x: Tensor, y: Tensor, place: int = place, source: int = source, first: int = first
                ) -> None:
                    if layer > source:
                        cell = effect[place, layer]
                        torch.maximum(cell, relative_change(added[layer], x, y)[0, first:].max(), out=cell)

                with hooked(self.hf, before, after):
                    self.hf.model(input_ids=ids, use_cache=False)
        return effect

    @torch.no_grad()
    def erasure(
        self,
        ids: Tensor,
        answer: Sequence[int],
        baseline: Tensor,
        points: Sequence[int],
        only: Sequence[int] | None = None,
    ) -> Tensor:
        """One pass per layer point and token (`only` some of those that the answer can see): effect [S, T']."""
        predicting = torch.tensor(answer, device=ids.device) - 1
        clean = self.hf(input_ids=ids, use_cache=False).logits[0, predicting].float().softmax(-1)
        tokens = range(max(answer)) if only is None else only
        effect = torch.zeros(len(points), len(tokens), device=ids.device)
        for place, point in enumerate(points):
            for column, token in enumerate(tokens):

                def erase(at: int, x: Tensor, point: int = point, token: int = token) -> Tensor | None:
                    if at != point:
                        return None
                    x = x.clone()
                    x[:, token] = baseline[point].to(x)
                    return x

                with at_points(self.hf, erase):
                    logits = self.hf(input_ids=ids, use_cache=False).logits[0, predicting]
                effect[place, column] = (logits.float().softmax(-1) - clean).norm(dim=-1).max()
        return effect

    @torch.no_grad()
    def patching(self, ids: Tensor, source: Tensor, words: Sequence[int], layers: Sequence[int]) -> Tensor:
        """Put every state of `source` into the run of `ids`, `together` tokens a pass: share of the gap, [S, T]."""
        seen: list[Tensor] = []
        with hooked(self.hf, before=lambda _layer, x: seen.append(x)):
            high = gap(self.hf(input_ids=source, use_cache=False).logits, words)
        low = gap(self.hf(input_ids=ids, use_cache=False).logits, words)
        tokens = torch.arange(ids.shape[1], device=ids.device)
        rows = []
        for layer in layers:
            for own in tokens.split(self.together):
                where = torch.arange(len(own), device=ids.device)

                def put(at: int, x: Tensor, layer: int = layer, own: Tensor = own, where: Tensor = where) -> Any:
                    if at != layer:
                        return None
                    x = x.clone()
                    x[where, own] = seen[layer][0, own]
                    return x

                with hooked(self.hf, before=put):
                    logits = self.hf(input_ids=ids.expand(len(own), -1), use_cache=False).logits
                rows.append((gap(logits, words) - low) / (high - low))
        return torch.cat(rows).view(len(layers), -1)

    @torch.no_grad()
    def stats(self, ids: Tensor) -> Tensor:
        """Sums over tokens of ‖a‖/‖h‖, ‖m‖/‖h+a‖, ‖c‖/‖h‖ and the three cosines: [6, L]."""
        attention: list[Tensor] = []
        mlp: list[Tensor] = []
        rows: list[Tensor] = []

        def measure(layer: int, x: Tensor, y: Tensor) -> None:
            pairs = ((attention[layer], x), (mlp[layer], x + attention[layer]), (y.float() - x.float(), x))
            size = [a.float().norm(dim=-1) / h.float().norm(dim=-1).clamp(min=EPS) for a, h in pairs]
            cosine = [functional.cosine_similarity(a.float(), h.float(), dim=-1) for a, h in pairs]
            rows.append(torch.stack([*size, *cosine]).sum((1, 2)))

        with ExitStack() as stack, hooked(self.hf, after=measure):
            for layer in self.hf.model.layers:
                stack.callback(layer.self_attn.register_forward_hook(lambda m, a, o: attention.append(o[0])).remove)
                stack.callback(layer.mlp.register_forward_hook(lambda m, a, o: mlp.append(o)).remove)
            self.hf(input_ids=ids, use_cache=False)
        return torch.stack(rows, 1)

    @torch.no_grad()
    def lens(self, ids: Tensor, k: int = 5) -> Tensor:
        """The notebook's way: all layers' logits are kept, overlaps by one-hot vectors. Sums of KL, overlap [2, L]."""
        resid: list[Tensor] = []
        with hooked(self.hf, before=lambda layer, x: resid.append(x)):
            final = self.hf(input_ids=ids, use_cache=False).logits
        logits = [self.hf.lm_head(self.hf.model.norm(value)).float() for value in resid]
        return all_logits_lens(logits, final, k)

    def gradients(self, ids: Tensor, answer: Sequence[int], layers: Sequence[int], steps: int) -> Tensor:
        """Integrated gradients: attribution [S, T]."""
        block, frozen = self.block, self.frozen
        for parameter in self.hf.parameters():
            parameter.requires_grad_(not frozen)
        predicting = torch.tensor(answer, device=ids.device) - 1
        rows = []
        for layer in layers:
            total = torch.zeros(ids.shape[1], device=ids.device)
            for begin in range(0, steps, block):
                r = torch.arange(begin, min(begin + block, steps), device=ids.device)[:, None, None] / steps
                kept: dict[str, Tensor] = {}

                def grow(
                    n: int, _x: Tensor, y: Tensor, layer: int = layer, r: Tensor = r, kept: dict[str, Tensor] = kept
                ) -> Tensor | None:
                    if n != layer:
                        return None
                    clean = y.detach().float()
                    mean = clean.mean(dim=1, keepdim=True)
                    kept["path"] = clean - mean
                    kept["leaf"] = (clean * r + mean * (1 - r)).requires_grad_()
                    return kept["leaf"].to(y.dtype)

                with hooked(self.hf, after=grow):
                    if frozen:
                        hidden = self.hf.model(input_ids=ids, use_cache=False).last_hidden_state[:, predicting]
                        probabilities = self.hf.lm_head(hidden).float().softmax(-1)
                    else:
                        logits = self.hf(input_ids=ids, use_cache=False).logits
                        probabilities = logits.float().softmax(-1)[:, predicting]
                targets = ids[0, predicting + 1][None, :, None].expand(len(probabilities), -1, 1)
                probabilities.gather(-1, targets).sum().backward()
                gradient = kept["leaf"].grad
                assert gradient is not None
                total += (gradient * kept["path"]).sum(-1).sum(0)
                self.hf.zero_grad(set_to_none=True)
            rows.append(total / steps)
        for parameter in self.hf.parameters():
            parameter.requires_grad_(True)
        return torch.stack(rows)


class FrozenLoop(HookLoop):
    """The best loop of its kind for gradients: weights frozen, answer positions alone unembedded, larger blocks."""

    block, frozen = 32, True


class LayerLoop(HookLoop):
    """The best loop of its kind for patching: a pass a layer, with a row a token."""

    together = 1 << 20


def gap(logits: Tensor, words: Sequence[int]) -> Tensor:
    """By how much one word is ahead of another after the last token, a number a row."""
    last = logits[:, -1].float()
    return last[:, words[0]] - last[:, words[1]]


def all_logits_lens(logits: Sequence[Tensor], final: Tensor, k: int = 5) -> Tensor:
    """Sums over tokens of KL(lens‖final) and of the top k's overlap by one-hot vectors, [2, L]: the notebook's."""
    last = final.float().log_softmax(-1)
    vocab = last.shape[-1]
    real = functional.one_hot(last.topk(k, dim=-1).indices, vocab).sum(-2)
    rows = []
    for own in logits:
        lens = own.float().log_softmax(-1)
        hot = functional.one_hot(lens.topk(k, dim=-1).indices, vocab).sum(-2)
        overlap = (hot.unsqueeze(-2).float() @ real.unsqueeze(-1).float() / k).sum()
        rows.append(torch.stack([(lens.exp() * (lens - last)).sum(), overlap]))
    return torch.stack(rows, 1)
