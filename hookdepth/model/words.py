"""Words as tokens: the one id that a word has in a model's own tokenizer."""

from __future__ import annotations

from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.model.decoder import Decoder


def token_id(model: Decoder, token: int | str) -> int:
    """The id of a word that is one token of the model's: token_id(model, "a"). An id is checked, too."""
    vocab = int(model.config.vocab_size)
    if not isinstance(token, str):
        return whole_number(f"a token of {model.name!r}", token, 0, vocab - 1)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise HookdepthError(f"the word {token!r} for a model without a tokenizer", "give token ids, or a tokenizer")
    found = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        pieces = ", ".join(repr(tokenizer.decode([piece])) for piece in found[:8]) + (", …" if len(found) > 8 else "")
        what = f"the word {shown(token)} is {len(found)} tokens" + (f": {pieces}" if found else "")
        raise HookdepthError(what, "give one that is a single token (perhaps with a space in front), or a token id")
    if found[0] == tokenizer.unk_token_id and token != tokenizer.unk_token:
        raise HookdepthError(f"the tokenizer of {model.name!r} does not know {token!r}", "give another word")
    return whole_number(f"the token of {token!r}", found[0], 0, vocab - 1)
