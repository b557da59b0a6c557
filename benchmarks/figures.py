"""The figures of a run: each contestant's time over ours, row by row, and how time grows.

draw_ratios(summary, Path("cpu.png")); draw_sweeps(summary, Path("cpu-scaling.png"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.contest import OURS

# Okabe and Ito's colours, which all kinds of colour vision tell apart.
_COLOURS = {
    OURS: "#000000",
    "hook loop": "#0072B2",
    "hook loop, frozen, blocks of 32": "#56B4E9",
    "loop batched by layer": "#F0E442",
    "whole batch": "#009E73",
    "nnsight, a trace each": "#D55E00",
    "nnsight, one trace": "#E69F00",
    "TransformerLens": "#CC79A7",
}
_AXIS_LABELS = {
    "layers": "layers L",
    "tokens": "tokens T",
    "interventions": "interventions (erasures)",
    "cuts": "cuts",
    "prompts": "prompts",
    "rows": "most rows of a pass",
}


def draw_ratios(summary: dict[str, Any], path: Path) -> None:
    """A panel for each model and dtype; the floor is the black mark left of 1."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in summary["rows"]:
        if OURS in row.get("contestants", {}):
            groups.setdefault(f"{row['model']}, {row['dtype']}", []).append(row)
    if not groups:
        return
    tallest = max(len(rows) for rows in groups.values())
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(6.4 * columns, lines * (1.6 + 0.62 * tallest)), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    used: dict[str, Any] = {}
    for panel, (label, rows) in zip(panels, groups.items(), strict=False):
        _panel(panel, label, rows, used)
    for panel in list(panels):
        panel.set_visible(False)
    used = {name: used[name] for name in (*_COLOURS, "floor") if name in used}
    figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Time of one run over hookdepth's\n{summary['hardware']}, {summary['date']}", fontsize=11)
    figure.savefig(path, dpi=120)


def _panel(panel: Any, label: str, rows: list[dict[str, Any]], used: dict[str, Any]) -> None:
    shown = [record["ratio"] for row in rows for record in row["contestants"].values() if "ratio" in record]
    least = min(0.3, 0.7 * min([*shown, *(row["of_floor"] for row in rows)]))
    for place, row in enumerate(rows):
        timed = {n: r for n, r in row["contestants"].items() if "ratio" in r}
        height = 0.8 / len(timed)
        for number, (name, record) in enumerate(timed.items()):
            y = place - 0.4 + (number + 0.5) * height
            bar = panel.barh(y, record["ratio"] - least, height, left=least, color=_COLOURS[name])
            used.setdefault(name, bar)
            panel.text(record["ratio"] * 1.05, y, f"{record['ratio']:.3g}×", va="center", fontsize=6)
        mark = panel.plot([row["of_floor"]] * 2, [place - 0.45, place + 0.45], color="#888888", lw=1.5, ls="--")
        used.setdefault("floor", mark[0])
    names = [
        f"{row['workload'].replace(', ', chr(10), 1)}\n{row['contestants'][OURS]['seconds']:.3g} s" for row in rows
    ]
    panel.set_yticks(range(len(rows)), names, fontsize=7)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlim(least, max(shown) * 1.8)
    panel.axvline(1.0, color="black", lw=0.6)
    panel.set_title(label, fontsize=9)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def draw_sweeps(summary: dict[str, Any], path: Path) -> None:
    """A panel for each axis, both scales logarithmic, exponents in the legend."""
    sweeps = summary["sweeps"]["axes"]
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    for panel, (axis, curves) in zip(figure.subplots(2, 3).flat, sweeps.items(), strict=False):
        for name, curve in curves.items():
            label = f"{name}: exponent {curve['exponent']:.2f}"
            panel.plot(curve["x"], curve["seconds"], marker="o", ms=4, color=_COLOURS[name], label=label)
        panel.set(xscale="log", yscale="log", xlabel=_AXIS_LABELS[axis], ylabel="seconds")
        panel.set_xticks(next(iter(curves.values()))["x"])
        panel.set_xticklabels([str(x) for x in next(iter(curves.values()))["x"]])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.legend(fontsize=7, frameon=False)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    described = summary["sweeps"]
    figure.suptitle(f"{described['shape']} shape, {described['dtype']}: {summary['hardware']}, {summary['date']}")
    figure.savefig(path, dpi=120)
