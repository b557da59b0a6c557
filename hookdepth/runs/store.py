"""What a run keeps while it works: a file for each chunk that is measured, in a folder that only it writes to.

with locked(Path("out/.chunks")):
    chunks = Chunks(Path("out/.chunks"), ("first",), identities)
    chunks.claim()                       # refuses those of other settings
    chunks.save(0, partial, seconds=1.5)
    chunks.passes(0)                     # 1: it is there
    chunks.load(0)                       # (partial, {"seconds": 1.5, "host": …, …})

A file that does not hold (half written by a disk that lost power, changed, another chunk's) is never used: its chunk
is measured again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hookdepth.analyses import Partial
from hookdepth.errors import DamagedError, HookdepthError
from hookdepth.results import SUFFIX, Result, write_json

LOCK = "lock"
_SETTINGS = "settings.json"
VISIBLE_S = 90.0  # a shared file system may show another machine's file this late


class Chunks:
    """The chunks of analyses that share their passes.

    Those of several analyses hold other tensors, from other passes, than those of one alone: their names
    begin with the names of all of them.

    Args:
        identities: per analysis, everything that its numbers depend on.
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
        self.folder, self.warn, self.patience = folder, warn, patience
        self.identity = {name: identities[name] for name in analyses}
        self.name = "+".join(self.identity)
        self.prefix = f"{self.name}-"
        self.settings = folder / f"{self.prefix}{_SETTINGS}"  # says whose chunks lie here
        # Each chunk names its run by a hash: the settings of a large data set are long, and kept once.
        owner = {name: unnamed(identity) for name, identity in self.identity.items()}
        self.owner = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()

    def path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{self.prefix}{chunk:06d}{SUFFIX}"

    def count(self) -> int:
        """How many are there."""
        return len(list(self.folder.glob(f"{self.prefix}*{SUFFIX}")))

    def claim(self) -> None:
        """Write down whose chunks lie here; chunks of other settings are refused by the first that differs."""
        stored = _read_settings(self.settings)
        if self.count() and stored is not None:
            for name, identity in self.identity.items():
                refuse_other(self.settings, stored.get(name, {}), identity, f"{name}.")
            return
        if self.count():  # each of them names its run, so that none of another can be taken for this one's
            self.warn(f"{str(self.settings)!r} is missing or damaged; written again")
        _remove(self.settings)
        write_json(self.settings, self.identity)

    def save(self, chunk: int, partial: Partial, seconds: float) -> None:
        """Keep what a chunk gave."""
        metadata = {
            "owner": self.owner,
            "chunk": chunk,
            "passes": partial.passes,
            "null_effect": partial.null_effect,
            "null_where": partial.null_where,
            "seconds": seconds,
            "host": platform.node(),
        }
        Result(self.name, partial.tensors, metadata).save(self.path(chunk))

    def passes(self, chunk: int) -> int | None:
        """Passes of a chunk that is there; None where it is not, or does not hold: then it is to be measured."""
        path = self.path(chunk)
        if not path.exists() and not path.is_symlink():
            return None
        try:
            return self._read(chunk)[0].passes
        except DamagedError as error:
            self.warn(f"{error.problem}; measured again")
            _remove(path)
            return None

    def load(self, chunk: int) -> tuple[Partial, dict[str, Any]]:
        """What a chunk gave, and how it was measured; waits for a shared file system to show it."""
        if not appears(self.path(chunk), self.patience):
            remedy = "give --out on a file system that all machines share, where nobody else takes files away"
            raise HookdepthError(f"the chunk {str(self.path(chunk))!r}, which was measured, is not there", remedy, 1)
        try:
            return self._read(chunk)
        except DamagedError as error:  # it held a moment ago
            raise HookdepthError(error.problem, "give the same command again: it is measured again", 1) from error

    def _read(self, chunk: int) -> tuple[Partial, dict[str, Any]]:
        """What a chunk's file says, once all of it has been checked."""
        path = self.path(chunk)
        if not path.is_file():
            raise DamagedError(f"{str(path)!r} is no file", "take it away")
        stored = Result.load(path)
        meta = stored.metadata
        if (stored.analysis, meta.get("chunk")) != (self.name, chunk):
            says = f"{stored.analysis}, chunk {meta.get('chunk')}"
            raise DamagedError(f"{str(path)!r} holds another chunk ({says})", "take it away")
        if meta.get("owner") != self.owner:
            what = f"{str(path)!r} is of a run with other settings"
            raise HookdepthError(what, "give --overwrite, or use the same versions on all machines")
        return Partial(stored.tensors, meta["passes"], meta["null_effect"], meta["null_where"]), meta

    def clear(self) -> None:
        """Let the chunks go."""
        for path in [*self.folder.glob(f"{self.prefix}*{SUFFIX}"), self.settings]:
            _remove(path)


def forget(folder: Path, names: Iterable[str]) -> None:
    """Let go of all chunks that some analyses have a part in: forget(Path("out/.chunks"), ["first"])."""
    for path in folder.glob("*-*"):
        if set(path.name.rpartition("-")[0].split("+")) & set(names):
            _remove(path)


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) and all(isinstance(one, dict) for one in stored.values()) else None


def stored_identities(folder: Path, name: str) -> list[dict[str, Any]]:
    """What chunks of a run that was stopped say: stored_identities(Path("out/.chunks"), "first")."""
    found = [_read_settings(path) for path in sorted(folder.glob(f"*{_SETTINGS}"))]
    return [stored[name] for stored in found if stored is not None and name in stored]


def _remove(path: Path) -> None:
    """Take away what lies at a place of ours, were it a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder: a launcher that was killed may have left its processes at work.

    The lock is the operating system's and goes with the process, however that ends.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise HookdepthError(
            f"another run is at work in {str(folder.parent)!r}", "wait for it, or give another --out folder"
        ) from error
    except OSError as error:
        what = f"cannot write the folder {str(folder.parent)!r} ({error.strerror})"
        raise HookdepthError(what, "give an --out folder you can write to", 1) from error
    try:
        yield
    finally:
        lock.release()


def appears(path: Path, patience: float) -> bool:
    """Whether a file is there, as soon as a shared file system shows it: appears(Path("out/.chunks/lock"), 90.0)."""
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return True


def unnamed(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the model's name: a folder has several paths, and its weights say which model it is."""
    model = identity.get("model")
    if not isinstance(model, dict):
        return identity
    return {**identity, "model": {key: value for key, value in model.items() if key != "id"}}


def refuse_other(path: Path, stored: dict[str, Any], wanted: dict[str, Any], whose: str = "") -> None:
    """Raise, naming the first setting that differs, where a file belongs to another run."""
    difference = _first_difference(unnamed({key: stored.get(key) for key in wanted}), unnamed(wanted))
    if difference:
        where, old, new = difference
        what = f"{str(path)!r} was computed with {whose}{where} = {_short(old)}, this run has {_short(new)}"
        raise HookdepthError(what, "give another --out folder, the same settings, or --overwrite")


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
