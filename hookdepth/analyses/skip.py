"""skip-current and skip-future: skip a layer or sublayer, see who notices (2505.13898, Fig. 3).

    task(model, inputs, Settings(parts=("layer", "attn")), ("skip-current", "skip-future"))

Row s of an effect: layer s skipped; column i: max over tokens of ‖c_i − c̄_i‖/‖c_i‖. Output: max over
tokens of ‖softmax(z) − softmax(z̄)‖₂. *current* skips all tokens from `keep_front` on and measures all;
*future* skips those left of a cut and measures those right of it, max over the prompt's cuts. Both come from
the same passes: the skips without a cut lend their keys and values to every cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hookdepth.analyses.base import Inputs, OnPass, Partial, Settings, Task, Tensors, chunks_of, partial_of
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Skip
from hookdepth.engine.measurements import LayerEffect, Measurement, OutputEffect
from hookdepth.engine.passes import run_branches
from hookdepth.model.decoder import Decoder


def task(model: Decoder, inputs: Inputs, settings: Settings, analyses: tuple[str, ...]) -> Task:
    """One chunk for each prompt, or for a few short ones."""
    lengths = [len(prompt) for prompt in inputs.prompts]
    chunks = chunks_of(lengths, (model.n_layers + 2) * len(settings.parts))
    wants = {"current": "skip-current" in analyses, "future": "skip-future" in analyses}

    def branches(chunk: int) -> tuple[list[Branch], list[int]]:
        listed = [
            Branch((skip,), prompt=local, cut=cut)
            for local, prompt in enumerate(chunks[chunk])
            for part in settings.parts
            for layer in range(model.n_layers)
            for skip in [Skip(layer, part, slice(settings.front(analyses[0]), None))]
            for cut in ([None] if wants["current"] else []) + list(inputs.cuts[prompt] if wants["future"] else ())
        ]
        return listed, [lengths[prompt] for prompt in chunks[chunk]]

    def run(chunk: int, on_pass: OnPass) -> Partial:
        listed, _ = branches(chunk)
        tensors = {
            f"{name}.{part}.{kind}": torch.zeros(len(chunks[chunk]), model.n_layers, *shape)
            for name in analyses
            for part in settings.parts
            for kind, shape in (("effect", (model.n_layers,)), ("output", ()))
        }
        prompts = [inputs.prompts[prompt] for prompt in chunks[chunk]]
        measured: list[Measurement] = [LayerEffect(), OutputEffect()]
        results = run_branches(model, prompts, listed, measured, max_rows=settings.max_rows, on_pass=on_pass)
        for number, branch in enumerate(listed):
            (skip,) = branch.interventions
            assert isinstance(skip, Skip)
            prefix = f"skip-{'current' if branch.cut is None else 'future'}.{skip.part}"
            for kind, values in (("effect", results.layer["effect"]), ("output", results.output["output"])):
                cell = tensors[f"{prefix}.{kind}"][branch.prompt, skip.layer]
                torch.maximum(cell, values[number], out=cell)
        return partial_of(results, tensors)

    return Task("skip", analyses, len(chunks), run, lambda partials: finish_effects(analyses, partials), branches)


def finish_effects(analyses: Sequence[str], partials: Sequence[Partial]) -> dict[str, Tensors]:
    """Per-prompt effects of all chunks, and their maximum over prompts.

    finish_effects(["skip-current"], partials)["skip-current"]["layer.per_prompt_effect"]   # [N, L, L]
    """
    results: dict[str, Tensors] = {name: {} for name in analyses}
    for key in partials[0].tensors:
        name, part, kind = key.split(".")
        per_prompt = torch.cat([partial.tensors[key] for partial in partials])
        results[name][f"{part}.per_prompt_{kind}"] = per_prompt
        results[name][f"{part}.{kind}"] = per_prompt.amax(0)
    return results
