"""Results of a step as named numbers, for TensorBoard, W&B and other loggers."""

from __future__ import annotations

from collections.abc import Mapping

from hookdepth.analyses.depth import depth_score
from hookdepth.analyses.registry import declared
from hookdepth.analyses.stats import ResidualStats
from hookdepth.report.summary import depth_scores, effective_depth
from hookdepth.results import Result
from hookdepth.training.reading import STATISTICS


def metrics_of(results: Mapping[str, Result], per_layer: bool = False) -> dict[str, float]:
    """Results as named numbers, as a logger wants them: metrics_of(monitor.results)["depth/cosine.layer"]

    Of residual statistics: the mean over layers of every relative contribution and cosine, and `contribution_depth`,
    the mean layer weighted by its relative contribution (0 to L − 1); `per_layer` adds both for every layer, and the
    norm of its input. Of probes: effective depths (ratios) and depth scores, where they exist.
    """
    metrics: dict[str, float | None] = {}
    if ResidualStats.name in results:
        tensors = results[ResidualStats.name].tensors
        means = [name for name in STATISTICS if not name.startswith("norm.")]
        metrics |= {name: tensors[name].mean().item() for name in means}
        metrics["contribution_depth"] = depth_score(tensors["relative_contribution.layer"])
        for name in (*means, "norm.resid") if per_layer else ():
            metrics |= {f"{name}/{layer:03d}": value for layer, value in enumerate(tensors[name].tolist())}
    for name, depth in effective_depth(results, declared).items():
        metrics[f"effective_depth.{name}"] = depth["ratio"]
    for analysis, parts in depth_scores(results, declared).items():
        for part, kinds in parts.items():
            metrics |= {f"depth_score.{analysis}.{part}.{kind}": score for kind, score in kinds.items()}
    return {f"depth/{name}": value for name, value in metrics.items() if value is not None}
