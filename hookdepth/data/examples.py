"""Data sets: those that ship, those of the hub, files; GSM8K's template."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from hookdepth.data.hub import HUB_SETS, hub_rows
from hookdepth.data.lines import Lines
from hookdepth.data.tokens import refuse_unusable
from hookdepth.errors import HookdepthError, clipped, shown, suggestion

SHIPPED = {
    "demo": "demo.jsonl",
    "demo-levels": "demo-levels.jsonl",
    "demo-facts": "demo-facts.jsonl",
    "demo-text": "demo-text.txt",
}
NAMES = (*SHIPPED, *HUB_SETS)
ROW = (
    'one JSON object a line, all with "question" and "answer", or all with "prompt" and, optionally, "answer" '
    'and "level"'
)
# As lm-evaluation-harness and the notebook have it, to the letter: the reasoning ends in a line break of its own.
TEMPLATE = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'
    "\n{reasoning}The final answer is {final}"
)
_KEYS = ("question", "prompt", "answer", "level")
_LEVEL = re.compile(r"[^\W_][\w-]{0,31}")  # it becomes part of names of tensors and files
_TAKEN = ("score", "score_interval", "per_prompt")  # which begin the names of other tensors


@dataclass(frozen=True)
class Example:
    """A row: Example("2 + 2 = 4", "2 + 2 = ", "4"). Prompts run on `text`; only rows with `prompt` have the rest."""

    text: str
    prompt: str | None = None
    answer: str | None = None
    level: int | str | None = None


@dataclass(frozen=True)
class Dataset:
    """Rows of a data set, as many as were asked for: load_examples("demo").

    `more` is how many follow that were not read; None where some do that nobody has counted.
    """

    name: str
    examples: tuple[Example, ...]
    more: int | None = 0

    @property
    def sha256(self) -> str:
        """A hash of what the rows say that were read."""
        return self.digest(len(self.examples))

    def digest(self, count: int) -> str:
        """A hash of what the first rows say, whatever follows them: load_examples("demo").digest(2)."""
        rows = [astuple(example) for example in self.examples[:count]]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def left_out(self, limit: int) -> str:
        """What a run of the first `limit` rows leaves out, in words: "the first 10 of 1,319 prompts", or ""."""
        if self.more is None:
            return f"the first {limit:,} of more than {len(self.examples):,} prompts"
        total = len(self.examples) + self.more
        return f"the first {limit:,} of {total:,} prompts" if total > limit else ""


def load_examples(name: str | os.PathLike[str], limit: int | None = None) -> Dataset:
    """Read a data set: one of `NAMES`, a .jsonl file, or a text file with a prompt a line.

    A name goes before a file of that name. Blank lines in files are skipped. What follows after `limit` rows is
    counted, but not looked at.

    Raises:
        HookdepthError: no such data set or file, no `datasets` or hub, not UTF-8, a bad row; names file and line.
    """
    name = os.fspath(name)
    if name in HUB_SETS:
        rows = hub_rows(name)
        where = f"row {{}} of {HUB_SETS[name].path}"
        parsed = _examples((where.format(number), row) for number, row in enumerate(rows[:limit], 1))
        return Dataset(name, tuple(parsed), len(rows) - len(parsed))
    path = _file(name)
    with Lines(name, path) as lines:
        filled = islice(lines.filled(), limit)
        examples = (
            _examples((where, _row(line, where)) for where, line in filled)
            if path.suffix.lower() in (".jsonl", ".ndjson")
            else [Example(line, prompt=line) for _, line in filled]
        )
        more = lines.count_rest()
    if not examples:
        raise HookdepthError(f"{name!r} is empty", f"write a prompt a line, or in a .jsonl file {ROW}")
    return Dataset(Path(name).name, tuple(examples), more)


def texts_as_dataset(texts: str | Sequence[str]) -> Dataset:
    """Prompts that are at hand, as a data set: texts_as_dataset(["The capital of France is", "2 + 2 ="])."""
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise HookdepthError(f"the texts are {shown(texts)}", "give a list of prompts")
    listed = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in listed if not isinstance(text, str)]
    if wrong or not listed:
        raise HookdepthError(f"{wrong[0]!r} is no text" if wrong else "there are no texts", "give a list of prompts")
    return Dataset("texts", tuple(Example(text, prompt=text) for text in listed))


def _file(name: str) -> Path:
    if name in SHIPPED:
        return Path(str(resources.files("hookdepth.data") / SHIPPED[name]))
    path = Path(os.path.expanduser(name))  # unlike the method of Path, it takes any string
    if not name or not os.path.exists(path):  # so does this one
        near = suggestion(name, NAMES)
        hint = f"did you mean {near}?" if near else f"give {', '.join(NAMES)} or an existing file"
        raise HookdepthError(f"no data set or file {clipped(name, 200)!r}", hint)
    if path.is_dir():
        raise HookdepthError(f"{name!r} is a folder", "give a .jsonl or text file")
    if stat.S_ISCHR(path.stat().st_mode):  # /dev/zero has no end; a pipe has
        raise HookdepthError(f"{name!r} is a device", "give a .jsonl or text file")
    if path.suffix.lower() == ".json":
        raise HookdepthError(f"{name!r} is JSON, not JSON lines", f"write {ROW}, to a file ending in .jsonl")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise HookdepthError(f"{name!r} is a table, of which every line would be a prompt", f"write {ROW}")
    return path


def _examples(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Example]:
    examples: list[Example] = []
    first: tuple[str, bool] | None = None
    for where, row in rows:
        questions = "question" in row
        first = first or (where, questions)
        if questions != first[1]:
            raise HookdepthError(f"{where} has other keys than {first[0]}", f"write {ROW}")
        examples.append((_gsm8k_example if questions else _prompt_example)(row, where))
    return examples


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        why = str(error).split(": line 1")[0]  # it counts lines within the line
        raise HookdepthError(f"{where} is not valid JSON ({why})", f"write {ROW}") from error
    if not isinstance(row, dict) or ("question" in row) == ("prompt" in row):
        raise HookdepthError(f'{where} is no JSON object with either "question" or "prompt"', f"write {ROW}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that stands twice would leave nobody sure which of its values is meant."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in _KEYS if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]!r} stands twice")
    return dict(pairs)


def _gsm8k_example(row: dict[str, Any], where: str) -> Example:
    question, answer = _string(row, "question", where), _string(row, "answer", where)
    reasoning, _, final = answer.partition("####")
    if not final.strip() or "####" in final:
        what = f"the \"answer\" of {where} is not reasoning, one '####' and a final answer"
        raise HookdepthError(what, "end it with a line such as '#### 42', or use the keys prompt and answer")
    return Example(TEMPLATE.format(question=question, reasoning=reasoning, final=final.strip()))


def _prompt_example(row: dict[str, Any], where: str) -> Example:
    prompt = _string(row, "prompt", where)
    answer = _string(row, "answer", where) if "answer" in row else None
    level = row.get("level")
    level = int(level) if isinstance(level, str) and level.isdecimal() and level.isascii() else level
    numbered = isinstance(level, int) and not isinstance(level, bool) and 0 <= level < 10**9
    if isinstance(level, str) and level in _TAKEN:
        what = f'the "level" of {where} is {shown(level)}, which names something else'
        raise HookdepthError(what, "call it otherwise")
    if not (level is None or numbered or (isinstance(level, str) and _LEVEL.fullmatch(level))):
        what = f'the "level" of {where} is {shown(level)}'
        raise HookdepthError(what, "give a whole number, or a short word of letters, digits and hyphens")
    return Example(prompt + (answer or ""), prompt, answer, level)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise HookdepthError(f'{where} has no "{key}" that is a string', f"write {ROW}")
    refuse_unusable(value, f'the "{key}" of {where}')
    return value
