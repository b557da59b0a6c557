"""At which depth things happen: effective depth by three definitions, and depth scores.

    cosine_depth(stats)["cosine"]["index"]           # 19: the layer from which on layers sharpen what is there
    depth_scores_of(effects)["layer"]["effect"]      # 8.4: the mean layer, weighted by its effect

Pure functions of an analysis' tensors, which analyses call in `numbers`. Everything that they say is JSON-able; what
does not exist is null, never NaN. Sources: *What Affects the Effective Depth of Large Language Models?* (2512.14064)
and Fig. 7 of *Do Language Models Use Their Depth Efficiently?* (2505.13898).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses.settings import PARTS

_COSINE = "cosine."
KL_SHARE = 0.5
OVERLAP_THRESHOLD = 0.3


def mean_cosine(stats: Mapping[str, Tensor]) -> Float[Tensor, " layer"]:
    """Mean of the cosine curves of attention, MLP and layer, or of what else there is, from −1 to 1.

    mean_cosine(result.tensors)   # [L]
    """
    return torch.stack([curve.double() for name, curve in stats.items() if name.startswith(_COSINE)]).nanmean(0)


def last_crossing(curve: Float[Tensor, " layer"]) -> int | None:
    """The last l ≥ 1 with curve[l−1] < 0 ≤ curve[l]; None where there is none (2512.14064, cosine).

    A curve that starts non-negative crosses only if it falls below zero first. (The authors' notebook
    returns the layer before the crossing, l − 1.)

        last_crossing(torch.tensor([-0.1, 0.2, -0.1, 0.0]))   # 3
    """
    crossings = ((curve[:-1] < 0) & (curve[1:] >= 0)).nonzero().flatten().tolist()
    return crossings[-1] + 1 if crossings else None


def first_below_share(kl: Float[Tensor, " point"], share: float = KL_SHARE) -> int | None:
    """The first layer l < L with kl[l] < share · max(kl) (2512.14064, logit lens).

    Entry L, the final residual, is 0 by construction and does not count as a layer.

        first_below_share(torch.tensor([4.0, 3.0, 1.0, 0.0]))   # 2
    """
    return next(iter((kl[:-1] < share * kl.max()).nonzero().flatten().tolist()), None)


def first_above(overlap: Float[Tensor, " point"], threshold: float = OVERLAP_THRESHOLD) -> int | None:
    """The first layer l < L with overlap[l] > threshold (2512.14064, logit lens); entry L does not count.

    first_above(torch.tensor([0.1, 0.2, 0.6, 1.0]))   # 2
    """
    return next(iter((overlap[:-1].double() > threshold).nonzero().flatten().tolist()), None)


def later_effect(effect: Float[Tensor, "skipped measured"]) -> Float[Tensor, " skipped"]:
    """e_s = Σ_i effect[s, i] / max(L − 1 − s, 1): the summed effect of layer s per later layer.

    The sum runs over every i, as in the authors' code. Where the skipped tokens themselves are measured
    (not only right of a cut), the diagonal, 1 for part `layer`, is in it; with cuts it is 0.

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


OTHERWISE = {"-20 %": 0.8, "+20 %": 1.2}
"""What an effective depth is tried at besides: shares of its threshold."""


def depth(
    label: str,
    index: int | None,
    n_layers: int | None,
    definition: str,
    otherwise: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """An effective depth as the summary says it; `n_layers` is None where nothing was measured.

    `status` is `found`, `none` (measured, but no layer fits) or `not measured`; without `found`, index and ratio are
    None. The ratio is (index + 1) / L.

        depth("Cosine crossing", 19, 30, "last layer where …")["ratio"]   # 2 / 3

    Args:
        otherwise: the index at other thresholds.
    """
    status = "not measured" if n_layers is None else "none" if index is None else "found"
    ratio = None if index is None or n_layers is None else (index + 1) / n_layers
    found = {"index": index, "ratio": ratio, "status": status, "definition": definition, "label": label}
    return found | ({"otherwise": dict(otherwise)} if otherwise else {})


def cosine_depth(stats: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Where the mean cosine turns positive for the last time (2512.14064): cosine_depth(result.tensors)["cosine"]."""
    measured = f"{_COSINE}layer" in stats
    curve = mean_cosine(stats) if measured else None
    definition = (
        "last layer l where the mean of the cosine curves crosses from negative to non-negative "
        "(mean[l-1] < 0 <= mean[l])"
    )
    index, n_layers = (None, None) if curve is None else (last_crossing(curve), len(curve))
    otherwise = None
    if curve is not None:  # the threshold is 0: it is moved by a fifth of the largest value
        most = curve.abs().max().item()
        otherwise = {word: last_crossing(curve - (share - 1) * most) for word, share in OTHERWISE.items()}
    return {"cosine": depth("Cosine crossing", index, n_layers, definition, otherwise)}


def lens_depths(lens: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The two effective depths of the logit lens (2512.14064): lens_depths(result.tensors)["kl"]."""
    kl, overlap = lens.get("kl"), lens.get("topk_overlap")
    kl_says = f"first layer with KL(lens || final) < {KL_SHARE} * max KL"
    overlap_says = f"first layer with top-5 overlap > {OVERLAP_THRESHOLD}"
    return {
        "kl": _lens_depth("Logit lens, KL divergence", kl, first_below_share, KL_SHARE, kl_says),
        "topk_overlap": _lens_depth("Logit lens, top-5 overlap", overlap, first_above, OVERLAP_THRESHOLD, overlap_says),
    }


def _lens_depth(
    label: str, curve: Tensor | None, find: Callable[[Tensor, float], int | None], threshold: float, says: str
) -> dict[str, Any]:
    if curve is None:
        return depth(label, None, None, says)
    otherwise = {word: find(curve, share * threshold) for word, share in OTHERWISE.items()}
    return depth(label, find(curve, threshold), len(curve) - 1, says, otherwise)


def depth_scores_of(effects: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Depth scores by part, from the effect on layers and on the output.

    depth_scores_of(effects)["layer"]   # {"effect": 9.1, "output": 12.3}
    """
    scores: dict[str, dict[str, float | None]] = {}
    for part in PARTS:
        effect, output = effects.get(f"{part}.effect"), effects.get(f"{part}.output")
        if effect is None:
            continue
        scores[part] = {"effect": depth_score(later_effect(effect))}
        if output is not None:
            scores[part]["output"] = depth_score(output)
    return scores


def largest_effect(tensors: Mapping[str, Tensor]) -> float | None:
    """The largest value of the tensors called effect or output, which a noise floor is to be compared with.

    largest_effect(effects)   # 1.37
    """
    names = [
        name for name in tensors if {"effect", "output"} & set(name.split(".")) and not name.startswith("per_prompt.")
    ]
    values = [tensors[name].max().item() for name in names if tensors[name].numel()]
    return _finite(max(values)) if values else None


def f_change(tensors: Mapping[str, Tensor], f_baseline: str) -> Float[Tensor, " layer"]:
    """|f(x) − f(baseline)| of every layer: what the attributions of a layer should add up to.

    f_change(result.tensors, "attn.f_baseline.0")   # [L]
    """
    return (tensors[f_baseline.replace("f_baseline", "f_input")] - tensors[f_baseline]).abs()


def largest_f_change(tensors: Mapping[str, Tensor]) -> float | None:
    """The largest |f(x) − f(baseline)|, which a noise floor of f is to be compared with; None where there is none.

    largest_f_change(result.tensors)   # 0.52
    """
    changes = [f_change(tensors, name) for name in tensors if "f_baseline" in name.split(".")]
    return _finite(max(change.max().item() for change in changes)) if changes else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
