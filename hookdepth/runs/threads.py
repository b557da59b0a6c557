"""With how many threads the analyses of a run are computed.

A matrix product on a CPU is summed in another order with every number of threads, and a launcher of several
processes gives each of them one. So the first process decides when a run begins, for all of them; a run that goes
on, and a result that is there, keep the number that they were begun with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from hookdepth.errors import HookdepthError, environment_number
from hookdepth.results import SUFFIX, Result
from hookdepth.runs.contract import check_contents
from hookdepth.runs.store import stored_identities

_MOST = 4096  # that any machine has


def threads_of(groups: Iterable[Sequence[str]], out: Path, chunks: Path, fresh: bool = False) -> dict[str, int]:
    """Analysis → number of threads.

        threads_of([("first", "second")], Path("out"), Path("out/.chunks"))     # {"first": 2, …}

    Args:
        groups: analyses that may share passes: those that are not done have one number.
        fresh: whatever lies in `out`, and in the `chunks` of a run that was stopped, is thrown away.
    """
    found: dict[str, int] = {}
    own = _own()
    for group in groups:
        stopped = [_in(identity) for name in group for identity in stored_identities(chunks, name)]
        rest = next(filter(None, stopped), own)
        found |= {name: own if fresh else _of_result(out / f"{name}{SUFFIX}") or rest for name in group}
    return found


def _own() -> int:
    """This process's number; among several that their launcher gave one thread each, the number of one alone."""
    if environment_number("WORLD_SIZE", 1, 1) == 1 or os.environ.get("OMP_NUM_THREADS") != "1" or _user_asked_for_one():
        return torch.get_num_threads()
    # As torch counts where nobody has said anything: cores, not their hyperthreads, and only those it may use.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def _user_asked_for_one() -> bool:
    """Whether OMP_NUM_THREADS=1 stood in the environment that the launcher itself was started in."""
    try:
        return psutil.Process().parent().environ().get("OMP_NUM_THREADS") == "1"
    except (psutil.Error, AttributeError):  # no parent, or one of another user: then the launcher's habit is likelier
        return False


def _of_result(path: Path) -> int | None:
    try:
        result = Result.load(path)
        check_contents(result, path)
    except HookdepthError:  # there is none, or one that the run itself will speak of
        return None
    return _in(result.metadata)


def _in(identity: Mapping[str, Any]) -> int | None:
    rounding = identity.get("rounding")
    threads = rounding.get("threads") if isinstance(rounding, dict) else None
    return threads if isinstance(threads, int) and 1 <= threads <= _MOST else None
