"""Data sets of the Hugging Face hub, through `datasets`: rows with the keys that a JSONL file would have."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hookdepth.errors import HookdepthError
from hookdepth.model.hub import NOT_THERE, hub_or_cache, one_line

Row = Mapping[str, Any]
SHUFFLE = 42  # of each level's list, as the paper's authors have it
_ELSEWHERE = "check the network, or write its rows to a .jsonl file elsewhere and give that"


@dataclass(frozen=True)
class _HubSet:
    path: str
    config: tuple[str, ...]
    split: str
    convert: Callable[[Row], dict[str, Any]]
    remedy: str = _ELSEWHERE


def _math(row: Row) -> dict[str, Any]:
    level = int(str(row["level"]).removeprefix("Level "))
    return {"prompt": f"Problem: {row['problem']}\nAnswer:", "answer": f" {row['solution']}", "level": level}


def _mquake(row: Row) -> dict[str, Any]:
    prompt = f"Question: {row['questions'][0]}\nAnswer:"
    return {"prompt": prompt, "answer": f" {row['answer']}", "level": len(row["orig_triples"])}


HUB_SETS = {
    "gsm8k": _HubSet(
        "openai/gsm8k",
        ("main",),
        "test",
        dict,
        "check the network, or fetch test.jsonl of the GitHub repository openai/grade-school-math "
        "(folder grade_school_math/data) elsewhere and give --dataset test.jsonl",
    ),
    "math": _HubSet("EleutherAI/hendrycks_math", ("intermediate_algebra",), "test", _math),
    "mquake": _HubSet("henryzhongsc/MQuAKE-Remastered", (), "CF3k", _mquake),
}


def hub_rows(name: str) -> list[dict[str, Any]]:
    """All rows of a data set of the hub; where they carry levels, level by level, each in an order of its own.

        hub_rows("mquake")[0]["level"]      # 2

    Raises:
        HookdepthError: no `datasets`, no hub, or a row without what is read of it; names the row.
    """
    source = HUB_SETS[name]
    rows: list[dict[str, Any]] = []
    try:
        rows += map(source.convert, _load(name, source))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"row {len(rows) + 1} of {source.path} is not as {name} is known ({error!r})"
        raise HookdepthError(what, "write its rows to a .jsonl file with prompt, answer and level") from error
    levels: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        levels.setdefault(row.get("level"), []).append(row)
    if None in levels:
        return rows
    for own in levels.values():
        random.Random(SHUFFLE).shuffle(own)
    return [row for level in sorted(levels) for row in levels[level]]


def _load(name: str, source: _HubSet) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        remedy = "pip install 'hookdepth[gsm8k]', or give a JSONL file"
        raise HookdepthError(f"{name} needs datasets", remedy) from error
    for logger in ("huggingface_hub", "datasets"):  # what they warn of is said in the error's one line
        logging.getLogger(logger).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    online = False
    try:
        with hub_or_cache() as online:
            return list(datasets.load_dataset(source.path, *source.config, split=source.split))
    except Exception as error:  # what is raised without a network differs from release to release
        what = one_line(f"cannot load {source.path}", error if online else NOT_THERE)
        raise HookdepthError(what, source.remedy) from error
