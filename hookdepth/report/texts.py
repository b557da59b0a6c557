"""What the report says about each analysis: heading, the paper's figure, and how to read ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "2505.13898"


@dataclass(frozen=True)
class Text:
    """Heading, figure of the paper, and two sentences on how to read each kind of figure, in their order."""

    heading: str
    figure: str
    readings: Mapping[str, str]


_BARS = (
    "A bar a layer: how far the predicted distribution moves, at most, when that layer is skipped (0 is not at all, "
    "√2 is from one certain token to another). "
)

TEXTS = {
    "residual-stats": Text(
        "What each layer adds to the residual stream",
        "Fig. 2",
        {
            "contribution": "How long the vector is that attention, MLP or both add, relative to the residual stream "
            "that it is added to. Where the bars drop for good, the remaining layers change little.",
            "cosine": "Above zero a layer strengthens what is there, below zero it erases it, and what is new and "
            "orthogonal shows as zero. The dashed line is where the mean turns positive for the last time: from there "
            "on, layers sharpen what has been found.",
            "norms": "The residual stream grows from layer to layer, and so must a contribution to count. Note the "
            "logarithmic axis: equal distances are equal factors.",
        },
    ),
    "logit-lens": Text(
        "Logit lens: when the prediction is there",
        "Fig. 4",
        {
            "kl": "The final norm and unembedding are applied to the residual stream before every layer and compared "
            "with the final prediction, which the last place is. Where the divergence falls below the dotted line, "
            "half of the largest, layers have begun to refine the output.",
            "overlap": "How many of the five likeliest tokens of each layer are among the final five; the grey bar is "
            "the final residual itself. Where the overlap passes the dotted line, the answer is taking shape.",
        },
    ),
    "skip-current": Text(
        "Skipping a layer: all tokens",
        "Fig. 3a",
        {
            "effect": "Row s, column i: by how much the contribution of layer i changes when layer s is skipped, as "
            "the largest relative change over tokens and prompts. Dark rows are layers on which no later layer "
            "depends.",
            "output": _BARS + "Low bars late in the model are layers that could be left out at little cost.",
        },
    ),
    "skip-future": Text(
        "Skipping a layer: future tokens only",
        "Fig. 3b",
        {
            "effect": "The layer is skipped before a cut and its effect is measured on the tokens after it, as the "
            "largest relative change over tokens, cuts and prompts. A layer that is dark here but bright under “all "
            "tokens” works on the current prediction and builds nothing that later tokens use.",
            "output": _BARS + "Only tokens after the cut are measured: what a layer leaves for later.",
        },
    ),
    "local-current": Text(
        "Direct effects: all tokens",
        "Fig. 5",
        {
            "effect": "Row s, column i: the contribution of layer s is taken out of the input of layer i only, "
            "everything between them being as in the clean run. Compared with skipping, this leaves out what travels "
            "through other layers.",
        },
    ),
    "local-future": Text(
        "Direct effects: future tokens only",
        "Fig. 5",
        {
            "effect": "The contribution of layer s is taken out of the input of layer i on the tokens before a cut, "
            "and the effect is measured on those after it. Bright cells are layers that read, through attention, what "
            "an earlier layer wrote at earlier tokens.",
        },
    ),
    "residual-erasure": Text(
        "Residual erasure: until when each token is needed",
        "Fig. 6b",
        {
            "": "Each cell replaces the residual of one token before one layer by an uninformative mean, and shows how "
            "far the predictions of the answer (bold) move. A column that turns dark at layer l was last read below "
            "l; if computation were compositional, tokens needed first would turn dark first.",
        },
    ),
    "integrated-gradients": Text(
        "Integrated gradients: what the answer is made of",
        "Fig. 6a",
        {
            "": "Red raises the probability of the answer and blue lowers it, relative to the prompt's mean activation "
            "at that layer; the colour limits do not count the first token. The strip shows how far each layer's "
            "attributions are from adding up to the change they explain: rows with a cross have not converged and "
            "should not be read.",
        },
    ),
}

PART_NAMES = {"layer": "whole layer", "attn": "attention", "mlp": "MLP"}
WORDS = PART_NAMES | {
    "contribution": "mean relative contribution",
    "cosine": "cosine similarity with the residual stream",
    "norms": "mean norms, logarithmic",
    "kl": "KL divergence from the final prediction",
    "overlap": "overlap of the five likeliest tokens",
    "effect": "effect on later layers",
    "output": "effect on the output",
}
DEPTH_NAMES = {
    "cosine": "Cosine crossing",
    "kl": "Logit lens, KL divergence",
    "topk_overlap": "Logit lens, top-5 overlap",
}
