"""What a text must not be, whoever makes tokens of it.

tokens_of(tokenizer, "The capital of France is")     # ids, as the tokenizer gives them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookdepth.errors import HookdepthError


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds: tokens_of(tokenizer, "2 + 2 = 4").

    Raises:
        HookdepthError: the text begins with the word that the tokenizer puts there by itself.
    """
    ids = list(tokenizer(text)["input_ids"])
    refuse_second_beginning(tokenizer, text, ids)
    return ids


def refuse_second_beginning(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise where a text made for another tokenizer, e.g. by a chat template, would begin with BOS twice.

    refuse_second_beginning(tokenizer, "2 + 2 = 4", [5, 7, 5, 8, 9])     # None: it does not
    """
    word, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if word and text.startswith(word) and not text.startswith(word + word) and list(ids[:2]) == [bos, bos]:
        raise HookdepthError(
            f"the text begins with {word!r}, and the tokenizer puts another before it",
            f"leave {word!r} out of the text",
        )
