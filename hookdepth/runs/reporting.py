"""The pages of a run, or of several: results are loaded and checked, declarations looked up, and the report written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import declared, known
from hookdepth.errors import HookdepthError
from hookdepth.report.compare import labels_of, write_comparison
from hookdepth.report.explore import write_explorer
from hookdepth.report.folder import write_report
from hookdepth.report.notebook import drawn
from hookdepth.results import Result, read_log
from hookdepth.runs.contract import load_folder


def report(folder: str | os.PathLike[str]) -> Path:
    """Figures (PNG and SVG), `summary.json` and `report.html` from every result in a folder; the page's path.

        report("out/demo")     # and explore.html beside it, where there are maps to point at

    Raises:
        HookdepthError: no such folder, no result in it, a file that is not one, or it cannot be written to.
    """
    results, folder = _drawn(folder), Path(folder)
    write_explorer(folder / "explore.html", results, declared)
    return write_report(folder, results, declared, _of_every_run(), read_log(folder))


def comparison(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], scatter: bool = False) -> Path:
    """`compare.html` and its figures in `out`, from the results of several runs; `scatter`: effective depths, too.

    comparison(["out/small", "out/large"], "both")  # both/compare.html
    """
    if not folders:
        raise HookdepthError("no folder to compare", "give the --out folders of two or more runs")
    runs = dict(zip(labels_of(folders), map(_drawn, folders), strict=True))
    return write_comparison(runs, Path(out), declared, _of_every_run(), scatter)


def _drawn(folder: str | os.PathLike[str]) -> dict[str, Result]:
    return {name: drawn(result, declared(result)) for name, result in load_folder(folder).items()}


def _of_every_run() -> list[Analysis]:
    return [kind() for kind in known().values() if kind.in_all]
