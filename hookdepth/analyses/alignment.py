"""The same text in two models: which tokens of one belong to which of the other.

ids, positions, their_ids, their_positions = aligned(subject, target, 0, front=1)
"""

from __future__ import annotations

from typing import Any

from hookdepth.analyses.subject import Subject
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder


def aligned(subject: Subject, target: Decoder, number: int, front: int) -> tuple[Any, Any, Any, Any]:
    """Ids and positions of a prompt in both models, where both have read the same characters.

    aligned(subject, subject.model, 0, 1)   # ids, positions, ids, positions
    """
    ids, model = subject.inputs.prompts[number], subject.model
    if target is model or (target.tokenizer is None and model.tokenizer is None):
        target.check_ids(ids, f"prompt {number}")
        return ids, range(front, len(ids)), ids, range(front, len(ids))
    if target.tokenizer is None or not subject.inputs.texts:
        raise HookdepthError(
            "the target has no tokenizer" if target.tokenizer is None else "the prompts have no text",
            "give models that both come with their tokenizer, and texts",
        )
    text = subject.inputs.texts[number]
    theirs = tuple(target.tokenizer(text, verbose=False)["input_ids"])
    if theirs == ids:
        return ids, range(front, len(ids)), ids, range(front, len(ids))
    ends = [_ends(decoder.tokenizer, text, front) for decoder in (model, target)]
    both = sorted(ends[0].keys() & ends[1].keys())
    return ids, [ends[0][end] for end in both], theirs, [ends[1][end] for end in both]


def _ends(tokenizer: Any, text: str, front: int) -> dict[int, int]:
    """Character at which a token ends → its position; of several that end there the last, which has read the most."""
    if not getattr(tokenizer, "is_fast", False):
        raise HookdepthError("tokens are aligned by characters, which a slow tokenizer does not give", "use a fast one")
    offsets = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return {end: place for place, (_, end) in enumerate(offsets) if end and place >= front}
