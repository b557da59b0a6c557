"""A folder of results → figures, `summary.json` and one self-contained `report.html`.

    write_report("out/demo")   # out/demo/report.html

The page needs nothing but itself: images are inside, there is no script, and nothing is fetched. The
same results give the same bytes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hookdepth.analyses.contract import load_folder
from hookdepth.report import figures as plots
from hookdepth.report.hover import Values, number, overlay, tables, values_of
from hookdepth.report.html import arranged, contents, details, facts, note, page, section, small, table
from hookdepth.report.summary import ordered, summarise
from hookdepth.report.tables import flatten, shorten
from hookdepth.report.texts import DEPTH_NAMES, PAPER, PART_NAMES, TEXTS, WORDS
from hookdepth.report.tokens import MOST_PROBES
from hookdepth.results import Result, read_log, write_atomic, write_json

DEPTH_NOTE = "Ratio: (layer + 1) / L. Definitions: arXiv 2512.14064."


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Figures (PNG and SVG), `summary.json` and `report.html` from every result in a folder; the page's path.

        write_report("out/demo")

    Raises:
        HookdepthError: no such folder, no result in it, a file that is not one, or it cannot be written to.
    """
    folder = Path(folder)
    results = ordered(load_folder(folder))
    summary = summarise(results, read_log(folder))
    write_json(folder / "summary.json", summary)
    headings = {name: TEXTS[name].heading if name in TEXTS else name for name in results}
    body = [_head(summary), contents({"Effective depth": "Effective depth", **headings}), _depths(summary)]
    for name, result in results.items():
        body.append(_analysis(name, result, summary["analyses"][name], folder))
    title = f"hookdepth: {(summary['model'] or {}).get('id', 'unnamed model')}"
    return write_atomic(folder / "report.html", page(title, body).encode(errors="replace"))


def _head(summary: Mapping[str, Any]) -> str:
    model, data, versions = ({**(summary[key] or {})} for key in ("model", "data", "versions"))
    lengths = data.get("lengths")
    quantised = model.get("quantization")
    pairs = {
        "Model": model.get("id"),
        "Revision": model.get("revision"),
        "Layers": model.get("n_layers"),
        "Width": model.get("d_model"),
        "Parameters": _millions(model.get("n_parameters")),
        "Data type": " ".join(str(item) for item in (model.get("dtype"), quantised) if item and item != "none"),
        "Attention": model.get("attn_implementation"),
        "Device": model.get("device"),
        "Data": data.get("name"),
        "Prompts": data.get("n_prompts"),
        "Tokens": sum(lengths) if lengths else None,
        "Seed": summary["seed"],
        "Settings": _common_settings(summary["analyses"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    warning = [note(f"These results differ in: {', '.join(summary['mixed'])}.", warn=True)] if summary["mixed"] else []
    return facts(pairs) + "".join(warning)


def _common_settings(analyses: Mapping[str, Mapping[str, Any]]) -> str:
    """All settings that fit in a few words, each value once: "keep_front = 1; parts = layer"."""
    found: dict[str, list[str]] = {}
    for own in analyses.values():
        for key, value in flatten(own["settings"] or {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if value is not None and len(text) <= 30 and text not in found.setdefault(key, []):
                found[key].append(text)
    return "; ".join(f"{key} = {' | '.join(values)}" for key, values in found.items())


def _depths(summary: Mapping[str, Any]) -> str:
    rows = [
        (DEPTH_NAMES[name], *depth_cells(depth), depth["definition"])
        for name, depth in summary["effective_depth"].items()
    ]
    parts = [table(("Definition", "Layer", "Ratio", "What it says"), rows)]
    parts.append(small(DEPTH_NOTE))
    scores = [
        (name, PART_NAMES[part], number(by.get("effect")), number(by.get("output")))
        for name, parts_of in summary["depth_scores"].items()
        for part, by in parts_of.items()
    ]
    if scores:
        parts.append("<h3>Depth score</h3>")
        parts.append(table(("Analysis", "Part", "By effect on layers", "By effect on output"), scores))
        parts.append(
            small(
                "Mean layer weighted by effect, from 0 to L − 1: e_s = Σ_i effect[s, i] / max(L − 1 − s, 1), "
                f"score = Σ s·e_s / Σ e_s (arXiv {PAPER}, Fig. 7)."
            )
        )
    return section("Effective depth", parts)


def depth_cells(depth: Mapping[str, Any]) -> tuple[str, str]:
    """An effective depth of the summary as two cells: its layer, or why there is none, and its share of the layers.

    depth_cells({"status": "found", "index": 17, "ratio": 17 / 30})   # ('17', '0.567')
    """
    if depth["status"] != "found":
        return str(depth["status"]), "—"
    return str(depth["index"]), number(depth["ratio"])


def _analysis(name: str, result: Result, facts_of: Mapping[str, Any], folder: Path) -> str:
    text = TEXTS.get(name)
    parts = [_floor(facts_of)]
    probes = result.metadata.get("probes") or []
    settings = "; ".join([*_settings(facts_of["settings"] or {}), _cost(facts_of)])
    groups = []
    for kind, drawn in by_kind(name, plots.figures_for(result)).items():
        shown = [
            figure_html(key, caption_of(name, key, probes), figure, folder, values_of(result, key))
            for key, figure in drawn.items()
        ]
        groups.append((reading_of(name, kind), shown, small(f"{floor_in_brief(facts_of)}; {settings}.")))
    parts.append(arranged(groups))
    if not text:
        parts.append(note(f"This version has no figures for it; its numbers are in {name}.safetensors."))
    if len(probes) > MOST_PROBES:
        parts.append(note(f"The first {MOST_PROBES} of {len(probes)} probes are shown; all are in {name}.safetensors."))
    return section(text.heading if text else name, parts, name)


def by_kind(analysis: str, drawn: Mapping[str, Figure]) -> dict[str, dict[str, Figure]]:
    """Figures that are read the same way, in one group: of all parts, or of all probes."""
    known = TEXTS[analysis].readings if analysis in TEXTS else {}
    groups: dict[str, dict[str, Figure]] = {kind: {} for kind in known}
    for name, figure in drawn.items():
        kind = name.rpartition("-")[2]
        groups.setdefault(kind if kind in known else "", {})[name] = figure
    return {kind: group for kind, group in groups.items() if group}


def reading_of(analysis: str, kind: str) -> str:
    """How to read one kind of an analysis' figures, with where the paper has it: HTML."""
    text = TEXTS[analysis]
    return f"<p>{escape(text.readings.get(kind, ''))} <cite>arXiv {PAPER}, {text.figure}.</cite></p>"


def _settings(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_words(value)}" for key, value in flatten(settings) if value is not None]


def _words(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return shorten(", ".join(value), 80)
    return shorten(value, 80)


def _cost(facts_of: Mapping[str, Any]) -> str:
    words = [("n_prompts", "prompt", "prompts"), ("n_tokens", "token", "tokens"), ("passes", "pass", "passes")]
    counts = [f"{number(facts_of[key])} {one if facts_of[key] == 1 else many}" for key, one, many in words]
    return ", ".join([*counts, f"{number(facts_of['wall_time_s'])} s"])


def caption_of(analysis: str, figure: str, probes: Sequence[Mapping[str, Any]]) -> str:
    """What a figure shows, from its name: the part, the probe, the kind of value."""
    words = figure.removeprefix(f"{analysis}-").split("-")
    shown = [WORDS.get(word, word) for word in words if not word.isdigit()]
    numbers = [int(word) for word in words if word.isdigit()]
    if numbers and numbers[0] < len(probes):
        probe = probes[numbers[0]]
        prompt, answer = (shorten(str(probe.get(key, "")), 120) for key in ("prompt", "answer"))
        shown.append(f"“{prompt}” → “{answer}”")
    caption = ", ".join(shown)
    return caption[:1].upper() + caption[1:]


def floor_in_brief(facts_of: Mapping[str, Any]) -> str:
    """The noise floor of an analysis in a few words, from its part of the summary.

    floor_in_brief({"null_effect": 0.00012, "largest_effect": 0.9})   # 'Noise floor 0.00012'
    """
    floor = facts_of["null_effect"]
    if floor is None:
        return "No noise floor" + (": nothing is intervened on" if facts_of["largest_effect"] is None else " measured")
    return f"Noise floor {floor:.2g}"


def _floor(facts_of: Mapping[str, Any]) -> str:
    """The noise floor in a sentence, next to what it is the floor of; a warning from 1 % of the largest effect."""
    floor, largest, where = (facts_of[key] for key in ("null_effect", "largest_effect", "null_where"))
    if floor is None:
        return "" if largest is None else note("Noise floor: not measured.", warn=True)
    if floor == 0:
        return note("Noise floor 0: every difference shown is an effect.")
    place = f" ({where})" if where else ""
    share = f", {100 * floor / largest:.2g} % of the largest effect, {number(largest)}" if largest else ""
    text = f"Noise floor {floor:.2g}: a branch that changes nothing differs by up to that much{place}{share}."
    return note(text, warn=not largest or floor > 0.01 * largest)


def figure_html(name: str, caption: str, figure: Figure, folder: Path, values: Sequence[Values]) -> str:
    """Write a figure's files and return it for the page, with its values on hover and in a table."""
    images = {kind: plots.render(figure, kind) for kind in ("png", "svg")}
    for kind, content in images.items():
        write_atomic(folder / f"{name}.{kind}", content)
    data = base64.b64encode(images["png"]).decode()
    width = f"{figure.get_figwidth():.2f}"
    return (
        f'<figure><div class="scroll"><div class="plot" style="--inches:{width}">'
        f'<img alt="{escape(f"{name}: {caption}")}" src="data:image/png;base64,{data}">{overlay(figure, values)}'
        f"</div></div><figcaption><b>{escape(caption)}.</b> <code>{escape(name)}.png, .svg</code></figcaption>"
        f"{details('Values', tables(values))}</figure>"
    )


def _millions(count: Any) -> str | None:
    return f"{count / 1e6:,.4g} M" if isinstance(count, int) else None
