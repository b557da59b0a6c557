"""What the eight analyses declare about themselves, until their classes say it: each entry is pasted into its class.

lookup(Result.load("out/logit-lens.safetensors")).heading
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.report.figures import Bars, Heatmap, Kind, Lines, Strip, TokenMap
from hookdepth.results import Result

CHANGE_FLOOR = 0.01  # a smaller |f(x) − f(baseline)| is taken as this, as where convergence is decided


@dataclass(frozen=True)
class Declared:
    """Declared("mine", "My heading", "", "", 9, {"effect": "layer layer"}, [Heatmap("effect", "…")])"""

    name: str
    heading: str
    question: str
    paper: str
    order: float
    tensors: Mapping[str, str]
    figures: Sequence[Kind]
    derived: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda tensors: {}

    def numbers(self, result: Result) -> dict[str, Any]:
        """Its share of the summary: DECLARED["logit-lens"].numbers(result)"""
        return self.derived(result.tensors)

    def notes(self, result: Result) -> list[str]:
        """Sentences that depend on the numbers: DECLARED["logit-lens"].notes(result)   # []"""
        return []


def relative_error(values: Mapping[str, Tensor]) -> Tensor | None:
    """Completeness error of each layer relative to |f(x) − f(baseline)|; None where it was not measured.

    relative_error({"completeness_error": …, "f_input": …, "f_baseline": …})   # [L]
    """
    if not {"completeness_error", "f_input", "f_baseline"} <= set(values):
        return None
    return values["completeness_error"] / depth.f_change(values, "f_baseline").clamp(min=CHANGE_FLOOR)


def _effects(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"depth_score": depth.depth_scores_of(tensors), "largest_effect": depth.largest_effect(tensors)}


_BARS = (
    "A bar a layer: how far the predicted distribution moves, at most, when that layer is skipped (0 is not at all, "
    "√2 is from one certain token to another). "
)
_EFFECT: dict[str, Any] = {
    "label": "Relative change",
    "caption": "effect on later layers",
    "limits": (0.0, 1.0),
    "signed": False,
}
_SKIPPED = {**_EFFECT, "rows": "Layer skipped", "columns": "Effect @ layer"}
_REMOVED = {**_EFFECT, "rows": "Layer removed from the input", "columns": "Direct effect @ layer"}
_OUTPUT: dict[str, Any] = {
    "label": "Output change norm",
    "caption": "effect on the output",
    "axis": "Layer skipped",
}
_LARGEST = "largest over tokens and prompts"
_LARGEST_OF_CUTS = "largest over tokens, cuts and prompts"
_MEAN = "mean over tokens and prompts"
_ATTRIBUTION: dict[str, Any] = {
    "label": "Attribution",
    "caption": "",
    "signed": True,
    "without_first": True,
    "without_last": True,
    "strip": Strip(
        "Relative\ncompleteness\nerror",
        ("completeness_error", "evaluations", "f_input", "f_baseline", "converged"),
        relative_error,
        ok="converged",
        tolerance="ig_tolerance",
    ),
}
_ATTRIBUTION_READING = (
    "Red raises the probability of the answer and blue lowers it, relative to the prompt's mean activation "
    "at that layer; the colour limits do not count the first token. The strip shows how far each layer's "
    "attributions are from adding up to the change they explain: rows with a cross have not converged and "
    "should not be read."
)

_ALL = [
    Declared(
        "residual-stats",
        "What each layer adds to the residual stream",
        "how much does each layer add to the residual stream, and in which direction?",
        "2505.13898, Fig. 2",
        1,
        {
            "norm.resid": "point",
            "norm.{part}": "layer",
            "cosine.{part}": "layer",
            "relative_contribution.{part}": "layer",
            "relative_contribution_max.{part}": "layer",
        },
        [
            Bars(
                "relative_contribution.*",
                "How long the vector is that attention, MLP or both add, relative to the residual stream "
                "that it is added to. Where the bars drop for good, the remaining layers change little.",
                label="Mean relative contribution",
                caption="mean relative contribution",
                name="contribution",
                reduction=_MEAN,
                limit=1.5,
                grow_to=3.0,
                also={"relative_contribution_max.*": "largest {}"},
                over_training="Relative contribution\nof the layer",
            ),
            Bars(
                "cosine.*",
                "Above zero a layer strengthens what is there, below zero it erases it, and what is new and "
                "orthogonal shows as zero. The dashed line is where the mean turns positive for the last time: from "
                "there on, layers sharpen what has been found.",
                label="Cosine similarity",
                caption="cosine similarity with the residual stream",
                reduction=_MEAN,
                signed=True,
                mean=True,
                mark=depth.last_crossing,
                over_training="Cosine similarity\n(mean of the three)",
            ),
            Lines(
                "norm.*",
                "The residual stream grows from layer to layer, and so must a contribution to count. Note the "
                "logarithmic axis: equal distances are equal factors.",
                label="Mean norm",
                caption="mean norms, logarithmic",
                name="norms",
                reduction=_MEAN,
                log=True,
                compared="resid",
                over_training=None,
            ),
        ],
        lambda tensors: {"effective_depth": depth.cosine_depth(tensors)},
    ),
    Declared(
        "logit-lens",
        "Logit lens: when the prediction is there",
        "from which layer on is the prediction there?",
        "2505.13898, Fig. 4",
        2,
        {"kl": "point", "topk_overlap": "point"},
        [
            Bars(
                "kl",
                "The final norm and unembedding are applied to the residual stream before every layer and compared "
                "with the final prediction, which the last place is. Where the divergence falls below the dotted line, "
                "half of the largest, layers have begun to refine the output.",
                label="KL divergence (nats)",
                caption="KL divergence from the final prediction",
                reduction=_MEAN,
                threshold=lambda kl: depth.KL_SHARE * kl.max().item(),
                threshold_label="half of the largest",
                mark=depth.first_below_share,
                grey_last=True,
                over_training="Logit lens:\nKL divergence (nats)",
            ),
            Bars(
                "topk_overlap",
                "How many of the five likeliest tokens of each layer are among the final five; the grey bar is "
                "the final residual itself. Where the overlap passes the dotted line, the answer is taking shape.",
                label="Top-5 overlap",
                caption="overlap of the five likeliest tokens",
                name="overlap",
                reduction=_MEAN,
                threshold=depth.OVERLAP_THRESHOLD,
                threshold_label=f"threshold {depth.OVERLAP_THRESHOLD}",
                mark=depth.first_above,
                grey_last=True,
                over_training=None,
            ),
        ],
        lambda tensors: {"effective_depth": depth.lens_depths(tensors)},
    ),
    Declared(
        "skip-current",
        "Skipping a layer: all tokens",
        "which later layers notice that a layer is skipped?",
        "2505.13898, Fig. 3a",
        3,
        {"{part}.effect": "layer layer", "{part}.output": "layer"},
        [
            Heatmap(
                "{part}.effect",
                "Row s, column i: by how much the contribution of layer i changes when layer s is skipped, as "
                "the largest relative change over tokens and prompts. Dark rows are layers on which no later layer "
                "depends.",
                reduction=_LARGEST,
                **_SKIPPED,
            ),
            Bars(
                "{part}.output",
                _BARS + "Low bars late in the model are layers that could be left out at little cost.",
                reduction=_LARGEST,
                over_training="Layer skipped:\noutput change norm",
                **_OUTPUT,
            ),
        ],
        _effects,
    ),
    Declared(
        "skip-future",
        "Skipping a layer: future tokens only",
        "which later layers notice, at later tokens, that a layer is skipped?",
        "2505.13898, Fig. 3b",
        4,
        {"{part}.effect": "layer layer", "{part}.output": "layer"},
        [
            Heatmap(
                "{part}.effect",
                "The layer is skipped before a cut and its effect is measured on the tokens after it, as the "
                "largest relative change over tokens, cuts and prompts. A layer that is dark here but bright under "
                "“all tokens” works on the current prediction and builds nothing that later tokens use.",
                reduction=_LARGEST_OF_CUTS,
                **_SKIPPED,
            ),
            Bars(
                "{part}.output",
                _BARS + "Only tokens after the cut are measured: what a layer leaves for later.",
                reduction=_LARGEST_OF_CUTS,
                over_training="Layer skipped, later tokens:\noutput change norm",
                **_OUTPUT,
            ),
        ],
        _effects,
    ),
    Declared(
        "local-current",
        "Direct effects: all tokens",
        "which layers read directly what a layer wrote?",
        "2505.13898, Fig. 5",
        5,
        {"{part}.effect": "layer layer"},
        [
            Heatmap(
                "{part}.effect",
                "Row s, column i: the contribution of layer s is taken out of the input of layer i only, "
                "everything between them being as in the clean run. Compared with skipping, this leaves out what "
                "travels through other layers.",
                reduction=_LARGEST,
                **_REMOVED,
            )
        ],
        _effects,
    ),
    Declared(
        "local-future",
        "Direct effects: future tokens only",
        "which layers read directly, at later tokens, what a layer wrote?",
        "2505.13898, Fig. 5",
        6,
        {"{part}.effect": "layer layer"},
        [
            Heatmap(
                "{part}.effect",
                "The contribution of layer s is taken out of the input of layer i on the tokens before a cut, "
                "and the effect is measured on those after it. Bright cells are layers that read, through attention, "
                "what an earlier layer wrote at earlier tokens.",
                reduction=_LARGEST_OF_CUTS,
                **_REMOVED,
            )
        ],
        _effects,
    ),
    Declared(
        "residual-erasure",
        "Residual erasure: until when each token is needed",
        "until which layer is each token of the prompt needed?",
        "2505.13898, Fig. 6b",
        7,
        {"effect.{i}": "point token{i}", "baseline": "point width"},
        [
            TokenMap(
                "effect.{i}",
                "Each cell replaces the residual of one token before one layer by an uninformative mean, and shows "
                "how far the predictions of the answer (bold) move. A column that turns dark at layer l was last read "
                "below l; if computation were compositional, tokens needed first would turn dark first.",
                label="Probability Difference Norm",
                caption="",
                name="{i}",
                reduction="largest over the answer's tokens",
                signed=False,
                without_last=True,
            )
        ],
        lambda tensors: {"largest_effect": depth.largest_effect(tensors)},
    ),
    Declared(
        "integrated-gradients",
        "Integrated gradients: what the answer is made of",
        "which tokens, at which layer, is the answer made of?",
        "2505.13898, Fig. 6a",
        8,
        {
            "{part}.attribution.{i}": "layer token{i}",
            "attribution.{i}": "layer token{i}",
            **{
                f"{part}{name}.{{i}}": axes
                for part in ("", "{part}.")
                for name, axes in (
                    ("completeness_error", "layer"),
                    ("evaluations", "layer"),
                    ("f_input", ""),
                    ("f_baseline", "layer"),
                    ("converged", "layer"),
                )
            },
        },
        [
            TokenMap(
                "attribution.{i}",
                _ATTRIBUTION_READING,
                name="layer-{i}",
                **{**_ATTRIBUTION, "caption": "whole layer"},
            ),
            TokenMap("{part}.attribution.{i}", _ATTRIBUTION_READING, name="{part}-{i}", **_ATTRIBUTION),
        ],
        lambda tensors: {"largest_effect": depth.largest_f_change(tensors)},
    ),
]

DECLARED = {declared.name: declared for declared in _ALL}


def lookup(result: Result) -> Declared | None:
    """The declaration of a result's analysis; None where nobody knows it: lookup(result).heading"""
    return DECLARED.get(result.analysis)
