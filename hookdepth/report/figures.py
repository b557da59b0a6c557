"""Results as figures, by name: which function draws which analysis.

    for name, figure in figures_for(Result.load("out/skip-current.safetensors")).items():
        Path(f"{name}.png").write_bytes(render(figure, "png"))

Figures are matplotlib's, made by its object interface: no pyplot, no window, no global state. The same
result gives the same bytes. The functions are in plots_layers, plots_tokens and plots_compare.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from hookdepth.report import layers as plots_layers
from hookdepth.report import summary
from hookdepth.report.compare import compare_figures
from hookdepth.report.style import render
from hookdepth.report.tokens import erasure_figures, gradient_figures
from hookdepth.results import Result

__all__ = ["compare_figures", "figures_for", "render"]


def figures_for(result: Result) -> dict[str, Figure]:
    """All figures of a result, by name; none for an analysis of another version.

    figures_for(results["logit-lens"])   # {"logit-lens-kl": …, "logit-lens-overlap": …}
    """
    draw = _FIGURES.get(result.analysis)
    return draw(result) if draw else {}


def _stats_figures(result: Result) -> dict[str, Figure]:
    draws = {
        "contribution": plots_layers.contribution_figure,
        "cosine": plots_layers.cosine_figure,
        "norms": plots_layers.norms_figure,
    }
    return {f"residual-stats-{name}": draw(result.tensors) for name, draw in draws.items()}


def _lens_figures(result: Result) -> dict[str, Figure]:
    draws = {"kl": plots_layers.kl_figure, "overlap": plots_layers.overlap_figure}
    return {f"logit-lens-{name}": draw(result.tensors) for name, draw in draws.items()}


def _effect_figures(result: Result) -> dict[str, Figure]:
    labels = plots_layers.effect_labels(result.analysis)
    figures = {}
    for part in summary.PARTS:
        effect, output = (result.tensors.get(f"{part}.{kind}") for kind in ("effect", "output"))
        if effect is not None:
            figures[f"{result.analysis}-{part}-effect"] = plots_layers.effect_figure(effect, *labels)
        if output is not None:
            figures[f"{result.analysis}-{part}-output"] = plots_layers.output_figure(output, part)
    return figures


_FIGURES: dict[str, Callable[[Result], dict[str, Figure]]] = {
    "residual-stats": _stats_figures,
    "logit-lens": _lens_figures,
    **dict.fromkeys(("skip-current", "skip-future", "local-current", "local-future"), _effect_figures),
    "residual-erasure": erasure_figures,
    "integrated-gradients": gradient_figures,
}


class Kind:
    """Stands in until the kinds are there."""
