"""What an analysis of somebody else's is made of, as the identity of its results has it: its values and its code.

    own_values(HalfMlp())      # {'source_sha256': '5f0c…'}

The digest is over the files in which the class and its bases stand, and over what Python made of them: a file that was
edited after it was imported is not yet what runs, and what is typed at a prompt has no file. Of the functions it takes
bytecode, constants, and those values of the module that they read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodWrapperType, ModuleType
from typing import Any

import torch

from hookdepth.engine.measurement import LayerMeasurement, OutputMeasurement
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.identity import PROCESS, weights_digest

_INSIDE = ("fget", "func", "__func__")  # where properties, cached ones, static and class methods keep their function


def own_values(analysis: Any) -> dict[str, Any]:
    """What it was made with, and a digest of its code where it is not one of ours.

    Raises:
        HookdepthError: it holds what cannot be written down.
    """
    values: dict[str, Any] = {name: value for name, value in vars(analysis).items() if not name.startswith("_")}
    if not _is_known(type(analysis)):
        values["source_sha256"] = _digest(analysis)
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise HookdepthError(
            f"{analysis.name} holds what cannot be written down ({error})",
            "keep numbers, texts and lists in its attributes, and names that begin with _ for the rest",
        ) from error
    return values


def digest_of(values: Sequence[Any]) -> str:
    """A digest of instances, with the code of those that are not ours: digest_of([Branch((Skip(4),)), KL()])."""
    inner = [part for value in values for part in vars(value).values()]
    inner += [one for part in inner if isinstance(part, tuple) for one in part]
    unknown = {type(one).__module__ for one in (*values, *inner) if not _is_known(type(one))}
    homes = unknown | {one.__module__ for one in inner if isinstance(one, FunctionType)}
    kinds = {type(one) for one in (*values, *inner) if type(one).__module__ in homes}
    parts = [_plain(list(values), homes, ())] + [_plain(kind, homes, ()) for kind in sorted(kinds, key=repr)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_known(kind: type) -> bool:
    """Ours, or Python's: the versions in a result's metadata say which code that is."""
    home = kind.__module__.partition(".")[0]
    return home == "hookdepth" or (home in sys.stdlib_module_names and home != "__main__")


def _digest(analysis: Any) -> str:
    measuring = [type(one) for one in analysis.measurements]
    classes = [one for kind in (type(analysis), *measuring) for one in kind.__mro__ if not _is_known(one)]
    homes = {kind.__module__ for kind in classes}
    parts = [[_text(kind), list(_members(kind, homes, ()))] for kind in dict.fromkeys(classes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _text(kind: type) -> str:
    try:
        return Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # typed at a prompt: there is no file
        return ""


def _members(kind: type, homes: Set[str], seen: tuple[int, ...]) -> Iterator[Any]:
    for name, value in sorted(vars(kind).items()):
        function = next((found for word in _INSIDE if (found := getattr(value, word, None))), value)
        if isinstance(function, FunctionType) or not name.startswith(("__", "_abc_")):
            yield [name, _plain(function, homes, seen)]


def _plain(value: Any, homes: Set[str], seen: tuple[int, ...]) -> Any:
    """A value as JSON-able data that is the same in every process, and another where it means something else."""
    if id(value) in seen:
        return "again"
    seen = (*seen, id(value))
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if value is None or type(value) in (str, bool, int, float, complex):
        return repr(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [list(value.shape), str(value.dtype), hashlib.sha256(data).hexdigest()]
    if isinstance(value, Mapping):
        return sorted([repr(key), _plain(one, homes, seen)] for key, one in value.items())
    if isinstance(value, Set):
        return sorted(json.dumps(_plain(one, homes, seen)) for one in value)
    if isinstance(value, Sequence):
        return [_plain(one, homes, seen) for one in value]
    return _code(value, homes, seen)


def _code(value: Any, homes: Set[str], seen: tuple[int, ...]) -> Any:
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, [_plain(one, homes, seen) for one in value.co_consts]]
    if isinstance(value, ModuleType):
        return value.__name__
    label = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, FunctionType) and value.__module__ in homes:
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != type(cell)()]
        reads = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        own = [value.__code__, value.__defaults__, value.__kwdefaults__, cells, reads]
        return [label, *(_plain(one, homes, seen) for one in own)]
    if isinstance(value, type):
        return [label, *(_members(value, homes, seen) if value.__module__ in homes else ())]
    measures = isinstance(value, LayerMeasurement | OutputMeasurement)
    if (measures or is_dataclass(value) or type(value).__module__ in homes) and hasattr(value, "__dict__"):
        return [label, _plain(getattr(value, "__dict__", {}), homes, seen)]
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodWrapperType):
        return label
    if isinstance(value, torch.nn.Module | Decoder):
        module = value.hf if isinstance(value, Decoder) else value
        return [label, repr(module), weights_digest(module)]
    return [label, *_reduced(value, homes, seen)]


def _reduced(value: Any, homes: Set[str], seen: tuple[int, ...]) -> list[Any]:
    """What an object of somebody else's is made of, as Python itself would copy it: a slice, an array, a partial."""
    try:
        made = value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001 (whatever its own method raises)
        # Nobody can tell what it holds: that of another process never counts as the same.
        return [f"number {id(value)} of process {PROCESS}"]
    parts = [made] if isinstance(made, str) else [list(one) if isinstance(one, Iterator) else one for one in made]
    return [_plain(one, homes, seen) for one in parts]


def _names(code: CodeType) -> set[str]:
    """Names that a function reads, those of the functions and comprehensions inside it as well."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
