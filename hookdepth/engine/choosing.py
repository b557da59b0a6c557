"""How the next token of a text is chosen, and when the text has come to its end.

choice = Choice.of(model, 0.0, None, 0, ())
chosen = choice.next(logits, texts)     # [row, vocab] → a token for each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from hookdepth.engine.intervention import Intervention
from hookdepth.engine.texts import CLOSE, Generated
from hookdepth.errors import HookdepthError, NotFiniteError, shown, whole_number
from hookdepth.model.decoder import Decoder


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen, and after which a row ends: Choice.of(model, 0.0, None, 0, ())."""

    temperature: float
    top_k: int | None
    seed: int
    ends: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, model: Decoder, temperature: Any, top_k: Any, seed: Any, stop: Any) -> Choice:
        """What a user asks for, made plain."""
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < inf:
            raise HookdepthError(f"the temperature is {shown(temperature)}", "give 0 (the likeliest token) or more")
        if top_k is not None:
            top_k = whole_number("top_k", top_k, 1, int(model.config.vocab_size))
            if not temperature:
                raise HookdepthError(f"top_k is {top_k} at temperature 0, which draws nothing", "set temperature=1.0")
        listed = [stop] if isinstance(stop, str | int) else list(stop)
        texts = tuple(one for one in listed if isinstance(one, str))
        if "" in texts or (texts and model.tokenizer is None):
            raise HookdepthError(
                "an empty text to stop at" if "" in texts else "a text to stop at, for a model without a tokenizer",
                "give token ids" if model.tokenizer is None else "give one with letters in it",
            )
        model.check_ids(own := [one for one in listed if not isinstance(one, str)], "stop")
        known = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
        known = model.config.eos_token_id if known is None else known
        ends = known if isinstance(known, list | tuple) else [] if known is None else [known]
        seed = whole_number("the seed", seed, 0, 1 << 40)
        return cls(float(temperature), top_k, seed, frozenset([*ends, *map(int, own)]), texts)

    def next(self, logits: Tensor, rows: Sequence[Writing]) -> list[int]:
        """The next token of each row, from its logits [row, vocab]."""
        if not self.temperature:
            best = logits.topk(2).values
            chosen, margin = torch.stack([logits.argmax(-1).double(), (best[:, 0] - best[:, 1]).double()]).tolist()
            for row, between in zip(rows, margin, strict=True):
                if not isfinite(between):
                    raise NotFiniteError("non-finite logits", "check the weights, or use a dtype of wider range", 1)
                row.note(between)
            return [int(token) for token in chosen]
        scores = logits.double() / self.temperature
        if self.top_k is not None:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        sums = torch.softmax(scores, dim=-1).cumsum(-1)
        if not torch.isfinite(sums).all():
            raise NotFiniteError("non-finite logits", "check the weights, or use a dtype of wider range", 1)
        drawn = torch.tensor([row.draw(self.seed) for row in rows], dtype=torch.float64, device=sums.device)[:, None]
        return torch.searchsorted(sums, drawn * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1).tolist()


@dataclass(frozen=True)
class Row:
    """What a row is: which prompt it follows, what it changes on the tokens that it writes, and how long it may get."""

    prompt: int
    token_ids: Sequence[int]
    interventions: tuple[Intervention, ...]
    total: int


@dataclass(eq=False)
class Writing:
    """A row that writes."""

    row: Row
    number: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    close_call: int | None = None
    generator: torch.Generator | None = None

    @property
    def position(self) -> int:
        """Of its last token."""
        return len(self.row.token_ids) + len(self.tokens) - 1

    def add(self, token: int, choice: Choice, model: Decoder) -> None:
        """Take a token, unless it has come to its end."""
        if not self.done:
            self.tokens.append(token)
            self.done = token in choice.ends or any(text in self.decoded(model) for text in choice.texts)

    def note(self, ahead: float) -> None:
        """By how much the likeliest token's logit was ahead of the next."""
        if ahead < CLOSE and self.close_call is None and not self.done:
            self.close_call = len(self.tokens)

    def decoded(self, model: Decoder) -> str:
        """All that it wrote."""
        if model.tokenizer is None:
            return " ".join(map(str, self.tokens))
        text: str = model.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text

    def text(self, choice: Choice, model: Decoder) -> Generated:
        """What it wrote, up to a text that it should stop at."""
        text = self.decoded(model)
        stop = min((text.find(one) for one in choice.texts if one in text), default=len(text))
        return Generated(text[:stop], self.tokens, self.done, self.close_call)

    def draw(self, seed: int) -> float:
        """The row's next random number."""
        if self.generator is None:
            self.generator = torch.Generator().manual_seed((seed << 20) + self.row.prompt)
        return torch.rand((), dtype=torch.float64, generator=self.generator).item()
