"""What `generate` gives: texts that know their tokens.

texts = generate(model, [ids], [Skip(4)], max_new_tokens=8)
texts[0][0], texts[0][0].tokens, texts.clean[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hookdepth.engine.plan import Plan

CLOSE = 1e-4
"""Two logits nearer than this are ordered by rounding."""


class Generated(str):
    """A text that was written, without its prompt; of a model without tokenizer the ids, as a text.

        text = generate(model, [ids], max_new_tokens=8).clean[0]
        text.tokens, text.stopped, text.close_call

    Attributes:
        tokens: its ids, with the one that ended it.
        stopped: whether it came to an end by itself.
        close_call: which of its tokens was the first whose two likeliest logits lie within 1e-4; None where none was.
    """

    tokens: list[int]
    stopped: bool
    close_call: int | None

    def __new__(cls, text: str, tokens: Sequence[int], stopped: bool, close_call: int | None) -> Generated:
        """A text and how it came about."""
        made = super().__new__(cls, text)
        made.tokens, made.stopped, made.close_call = list(tokens), stopped, close_call
        return made


@dataclass
class Generations(Sequence[list[Generated]]):
    """The texts of every prompt: texts[prompt][branch].

        texts = generate(model, [ids], [Skip(4), Skip(5)], max_new_tokens=8)
        texts[0][1], texts.tokens[0][1], texts.clean[0]

    Attributes:
        clean: [prompt], what the model writes untouched.
        branches: [prompt][branch].
        null_effect: largest difference between the logits of a null branch and its clean run after the prompt.
        plan: how the prompts were read.
    """

    clean: list[Generated]
    branches: list[list[Generated]]
    null_effect: float
    plan: Plan = field(repr=False)

    def __getitem__(self, prompt: int) -> list[Generated]:  # type: ignore[override]
        """The texts of one prompt's branches."""
        return self.branches[prompt]

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.branches)

    def __iter__(self) -> Iterator[list[Generated]]:
        """Prompt after prompt."""
        return iter(self.branches)

    @property
    def texts(self) -> list[list[str]]:
        """Plain texts, [prompt][branch]."""
        return [[str(text) for text in own] for own in self.branches]

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Token ids, [prompt][branch]."""
        return [[text.tokens for text in own] for own in self.branches]

    def __repr__(self) -> str:
        """A line a text; '≈' where rounding may have decided a token."""
        lines = []
        for number, (clean, own) in enumerate(zip(self.clean, self.branches, strict=True)):
            named = [("clean", clean), *((f"branch {n}", text) for n, text in enumerate(own))]
            for name, text in named:
                lines.append(f"prompt {number}  {name:>10} {' ' if text.close_call is None else '≈'} {str(text)!r}")
        return "\n".join(lines)
