"""What a run keeps while it works: a file for each chunk that is measured, in a folder that only it writes to.

with locked(Path("out/.chunks")):
    chunks = Chunks(Path("out/.chunks"), ("logit-lens",), identities)
    chunks.claim()                       # refuses those of other settings
    chunks.save(0, partial, seconds=1.5)
    chunks.passes(0)                   # 1: it is there
    chunks.load(0)                       # (partial, 1.5)
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hookdepth.analyses import Partial
from hookdepth.errors import HookdepthError
from hookdepth.results import SUFFIX, Result, read_metadata, write_json

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
VISIBLE_S = 90.0  # a shared file system may show another machine's file this late


class Chunks:
    """The chunks of analyses that share their passes.

        Chunks(Path("out/.chunks"), ("skip-current", "skip-future"), identities).count()

    Those of several analyses hold other tensors, from other passes, than those of one alone: their names
    begin with the names of all of them.

    Args:
        folder: where they lie.
        analyses: what they are chunks of.
        identities: per analysis, everything that its numbers depend on.
        warn: called with one line where a file cannot be read.
        patience: seconds to wait for a chunk that other processes have measured.
    """

    def __init__(
        self,
        folder: Path,
        analyses: Iterable[str],
        identities: Mapping[str, dict[str, Any]],
        warn: Callable[[str], None] = lambda line: None,
        patience: float = 0.0,
    ) -> None:
        self.folder, self.prefix, self.warn, self.patience = folder, "+".join(analyses) + "-", warn, patience
        self.identity = {name: identities[name] for name in self.prefix[:-1].split("+")}
        # Each chunk names its run by a hash: the settings of a large data set are long, and kept once.
        self.owner = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{self.prefix}{chunk:06d}{SUFFIX}"

    def count(self) -> int:
        """How many are there."""
        return len(list(self.folder.glob(f"{self.prefix}*{SUFFIX}")))

    def claim(self) -> None:
        """Write down whose chunks lie here.

        Raises:
            HookdepthError: there are chunks of other settings; names the first that differs.
        """
        path = self.folder / f"{self.prefix}settings.json"
        if self.count() and path.exists():
            refuse_other(path, json.loads(path.read_text(encoding="utf-8")), self.identity)
        else:
            write_json(path, self.identity)

    def save(self, chunk: int, partial: Partial, seconds: float) -> None:
        """Keep what a chunk gave."""
        metadata = {
            "owner": self.owner,
            "passes": partial.passes,
            "null_effect": partial.null_effect,
            "null_where": partial.null_where,
            "wall_time_s": seconds,
        }
        Result(self.prefix[:-1], partial.tensors, metadata).save(self.path(chunk))

    def passes(self, chunk: int) -> int | None:
        """Passes of a chunk that is there; None where it is not, or cannot be read.

        Raises:
            HookdepthError: it is one of another run.
        """
        if not self.path(chunk).exists():
            return None
        try:
            metadata = read_metadata(self.path(chunk))
        except HookdepthError as error:  # a disk that lost power may hold less than it had promised
            self.warn(f"{error.problem}; measured again")
            return None
        self._check_owner(chunk, metadata)
        return int(metadata["passes"])

    def load(self, chunk: int) -> tuple[Partial, float]:
        """What a chunk gave, and in how many seconds; waits for a shared file system to show it."""
        if not appears(self.path(chunk), self.patience):
            raise HookdepthError(
                f"the chunk {str(self.path(chunk))!r}, which was measured, is not there",
                "give --out on a file system that all machines share, where nobody else takes files away",
                1,
            )
        stored = Result.load(self.path(chunk))
        meta = stored.metadata
        self._check_owner(chunk, meta)
        partial = Partial(stored.tensors, meta["passes"], meta["null_effect"], meta["null_where"])
        return partial, float(meta["wall_time_s"])

    def _check_owner(self, chunk: int, metadata: Mapping[str, Any]) -> None:
        if metadata.get("owner") != self.owner:
            raise HookdepthError(
                f"{str(self.path(chunk))!r} is of a run with other settings",
                "give --overwrite, or use the same versions on all machines",
            )

    def clear(self) -> None:
        """Let the chunks go."""
        for path in [*self.folder.glob(f"{self.prefix}*{SUFFIX}"), self.folder / f"{self.prefix}settings.json"]:
            path.unlink(missing_ok=True)


def forget(folder: Path, names: Iterable[str]) -> None:
    """Let go of all chunks that the named analyses have a part in.

    forget(Path("out/.chunks"), ["skip-current"])
    """
    for path in folder.glob("*-*"):
        if set(path.name.rpartition("-")[0].split("+")) & set(names):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder: a launcher that was killed may have left its processes at work.

    The lock is the operating system's and goes with the process, however that ends.

    Raises:
        HookdepthError: another run holds it (exit status 2), or the folder cannot be written (1).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise HookdepthError(
            f"cannot write the folder {str(folder.parent)!r} ({error.strerror})",
            "give an --out folder you can write to",
            1,
        ) from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HookdepthError(
                    f"another run is at work in {str(folder.parent)!r}", "wait for it, or give another --out folder"
                ) from error
            except OSError:
                pass  # a file system without locks: then nothing keeps two runs apart
        yield


def appears(path: Path, patience: float) -> bool:
    """Whether a file is there, now or within some seconds, as soon as a shared file system shows it.

    appears(Path("out/.chunks/lock"), VISIBLE_S)
    """
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return True


def refuse_other(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise, naming the first setting that differs, where a file belongs to another run."""
    difference = _first_difference({key: stored.get(key) for key in wanted}, wanted)
    if difference:
        where, old, new = difference
        raise HookdepthError(
            f"{str(path)!r} was computed with {where} = {_short(old)}, this run has {_short(new)}",
            "give another --out folder, the same settings, or --overwrite",
        )


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Plain values before lists, and of a long list the first entry that differs: short, and never the same twice."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=lambda key: (isinstance(new.get(key), list | dict), key)):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 8:
        place = next(n for n, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return _first_difference(old[place], new[place], f"{where}[{place}]")
    return where, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
