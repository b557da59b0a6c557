"""Prompts as tokens, probes with the tokens of their answer, and where prompts are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hookdepth.errors import HookdepthError, refuse_second_beginning

DEFAULT_PROBES = (("5 + 7 + 5 + 3 + 1 + 7 = ", "28"), ("The spouse of the performer of Imagine is", " Yoko Ono"))
LONGEST_TOKEN = 32  # characters; nearly all are far shorter
# Both kinds of tokenizer mark a space (byte-level Ġ, sentencepiece ▁); Ċ is byte-level's line break.
READABLE = str.maketrans({"Ġ": "_", "▁": "_", "Ċ": "\\n", "\n": "\\n"})


@dataclass(frozen=True)
class Probe:
    """A tokenised prompt with its answer: make_probe(tokenizer, "2 + 2 = ", "4").

    `token_ids` and `tokens`, to be read, are of prompt + answer, special tokens included, [T]; `answer_positions` are
    the answer's in it: the logits that predict token p are those at p − 1.
    """

    prompt: str
    answer: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    answer_positions: tuple[int, ...]


def refuse_unusable(text: str, what: str) -> None:
    """Raise for a text that is blank or no Unicode: refuse_unusable("2 + 2 =", "the prompt")."""
    if not text.strip():
        raise HookdepthError(f"{what} is empty", "write some text there")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a pair; tokenizers then fail in their own words
        raise HookdepthError(f"{what} is not Unicode text ({error.reason})", "remove the lone surrogate") from error


def encode(tokenizer: Any, text: str, max_tokens: int | None = None) -> list[int]:
    """Token ids of a text, [T], with the special tokens that the tokenizer adds by itself.

    Raises:
        HookdepthError: the text gives no tokens, or only special ones, or more than `max_tokens`.
    """
    refuse_unusable(text, f"the prompt {text[:40]!r}")
    ids = list(_tokenise(tokenizer, text, max_tokens)["input_ids"])
    refuse_second_beginning(tokenizer, text, ids)
    if set(ids) <= set(tokenizer.all_special_ids):
        raise HookdepthError(f"the prompt {text[:40]!r} has only special or unknown tokens", "give another prompt")
    return ids


def _tokenise(tokenizer: Any, text: str, max_tokens: int | None, **options: Any) -> Any:
    if max_tokens is None:
        return tokenizer(text, verbose=False, **options)
    # A whole book given as one line would take minutes: far more tokens than fit need not be counted to the end.
    head = text[: LONGEST_TOKEN * max_tokens]
    count = len(tokenizer(head, verbose=False)["input_ids"]) if len(head) < len(text) else 0
    counted = f"more than {count}"
    if count <= 2 * max_tokens:
        encoding = tokenizer(text, verbose=False, **options)
        if len(encoding["input_ids"]) <= max_tokens:
            return encoding
        counted = str(len(encoding["input_ids"]))
    what = f"the prompt that begins {text[:40]!r} has {counted} tokens, the model takes {max_tokens}"
    raise HookdepthError(what, "shorten it, or use a model with a longer context")


def make_probe(tokenizer: Any, prompt: str, answer: str, max_tokens: int | None = None) -> Probe:
    """Tokenise prompt + answer as one text and find the answer's tokens by their character offsets.

    A token that begins in the prompt and ends in the answer is refused even where the prompt's share of it is a
    mere space: the model is never asked for such an answer. The same text can be split where tokens meet.

    Raises:
        HookdepthError: prompt or answer is blank, a slow tokenizer, more than `max_tokens`, or prompt and answer
            do not meet between two tokens; the error says which split of the text does.
    """
    refuse_unusable(prompt, "the probe's prompt")
    refuse_unusable(answer, "the probe's answer")
    if not getattr(tokenizer, "is_fast", False):
        what = f"a probe needs character offsets, which {type(tokenizer).__name__} does not give"
        raise HookdepthError(what, "use a model with a fast tokenizer, or leave out the analyses that take probes")
    encoding = _tokenise(tokenizer, prompt + answer, max_tokens, return_offsets_mapping=True)
    ids = tuple(encoding["input_ids"])
    refuse_second_beginning(tokenizer, prompt, ids)
    tokens = readable_tokens(tokenizer, ids)
    return Probe(prompt, answer, ids, tokens, _locate(encoding["offset_mapping"], tokens, prompt, answer))


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens for an axis of T: readable_tokens(tokenizer, [504, 22615]) is ("The", "_spouse")."""
    return tuple(str(token).translate(READABLE) for token in tokenizer.convert_ids_to_tokens(list(ids)))


def _locate(offsets: Sequence[tuple[int, int]], tokens: Sequence[str], prompt: str, answer: str) -> tuple[int, ...]:
    """Indices of the tokens that end after the seam, once it is sure that all of them begin at or after it.

    Special tokens have the offsets (0, 0). Some tokenizers leave spaces out of offsets, and then the answer's
    first token may have swallowed the prompt's last space unseen: hence a token must end at the seam, too.
    """
    seam = len(prompt)
    positions = tuple(index for index, (_, end) in enumerate(offsets) if end > seam)
    if not positions:
        raise HookdepthError(f"the tokenizer finds no tokens in the answer {answer!r}", "give another answer")
    first = positions[0]
    start, before = offsets[first][0], max((end for _, end in offsets[:first]), default=0)
    if start >= seam and before == seam:
        return positions
    what = f"the token {tokens[first]!r} merges the end of the prompt {prompt[-20:]!r} with the answer {answer[:20]!r}"
    split = min(start, before)  # the nearest place to the left where tokens meet
    remedy = f"end the prompt with {prompt[:split][-20:]!r} and give the rest to the answer"
    raise HookdepthError(what, remedy if split else "split the text elsewhere")


def sample_cuts(lengths: Sequence[int], seed: int = 123, per_prompt: int = 4) -> list[tuple[int, ...]]:
    """Where to cut each prompt into tokens < t and tokens ≥ t, in the notebook's random order.

        sample_cuts([40, 12])    # [(24, 32, 16, 8), ()]

    One generator runs on from prompt to prompt. A prompt of fewer than 13 tokens is too short to be cut: ().
    """
    generator = random.Random(seed)
    cuts = []
    for length in lengths:
        positions = list(range(8, length - 4, 8))
        generator.shuffle(positions)
        cuts.append(tuple(positions[:per_prompt]))
    return cuts
