"""Heat maps of layer against token: residual erasure and integrated gradients, a figure for each probe.

    erasure_figures(Result.load("out/residual-erasure.safetensors"))["residual-erasure-0"]

Layers go upward; the last token, whose state predicts nothing that is measured, is left out, as in the
notebook. Tokens of the answer are in bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hookdepth.report.style import (
    BLACK,
    GREY,
    RED,
    boxed,
    colour_map,
    layer_axis,
    literal,
    new_figure,
    printable,
    styled,
)
from hookdepth.results import Result

CHANGE_FLOOR = 0.01  # a smaller |f(x) − f(baseline)| is taken as this, as where convergence is decided
DEFAULT_TOLERANCE = 0.01
LONGEST_TOKEN = 14
MOST_PROBES = 20  # are drawn; the rest of a large data set of probes is in the file
_READABLE = str.maketrans({" ": "_", "Ġ": "_", "▁": "_", "Ċ": "\n"})
_BEGIN = ("<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<s>", "<bos>", "[CLS]")


def token_label(token: str) -> str:
    """A token as a tick label: spaces as underscores, special first tokens BOS, long ones cut, what has no glyph a box.

    token_label(" Yoko")   # "_Yoko"
    """
    if token in _BEGIN:
        return "BOS"
    text = printable(token.translate(_READABLE))
    return text if len(text) <= LONGEST_TOKEN else f"{text[: LONGEST_TOKEN - 1]}…"


def probe_numbers(tensors: Mapping[str, Tensor], stem: str) -> list[int]:
    """The numbers i for which there is a tensor `stem.i`: probe_numbers(tensors, "effect") → [0, 1]."""
    ends = (name.removeprefix(f"{stem}.") for name in tensors if name.startswith(f"{stem}."))
    return sorted(int(end) for end in ends if end.isdigit())


def probe_of(result: Result, number: int) -> dict[str, Any]:
    """What is known of a probe: probe_of(result, 0)["tokens"]."""
    probes = result.metadata.get("probes") or []
    return probes[number] if number < len(probes) else {}


def erasure_figures(result: Result) -> dict[str, Figure]:
    """A figure for each probe: {"residual-erasure-0": …}."""
    numbers = probe_numbers(result.tensors, "effect")[:MOST_PROBES]
    return {
        f"residual-erasure-{n}": erasure_figure(result.tensors[f"effect.{n}"], probe_of(result, n)) for n in numbers
    }


@styled
def erasure_figure(effect: Tensor, probe: Mapping[str, Any]) -> Figure:
    """Effect on the answer of erasing each token before each layer; row L: the final residual (2505.13898, Fig. 6b)."""
    figure = new_figure(*tokens_size(effect))
    axes = figure.subplots()
    image = draw_tokens(axes, effect, probe, vmin=0, cmap=colour_map("viridis"))
    figure.colorbar(image, ax=axes, label="Probability Difference Norm", fraction=0.05, pad=0.02)
    return figure


def gradient_figures(result: Result) -> dict[str, Figure]:
    """A figure for each part and probe: {"integrated-gradients-layer-0": …}."""
    tolerance = (result.metadata.get("settings") or {}).get("ig_tolerance") or DEFAULT_TOLERANCE
    return {
        f"integrated-gradients-{part}-{n}": gradient_figure(values, probe_of(result, n), tolerance)
        for part, n, values in gradients_of(result.tensors)
        if n < MOST_PROBES
    }


def gradients_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Part, probe number and tensors of every attribution map: `for part, n, values in gradients_of(tensors)`."""
    for part, prefix in (("layer", ""), ("attn", "attn."), ("mlp", "mlp.")):
        for n in probe_numbers(tensors, f"{prefix}attribution"):
            names = ("attribution", "completeness_error", "evaluations", "f_input", "f_baseline", "converged")
            yield part, n, {name: tensors[f"{prefix}{name}.{n}"] for name in names if f"{prefix}{name}.{n}" in tensors}


@styled
def gradient_figure(values: Mapping[str, Tensor], probe: Mapping[str, Any], tolerance: float) -> Figure:
    """Attribution of the answer to each token at each layer (2505.13898, Fig. 6a), and how far each row has converged.

    The limits are symmetric and do not count the first token, whose value can dwarf all others. The strip:
    |Σ attribution − (f(x) − f(baseline))| relative to |f(x) − f(baseline)|, a cross where it did not converge.
    """
    attribution = values["attribution"]
    limit = symmetric_limit(attribution)
    error = relative_error(values)
    width, height = tokens_size(attribution)
    figure = new_figure(width + (1.5 if error is not None else 0), height)
    grid = figure.subplots(1, 1 if error is None else 2, sharey=True, squeeze=False, width_ratios=_ratios(width, error))
    axes = grid[0, 0]
    image = draw_tokens(axes, attribution, probe, vmin=-limit, vmax=limit, cmap=colour_map("RdBu_r"))
    shown = attribution[:, : max(attribution.shape[1] - 1, 1)].abs()
    extend = "both" if shown.numel() and shown.max().item() > limit * (1 + 1e-6) else "neither"
    if error is not None:
        _draw_convergence(grid[0, 1], error, values.get("converged"), tolerance)
    figure.colorbar(image, ax=list(grid[0]), label="Attribution", extend=extend, fraction=0.04, pad=0.02)
    return figure


def symmetric_limit(attribution: Tensor) -> float:
    """The largest |attribution| without the first token; 1 where there is none.

    symmetric_limit(torch.tensor([[9.0, -0.5, 0.2]]))   # 0.5
    """
    rest = attribution[:, 1:].abs()
    return (rest.max().item() if rest.numel() else 0.0) or 1.0


def relative_error(values: Mapping[str, Tensor]) -> np.ndarray | None:
    """Completeness error of each layer relative to |f(x) − f(baseline)|; None where it was not measured.

    relative_error({"completeness_error": …, "f_input": …, "f_baseline": …})   # [L]
    """
    if not {"completeness_error", "f_input", "f_baseline"} <= set(values):
        return None
    change = (values["f_input"] - values["f_baseline"]).abs().clamp(min=CHANGE_FLOOR)
    return (values["completeness_error"] / change).numpy()


def _draw_convergence(axes: Axes, error: np.ndarray, converged: Tensor | None, tolerance: float) -> None:
    layers = np.arange(len(error))
    good = np.ones(len(error), bool) if converged is None else converged.numpy() > 0.5
    low = tolerance / 100
    shown = np.clip(error, low, None)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, max(1.0, float(np.nanmax(shown, initial=0.0))) * 2)
    axes.axvline(tolerance, color=BLACK, linestyle=":", linewidth=1)
    axes.plot(shown[good], layers[good], "o", color=GREY, markersize=3)
    axes.plot(shown[~good], layers[~good], "X", color=RED, markersize=6, markeredgewidth=0)
    axes.set_xlabel("Relative\ncompleteness\nerror", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if not good.all():
        axes.set_title(f"✖ not\nconverged: {int((~good).sum())}", color=RED, fontsize=8)


def draw_tokens(axes: Axes, values: Tensor, probe: Mapping[str, Any], *, label: bool = True, **image: Any) -> Any:
    """A heat map with layers upward and tokens as ticks, without the last token's column."""
    shown = values[:, :-1] if values.shape[1] > 1 else values
    drawn = axes.imshow(np.ma.masked_invalid(shown.numpy()), aspect="auto", origin="lower", **image)
    boxed(axes)
    layer_axis(axes.yaxis, len(shown), "Layer" if label else None)
    n_tokens = shown.shape[1]
    tokens = [token_label(token) for token in probe.get("tokens") or map(str, range(n_tokens))]
    axes.set_xticks(range(n_tokens), (tokens + [""] * n_tokens)[:n_tokens])
    answer = set(probe.get("answer_positions") or ())
    texts = axes.get_xticklabels()
    literal(texts)
    for position, text in enumerate(texts):
        text.set(rotation=45, ha="right", rotation_mode="anchor", fontsize=8 if n_tokens <= 40 else 7)
        text.set_fontweight("bold" if position in answer else "normal")
    return drawn


def tokens_size(values: Tensor) -> tuple[float, float]:
    """Width and height in inches at which every token can be read: tokens_size(torch.zeros(31, 20))."""
    rows, columns = values.shape[0], max(values.shape[1] - 1, 1)
    per_token = 0.24 if columns <= 24 else 0.17
    return max(4.4, 1.6 + per_token * columns), min(max(3.2, 1.0 + 0.14 * rows), 8.0)


def _ratios(width: float, error: np.ndarray | None) -> list[float]:
    return [1.0] if error is None else [width - 0.6, 1.0]
