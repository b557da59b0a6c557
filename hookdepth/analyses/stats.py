"""residual-stats: what attention, MLP and layer add to the residual stream, relative to it (2505.13898, Fig. 2).

    task(model, inputs, Settings(), ("residual-stats",)).run(0, print).tensors["relative_contribution.attn"]   # [L]

attn: ‖a‖/‖h‖ and cos(a, h); mlp: ‖m‖/‖h+a‖ and cos(m, h+a); layer: ‖c‖/‖h‖ and cos(c, h). Means over all
tokens of all prompts but the first `keep_front` of each (0), so a long prompt counts for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookdepth.analyses.base import Inputs, OnPass, Partial, Settings, Task, Tensors, tokens_after
from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.metrics import cosine, relative_norm
from hookdepth.model.decoder import Decoder

_PARTS = ("attn", "mlp", "layer")


def task(model: Decoder, inputs: Inputs, settings: Settings, analyses: tuple[str, ...]) -> Task:
    """One chunk a prompt: sums over its tokens, on the device, from one forward pass."""
    front = settings.front("residual-stats")
    tokens = tokens_after(front, inputs.prompts, "residual-stats")

    def run(chunk: int, on_pass: OnPass) -> Partial:
        sums = residual_sums(model, inputs.prompts[chunk], front)
        on_pass()
        return Partial(sums, 1)

    def finish(partials: Sequence[Partial]) -> dict[str, Tensors]:
        result: Tensors = {}
        for name in partials[0].tensors:
            values = torch.stack([partial.tensors[name] for partial in partials])
            result[name] = values.amax(0) if "_max" in name else (values.double().sum(0) / tokens).float()
        return {"residual-stats": result}

    return Task("residual-stats", analyses, len(inputs.prompts), run, finish)


def residual_sums(model: Decoder, prompt: Sequence[int], front: int = 0) -> Tensors:
    """Sums over a prompt's tokens from `front` on of everything that residual-stats averages; `*_max` are maxima.

    residual_sums(model, ids)["norm.resid"]   # [L+1]
    """
    per_layer: list[Tensor] = []
    last_norm: list[Tensor] = []

    def measure(layer: int, sites: LayerSites) -> None:
        resid_mid = sites.resid_pre + sites.attn_out
        contribution = sites.resid_post.float() - sites.resid_pre.float()
        pairs = ((sites.attn_out, sites.resid_pre), (sites.mlp_out, resid_mid), (contribution, sites.resid_pre))
        relative = torch.stack([relative_norm(part, whole)[0, front:] for part, whole in pairs])  # [part, token]
        cosines = torch.stack([cosine(part, whole)[0, front:] for part, whole in pairs])
        norms = torch.stack([part.float().norm(dim=-1)[0, front:] for part, _ in pairs])
        resid = sites.resid_pre[0, front:].float().norm(dim=-1).sum()[None]
        per_layer.append(torch.cat([relative.sum(-1), cosines.sum(-1), norms.sum(-1), relative.amax(-1), resid]))
        if layer == model.n_layers - 1:
            last_norm.append(sites.resid_post[0, front:].float().norm(dim=-1).sum())

    with model.evaluating(), each_layer(model, measure):
        model.forward(torch.tensor([list(prompt)], device=model.device))
    table = torch.stack([values.cpu() for values in per_layer], dim=1)  # [13, L]
    kinds = ("relative_contribution", "cosine", "norm", "relative_contribution_max")
    names = [f"{kind}.{part}" for kind in kinds for part in _PARTS]
    result = dict(zip(names, table, strict=False))
    result["norm.resid"] = torch.cat([table[-1], last_norm[0].cpu()[None]])
    return result
