"""What a monitored training left behind: a folder a step, and the picture over all of them."""

from __future__ import annotations

import os
from pathlib import Path

from hookdepth.errors import HookdepthError, as_path
from hookdepth.results import SUFFIX, Result, write_atomic

STEP = "step-"


def load_history(folder: str | os.PathLike[str]) -> dict[str, dict[int, Result]]:
    """Analysis → step → result, in order of steps, of every step in the `out` folder of a monitor.

        list(load_history("depth"))     # names of analyses

    Raises:
        HookdepthError: no such folder, no step in it, or a file that is no result.
    """
    folder = as_path(folder)
    found = [(path.parent.name.removeprefix(STEP), path) for path in folder.glob(f"{STEP}*/*{SUFFIX}")]
    steps = sorted((int(step), path) for step, path in found if step.isdigit())
    if not steps:
        raise HookdepthError(f"no steps in {str(folder)!r}", "give the out= folder of a DepthMonitor or DepthCallback")
    history: dict[str, dict[int, Result]] = {}
    for step, path in steps:
        result = Result.load(path)
        history.setdefault(result.analysis, {})[step] = result
    return history


def save_picture(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw the heat map over training time from a monitor's folder.

        save_picture("depth", "depth.png")     # or .svg

    Raises:
        HookdepthError: as `load_history`, or the file cannot be written.
    """
    from hookdepth.analyses.registry import declared
    from hookdepth.report.drawing.over_training import training_figure  # matplotlib, which training need not import
    from hookdepth.report.drawing.style import render

    kind = as_path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise HookdepthError(f"{str(path)!r} is neither .png nor .svg", "name a file that ends in one of them")
    return write_atomic(path, render(training_figure(load_history(folder), declared), kind)[0])
