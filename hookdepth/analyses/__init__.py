"""The analyses of the paper and beyond: one module each, what to branch, what to measure, how to reduce.

from hookdepth.analyses import NAMES, tasks_for

for task in tasks_for(["skip-current", "skip-future"], model, inputs, settings):
    parts = [task.run(chunk, lambda: None) for chunk in range(task.n_chunks)]
    task.finish(parts)["skip-current"]["layer.effect"]   # [L, L]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hookdepth.analyses import erasure, gradients, lens, local, skip, stats
from hookdepth.analyses.base import BASELINE_PROMPTS, Inputs, Partial, Settings, Task, noise_floor
from hookdepth.model.decoder import Decoder

# In the order in which they run and are reported; modules that serve several analyses share their passes.
_MODULES = (
    (stats, ("residual-stats",)),
    (lens, ("logit-lens",)),
    (skip, ("skip-current", "skip-future")),
    (local, ("local-current", "local-future")),
    (erasure, ("residual-erasure",)),
    (gradients, ("integrated-gradients",)),
)
NAMES = tuple(name for _, names in _MODULES for name in names)
NEED_CUTS = ("skip-future", "local-future")
NEED_PROBES = ("residual-erasure", "integrated-gradients")


def tasks_for(names: Iterable[str], model: Decoder, inputs: Inputs, settings: Settings) -> list[Task]:
    """The tasks that compute the named analyses, sharing passes where they can.

    [task.name for task in tasks_for(["skip-future", "logit-lens"], model, inputs, settings)]
    """
    wanted = set(names)
    tasks = [
        module.task(model, inputs, settings, tuple(name for name in served if name in wanted))
        for module, served in _MODULES
        if wanted.intersection(served)
    ]
    # Also what they compute between two passes must not depend on the caller's autocast, defaults and modes.
    in_own_state = model.evaluating
    return [replace(task, run=in_own_state()(task.run), finish=in_own_state()(task.finish)) for task in tasks]


__all__ = [
    "BASELINE_PROMPTS",
    "NAMES",
    "NEED_CUTS",
    "NEED_PROBES",
    "Inputs",
    "Partial",
    "Settings",
    "Task",
    "noise_floor",
    "tasks_for",
]
