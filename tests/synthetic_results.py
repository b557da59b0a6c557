"""Plausible results of every analysis for a model that does not exist: any depth, any number of tokens.

results = synthetic_results(n_layers=30, n_tokens=20)
results["skip-current"].tensors["layer.effect"]   # [30, 30]
write_folder("out", n_layers=4)                   # the same as files
"""

import math
from pathlib import Path

import torch

from hookdepth.results import SCHEMA, Result

ADDITION = ["<|im_start|>", "5", " +", " 7", " +", " 5", " +", " 3", " +", " 1", " +", " 7", " =", " ", "28"]
STRANGE = ["日本", "$x$", "\n", "é", "_", "a_very_long_token_indeed", "<script>", "🙂", "$", "%", "\t", "Ġword"]
EVERY_KIND = ("residual-stats", "logit-lens", "skip-current", "residual-erasure", "integrated-gradients")
INTERVENTIONS = ("skip-current", "skip-future", "local-current", "local-future")


def tokens_of(n_tokens, strange=False):
    """`tokens_of(20)`: that many tokens, the paper's addition first; with the awkward ones if asked."""
    source = (STRANGE if strange else []) + ADDITION
    return [source[index % len(source)] for index in range(n_tokens)]


def synthetic_results(
    n_layers=30,
    n_tokens=20,
    parts=("layer",),
    *,
    null=0.0,
    n_prompts=3,
    n_probes=2,
    strange=False,
    model="tests/synthetic-135M",
    huge=0.0,
    seed=0,
):
    """All analyses by name; `huge` is added to layer 1's relative contribution, `null` is the noise floor."""
    draw = torch.Generator().manual_seed(seed)
    meta = _metadata(n_layers, n_prompts, model)
    tensors = {"residual-stats": _stats(n_layers, draw, huge), "logit-lens": _lens(n_layers, draw)}
    for name in INTERVENTIONS:
        kinds = parts if name.startswith("skip") else ("layer",)
        tensors[name] = {}
        for part in kinds:
            tensors[name] |= _effects(name, part, n_layers, n_prompts, draw)
    probes = [_probe(n_tokens, index, strange) for index in range(n_probes)]
    tensors["residual-erasure"] = _erasure(n_layers, n_tokens, n_probes, draw)
    tensors["integrated-gradients"] = _gradients(n_layers, n_tokens, n_probes, parts, draw)
    results = {}
    for name, values in tensors.items():
        extra = {"analysis": name, "settings": _settings(name, parts)}
        if "probes" in _needs(name):
            extra["probes"] = probes
        if name in INTERVENTIONS or _needs(name):
            extra |= {"null_effect": null, "null_where": "prompt 0, layer 2, 14 rows" if null else None}
        results[name] = Result(name, values, {**meta, **extra})
    return results


def some_results(names=EVERY_KIND, **options):
    """`some_results(n_layers=4)`: of one probe, and of an analysis for each kind of figure or of those named alone."""
    results = synthetic_results(**{"n_probes": 1, **options})
    return {name: results[name] for name in names}


def write_folder(folder, names=None, **options):
    """`write_folder(tmp_path / "out", n_layers=4)`: the results as files, all or those named; returns the folder."""
    for name, result in (some_results(names, **options) if names else synthetic_results(**options)).items():
        result.save(Path(folder) / f"{name}.safetensors")
    return Path(folder)


def _needs(name):
    return ("probes",) if name in ("residual-erasure", "integrated-gradients") else ()


def _settings(name, parts):
    if name == "integrated-gradients":
        return {"parts": list(parts), "ig_method": "adaptive", "ig_steps": 256, "ig_tolerance": 0.01}
    if name.endswith("future"):
        return {"parts": list(parts), "keep_front": 1, "cuts": [[8, 40, 24, 16]] * 3}
    return {"keep_front": 1} if "-" in name and name not in ("residual-stats", "logit-lens") else {}


def _metadata(n_layers, n_prompts, model):
    return {
        "schema": SCHEMA,
        "model": {
            "id": model,
            "revision": None,
            "config_sha256": "0" * 64,
            "family": "llama",
            "n_layers": n_layers,
            "d_model": 576,
            "n_parameters": 134_515_008,
            "dtype": "float32",
            "quantization": "none",
            "attn_implementation": "sdpa",
            "device": "cpu",
        },
        "data": {
            "name": "demo",
            "n_prompts": n_prompts,
            "prompts_sha256": "1" * 64,
            "lengths": [100 + 7 * index for index in range(n_prompts)],
        },
        "seed": 123,
        "versions": {"hookdepth": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0", "python": "3.11.2"},
    }


def _noise(shape, draw, scale=0.1):
    return 1 + scale * torch.randn(shape, generator=draw)


def _phase(n_layers):
    """1 in the first half of the layers, falling to 0 in the second."""
    return torch.sigmoid((0.58 * n_layers - torch.arange(n_layers).float()) / max(0.05 * n_layers, 0.5))


def _stats(n_layers, draw, huge):
    early = _phase(n_layers)
    base = {"attn": 0.1 + 0.35 * early, "mlp": 0.15 + 0.45 * early, "layer": 0.2 + 0.6 * early}
    tensors = {}
    resid = 3 * 1.09 ** torch.arange(n_layers + 1).float()
    tensors["norm.resid"] = resid
    for part, curve in base.items():
        relative = (curve * _noise(n_layers, draw)).abs()
        if huge:
            relative[min(1, n_layers - 1)] += huge * {"attn": 0.05, "mlp": 0.8, "layer": 1.0}[part]
        tensors[f"relative_contribution.{part}"] = relative
        tensors[f"relative_contribution_max.{part}"] = 3 * relative
        tensors[f"norm.{part}"] = relative * resid[:-1]
        tensors[f"cosine.{part}"] = (0.2 - 0.4 * early) * _noise(n_layers, draw, 0.3)
    return tensors


def _lens(n_layers, draw):
    late = 1 - torch.cat([_phase(n_layers), torch.zeros(1)])
    kl = (11 * (1 - late) + 0.4) * _noise(n_layers + 1, draw, 0.05).abs()
    overlap = (0.05 + 0.6 * late) * _noise(n_layers + 1, draw, 0.1).abs()
    kl[-1], overlap[-1] = 0.0, 1.0
    return {"kl": kl, "topk_overlap": overlap.clamp(max=1)}


def _effects(name, part, n_layers, n_prompts, draw):
    skipped = torch.arange(n_layers).float()[:, None]
    distance = (skipped.T - skipped).clamp(min=0)
    strength = _phase(n_layers)[:, None] + 0.1
    effect = strength * torch.exp(-distance / max(4.0, n_layers / 2))
    per_prompt = effect * _noise((n_prompts, n_layers, n_layers), draw).abs()
    if name.endswith("future"):
        per_prompt = per_prompt * 0.5 * strength
    per_prompt = per_prompt.triu(1)
    if name == "skip-current":
        per_prompt = per_prompt + torch.eye(n_layers)
        per_prompt[:, 0] = 3 * per_prompt[:, 0]
    tensors = {f"{part}.effect": per_prompt.amax(0), f"per_prompt.{part}.effect": per_prompt}
    if name.startswith("skip"):
        output = (0.1 + 0.7 * _phase(n_layers)) * _noise((n_prompts, n_layers), draw).abs()
        tensors |= {f"{part}.output": output.amax(0), f"per_prompt.{part}.output": output}
    return tensors


def _probe(n_tokens, index, strange):
    tokens = tokens_of(n_tokens, strange=strange and index == 0)
    prompt = "5 + 7 = " if index == 0 else "The spouse of the performer of Imagine is <b>&"
    return {"prompt": prompt, "answer": "28", "tokens": tokens, "answer_positions": [n_tokens - 2, n_tokens - 1]}


def _erasure(n_layers, n_tokens, n_probes, draw):
    late = torch.cat([torch.ones(1), _phase(n_layers)])[:, None]
    tensors = {}
    for index in range(n_probes):
        effect = 0.8 * late * torch.rand((n_layers + 1, n_tokens), generator=draw)
        effect[:, -1] = 0
        tensors[f"effect.{index}"] = effect
    return {**tensors, "baseline": torch.randn((n_layers + 1, 8), generator=draw)}


def _gradients(n_layers, n_tokens, n_probes, parts, draw):
    tensors = {}
    for part in parts:
        prefix = "" if part == "layer" else f"{part}."
        for index in range(n_probes):
            late = _phase(n_layers)[:, None]
            values = 0.1 * late * torch.randn((n_layers, n_tokens), generator=draw)
            values[:, 0] = 2.0
            values[:, -1] = 0
            error = 0.004 * torch.rand(n_layers, generator=draw)
            converged = torch.ones(n_layers)
            error[n_layers // 3], converged[n_layers // 3] = 0.2, 0
            named = {
                "attribution": values,
                "completeness_error": error,
                "evaluations": torch.randint(11, 551, (n_layers,), generator=draw).float(),
                "f_input": torch.tensor(0.71),
                "f_baseline": torch.full((n_layers,), 0.71 - 0.52 * math.tanh(1.0)),
                "converged": converged,
            }
            tensors |= {f"{prefix}{kind}.{index}": value for kind, value in named.items()}
    return tensors
