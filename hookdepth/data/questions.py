"""Questions that a model answers in its own words, and when an answer counts as right.

The prompt is the question alone. The answer is what follows `The final answer is`, to the end of that line, else the
first line; commas and spaces do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hookdepth.data.examples import TEMPLATE, Dataset, Example
from hookdepth.data.tokens import encode
from hookdepth.errors import HookdepthError

FINAL = "The final answer is"
_END = TEMPLATE.partition("{reasoning}")[0].rpartition("{question}")[2]
_SHORT, _REASONING = 8, 320  # tokens: more than an answer has, so that one that goes on is not cut to it


@dataclass(frozen=True)
class Question:
    """A prompt, what should follow, and how many tokens may: Question((5, 6, 7), " Paris.", 10)."""

    token_ids: tuple[int, ...]
    answer: str
    most_tokens: int


def questions_of(
    dataset: Dataset, tokenizer: Any, limit: int | None = None, max_tokens: int | None = None
) -> tuple[Question, ...]:
    """The rows of a data set as questions: questions_of(load_examples("demo-facts", 1), tokenizer)[0].answer"""
    found = []
    for number, example in enumerate(dataset.examples[:limit], 1):
        question, answer = _asked(example)
        if not question or not answer or not _plain(answer):
            what = f"row {number} of {dataset.name!r} has no question with an answer"
            raise HookdepthError(what, "give demo-facts, gsm8k, or a .jsonl file with prompt and answer")
        # Of a whole text, so that room for the answer is counted as it will be written.
        most = _REASONING if FINAL.lower() in question.lower() or _END in question else _SHORT
        most += len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        found.append(Question(tuple(encode(tokenizer, question, max_tokens)), answer, most))
    return tuple(found)


def _asked(example: Example) -> tuple[str | None, str | None]:
    if example.prompt is not None:
        return example.prompt, example.answer
    head, end, rest = example.text.partition(_END)  # a row of GSM8K, in its template
    return (head + end, rest.rpartition(FINAL)[2]) if end else (None, None)


def is_right(text: str, answer: str) -> bool:
    """Whether a text answers a question: is_right(" 1,024\\nNext", "1024")     # True"""
    _, said, rest = text.partition(FINAL)  # the first: a model may go on to ask and answer itself
    lines = (rest if said else text).strip().splitlines()
    return bool(lines) and _plain(lines[0]) == _plain(answer)


def _plain(text: str) -> str:
    return "".join(text.replace(",", " ").split())
