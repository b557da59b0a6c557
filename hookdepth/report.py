"""A folder of results → figures, `summary.json` and one self-contained `report.html`.

    write_report("out/demo")                                # out/demo/report.html
    write_comparison(["out/demo", "out/other"], "compare")  # compare/compare.html

The pages need nothing but themselves: images are inside, there is no script, and nothing is fetched. The
same results give the same bytes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from hookdepth import plots
from hookdepth.errors import HookdepthError
from hookdepth.plots_tokens import MOST_PROBES
from hookdepth.report_html import details, facts, note, page, section, small, table
from hookdepth.report_texts import DEPTH_NAMES, PAPER, PART_NAMES, TEXTS, WORDS
from hookdepth.results import Result, load_folder, write_atomic, write_json
from hookdepth.summary import ordered, summarise
from hookdepth.tables import flatten, shorten

DEPTH_NOTE = "Ratio: (layer + 1) / L. Definitions: arXiv 2512.14064."


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Figures (PNG and SVG), `summary.json` and `report.html` from every result in a folder; the page's path.

        write_report("out/demo")

    Raises:
        HookdepthError: no such folder, no result in it, a file that is not one, or it cannot be written to.
    """
    folder = Path(folder)
    results = ordered(load_folder(folder))
    summary = summarise(results)
    write_json(folder / "summary.json", summary)
    body = [_head(summary), _depths(summary)]
    for name, result in results.items():
        body.append(_analysis(name, result, summary["analyses"][name], folder))
    title = f"hookdepth: {(summary['model'] or {}).get('id', 'unnamed model')}"
    return write_atomic(folder / "report.html", page(title, body).encode())


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
    body = [_compare_depths(summaries), _compare_settings(runs)]
    shown = [
        _figure(f"compare-{name}", _compare_caption(name, runs), figure, out)
        for name, figure in plots.compare_figures(runs).items()
    ]
    nothing = note("These runs have no analysis in common.")
    lines = "Curves of runs of different depths are drawn over relative depth: layer l at (l + 0.5) / L."
    body.append(section("Figures", [small(lines), *(shown or [nothing])]))
    title = f"hookdepth: {len(runs)} runs compared"
    return write_atomic(out / "compare.html", page(title, body).encode())


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
        (DEPTH_NAMES[name], *_depth_cells(depth), depth["definition"])
        for name, depth in summary["effective_depth"].items()
    ]
    parts = [table(("Definition", "Layer", "Ratio", "What it says"), rows)]
    parts.append(small(DEPTH_NOTE))
    scores = [
        (name, PART_NAMES[part], _number(by.get("effect")), _number(by.get("output")))
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


def _depth_cells(depth: Mapping[str, Any]) -> tuple[str, str]:
    if depth["status"] != "found":
        return str(depth["status"]), "—"
    return str(depth["index"]), _number(depth["ratio"])


def _analysis(name: str, result: Result, facts_of: Mapping[str, Any], folder: Path) -> str:
    text = TEXTS.get(name)
    parts = [f"<p>{escape(text.reading)} <cite>arXiv {PAPER}, {text.figure}.</cite></p>"] if text else []
    parts.append(_floor(facts_of))
    probes = result.metadata.get("probes") or []
    for figure_name, figure in plots.figures_for(result).items():
        parts.append(_figure(figure_name, _caption(name, figure_name, probes), figure, folder))
    if len(probes) > MOST_PROBES:
        parts.append(note(f"The first {MOST_PROBES} of {len(probes)} probes are shown; all are in {name}.safetensors."))
    parts.append(small("; ".join([*_settings(facts_of["settings"] or {}), _cost(facts_of)])))
    parts.append(details("Numbers", _numbers(result, probes)))
    return section(text.heading if text else name, parts, name)


def _settings(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {shorten(value, 80)}" for key, value in flatten(settings) if value is not None]


def _cost(facts_of: Mapping[str, Any]) -> str:
    words = [("n_prompts", "prompt", "prompts"), ("n_tokens", "token", "tokens"), ("launches", "launch", "launches")]
    counts = [f"{_number(facts_of[key])} {one if facts_of[key] == 1 else many}" for key, one, many in words]
    return ", ".join([*counts, f"{_number(facts_of['wall_time_s'])} s"])


def _caption(analysis: str, figure: str, probes: Sequence[Mapping[str, Any]]) -> str:
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


def _floor(facts_of: Mapping[str, Any]) -> str:
    """The noise floor in a sentence, next to what it is the floor of; a warning from 1 % of the largest effect."""
    floor, largest, where = (facts_of[key] for key in ("null_effect", "largest_effect", "null_where"))
    if floor is None:
        return "" if largest is None else note("Noise floor: not measured.", warn=True)
    if floor == 0:
        return note("Noise floor 0: every difference shown is an effect.")
    place = f" ({where})" if where else ""
    share = f", {100 * floor / largest:.2g} % of the largest effect, {_number(largest)}" if largest else ""
    text = f"Noise floor {floor:.2g}: a branch that changes nothing differs by up to that much{place}{share}."
    return note(text, warn=not largest or floor > 0.01 * largest)


def _numbers(result: Result, probes: Sequence[Mapping[str, Any]]) -> str:
    """Everything that the figures show, as tables: one for all values a layer, one for each map."""
    kept = {name: value for name, value in sorted(result.tensors.items()) if _shown(name)}
    scalars = {name: value.item() for name, value in kept.items() if value.ndim == 0}
    curves = {name: value for name, value in kept.items() if value.ndim == 1}
    maps = {name: value for name, value in kept.items() if value.ndim == 2}
    parts = [f"<p>{escape(name)} = {_number(value)}</p>" for name, value in scalars.items()]
    if curves:
        rows = max(len(value) for value in curves.values())
        body = [(str(row), *(_at(value, row) for value in curves.values())) for row in range(rows)]
        parts.append(table(("layer", *curves), body))
    for name, value in maps.items():
        parts.append(f"<h4>{escape(name)}</h4>")
        parts.append(table(("", *_columns(name, value, probes)), _rows(value)))
    return "".join(parts)


def _shown(name: str) -> bool:
    """Whether a tensor's numbers are on the page; the others are in the file."""
    number = name.rsplit(".", 1)[-1]
    beyond = number.isdigit() and int(number) >= MOST_PROBES
    return not beyond and name != "baseline" and "per_prompt" not in name


def _columns(name: str, values: Tensor, probes: Sequence[Mapping[str, Any]]) -> list[str]:
    number = name.rsplit(".", 1)[-1]
    tokens = probes[int(number)].get("tokens") if number.isdigit() and int(number) < len(probes) else None
    plain = [str(column) for column in range(values.shape[1])]
    return [str(token) for token in tokens] if tokens and len(tokens) == len(plain) else plain


def _rows(values: Tensor) -> Iterable[tuple[str, ...]]:
    return ((str(index), *(f"{value:.3g}" for value in row)) for index, row in enumerate(values.tolist()))


def _at(values: Tensor, row: int) -> str:
    return f"{values[row].item():.4g}" if row < len(values) else ""


def _figure(name: str, caption: str, figure: Figure, folder: Path) -> str:
    """Write a figure's files and return it for the page, its width on paper kept for the style sheet."""
    images = {kind: plots.render(figure, kind) for kind in ("png", "svg")}
    for kind, content in images.items():
        write_atomic(folder / f"{name}.{kind}", content)
    data = base64.b64encode(images["png"]).decode()
    width = f"{figure.get_figwidth():.2f}"
    return (
        f'<figure><div class="scroll"><img style="--inches:{width}" alt="{escape(f"{name}: {caption}")}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(caption)} '
        f"<code>{escape(name)}.png, .svg</code></figcaption></figure>"
    )


def _compare_caption(name: str, runs: Mapping[str, Mapping[str, Result]]) -> str:
    analysis = next(known for known in TEXTS if name.startswith(known))
    probes = next((own[analysis].metadata.get("probes") or [] for own in runs.values() if analysis in own), [])
    return f"{TEXTS[analysis].heading}. {_caption(analysis, name, probes)}"


def _compare_depths(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("Run", "Model", "Layers", *DEPTH_NAMES.values())
    rows = []
    for label, summary in summaries.items():
        model = summary["model"] or {}
        depths = [_depth_cells(summary["effective_depth"][name]) for name in DEPTH_NAMES]
        cells = [layer if ratio == "—" else f"{layer} ({ratio})" for layer, ratio in depths]
        rows.append((label, str(model.get("id", "—")), _number(model.get("n_layers")), *cells))
    parts = [table(head, rows), small(f"Layer, and in brackets its ratio. {DEPTH_NOTE}")]
    found = [(a, part) for s in summaries.values() for a, by in s["depth_scores"].items() for part in by]
    columns = list(dict.fromkeys(found))
    if columns:
        scores = [
            (label, *(_number(s["depth_scores"].get(a, {}).get(p, {}).get("effect")) for a, p in columns))
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
                        own.setdefault(path, shorten(value, 60))
                    elif name in shared:
                        own[f"{name}: {path.removeprefix('settings.')}"] = shorten(value, 60)
    names = dict.fromkeys(name for own in flat.values() for name in own)
    rows = [(name, *(own.get(name, "—") for own in flat.values())) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    shown = table(("Setting", *flat), rows) if rows else note("The runs have the same settings.")
    return section("Differences in settings", [shown])


def _number(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _millions(count: Any) -> str | None:
    return f"{count / 1e6:,.4g} M" if isinstance(count, int) else None
