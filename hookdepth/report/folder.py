"""A folder of results → figures, `summary.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hookdepth.report.figures import pictures_of
from hookdepth.report.kind import Declaration, Lookup
from hookdepth.report.page import DEPTH_NOTE, Note, Section, depth_cells, floor_in_brief, groups_of, write_page
from hookdepth.report.patterns import MOST_PROBES, PART_NAMES
from hookdepth.report.summary import ordered, summarise
from hookdepth.report.tables import Table, counted, flatten, number, shorten
from hookdepth.results import Result, write_json

SCORE_NOTE = (
    "Mean layer weighted by effect, from 0 to L − 1: e_s = Σ_i effect[s, i] / max(L − 1 − s, 1), "
    "score = Σ s·e_s / Σ e_s (arXiv 2505.13898, Fig. 7)."
)


def write_report(
    folder: Path,
    results: Mapping[str, Result],
    lookup: Lookup,
    known: Iterable[Declaration] = (),
    log: Mapping[str, Any] | None = None,
) -> Path:
    """Figures (PNG and SVG), `summary.json` and `report.html` of results, into a folder; the page's path.

        write_report(Path("out"), results, lookup)   # out/report.html

    Args:
        lookup: result → the declaration of its analysis, None where nobody knows it.
        known: analyses whose effective depths are said to be not measured, where they were not.
        log: analysis → times and counts of passes.
    """
    results = ordered(results, lookup)
    summary = summarise(results, lookup, known, log)
    write_json(folder / "summary.json", summary)
    sections = [_depths(summary)]
    for name, result in results.items():
        sections.append(_section(result, lookup(result), summary["analyses"][name], folder))
    title = f"hookdepth: {(summary['model'] or {}).get('id', 'unnamed model')}"
    data = summary["data"] or {}
    warning = f"These results differ in: {', '.join(summary['mixed'])}." if summary["mixed"] else ""
    return write_page(folder / "report.html", title, sections, _head(summary), warning, data.get("texts") or ())


def _head(summary: Mapping[str, Any]) -> dict[str, Any]:
    model, data, versions = ({**(summary[key] or {})} for key in ("model", "data", "versions"))
    lengths = data.get("lengths")
    dtypes = (model.get("dtype"), model.get("quantization"))
    count = model.get("n_parameters")
    return {
        "Model": model.get("id"),
        "Revision": model.get("revision"),
        "Layers": model.get("n_layers"),
        "Width": model.get("d_model"),
        "Sublayers": "parallel: the MLP does not see the attention" if model.get("parallel") else None,
        "Parameters": f"{count / 1e6:,.4g} M" if isinstance(count, int) else None,
        "Data type": " ".join(str(item) for item in dtypes if item and item != "none"),
        "Attention": model.get("attn_implementation"),
        "Device": model.get("device"),
        "Data": data.get("name"),
        "Prompts": data.get("n_prompts"),
        "Tokens": sum(lengths) if lengths else None,
        "Seed": summary["seed"],
        "Settings": _common_settings(summary["analyses"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _common_settings(analyses: Mapping[str, Mapping[str, Any]]) -> str:
    found: dict[str, list[str]] = {}
    for own in analyses.values():
        for key, value in flatten(own["settings"] or {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if value is not None and len(text) <= 30 and text not in found.setdefault(key, []):
                found[key].append(text)
    return "; ".join(f"{key} = {' | '.join(values)}" for key, values in found.items())


def _depths(summary: Mapping[str, Any]) -> Section:
    depths = summary["effective_depth"]
    rows = [
        (own.get("label", name), *depth_cells(own), _otherwise(own), own["definition"]) for name, own in depths.items()
    ]
    head: tuple[str, ...] = ("Definition", "Layer", "Ratio", "Threshold ∓ 20 %", "What it says")
    tables = [Table(head, rows, below=DEPTH_NOTE)] if rows else []
    scores = [
        (name, PART_NAMES.get(part, part), number(by.get("effect")), number(by.get("output")))
        for name, parts_of in summary["depth_scores"].items()
        for part, by in parts_of.items()
    ]
    if scores:
        head = ("Analysis", "Part", "By effect on layers", "By effect on output")
        tables.append(Table(head, scores, "Depth score", SCORE_NOTE))
    notes = [] if rows else [Note("Nothing that was measured says an effective depth.")]
    return Section("Effective depth", tables=tables, notes=notes)


def _otherwise(depth: Mapping[str, Any]) -> str:
    """The layers at other thresholds, so that nobody takes one that hangs on a threshold for a fact."""
    found = (depth.get("otherwise") or {}).values()
    return " … ".join("none" if index is None else str(index) for index in found) or "—"


def _section(result: Result, declaration: Declaration | None, facts: Mapping[str, Any], folder: Path) -> Section:
    name, file, notes = result.analysis, facts["file"], _floor(facts)
    probes = result.metadata.get("probes") or []
    shortened = f"The first {MOST_PROBES} of {len(probes)} probes are shown; all are in {file}."
    last = [Note(shortened)] if len(probes) > MOST_PROBES else []
    if declaration is None:
        unknown = Note(f"This version has no figures for it; its numbers are in {file}.")
        return Section(name, name, notes=notes, last=[unknown, *last])
    drawn = pictures_of(result, declaration)
    if not drawn:
        last.insert(0, Note(f"None of its tensors is one that its figures show; its numbers are in {file}."))
    numbers = [(key, shorten(value)) for key, value in flatten(facts.get("numbers", {}))]
    tables = [Table(("Number", "Value"), numbers)] if numbers else []
    notes += [Note(text) for text in declaration.notes(result)]
    groups = groups_of(drawn, declaration, folder, _below(facts))
    return Section(declaration.heading, name, declaration.question, tables, notes, groups, last)


def _below(facts: Mapping[str, Any]) -> str:
    said = []
    for key, value in flatten(facts["settings"] or {}):
        if value is not None:
            words = isinstance(value, list) and all(isinstance(item, str) for item in value)
            said.append(f"{key} = {shorten(', '.join(value) if words else value, 80)}")
    things = (("n_prompts", "prompt", "prompts"), ("n_tokens", "token", "tokens"), ("passes", "pass", "passes"))
    cost = [counted(facts[key], one, many) for key, one, many in things if facts[key] is not None]
    if facts["wall_time_s"] is not None:
        cost.append(f"{number(facts['wall_time_s'])} s")
    return f"{floor_in_brief(facts)}; {'; '.join([*said, *([', '.join(cost)] if cost else [])])}."


def _floor(facts: Mapping[str, Any]) -> list[Note]:
    """The noise floor in a sentence, next to what it is the floor of; a warning from 1 % of the largest effect."""
    floor, largest, where = (facts[key] for key in ("null_effect", "largest_effect", "null_where"))
    if floor is None:
        return [] if largest is None else [Note("Noise floor: not measured.", warn=True)]
    if floor == 0:
        return [Note("Noise floor 0: every difference shown is an effect.")]
    place = f" ({where})" if where else ""
    share = f", {100 * floor / largest:.2g} % of the largest effect, {number(largest)}" if largest else ""
    text = f"Noise floor {floor:.2g}: a branch that changes nothing differs by up to that much{place}{share}."
    return [Note(text, warn=not largest or floor > 0.01 * largest)]
