"""Several processes that work on one run: who takes what, and how they wait for each other.

    with joined() as workers:                        # `accelerate launch -m hookdepth …`; alone without a launcher
        for chunk in workers.claims("skip", 1319):    # each chunk goes to one process, the next that is free
            ...
        workers.wait()

No tensor ever travels: processes write files to a folder that all of them see. What they tell each other
goes over gloo, also on GPUs: a gloo barrier fails at once when a process at the other end is gone, costs no
device time while it waits, and slow company is no error, however slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from hookdepth.errors import HookdepthError, environment_number

T = TypeVar("T")
_START = timedelta(minutes=10)  # until all are there
_WAIT = timedelta(days=30)  # for each other, later: one that is gone is noticed without any timeout


@dataclass
class Workers:
    """This process among those of the run; a single one needs no launcher and waits for nobody.

    list(Workers().claims("lens", 3))   # [0, 1, 2]
    """

    rank: int = 0  # the first talks, and writes results
    size: int = 1
    store: Any = None  # what counters live in; None for this one alone
    _taken: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the process that talks and writes results."""
        return self.rank == 0

    def claims(self, key: str, n: int) -> Iterator[int]:
        """Those of 0 … n−1 that fall to this process, in rising order; all must ask with the same keys in one order."""
        while (number := self.count(f"claim {key}") - 1) < n:
            yield number

    def count(self, key: str, by: int = 1) -> int:
        """Add to a counter that all share; what it then stands at."""
        if self.store is None:
            self._taken[key] = self._taken.get(key, 0) + by
            return self._taken[key]
        with self._listening():
            return int(self.store.add(key, by))

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until all processes are here; `meanwhile` is called a few times a second.

        Raises:
            HookdepthError: one of them is gone (exit status 1).
        """
        if self.store is None:
            return
        with self._listening():
            work: Any = dist.barrier(async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(0.1)
            work.wait()

    def together(self, run: Callable[[], T]) -> T:
        """Run something everywhere. Where it fails for anyone it fails for all, and the first process tells why."""
        if self.store is None:
            return run()
        failure, value = None, None
        try:
            value = run()
        except HookdepthError as error:
            failure = (error.problem, error.remedy, error.exit_status)
        gathered: list[Any] = [None] * self.size
        with self._listening():
            dist.all_gather_object(gathered, failure)
        for rank, found in enumerate(gathered):
            if found is not None:
                problem, remedy, status = found
                where = f"process {rank} of {self.size}: " if rank else ""
                raise HookdepthError(where + problem, remedy, status, told=not self.first)
        return value  # type: ignore[return-value]  # there was no failure

    def of_first(self, run: Callable[[], T]) -> T:
        """What the first process, which alone runs it, gets; JSON-able or simple values only."""
        mine = self.together(lambda: run() if self.first else None)
        if self.store is None:
            return mine  # type: ignore[return-value]  # of one, the first
        box = [mine]
        with self._listening():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # the first's

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and the store's own errors are such
            raise HookdepthError(
                f"process {self.rank} of {self.size}: another process of this run has ended",
                "see what it said, if it could; the same command goes on where the run stopped",
                1,
            ) from error


@contextmanager
def joined() -> Iterator[Workers]:
    """The workers that a launcher (accelerate, torchrun) has started this process in, or this one alone.

    Raises:
        HookdepthError: the launcher's variables make no sense, or the other processes do not come.
    """
    if environment_number("WORLD_SIZE", 1, 1) == 1:
        yield Workers()
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_WAIT)
    except (RuntimeError, ValueError) as error:
        raise HookdepthError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0][:200]})",
            "start them with `accelerate launch --num_processes N -m hookdepth run …`, or unset WORLD_SIZE",
            1,
        ) from error
    try:
        yield Workers(rank, size, dist.PrefixStore("hookdepth", store))
    finally:
        dist.destroy_process_group()
