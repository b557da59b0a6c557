"""Tables: what is in a result file as plain text (`hookdepth info`), and the values of a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.results import SUFFIX, Result

LONGEST_VALUE = 100
_HEADER = ("tensor", "shape", "min", "mean", "max", "non-finite")


def describe(path: str | os.PathLike[str]) -> str:
    """Metadata and tensors of a result file, or of every result file in a folder, as a table.

    Raises:
        HookdepthError: no such file or folder, no result in it, or a file that is not one.
    """
    path = Path(path)
    files = sorted(path.glob(f"*{SUFFIX}")) if os.path.isdir(path) else [path]
    if not files:
        raise HookdepthError(f"no result files in {str(path)!r}", "give the --out folder of a `hookdepth run`")
    return "\n\n".join(f"{file}\n{_describe(Result.load(file))}" for file in files)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested objects as pairs with dotted names; lists stay whole."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def shorten(value: Any, most: int = LONGEST_VALUE) -> str:
    """A value on one line, long ones cut, lists with their length: shorten([1, 2, 3])   # '[1, 2, 3] (3)'"""
    if isinstance(value, str):
        text = value if value.isprintable() else json.dumps(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
        text = text if text.isprintable() else json.dumps(value)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return f"{text} ({len(value)})" if isinstance(value, list) else text


@dataclass(frozen=True)
class Table:
    """A table of a page: Table(("Run", "Layers"), [("demo", "30")])."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""  # above it
    below: str = ""  # a quiet line under it


def number(value: Any, digits: int = 3) -> str:
    """A value in few characters, a dash where there is none: number(0.123456)   # '0.123'"""
    if value is None or value != value:
        return "—"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def counted(count: int, one: str, many: str = "") -> str:
    """A number with what it counts: counted(2, "prompt")   # '2 prompts'"""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def statistics(values: Tensor) -> tuple[str, str, str, str]:
    """Least, mean and largest of the finite values, and how many are not: "—" where there is none."""
    finite = values[torch.isfinite(values)].double()
    numbers = (finite.min().item(), finite.mean().item(), finite.max().item()) if finite.numel() else ()
    least, mean, most = [f"{number:.4g}" for number in numbers] or ["—"] * 3
    return least, mean, most, str(values.numel() - finite.numel())


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def _describe(result: Result) -> str:
    metadata = [(shorten(name), shorten(value)) for name, value in flatten(result.metadata)]
    tensors = [
        (shorten(name), str(list(value.shape)), *statistics(value)) for name, value in sorted(result.tensors.items())
    ]
    return f"{table(metadata)}\n\n{table([_HEADER, *tensors])}"
