"""Derived numbers: effective depth by three definitions, depth scores, and what a run was.

    summary = summarise(load_folder("out"))
    summary["effective_depth"]["kl"]     # {"index": 19, "ratio": 0.667, "status": "found", "definition": "…"}
    summary["depth_scores"]["skip-future"]["layer"]["effect"]   # 8.4

Everything is JSON-able; what does not exist is null, never NaN. Sources: *What Affects the Effective Depth of
Large Language Models?* (2512.14064) and Fig. 7 of *Do Language Models Use Their Depth Efficiently?* (2505.13898).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth._version import __version__
from hookdepth.results import SUFFIX, Result

ANALYSES = (
    "residual-stats",
    "logit-lens",
    "skip-current",
    "skip-future",
    "local-current",
    "local-future",
    "residual-erasure",
    "integrated-gradients",
)
PARTS = ("layer", "attn", "mlp")
COSINES = ("cosine.attn", "cosine.mlp", "cosine.layer")
KL_SHARE = 0.5
OVERLAP_THRESHOLD = 0.3

# definition → (the analysis it needs, what it says)
DEFINITIONS = {
    "cosine": (
        "residual-stats",
        "last layer l where the mean of the three cosine curves crosses from negative to non-negative "
        "(mean[l-1] < 0 <= mean[l])",
    ),
    "kl": ("logit-lens", f"first layer with KL(lens || final) < {KL_SHARE} * max KL"),
    "topk_overlap": ("logit-lens", f"first layer with top-5 overlap > {OVERLAP_THRESHOLD}"),
}


def mean_cosine(stats: Mapping[str, Tensor]) -> Float[Tensor, " layer"]:
    """Mean of the attention, MLP and layer cosine curves, from −1 to 1.

    mean_cosine(result.tensors)   # [L]
    """
    return torch.stack([stats[name].double() for name in COSINES]).mean(0)


def last_crossing(curve: Float[Tensor, " layer"]) -> int | None:
    """The last l ≥ 1 with curve[l−1] < 0 ≤ curve[l]; None where there is none (2512.14064, cosine).

    A curve that starts non-negative crosses only if it falls below zero first. (The authors' notebook
    returns the layer before the crossing, l − 1.)

        last_crossing(torch.tensor([-0.1, 0.2, -0.1, 0.0]))   # 3
    """
    crossings = (curve[:-1] < 0) & (curve[1:] >= 0)
    return _last(crossings.nonzero().flatten().tolist(), shift=1)


def first_below_share(kl: Float[Tensor, " point"], share: float = KL_SHARE) -> int | None:
    """The first layer l < L with kl[l] < share · max(kl) (2512.14064, logit lens).

    Entry L, the final residual, is 0 by construction and does not count as a layer.

        first_below_share(torch.tensor([4.0, 3.0, 1.0, 0.0]))   # 2
    """
    return _first((kl[:-1] < share * kl.max()).nonzero().flatten().tolist())


def first_above(overlap: Float[Tensor, " point"], threshold: float = OVERLAP_THRESHOLD) -> int | None:
    """The first layer l < L with overlap[l] > threshold (2512.14064, logit lens); entry L does not count.

    first_above(torch.tensor([0.1, 0.2, 0.6, 1.0]))   # 2
    """
    return _first((overlap[:-1].double() > threshold).nonzero().flatten().tolist())


def later_effect(effect: Float[Tensor, "skipped measured"]) -> Float[Tensor, " skipped"]:
    """e_s = Σ_i effect[s, i] / max(L − 1 − s, 1): the summed effect of layer s per later layer.

    The sum runs over every i, as in the authors' code. Where the skipped tokens themselves are measured
    (skip-current), the diagonal, 1 for part `layer`, is in it; in skip-future it is 0.

        later_effect(result.tensors["layer.effect"])   # [L]
    """
    n_layers = effect.shape[0]
    later = torch.arange(n_layers - 1, -1, -1, dtype=torch.float64).clamp(min=1)
    return effect.double().sum(-1) / later


def depth_score(per_layer: Float[Tensor, " layer"]) -> float | None:
    """Σ s·e_s / Σ e_s: the mean layer, weighted by effect, from 0 to L−1; None where nothing has an effect.

    2505.13898, Fig. 7.

        depth_score(torch.tensor([1.0, 1.0, 2.0]))   # 1.25
    """
    weights = per_layer.double()
    total = weights.sum().item()
    score = (torch.arange(len(weights), dtype=torch.float64) * weights).sum().item()
    return _finite(score / total) if total > 0 else None


def effective_depth(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """The three definitions of 2512.14064: layer index, and ratio = (index + 1) / L.

    `status` is `found`, `none` (measured, but no layer fits) or `not measured`; without `found`, index and
    ratio are None.

        effective_depth({"logit-lens": result})["kl"]["ratio"]   # 0.667
    """
    found: dict[str, int | None] = {}
    layers: dict[str, int] = {}
    if "residual-stats" in results:
        curve = mean_cosine(results["residual-stats"].tensors)
        found["cosine"], layers["cosine"] = last_crossing(curve), len(curve)
    if "logit-lens" in results:
        kl, overlap = (results["logit-lens"].tensors[name] for name in ("kl", "topk_overlap"))
        found["kl"], layers["kl"] = first_below_share(kl), len(kl) - 1
        found["topk_overlap"], layers["topk_overlap"] = first_above(overlap), len(overlap) - 1
    depths = {}
    for name, (_, definition) in DEFINITIONS.items():
        index = found.get(name)
        ratio = None if index is None else (index + 1) / layers[name]
        status = "not measured" if name not in found else "none" if index is None else "found"
        depths[name] = {"index": index, "ratio": ratio, "status": status, "definition": definition}
    return depths


def depth_scores(results: Mapping[str, Result]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Depth scores of every skip-* and local-* result, by part, from the effect on layers and on the output.

    depth_scores(results)["skip-current"]["layer"]   # {"effect": 9.1, "output": 12.3}
    """
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, result in results.items():
        for part in PARTS:
            effect, output = result.tensors.get(f"{part}.effect"), result.tensors.get(f"{part}.output")
            if effect is None or not name.startswith(("skip-", "local-")):
                continue
            by = {"effect": depth_score(later_effect(effect))}
            if output is not None:
                by["output"] = depth_score(output)
            scores.setdefault(name, {})[part] = by
    return scores


def largest_effect(result: Result) -> float | None:
    """The largest effect in a result: what its noise floor is to be compared with.

    For integrated gradients, whose floor is one of f, the largest |f(x) − f(baseline)|.

        largest_effect(results["skip-current"])   # 1.37
    """
    tensors = result.tensors
    values = [value for name, value in tensors.items() if {"effect", "output"} & set(name.split("."))]
    values += [f_change(tensors, name) for name in tensors if "f_baseline" in name.split(".")]
    return _finite(max(value.max().item() for value in values if value.numel())) if values else None


def f_change(tensors: Mapping[str, Tensor], f_baseline: str) -> Float[Tensor, " layer"]:
    """|f(x) − f(baseline)| of every layer: what the attributions of a layer should add up to.

    f_change(result.tensors, "attn.f_baseline.0")   # [L]
    """
    return (tensors[f_baseline.replace("f_baseline", "f_input")] - tensors[f_baseline]).abs()


def ordered(results: Mapping[str, Result]) -> dict[str, Result]:
    """The results in the order in which they are reported; analyses of another version come last.

    list(ordered(load_folder("out")))   # ["residual-stats", "logit-lens", …]
    """
    return {name: results[name] for name in sorted(results, key=lambda name: (_position(name), name))}


def summarise(results: Mapping[str, Result], log: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Everything that `summary.json` holds.

    summarise(load_folder("out"))["effective_depth"]["kl"]["ratio"]   # 0.667
    """
    results = ordered(results)
    metadata = {name: result.metadata for name, result in results.items()}
    head = next(iter(metadata.values()), {})
    return {
        "hookdepth": __version__,
        "model": _json(head.get("model")),
        "data": _json(_data_of(metadata)),
        "versions": _json(head.get("versions")),
        "seed": head.get("seed"),
        "effective_depth": effective_depth(results),
        "depth_scores": depth_scores(results),
        "analyses": {name: _analysis(name, one, costs.get(name, one.metadata)) for name, one in results.items()},
        "mixed": [key for key in ("model", "versions") if any(m.get(key) != head.get(key) for m in metadata.values())],
    }


def _data_of(metadata: Mapping[str, Mapping[str, Any]]) -> Any:
    """The data set of the analyses over prompts; those over probes only take their baseline from it."""
    over_prompts = [m.get("data") for m in metadata.values() if "probes" not in m]
    return (over_prompts or [m.get("data") for m in metadata.values()] or [None])[0]


def _analysis(name: str, result: Result, cost: Mapping[str, Any]) -> dict[str, Any]:
    metadata = result.metadata
    data = metadata.get("data") or {}
    lengths = data.get("lengths")
    return {
        "file": f"{name}{SUFFIX}",
        "wall_time_s": _json(cost.get("wall_time_s")),
        "passes": cost.get("passes"),
        "null_effect": _json(metadata.get("null_effect")),
        "null_where": metadata.get("null_where"),
        "largest_effect": largest_effect(result),
        "n_prompts": data.get("n_prompts"),
        "n_tokens": sum(lengths) if lengths else None,
        "settings": _json(metadata.get("settings")),
    }


def _position(name: str) -> int:
    return ANALYSES.index(name) if name in ANALYSES else len(ANALYSES)


def _json(value: Any) -> Any:
    """The value with every non-finite float replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first(indices: list[int]) -> int | None:
    return indices[0] if indices else None


def _last(indices: list[int], shift: int) -> int | None:
    return indices[-1] + shift if indices else None
