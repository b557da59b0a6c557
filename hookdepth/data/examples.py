"""Data sets: `demo`, GSM8K, files; GSM8K's template."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from hookdepth.data.lines import Lines
from hookdepth.data.tokens import refuse_unusable
from hookdepth.errors import HookdepthError, clipped, suggestion
from hookdepth.model.hub import NOT_THERE, hub_or_cache, one_line

NAMES = ("demo", "gsm8k")
ROW = 'one JSON object a line, all with "question" and "answer", or all with "prompt" and, optionally, "answer"'
# As lm-evaluation-harness and the notebook have it, to the letter: the reasoning ends in a line break of its own.
TEMPLATE = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'
    "\n{reasoning}The final answer is {final}"
)
GET_GSM8K = (
    "check the network, or fetch test.jsonl of the GitHub repository openai/grade-school-math "
    "(folder grade_school_math/data) elsewhere and give --dataset test.jsonl"
)
_KEYS = ("question", "prompt", "answer")


@dataclass(frozen=True)
class Example:
    """A row: Example("2 + 2 = 4", "2 + 2 = ", "4"). Prompts run on `text`; only rows with `prompt` have the rest."""

    text: str
    prompt: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Rows of a data set, as many as were asked for: load_examples("demo").

    Attributes:
        name: a file's is without the folder.
        examples: the rows that were read.
        more: how many follow that were not; None where some do that nobody has counted.
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
    """Read a data set: `demo`, `gsm8k`, a .jsonl file, or a text file with a prompt a line.

        load_examples("probes.jsonl").examples[0].answer

    A name goes before a file of that name. Blank lines in files are skipped. What follows after `limit` rows is
    counted, but not looked at.

    Raises:
        HookdepthError: no such data set or file, no `datasets` or hub, not UTF-8, a bad row; names file and line.
    """
    name = os.fspath(name)
    if name == "gsm8k":
        rows = _gsm8k_rows()
        where = "row {} of openai/gsm8k"
        examples = [_gsm8k_example(row, where.format(number)) for number, row in enumerate(rows[:limit], 1)]
        return Dataset(name, tuple(examples), len(rows) - len(examples))
    jsonl = name == "demo" or Path(name).suffix.lower() in (".jsonl", ".ndjson")
    with Lines(name, _file(name)) as lines:
        examples = _parse(islice(lines.filled(), limit), jsonl)
        more = lines.count_rest()
    if not examples:
        raise HookdepthError(f"{name!r} is empty", f"write a prompt a line, or in a .jsonl file {ROW}")
    return Dataset(Path(name).name, tuple(examples), more)


def texts_as_dataset(texts: str | Sequence[str]) -> Dataset:
    """Prompts that are at hand, as a data set: texts_as_dataset(["The capital of France is", "2 + 2 ="]).

    Raises:
        HookdepthError: none, or what is no text.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in listed if not isinstance(text, str)]
    if wrong or not listed:
        raise HookdepthError(f"{wrong[0]!r} is no text" if wrong else "there are no texts", "give a list of prompts")
    return Dataset("texts", tuple(Example(text, prompt=text) for text in listed))


def _gsm8k_rows() -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise HookdepthError("gsm8k needs datasets", "pip install 'hookdepth[gsm8k]', or give a JSONL file") from error
    for name in ("huggingface_hub", "datasets"):  # what they warn of is said in the error's one line
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    online = False
    try:
        with hub_or_cache() as online:
            return list(datasets.load_dataset("openai/gsm8k", "main", split="test"))
    except Exception as error:  # what is raised without a network differs from release to release
        raise HookdepthError(one_line("cannot load openai/gsm8k", error if online else NOT_THERE), GET_GSM8K) from error


def _file(name: str) -> Path:
    if name == "demo":
        return Path(str(resources.files("hookdepth.data") / "demo.jsonl"))
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


def _parse(lines: Iterable[tuple[str, str]], jsonl: bool) -> list[Example]:
    if not jsonl:
        return [Example(line, prompt=line) for _, line in lines]
    examples: list[Example] = []
    first: tuple[str, bool] | None = None
    for where, line in lines:
        row = _row(line, where)
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
    return Example(prompt + (answer or ""), prompt, answer)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise HookdepthError(f'{where} has no "{key}" that is a string', f"write {ROW}")
    refuse_unusable(value, f'the "{key}" of {where}')
    return value
