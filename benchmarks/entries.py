"""What a row of the table is made of: a workload, what ours gives, and the peers that do the same.

contestants_of(peers, "lens", run)      # run(peer, units) → tensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.limits import Need
from benchmarks.models import Subject
from benchmarks.peers import Peer, Peers
from hookdepth.analyses import Settings, chosen
from hookdepth.analyses import Subject as On
from hookdepth.runs.sharing import groups_of

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a run gave: tensors whose first dimension are the units, and the noise floor where there is one."""

    tensors: Tensors
    null_effect: float | None = None


@dataclass(frozen=True)
class Contestant:
    """A peer at a workload.

    Attributes:
        run: units → their tensors.
        units: all of them; empty where the work cannot be split.
        passes: number of units → how many passes that takes.
        scale: what its time is multiplied by besides.
        note: what is said about its line.
    """

    peer: Peer
    run: Callable[[Sequence[int]], Tensors]
    units: tuple[int, ...] = ()
    passes: Callable[[int], float] = lambda n: 1.0
    scale: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        ours: the analysis as users run it.
        need: its least work, from what it gave (the adaptive integral decides its nodes as it goes).
        check: what peers are compared with, where that is not what `ours` gives.
        targets: by contestant the ratio to reach; `floor`: the share of the floor; `seconds`.
        interventions: how many it makes, from what it gave; 0 where it only reads.
    """

    name: str
    ours: Callable[[], Outcome]
    need: Callable[[Outcome], Need]
    contestants: tuple[Contestant, ...]
    check: Callable[[], Outcome] | None = None
    targets: dict[str, float] = field(default_factory=dict)
    interventions: Callable[[Outcome], int] = lambda _: 0


def run_analyses(
    subject: Subject, names: Sequence[str], settings: Settings | None = None
) -> dict[str, tuple[Tensors, float | None]]:
    """Run analyses as `hookdepth run` does, without its files: name → (tensors, noise floor)."""
    results: dict[str, tuple[Tensors, float | None]] = {}
    for task in groups_of(chosen(names), On(subject.model, subject.inputs, settings or Settings())):
        partials = [task.run(unit, lambda: None) for unit in range(task.n_chunks)]
        null = max((p.null_effect for p in partials if p.null_effect is not None), default=None)
        results |= {name: (tensors, null) for name, tensors in task.finish(partials).items()}
    return results


def prompts_of(subject: Subject) -> list[Tensor]:
    """Token ids of each prompt, [1, T].

    prompts_of(subject)[0].shape
    """
    return [torch.tensor([prompt], device=subject.model.device) for prompt in subject.inputs.prompts]


def contestants_of(
    peers: Peers,
    does: str,
    run: Callable[[Peer, Sequence[int]], Tensors],
    units: tuple[int, ...] = (),
    passes: Callable[[int], float] = lambda n: 1.0,
    scale: float = 1.0,
    note: str = "",
    unit: str = "layers",
) -> tuple[Contestant, ...]:
    """The peers that do a kind of work, each bound to what `run` has it do."""

    def bound(peer: Peer) -> Callable[[Sequence[int]], Tensors]:
        return lambda chosen: run(peer, chosen)

    note = note or (unit if units else "")
    return tuple(Contestant(peer, bound(peer), units, passes, scale, note) for peer in peers.that(does))
