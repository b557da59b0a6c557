"""Several runs on one page: the same curves and maps of each, and the settings in which they differ.

write_comparison({"demo": results, "other": others}, Path("compare"), lookup)  # compare/compare.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookdepth.report import page
from hookdepth.report.figures import compared
from hookdepth.report.kind import Declaration, Lookup
from hookdepth.report.patterns import PART_NAMES
from hookdepth.report.scatter import READING, scatter_pictures
from hookdepth.report.summary import ordered, summarise, tells_depth
from hookdepth.report.tables import Table, counted, flatten, number, shorten
from hookdepth.results import Result

Runs = Mapping[str, Mapping[str, Result]]


def write_comparison(
    runs: Runs, out: Path, lookup: Lookup, known: Sequence[Declaration] = (), scatter: bool = False
) -> Path:
    """`compare.html` and its figures in `out`, from results of several runs by their labels; the page's path.

    `lookup` and `known` are those of `write_report`; `scatter` adds effective depths over models.
    """
    runs = {label: ordered(results, lookup) for label, results in runs.items()}
    summaries = {label: summarise(results, lookup, known) for label, results in runs.items()}
    sections = [_depths(summaries), _settings(runs)]
    if scatter:
        pictures = scatter_pictures(summaries, [own.name for own in known if tells_depth(own)])
        figures = [page.shown(picture, f"compare-{picture.name}", out) for picture in pictures]
        group = page.Group(READING, "arXiv 2512.14064.", figures, page.DEPTH_NOTE)
        sections.insert(1, page.Section("Effective depth over models", groups=[group]))
    for declaration, kinds in compared(runs, lookup):
        below = _floors(declaration.name, summaries)
        groups = page.groups_of(kinds, declaration, out, below, "compare-")
        notes = _unequal(declaration.name, runs)
        sections.append(page.Section(declaration.heading, declaration.name, declaration.question, (), notes, groups))
    warning = "" if len(sections) > 2 + scatter else "These runs have no analysis in common."
    return page.write_page(out / "compare.html", f"hookdepth: {len(runs)} runs compared", sections, {}, warning)


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


def _unequal(analysis: str, runs: Runs) -> list[page.Note]:
    """A maximum over more prompts is larger, whatever the models do."""
    metadata = [own[analysis].metadata for own in runs.values() if analysis in own]
    counts = sorted({(one.get("data") or {}).get("n_prompts") or 0 for one in metadata})
    largest = any((one.get("settings") or {}).get("over_prompts") == "max" for one in metadata)
    if len(counts) < 2 or not largest:
        return []
    text = f"These are the largest values over {' and '.join(map(str, counts))} prompts: more prompts, larger values. "
    return [page.Note(f"{text}Compare equal numbers, or means (--over-prompts mean).", warn=True)]


def _floors(analysis: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for label, summary in summaries.items():
        if facts := summary["analyses"].get(analysis):
            prompts = "" if facts["n_prompts"] is None else f" ({counted(facts['n_prompts'], 'prompt')})"
            told.append(f"{label}{prompts}: {page.floor_in_brief(facts).lower()}")
    return f"{'; '.join(told)}. Runs of different depths are drawn over relative depth: layer l at (l + 0.5) / L."


def _depths(summaries: Mapping[str, Mapping[str, Any]]) -> page.Section:
    names = {name: own for summary in summaries.values() for name, own in summary["effective_depth"].items()}
    rows = []
    for label, summary in summaries.items():
        model = summary["model"] or {}
        depths = [summary["effective_depth"].get(name, {"status": "not measured"}) for name in names]
        cells = [layer if ratio == "—" else f"{layer} ({ratio})" for layer, ratio in map(page.depth_cells, depths)]
        rows.append((label, str(model.get("id", "—")), number(model.get("n_layers")), *cells))
    head = ("Run", "Model", "Layers", *(own.get("label", name) for name, own in names.items()))
    tables = [Table(head, rows, below=f"Layer, and in brackets its ratio. {page.DEPTH_NOTE}")]
    found = [(a, part) for s in summaries.values() for a, by in s["depth_scores"].items() for part in by]
    columns = list(dict.fromkeys(found))
    if columns:
        scores = [
            (label, *(number(s["depth_scores"].get(a, {}).get(p, {}).get("effect")) for a, p in columns))
            for label, s in summaries.items()
        ]
        head = ("Run", *(f"{a}, {PART_NAMES.get(p, p)}" for a, p in columns))
        tables.append(Table(head, scores, "Depth score, by effect on layers"))
    return page.Section("Effective depth", tables=tables)


def _settings(runs: Runs) -> page.Section:
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
    if not rows:
        return page.Section("Differences in settings", notes=[page.Note("The runs have the same settings.")])
    return page.Section("Differences in settings", tables=[Table(("Setting", *flat), rows)])
