"""Several runs on one page: the same curves and maps of each, and the settings in which they differ.

write_comparison(["out/demo", "out/other"], "compare")  # compare/compare.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hookdepth.analyses.contract import load_folder
from hookdepth.errors import HookdepthError
from hookdepth.report import figures as plots
from hookdepth.report.hover import compared, number
from hookdepth.report.html import arranged, contents, note, page, section, small, table
from hookdepth.report.page import (
    DEPTH_NOTE,
    by_kind,
    caption_of,
    depth_cells,
    figure_html,
    floor_in_brief,
    reading_of,
)
from hookdepth.report.summary import ordered, summarise
from hookdepth.report.tables import flatten, shorten
from hookdepth.report.texts import DEPTH_NAMES, PART_NAMES, TEXTS
from hookdepth.results import Result, write_atomic


def write_comparison(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """`compare.html` and its figures in `out`, from the results of several runs; the page's path.

        write_comparison(["out/small", "out/large"], "compare")

    Raises:
        HookdepthError: as `write_report`, or no folder given.
    """
    if not folders:
        raise HookdepthError("no folder to compare", "give the --out folders of two or more runs")
    out = Path(out)
    runs = {label: ordered(load_folder(folder)) for label, folder in zip(labels_of(folders), folders, strict=True)}
    summaries = {label: summarise(results) for label, results in runs.items()}
    drawn = plots.compare_figures(runs)
    sections = [
        (analysis, _analysis(analysis, drawn, runs, summaries, out))
        for analysis in TEXTS
        if any(name.startswith(analysis) for name in drawn)
    ]
    first = {name: name for name in ("Effective depth", "Differences in settings")}
    body = [contents(first | {analysis: TEXTS[analysis].heading for analysis, _ in sections})]
    body += [_compare_depths(summaries), _compare_settings(runs), *(content for _, content in sections)]
    if not drawn:
        body.append(note("These runs have no analysis in common."))
    title = f"hookdepth: {len(runs)} runs compared"
    return write_atomic(out / "compare.html", page(title, body).encode(errors="replace"))


def labels_of(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The folders' names; with as many parents as it takes to tell them apart, and a number where nothing does.

    labels_of(["a/out", "b/out"])   # ["a/out", "b/out"]
    """
    paths = [Path(folder).resolve() for folder in folders]
    labels: list[str] = []
    for index, path in enumerate(paths):
        others = [other for place, other in enumerate(paths) if place != index and other != path]
        tail = next(
            (n for n in range(1, len(path.parts)) if all(other.parts[-n:] != path.parts[-n:] for other in others)), 1
        )
        label = "/".join(path.parts[-tail:])
        same = paths[:index].count(path)
        labels.append(f"{label} ({same + 1})" if same else label)
    return labels


def _analysis(
    analysis: str,
    drawn: Mapping[str, Figure],
    runs: Mapping[str, Mapping[str, Result]],
    summaries: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> str:
    own = {name: figure for name, figure in drawn.items() if name.startswith(analysis)}
    groups = []
    for kind, group in by_kind(analysis, own).items():
        shown = [
            figure_html(f"compare-{name}", _compare_caption(name, runs), figure, out, compared(runs, name))
            for name, figure in group.items()
        ]
        groups.append((reading_of(analysis, kind), shown, small(_compare_floors(analysis, summaries))))
    return section(TEXTS[analysis].heading, [arranged(groups)], analysis)


def _compare_floors(analysis: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    own = {label: summary["analyses"].get(analysis) for label, summary in summaries.items()}
    floors = "; ".join(f"{label}: {floor_in_brief(facts_of).lower()}" for label, facts_of in own.items() if facts_of)
    return f"{floors}. Runs of different depths are drawn over relative depth: layer l at (l + 0.5) / L."


def _compare_caption(name: str, runs: Mapping[str, Mapping[str, Result]]) -> str:
    analysis = next(known for known in TEXTS if name.startswith(known))
    probes = next((own[analysis].metadata.get("probes") or [] for own in runs.values() if analysis in own), [])
    return caption_of(analysis, name, probes)


def _compare_depths(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("Run", "Model", "Layers", *DEPTH_NAMES.values())
    rows = []
    for label, summary in summaries.items():
        model = summary["model"] or {}
        depths = [depth_cells(summary["effective_depth"][name]) for name in DEPTH_NAMES]
        cells = [layer if ratio == "—" else f"{layer} ({ratio})" for layer, ratio in depths]
        rows.append((label, str(model.get("id", "—")), number(model.get("n_layers")), *cells))
    parts = [table(head, rows), small(f"Layer, and in brackets its ratio. {DEPTH_NOTE}")]
    found = [(a, part) for s in summaries.values() for a, by in s["depth_scores"].items() for part in by]
    columns = list(dict.fromkeys(found))
    if columns:
        scores = [
            (label, *(number(s["depth_scores"].get(a, {}).get(p, {}).get("effect")) for a, p in columns))
            for label, s in summaries.items()
        ]
        parts.append("<h3>Depth score, by effect on layers</h3>")
        parts.append(table(("Run", *(f"{a}, {PART_NAMES[p]}" for a, p in columns)), scores))
    return section("Effective depth", parts)


def _compare_settings(runs: Mapping[str, Mapping[str, Result]]) -> str:
    """The settings in which the runs differ, model and data among them; those of analyses that all of them have."""
    shared = set.intersection(*(set(results) for results in runs.values()))
    flat: dict[str, dict[str, str]] = {}
    for label, results in runs.items():
        own = flat[label] = {"analyses": ", ".join(results)}
        for name, result in results.items():
            for key in ("model", "data", "settings", "seed", "versions"):
                for path, value in flatten(result.metadata.get(key), key):
                    if key != "settings":
                        own.setdefault(path, shorten(value, 16 if path.endswith("sha256") else 60))
                    elif name in shared:
                        own[f"{name}: {path.removeprefix('settings.')}"] = shorten(value, 60)
    names = dict.fromkeys(name for own in flat.values() for name in own)
    rows = [(name, *(own.get(name, "—") for own in flat.values())) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    shown = table(("Setting", *flat), rows) if rows else note("The runs have the same settings.")
    return section("Differences in settings", [shown])
