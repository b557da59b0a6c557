"""What each layer would say at the tokens of the first prompts: kept for the interactive page alone.

    kept = Said(3)
    kept.take(0, torch.rand(5, 3, 64))     # logits [point, token, vocab], chunk by chunk of tokens
    kept.tensors["page.top"]               # [point, token, 5]

Of a whole data set this would be larger than everything else together, so it is kept of a few prompts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.subject import Subject, Tensors
from hookdepth.metrics import likeliest
from hookdepth.report.patterns import PAGE

TOP_K = 5
PROMPTS, LAST = 2, 128
"""Of so many prompts it is kept, at so many of their last tokens."""
NAMES = tuple(f"{PAGE}{name}" for name in ("final", "top", "probability"))
TENSORS = dict.fromkeys((f"{name}.{{i}}" for name in NAMES), "point token{i} rank?") | {
    f"{NAMES[0]}.{{i}}": "point token{i}?"
}


class Said:
    """How likely the final prediction is at each point, the likeliest tokens there, and how likely those are: Said(3)

    Args:
        n_tokens: of the prompt; 0 to keep nothing.
    """

    def __init__(self, n_tokens: int) -> None:
        self.first, self.end, self.chunks = max(0, n_tokens - LAST), n_tokens, list[Tensor]()

    def take(self, begin: int, logits: Tensor) -> None:
        """The logits of a chunk of tokens, whose last point is the final prediction: Said(3).take(0, logits)"""
        logits = logits[:, max(0, self.first - begin) :]
        if not self.end or not logits.shape[1]:
            return
        final, found = logits[-1].argmax(-1, keepdim=True), []
        for here in logits:  # one after the other: float32 of all would be twice the memory
            ids = likeliest(here, TOP_K)
            shown = torch.softmax(here, dim=-1, dtype=torch.float32).gather(-1, torch.cat([final, ids], -1))
            found.append(torch.cat([shown, ids.float()], dim=-1))
        self.chunks.append(torch.stack(found))

    @property
    def tensors(self) -> Tensors:
        """By name; none where nothing was kept."""
        if not self.chunks:
            return {}
        final, probability, top = torch.cat(self.chunks, dim=1).cpu().split([1, TOP_K, TOP_K], dim=-1)
        return dict(zip(NAMES, (final.squeeze(-1), top, probability), strict=True))


def numbered(items: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """The tensors of all prompts that have them, by number: numbered([Said(3).tensors])"""
    return {f"{name}.{n}": own[name] for n, own in enumerate(items[:PROMPTS]) for name in NAMES if name in own}


def of_prompt(tensors: Mapping[str, Tensor], number: int) -> Tensors:
    """What `numbered` made of one prompt: of_prompt(tensors, 0)"""
    return {name: tensors[f"{name}.{number}"] for name in NAMES if f"{name}.{number}" in tensors}


def spelled(subject: Subject, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """For the metadata: the tokens of the maps' columns, and which words the numbers are: spelled(subject, tensors)"""
    shown = []
    for number, text in enumerate(subject.inputs.texts[:PROMPTS]):
        if own := of_prompt(tensors, number):
            top, decode = own[NAMES[1]], subject.model.tokenizer.decode
            tokens = [str(decode([token])) for token in subject.inputs.prompts[number][-top.shape[1] :]]
            words = {str(token): str(decode([token])) for token in top.unique().int().tolist()}
            shown.append({"prompt": text, "tokens": tokens, "words": words})
    return {"shown": shown} if shown else {}
