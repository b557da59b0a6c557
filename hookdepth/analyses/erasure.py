"""residual-erasure: until which layer is each token needed? (2505.13898, Fig. 6b)

    task(model, inputs, Settings(), ("residual-erasure",)).run(0, print).tensors["effect"]   # [L+1, T]

For every layer point l = 0 … L and token t, h_l[t] is replaced by the uninformative residual of that point,
its token mean over the baseline prompts; effect: max over the answer's tokens of ‖softmax − softmax‖₂ at the
positions that predict them. Tokens that no such position can see have effect 0, by causality.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses.base import Inputs, OnPass, Partial, Settings, Task, Tensors, partial_of
from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Patch
from hookdepth.engine.measurements import OutputEffect
from hookdepth.engine.passes import run_branches
from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.model.decoder import Decoder


def task(model: Decoder, inputs: Inputs, settings: Settings, analyses: tuple[str, ...]) -> Task:
    """One chunk a probe. The baseline is computed once, by whoever asks first."""

    @cache
    def baseline() -> Tensor:
        return uninformative_residual(model, inputs.baseline)

    def branches(chunk: int) -> tuple[list[Branch], list[int]]:
        empty = torch.zeros(model.n_layers + 1, model.d_model)
        return erasure_branches(inputs.probes[chunk], empty), [len(inputs.probes[chunk].token_ids)]

    def run(chunk: int, on_pass: OnPass) -> Partial:
        probe = inputs.probes[chunk]
        listed = erasure_branches(probe, baseline())
        prompts = [probe.token_ids]
        measured = [OutputEffect()]
        results = run_branches(model, prompts, listed, measured, max_rows=settings.max_rows, on_pass=on_pass)
        effect = torch.zeros(model.n_layers + 1, len(probe.token_ids))
        effect[:, : 1 + _last_predicting(probe)] = results.output["output"].view(model.n_layers + 1, -1)
        return partial_of(results, {"effect": effect})

    def finish(partials: Sequence[Partial]) -> dict[str, Tensors]:
        tensors = {f"effect.{chunk}": partial.tensors["effect"] for chunk, partial in enumerate(partials)}
        return {"residual-erasure": {**tensors, "baseline": baseline()}}

    return Task("residual-erasure", analyses, len(inputs.probes), run, finish, branches)


def erasure_branches(probe: Probe, baseline: Float[Tensor, "point width"]) -> list[Branch]:
    """A branch for every layer point and every token that a predicting position can see, points first.

    len(erasure_branches(probe, baseline))   # (L+1) · T'
    """
    n_layers = baseline.shape[0] - 1
    measured = [position - 1 for position in probe.answer_positions]
    return [
        Branch((_erase(point, n_layers, baseline[point], token),), measured=measured)
        for point in range(n_layers + 1)
        for token in range(1 + _last_predicting(probe))
    ]


def _erase(point: int, n_layers: int, vector: Tensor, token: int) -> Patch:
    if point < n_layers:
        return Patch("resid_pre", point, vector, [token])
    return Patch("resid_post", n_layers - 1, vector, [token])


def _last_predicting(probe: Probe) -> int:
    return max(probe.answer_positions) - 1


def uninformative_residual(model: Decoder, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "point width"]:
    """Token mean of resid_pre[0..L−1] and of the final residual, float32 on the CPU.

    uninformative_residual(model, first_ten_prompts)   # [L+1, d]
    """
    sums = torch.zeros(model.n_layers + 1, model.d_model, dtype=torch.float64)

    def add(layer: int, sites: LayerSites) -> None:
        here.append(sites.resid_pre[0].float().sum(0))
        if layer == model.n_layers - 1:
            here.append(sites.resid_post[0].float().sum(0))

    with model.evaluating(), each_layer(model, add):
        for prompt in prompts:
            here: list[Tensor] = []
            model.forward(torch.tensor([list(prompt)], device=model.device))
            sums += torch.stack([value.cpu() for value in here]).double()
    return (sums / sum(len(prompt) for prompt in prompts)).float()
