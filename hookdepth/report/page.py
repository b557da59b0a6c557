"""A folder of results → figures, `summary.json` and one self-contained `report.html`.

    write_report("out", results, lookup)   # out/report.html

The page is `page.html.jinja`, which is given what is defined here. It needs nothing but itself: images are inside,
there is no script, and nothing is fetched. The same results give the same bytes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hookdepth.report.drawing.style import render
from hookdepth.report.figures import pictures_of
from hookdepth.report.hover import Overlay, overlays
from hookdepth.report.kind import Declaration, Kind, Lookup, Picture, floor_of
from hookdepth.report.patterns import MOST_PROBES, PART_NAMES
from hookdepth.report.summary import ordered, summarise
from hookdepth.report.tables import Table, counted, flatten, number, shorten
from hookdepth.results import Result, write_atomic, write_json

DEPTH_NOTE = "Ratio: (layer + 1) / L. Definitions: arXiv 2512.14064."
SCORE_NOTE = (
    "Mean layer weighted by effect, from 0 to L − 1: e_s = Σ_i effect[s, i] / max(L − 1 − s, 1), "
    "score = Σ s·e_s / Σ e_s (arXiv 2505.13898, Fig. 7)."
)
_LONG = ("Settings", "Versions")


@dataclass(frozen=True)
class Shown:
    """A figure on a page: its picture as PNG, what lies over it, and its numbers: shown(picture, "kl", folder)."""

    name: str
    caption: str
    said: str
    png: str
    inches: str
    overlays: Sequence[Overlay]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Group:
    """Figures that are read alike: Group("How to read them.", "arXiv 2505.13898, Fig. 4", [], "2 prompts")."""

    reading: str
    paper: str
    figures: Sequence[Shown]
    below: str


@dataclass(frozen=True)
class Note:
    """A line that stands out; `warn` for what a reader must not miss: Note("Noise floor: not measured.", warn=True)."""

    text: str
    warn: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it: Section("Half of an MLP", "half-mlp", question="who needs it?")."""

    heading: str
    name: str = ""
    question: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[Note] = ()
    groups: Sequence[Group] = ()
    last: Sequence[Note] = ()

    @property
    def anchor(self) -> str:
        """Where links of the page go: Section("Effective depth").anchor   # 'Effective depth'"""
        return self.name or self.heading

    @property
    def beside(self) -> bool:
        """Whether groups, being of a single figure each, lie beside each other: Section("Logit lens").beside"""
        return all(len(group.figures) == 1 for group in self.groups)


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    facts: Mapping[str, Any],
    warning: str = "",
    prompts: Sequence[str] = (),
) -> Path:
    """A page from the template, written atomically: write_page(Path("out/report.html"), "Title", [section], {}).

    Args:
        facts: name → value, "—" for what is unknown; long values have a row of their own.
        warning: over everything, or nothing.
        prompts: texts, folded up.
    """
    cells = [(name, "—" if value is None or value == "" else str(value)) for name, value in facts.items()]
    text = rendered(
        "page.html.jinja",
        title=title,
        facts=[(name, value, len(value) > 40 or name in _LONG) for name, value in cells],
        warning=warning,
        prompts=prompts,
        sections=sections,
    )
    return write_atomic(path, text.encode(errors="replace"))


def rendered(template: str, **values: Any) -> str:
    """A page from one of the templates here, every text escaped: rendered("page.html.jinja", title="Title", …)"""
    folder = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.get_template(template).render(**values)


def write_report(
    folder: str | os.PathLike[str],
    results: Mapping[str, Result],
    lookup: Lookup,
    known: Iterable[Declaration] = (),
    log: Mapping[str, Any] | None = None,
) -> Path:
    """Figures (PNG and SVG), `summary.json` and `report.html` of results, into a folder; the page's path.

    Args:
        lookup: result → the declaration of its analysis, None where nobody knows it.
        known: analyses whose effective depths are said to be not measured, where they were not.
        log: analysis → times and counts of passes.

    Raises:
        HookdepthError: the folder cannot be written to.
    """
    folder = Path(folder)
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
    """All settings that fit in a few words, each value once: "keep_front = 1; parts = layer"."""
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


def depth_cells(depth: Mapping[str, Any]) -> tuple[str, str]:
    """An effective depth of the summary as two cells: its layer, or why there is none, and its share of the layers.

    depth_cells({"status": "found", "index": 17, "ratio": 17 / 30})   # ('17', '0.567')
    """
    if depth["status"] != "found":
        return str(depth["status"]), "—"
    return str(depth["index"]), number(depth["ratio"])


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


def groups_of(
    drawn: Sequence[tuple[Kind, Sequence[Picture]]],
    declaration: Declaration,
    folder: Path,
    below: str,
    prefix: str = "",
) -> list[Group]:
    """Figures by how they are read, drawn and written to a folder: groups_of(drawn, declaration, folder, "below")."""
    found: dict[tuple[str, str], list[Shown]] = {}
    for kind, pictures in drawn:
        paper = kind.paper or declaration.paper
        own = found.setdefault((kind.reading, f"arXiv {paper}." if paper else ""), [])
        own += [shown(picture, f"{prefix}{picture.name}", folder) for picture in pictures]
    return [Group(reading, paper, figures, below) for (reading, paper), figures in found.items()]


def shown(picture: Picture, name: str, folder: Path) -> Shown:
    """Draw a figure, write its files and return it for a page: shown(picture, "half-mlp-output", Path("out"))."""
    figure = picture.draw()
    images = {kind: render(figure, kind) for kind in ("png", "svg")}
    for kind, content in images.items():
        write_atomic(folder / f"{name}.{kind}", content)
    return Shown(
        name,
        picture.caption,
        picture.said,
        base64.b64encode(images["png"]).decode(),
        f"{figure.get_figwidth():.2f}",
        overlays(figure, picture.values),
        [values.table for values in picture.values],
    )


def _below(facts: Mapping[str, Any]) -> str:
    """The noise floor, the settings, and what it took, as far as it is known: prompts, tokens, passes, seconds."""
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


def floor_in_brief(facts: Mapping[str, Any]) -> str:
    """The noise floor of an analysis in a few words, from its part of the summary.

    floor_in_brief({"null_effect": 0.00012, "largest_effect": 0.9})   # 'Noise floor 0.00012'
    """
    if facts["null_effect"] is None and facts["largest_effect"] is None:
        return "No noise floor: nothing is intervened on"
    return floor_of(facts)


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
