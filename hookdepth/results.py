"""Results on disk: float32 safetensors plus one JSON object of metadata, written atomically.

    result = Result("mine", {"kl": kl, "topk_overlap": overlap}, {"seed": 123})
    result.save("out/mine.safetensors")
    Result.load("out/mine.safetensors").tensors["kl"]   # [L+1]

A file names its own content by a digest of everything in it, which is checked whenever it is read: a flipped bit or
a page of zeros is noticed. What differs from run to run (times, counts of passes, hosts) is not in it but in
`log.json` beside it, so that two runs with the same settings give the same bytes.

A file is written to a temporary name in its own folder, flushed to the disk and then renamed, so a
reader sees the old file, the new file or none, never half of one.
"""

from __future__ import annotations

import errno
import hashlib
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

from hookdepth.errors import DamagedError, HookdepthError, as_path, choose
from hookdepth.showing import show

SCHEMA = 2
SUFFIX = ".safetensors"
LOG = "log.json"
CLEAN = "clean."
"""Begins the names of what the clean runs of branches gave."""
PER_PROMPT = "per_prompt."
"""Begins the names of what the others are reduced from; nothing else means them."""
_KEY = "hookdepth"
RERUN = "give a file that `hookdepth run` wrote, or run the analysis again with --overwrite"


@dataclass(repr=False)
class Result:
    """The tensors of one analysis with everything needed to know what they are.

        Result("mine", {"layer.effect": effect}, {"null_effect": 0.0}).save("mine.safetensors")

    Attributes:
        analysis: name of the analysis, as on the command line.
        tensors: name → tensor; stored as contiguous float32 on the CPU.
        metadata: JSON-able settings, model, data, versions and noise floor; in a file also a `digest` of everything.
    """

    analysis: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name.

            Result("mine", {"kl": kl})["kl"]

        Raises:
            HookdepthError: there is no such tensor.
        """
        choose("tensor", name, self.tensors)
        return self.tensors[name]

    @property
    def clean(self) -> dict[str, Tensor]:
        """What the clean runs of branches gave, measured where each branch is: result.clean["output"]"""
        return {name.removeprefix(CLEAN): own for name, own in self.tensors.items() if name.startswith(CLEAN)}

    @property
    def noise(self) -> float | None:
        """The largest difference that a branch without changes makes; None where nothing is intervened on."""
        return self.metadata.get("null_effect")

    def axes(self, name: str) -> tuple[str, ...]:
        """What the axes of a tensor are: result.axes("kl")   # ('point',)"""
        self[name]
        found: tuple[str, ...] = show(self, "axes_of_result", name)
        return found

    def over_prompts(self, how: str) -> Result:
        """The same with prompts reduced by max, mean or median; each prompt's own values are `per_prompt.…`.

            per_prompt = Result(name, {"kl": kl, "per_prompt.kl": torch.stack([kl, kl])})
            per_prompt.over_prompts("median")["kl"]     # [L+1]

        Raises:
            HookdepthError: another reduction, or a result that has no prompt's own values.
        """
        found: Result = show(self, "over_prompts", how)
        return found

    def plot(self, name: str | None = None, **options: Any) -> Any:
        """The matplotlib figure of a tensor; by default the first that the analysis declares.

            result.plot("kl", figsize=(3.3, 2.0))

        Args:
            options: cmap, norm, vmin, vmax, figsize; look="lines" or "groups" for bars that would hide each other;
                ax draws into axes of one's own, and gives their figure.

        Raises:
            HookdepthError: no such tensor, one that has too many axes, or an option that the figure does not take.
        """
        return show(self, "plot", name, **options)

    def to_dataframe(self, name: str | None = None) -> Any:
        """A pandas frame with a row a value: the places along the axes, their labels, and the value.

        Args:
            name: of a tensor; by default all, with their names in a column.

        Raises:
            HookdepthError: no such tensor, or pandas is not there.
        """
        return show(self, "dataframe", name)

    def __repr__(self) -> str:
        return str(show(self, "summary"))

    def _repr_html_(self) -> str:
        return str(show(self, "html"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result atomically and return its path.

            Result("mine", {"kl": kl}).save("out/mine.safetensors")

        Raises:
            HookdepthError: the folder cannot be written or the disk is full (exit status 1).
        """
        tensors = {
            name: value.detach().to("cpu", torch.float32).contiguous().clone()
            for name, value in sorted(self.tensors.items())
        }
        meta = {**self.metadata, "schema": SCHEMA, "analysis": self.analysis}
        meta = json.loads(json.dumps(meta))  # as it will be read back: the digest is of that
        meta["digest"] = digest_of(tensors, meta)
        return write_atomic(path, save(tensors, metadata={_KEY: json.dumps(meta, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result file.

            Result.load(path).metadata["model"]["id"]

        Raises:
            DamagedError: not a safetensors file, cut short, or not what was written.
            HookdepthError: no such file, one of another version, or not written by hookdepth.
        """
        metadata = read_metadata(path)
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that torch has not
            raise DamagedError(f"cannot read the tensors of {str(path)!r} ({error})", RERUN) from error
        for name, value in tensors.items():
            if value.dtype != torch.float32:
                kind = str(value.dtype).removeprefix("torch.")
                raise DamagedError(f"the tensor {name!r} of {str(path)!r} is {kind}, not float32", RERUN)
        if metadata.get("digest") != digest_of(tensors, metadata):
            raise DamagedError(f"{str(path)!r} is damaged: its content is not what its digest says", RERUN)
        return cls(metadata["analysis"], tensors, metadata)


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of tensors, and over the metadata but for its own `digest`."""
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a result file, without reading its tensors.

        read_metadata(path)["analysis"]   # its name

    Raises:
        HookdepthError: as `Result.load`.
    """
    path = as_path(path)
    if not os.path.isfile(path):  # takes any name; the method of Path does not
        raise HookdepthError(f"no result file {str(path)!r}", "give a .safetensors file that `hookdepth run` wrote")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            raw = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{str(path)!r} is not a readable safetensors file ({error})", RERUN) from error
    if raw is None:
        raise HookdepthError(f"{str(path)!r} is a safetensors file, but not one of hookdepth's", RERUN)
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the metadata of {str(path)!r} is not JSON ({error})", RERUN) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("analysis"), str):
        raise DamagedError(f"the metadata of {str(path)!r} names no analysis", RERUN)
    if metadata.get("schema") != SCHEMA:
        raise HookdepthError(
            f"{str(path)!r} has schema {metadata.get('schema')!r}, this hookdepth reads {SCHEMA}",
            "read it with the version that wrote it, or run the analysis again with --overwrite",
        )
    return metadata


def read_log(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What differs from run to run of the same settings: analysis → what is known of how it was computed.

        read_log("out")     # {"mine": {"wall_time_s": 1.5, "passes": 10, "hosts": ["here"]}, …}

    `wall_time_s` is the sum over all chunks, whichever process measured them, `passes` the forward calls, `hosts` the
    machines. An analysis of which nothing is known, or nothing that could be read, is not there: no number of a
    result hangs on it.
    """
    try:
        log = json.loads((Path(folder) / LOG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = log.items() if isinstance(log, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and _is_log(entry)}


def _is_log(entry: Mapping[str, Any]) -> bool:
    numbers = [entry.get(key) for key in ("wall_time_s", "passes")]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 1e18 for n in numbers)


def add_to_log(folder: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put entries into a folder's log, beside those of other analyses."""
    write_json(Path(folder) / LOG, dict(sorted({**read_log(folder), **entries}.items())))


def check_folder_name(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose name could be written to but not read back from: it has bytes that are no UTF-8."""
    try:
        str(as_path(folder)).encode()
    except UnicodeEncodeError as error:
        raise HookdepthError(f"the name of the folder {os.fspath(folder)!r} is not UTF-8", "give another") from error


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write a JSON object atomically, keys in their order: write_json("out/summary.json", {"seed": 123})."""
    return write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes to `path` so that no reader ever meets half of them.

        write_atomic("out/report.html", page.encode())

    Raises:
        HookdepthError: the folder cannot be written or the disk is full (exit status 1).
    """
    path = as_path(path)
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
    """Remove what `write_atomic` leaves behind when it is killed: files that nobody would ever read."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
