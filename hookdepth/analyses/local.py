"""local-current and local-future: direct effects, not propagated (2505.13898, Fig. 5).

    task(model, inputs, Settings(), ("local-current",)).run(0, print).tensors["local-current.layer.effect"]  # [N, L, L]

Entry (s, i), i > s: layer i is given h_i − c_s instead of h_i, everything before being clean; how much does
what it adds change? Each branch is born at the input of layer i and gone after it, so the L(L−1)/2 of them
cost as much as the L propagated skips.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hookdepth.analyses.base import Inputs, OnPass, Partial, Settings, Task, Tensors, chunks_of, partial_of
from hookdepth.analyses.skip import finish_effects
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Subtract
from hookdepth.engine.measurements import LayerEffect
from hookdepth.engine.passes import run_branches
from hookdepth.model.decoder import Decoder


def task(model: Decoder, inputs: Inputs, settings: Settings, analyses: tuple[str, ...]) -> Task:
    """One chunk for each prompt, or for a few short ones."""
    lengths = [len(prompt) for prompt in inputs.prompts]
    chunks = chunks_of(lengths, model.n_layers + 2)
    wants = {"current": "local-current" in analyses, "future": "local-future" in analyses}

    def branches(chunk: int) -> tuple[list[Branch], list[int]]:
        listed = [
            Branch((subtract,), prompt=local, cut=cut, until=layer)
            for local, prompt in enumerate(chunks[chunk])
            for layer in range(1, model.n_layers)
            for source in range(layer)
            for subtract in [Subtract(source, layer, slice(settings.front(analyses[0]), None))]
            for cut in ([None] if wants["current"] else []) + list(inputs.cuts[prompt] if wants["future"] else ())
        ]
        return listed, [lengths[prompt] for prompt in chunks[chunk]]

    def run(chunk: int, on_pass: OnPass) -> Partial:
        listed, _ = branches(chunk)
        shape = (len(chunks[chunk]), model.n_layers, model.n_layers)
        tensors = {f"{name}.layer.effect": torch.zeros(shape) for name in analyses}
        if not listed:  # a single layer has no later one
            return Partial(tensors, 0, 0.0)
        prompts = [inputs.prompts[prompt] for prompt in chunks[chunk]]
        results = run_branches(model, prompts, listed, [LayerEffect()], max_rows=settings.max_rows, on_pass=on_pass)
        for number, branch in enumerate(listed):
            (subtract,) = branch.interventions
            assert isinstance(subtract, Subtract)
            name = f"local-{'current' if branch.cut is None else 'future'}"
            cell = tensors[f"{name}.layer.effect"][branch.prompt, subtract.source, subtract.layer]
            torch.maximum(cell, results.layer["effect"][number, subtract.layer], out=cell)
        return partial_of(results, tensors)

    def finish(partials: Sequence[Partial]) -> dict[str, Tensors]:
        return finish_effects(analyses, partials)

    return Task("local", analyses, len(chunks), run, finish, branches)
