"""Results on disk: float32 safetensors plus one JSON object of metadata, written atomically.

    result = Result("logit-lens", {"kl": kl, "topk_overlap": overlap}, {"seed": 123})
    result.save("out/logit-lens.safetensors")
    Result.load("out/logit-lens.safetensors").tensors["kl"]   # [L+1]

A file is written to a temporary name in its own folder, flushed to the disk and then renamed, so a
reader sees the old file, the new file or none, never half of one.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hookdepth.contract import violation
from hookdepth.errors import HookdepthError

SCHEMA = 1
SUFFIX = ".safetensors"
_KEY = "hookdepth"
_RERUN = "give a file that `hookdepth run` wrote, or run the analysis again with --overwrite"


@dataclass
class Result:
    """The tensors of one analysis with everything needed to know what they are.

        Result("skip-current", {"layer.effect": effect}, {"null_effect": 0.0}).save("skip-current.safetensors")

    Attributes:
        analysis: name of the analysis, as on the command line.
        tensors: name → tensor; stored as contiguous float32 on the CPU.
        metadata: JSON-able settings, model, data, versions, timing and noise floor.
    """

    analysis: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result atomically and return its path.

            Result("logit-lens", {"kl": kl}).save("out/logit-lens.safetensors")

        Raises:
            HookdepthError: the folder cannot be written or the disk is full (exit status 1).
        """
        tensors = {
            name: value.detach().to("cpu", torch.float32).contiguous().clone()
            for name, value in sorted(self.tensors.items())
        }
        meta = {"schema": SCHEMA, "analysis": self.analysis, **self.metadata}
        return write_atomic(path, save(tensors, metadata={_KEY: json.dumps(meta, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result file.

            Result.load("out/logit-lens.safetensors").metadata["model"]["id"]

        Raises:
            HookdepthError: no such file, not a safetensors file, cut short, or not written by hookdepth.
        """
        metadata = read_metadata(path)
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that torch has not
            raise HookdepthError(f"cannot read the tensors of {str(path)!r} ({error})", _RERUN) from error
        for name, value in tensors.items():
            if value.dtype != torch.float32:
                kind = str(value.dtype).removeprefix("torch.")
                raise HookdepthError(f"the tensor {name!r} of {str(path)!r} is {kind}, not float32", _RERUN)
        return cls(metadata["analysis"], tensors, metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a result file, without reading its tensors.

        read_metadata("out/logit-lens.safetensors")["analysis"]   # 'logit-lens'

    Raises:
        HookdepthError: as `Result.load`.
    """
    path = Path(path)
    if not os.path.isfile(path):  # takes any name; the method of Path does not
        raise HookdepthError(f"no result file {str(path)!r}", "give a .safetensors file that `hookdepth run` wrote")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            raw = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise HookdepthError(f"{str(path)!r} is not a readable safetensors file ({error})", _RERUN) from error
    if raw is None:
        raise HookdepthError(f"{str(path)!r} is a safetensors file, but not one of hookdepth's", _RERUN)
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HookdepthError(f"the metadata of {str(path)!r} is not JSON ({error})", _RERUN) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("analysis"), str):
        raise HookdepthError(f"the metadata of {str(path)!r} names no analysis", _RERUN)
    if metadata.get("schema") != SCHEMA:
        raise HookdepthError(
            f"{str(path)!r} has schema {metadata.get('schema')!r}, this hookdepth reads {SCHEMA}",
            "read it with the version that wrote it, or run the analysis again",
        )
    return metadata


def load_folder(folder: str | os.PathLike[str]) -> dict[str, Result]:
    """All results in a folder, by analysis.

        load_folder("out")["skip-current"].tensors["layer.effect"]   # [L, L]

    Raises:
        HookdepthError: no such folder, no result in it, a file in it that is not one, or two of one analysis.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise HookdepthError(f"no folder {str(folder)!r}", "give the --out folder of a `hookdepth run`")
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    results = [Result.load(path) for path in paths]
    if not results:
        raise HookdepthError(f"no result files in {str(folder)!r}", "give the --out folder of a `hookdepth run`")
    loaded: dict[str, Result] = {}
    for path, result in zip(paths, results, strict=True):
        check_contents(result, path)
        if result.analysis in loaded:
            raise HookdepthError(
                f"{str(path)!r} holds {result.analysis}, and so does another file of its folder",
                "move one of them away",
            )
        loaded[result.analysis] = result
    return loaded


def check_contents(result: Result, path: str | os.PathLike[str]) -> None:
    """Raise where a result lacks what its analysis must have, so that no figure has to ask.

        path = Path("out/logit-lens.safetensors")
        check_contents(Result.load(path), path)

    Raises:
        HookdepthError: a tensor is missing or has the wrong shape, or the metadata is of the wrong kind.
    """
    found = violation(result.analysis, result.tensors, result.metadata)
    if found:
        raise HookdepthError(f"{str(path)!r} is no complete {result.analysis} result: {found}", _RERUN)


def read_log(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What a run took, analysis by analysis, from the `log.json` of its folder; nothing where there is none.

        read_log("out").get("skip-current")   # {"wall_time_s": 34.5, "passes": 10}, or None

    Raises:
        HookdepthError: the file is there, and holds something else.
    """
    path = Path(folder) / "log.json"
    if not path.is_file():
        return {}
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HookdepthError(
            f"cannot read {str(path)!r} ({error})", "delete it: it only says what a run took"
        ) from error
    if not isinstance(log, dict) or not all(isinstance(entry, dict) for entry in log.values()):
        raise HookdepthError(f"{str(path)!r} is no log of a run", "delete it: it only says what a run took")
    return log


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write a JSON object atomically, keys in their order.

    write_json("out/summary.json", {"seed": 123})
    """
    return write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes to `path` so that no reader ever meets half of them.

        write_atomic("out/report.html", page.encode())

    Raises:
        HookdepthError: the folder cannot be written or the disk is full (exit status 1).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp is private; a result is as readable as any file
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        do = "free some space" if full else "give a folder you can write to"
        why = getattr(error, "strerror", None) or error
        raise HookdepthError(f"cannot write {str(path)!r} ({why})", f"{do}, then run again", 1) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def sweep(folder: Path) -> None:
    """Remove what `write_atomic` leaves behind when it is killed: files that nobody would ever read.

    sweep(Path("out"))
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
