"""nnsight 0.8.1: a trace per intervention, as the notebook has it, and all interventions as invokes of one trace.

    TracePerIntervention(twin(hf)).skip(ids, cuts=[None], layers=[3, 4])      # effect [2, L], output [2]

The first is the notebook's own code (what it copies to the host included), changed only where nnsight or
transformers have changed since: a layer's output is a tensor, gradients are read inside `with loss.backward()`.
The second follows "Batch several prompts in one pass" of nnsight's README and reduces on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.hooks import FRONT, all_logits_lens, gap


def merge_io(intervened: Tensor, orig: Tensor, t: int | None) -> Tensor:
    """The notebook's: intervened left of t (None: everywhere), the original elsewhere and at the first token."""
    if t is None:
        return torch.cat([orig[:, :FRONT], intervened[:, FRONT:]], dim=1)
    return torch.cat([orig[:, :FRONT], intervened[:, FRONT:t], orig[:, t:]], dim=1)


class _Traced:
    def __init__(self, hf: Any) -> None:
        # nnsight wants a tokenizer for several invokes; prompts are token ids, so it never tokenises.
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
        device = next(hf.parameters()).device  # else a pipeline takes the model to a GPU if there is one
        self.llm: Any = nnsight.TransformersModel(hf, task="text-generation", tokenizer=tokenizer, device=device)


class TracePerIntervention(_Traced):
    """The notebook's way."""

    @torch.no_grad()
    def skip(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The notebook's test_effect."""
        llm = self.llm
        with llm.session():
            dall = torch.zeros(1)
            dall_out = torch.zeros(1)
            residual_log = []
            with llm.trace(ids):
                for layer in llm.model.layers:
                    inputs = layer.inputs[0][0]
                    residual_log.append(layer.output.detach().cpu().float() - inputs.detach().cpu().float())
                outputs = llm.output.logits.detach().float().softmax(dim=-1).cpu()
            clean = torch.cat(residual_log, dim=0)
            for t in cuts:
                diffs, out_diffs = [], []
                for skipped in layers:
                    with llm.trace(ids):
                        new_logs = []
                        for i, layer in enumerate(llm.model.layers):
                            layer_inputs = layer.inputs[0][0]
                            if i == skipped:
                                layer.output = merge_io(layer_inputs, layer.output, t)
                            new_logs.append(layer.output.detach().cpu().float() - layer_inputs.detach().cpu().float())
                        new = torch.cat(new_logs, dim=0).float()
                        change = (clean[:, t:] - new[:, t:]).norm(dim=-1)
                        relative = change / clean[:, t:].norm(dim=-1).clamp(min=1e-6)
                        diffs.append(relative.max(dim=-1).values)
                        moved = llm.output.logits.detach()[:, t:].float().softmax(dim=-1).cpu() - outputs[:, t:]
                        out_diffs.append(moved.norm(dim=-1).max(dim=-1).values)
                dall = torch.max(dall, torch.stack(diffs, dim=0))
                dall_out = torch.max(dall_out, torch.cat(out_diffs, dim=0))
            dall = nnsight.save(dall)
            dall_out = nnsight.save(dall_out)
        return dall, dall_out

    @torch.no_grad()
    def erasure(self, ids: Tensor, answer: Sequence[int], baseline: Tensor, points: Sequence[int]) -> Tensor:
        """The notebook's measure_token_skip, its baseline given."""
        llm = self.llm
        first, last, tokens = min(answer) - 1, max(answer), max(answer)
        with llm.session():
            with llm.trace(ids):
                outs = llm.output.logits[:, first:last].detach().float().softmax(dim=-1)
            ls = []
            for point in points:
                ts = []
                for t in range(tokens):
                    with llm.trace(ids):
                        if point == 0:
                            llm.model.layers[0].inputs[0][0][:, t] = baseline[0][None].to(outs.device)
                        else:
                            llm.model.layers[point - 1].output[:, t] = baseline[point][None].to(outs.device)
                        changed = llm.output.logits[:, first:last].detach().float().softmax(dim=-1)
                        ts.append((outs - changed).norm(dim=-1).max(dim=1).values.cpu())
                ls.append(torch.cat(ts, 0))
            result = nnsight.save(torch.stack(ls, dim=0))
        return result

    @torch.no_grad()
    def patching(self, ids: Tensor, source: Tensor, words: Sequence[int], layers: Sequence[int]) -> Tensor:
        """A trace a layer and token, in the manner of measure_token_skip: share of the gap, [S, T]."""
        llm = self.llm
        with llm.session():
            with llm.trace(source):
                seen = [layer.inputs[0][0] for layer in llm.model.layers]
                high = gap(llm.output.logits, words)
            with llm.trace(ids):
                low = gap(llm.output.logits, words)
            rows = []
            for layer in layers:
                for t in range(ids.shape[1]):
                    with llm.trace(ids):
                        llm.model.layers[layer].inputs[0][0][:, t] = seen[layer][:, t]
                        rows.append((gap(llm.output.logits, words) - low) / (high - low))
            result = nnsight.save(torch.cat(rows).view(len(layers), -1))
        return result

    @torch.no_grad()
    def stats(self, ids: Tensor) -> Tensor:
        """The notebook's analyze_norms: sums over tokens, [6, L]."""
        llm = self.llm
        with llm.trace(ids):
            rows = []
            for layer in llm.model.layers:
                layer_inputs = layer.inputs[0][0]
                attn = layer.self_attn.output[0]
                mlp_input = attn + layer_inputs
                mlp = layer.mlp.output
                diff = layer.output.float() - layer_inputs.float()
                row = []
                for part, whole in ((attn, layer_inputs), (mlp, mlp_input), (diff, layer_inputs)):
                    size = part.norm(dim=-1).float() / whole.norm(dim=-1).float().clamp(min=1e-6)
                    row.append(size.sum().cpu())
                for part, whole in ((attn, layer_inputs), (mlp, mlp_input), (diff, layer_inputs)):
                    row.append(functional.cosine_similarity(part, whole, dim=-1).sum().cpu().float())
                rows.append(torch.stack(row))
            result = nnsight.save(torch.stack(rows, 1))
        return result

    @torch.no_grad()
    def lens(self, ids: Tensor) -> Tensor:
        """The notebook's run_logitlens: sums over tokens, [2, L]."""
        llm = self.llm
        with llm.trace(ids):
            resid = [layer.inputs[0][0] for layer in llm.model.layers]
            layer_logs = [llm.lm_head(llm.model.norm(value)).detach().float() for value in resid]
            result = nnsight.save(all_logits_lens(layer_logs, llm.output.logits))
        return result

    def gradients(self, ids: Tensor, answer: Sequence[int], layers: Sequence[int], steps: int) -> Tensor:
        """The notebook's get_igrads: weights not frozen, every position unembedded, blocks of 16 steps."""
        llm, block = self.llm, 16
        first, last = min(answer) - 1, max(answer)
        rows = []
        for n in layers:
            total = torch.zeros(ids.shape[1])
            for begin in range(0, steps, block):
                with llm.trace(ids):
                    orig = llm.model.layers[n].output.clone().detach()
                    baseline = orig.float().mean(dim=1, keepdims=True)
                    r = torch.arange(begin, min(begin + block, steps), device=orig.device) / steps
                    target = orig.float() * r[:, None, None] + baseline * (1 - r[:, None, None])
                    target.requires_grad_()
                    llm.model.layers[n].output = target.to(orig.dtype)
                    classes = functional.softmax(llm.output.logits[:, :-1].float(), dim=-1)
                    tid = ids[:, 1:].repeat(classes.shape[0], 1)
                    probabilities = classes.gather(-1, tid.unsqueeze(-1))[:, first:last]
                    with probabilities.sum().backward():
                        grad = target.grad
                        igrad = (grad * (orig.float() - baseline)).detach().cpu().sum(0).sum(-1).save()
                total = total + igrad
                llm._module.zero_grad(set_to_none=True)
            rows.append(total / steps)
        return torch.stack(rows)


class OneTrace(_Traced):
    """All interventions of a prompt in one trace: an invoke each; the clean run is the first."""

    @torch.no_grad()
    def skip(self, ids: Tensor, cuts: Sequence[int | None], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Max over cuts of effect [S, L] and output [S]."""
        llm = self.llm
        with llm.trace() as tracer:
            effects = nnsight.save([])
            outputs = nnsight.save([])
            clean = []
            last = []
            with tracer.invoke(ids):
                for layer in llm.model.layers:
                    inputs = layer.inputs[0][0].float()
                    clean.append(layer.output.float() - inputs)
                last.append(llm.output.logits.float().softmax(-1))
            for t in cuts:
                for skipped in layers:
                    with tracer.invoke(ids):
                        found = []
                        for i, layer in enumerate(llm.model.layers):
                            inputs = layer.inputs[0][0]
                            if i == skipped:
                                layer.output = merge_io(inputs, layer.output, t)
                            added = layer.output.float() - inputs.float()
                            change = clean[i] - added  # read after this layer's output: then the first invoke has it
                            relative = change[:, t:].norm(dim=-1) / clean[i][:, t:].norm(dim=-1).clamp(min=1e-6)
                            found.append(relative.max())
                        effects.append(torch.stack(found))
                        moved = llm.output.logits[:, t:].float().softmax(-1) - last[0][:, t:]
                        outputs.append(moved.norm(dim=-1).max())
        effect = torch.stack(list(effects)).view(len(cuts), len(layers), -1).amax(0)
        return effect, torch.stack(list(outputs)).view(len(cuts), len(layers)).amax(0)

    @torch.no_grad()
    def erasure(self, ids: Tensor, answer: Sequence[int], baseline: Tensor, points: Sequence[int]) -> Tensor:
        """Effect [S, T']."""
        llm = self.llm
        first, last, tokens = min(answer) - 1, max(answer), max(answer)
        vectors = baseline.to(ids.device, next(llm._module.parameters()).dtype)
        with llm.trace() as tracer:
            effects = nnsight.save([])
            clean = []
            with tracer.invoke(ids):
                clean.append(llm.output.logits[:, first:last].float().softmax(-1))
            for point in points:
                for t in range(tokens):
                    with tracer.invoke(ids):
                        if point == 0:
                            llm.model.layers[0].inputs[0][0][:, t] = vectors[0]
                        else:
                            llm.model.layers[point - 1].output[:, t] = vectors[point]
                        changed = llm.output.logits[:, first:last].float().softmax(-1)
                        effects.append((changed - clean[0]).norm(dim=-1).max())
        return torch.stack(list(effects)).view(len(points), tokens)
