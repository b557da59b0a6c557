"""What a run says: a table as it goes, figures, and one JSON line.

print(heading("demo, float32", device)); print(table_of(row))
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import OURS
from benchmarks.peers import LISTED
from hookdepth import __version__

ROOT = Path(__file__).resolve().parents[1]
_WIDTHS = (34, 9, 8, 9, 9, 10)


def heading(label: str, device: torch.device) -> str:
    """What the rows below ran on."""
    where = "GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    columns = ("", "seconds", "ratio", "peak MiB", "differs", "from f32")
    return f"\n{label}, {where}\n" + "".join(_cell(c, w) for c, w in zip(columns, _WIDTHS, strict=True))


def table_of(row: dict[str, Any]) -> str:
    """A row: the workload, then a line for each contestant. Ratio: its time over ours."""
    lines = [_title(row)]
    for name, record in row["contestants"].items():
        if "seconds" not in record:
            lines.append(f"  {name:<{_WIDTHS[0] - 2}} {record['status']}")
            continue
        cells = (
            f"  {name}",
            f"{record['seconds']:.4g}",
            "" if name == OURS else f"{record['ratio']:.2f}x",
            _number(record["peak_mib"], ",.0f"),
            _number(record.get("difference"), ".1e"),
            _number(record["from_float32"], ".1e"),
        )
        note = record.get("note") or ""
        lines.append("".join(_cell(c, w) for c, w in zip(cells, _WIDTHS, strict=True)) + (f"  {note}" if note else ""))
    for name, total in row.get("sums", {}).items():
        lines.append(f"  {name:<{_WIDTHS[0] - 2}}{total:>{_WIDTHS[1]}.4g}{total / _ours(row):>7.2f}x  sum of its rows")
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    rate = f"{row['gflops']:,.0f} GFLOP/s" if row["bound"] == "compute" else f"{row['gbytes_per_s']:,.0f} GB/s"
    floor = f"floor {row['floor_s']:.3g} s (at {rate}), {row['of_floor']:.0%} of it reached"
    null = "" if row["null_effect"] is None else f"; noise floor {row['null_effect']:.2g}"
    runs = f"; median of {row['rounds']}" if row["rounds"] > 1 else "; one run"
    many = f"; {row['interventions_per_s']:,.0f} interventions/s" if row["interventions_per_s"] else ""
    ours = row["contestants"][OURS]
    first = f"; {ours['cold_seconds']:.3g} s at a new length" if "cold_seconds" in ours else ""
    held = "" if ours["peak_mib"] is None else f"; memory {ours['peak_mib'] / ours['room_mib']:.0%} of what it may take"
    return f"{row['workload']}: {floor}; {row['mfu']:.0%} of peak{many}{first}{held}{null}{runs}{_targets(row)}"


def _targets(row: dict[str, Any]) -> str:
    parts = []
    for name, wanted in row["targets"].items():
        if name == "floor":
            parts.append(f"floor ≥ {wanted:.0%} {_met(row['of_floor'] >= wanted)}")
        elif name == "seconds":
            parts.append(f"≤ {wanted:g} s {_met(_ours(row) <= wanted)}")
        else:
            ratio = row["contestants"].get(name, {}).get("ratio")
            met = "not measured" if ratio is None else _met(ratio >= wanted)
            parts.append(f"{name} ≥ {wanted:g}x {met}")
    return "; target " + ", ".join(parts) if parts else ""


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def _ours(row: dict[str, Any]) -> float:
    return float(row["contestants"][OURS]["seconds"])


def _cell(text: str, width: int) -> str:
    return f"{text:<{width}}" if width == _WIDTHS[0] else f"{text:>{width}}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def sweeps_table(sweeps: dict[str, Any]) -> str:
    """A line for each curve: its times and its exponent."""
    lines = []
    for axis, curves in sweeps.items():
        for name, curve in curves.items():
            points = "  ".join(f"{x}: {s:.3g} s" for x, s in zip(curve["x"], curve["seconds"], strict=True))
            lines.append(f"  {axis:<14}{name:<12} exponent {curve['exponent']:5.2f}   {points}")
    return "\n".join(lines)


def readme_table(summary: dict[str, Any]) -> str:
    """The rows in Markdown, as the README shows them: our time and share of the floor, then ratios to the peers.

    In each cell stand the dtypes, one after the other.

    print(readme_table(json.loads(Path("benchmarks/results/cpu.json").read_text())))
    """
    rows = [row for row in summary["rows"] if "contestants" in row]
    peers = [listed.name for listed in LISTED if any(listed.name in row["contestants"] for row in rows)]
    several = len({row["model"] for row in rows}) > 1
    by_name: dict[str, list[list[str]]] = {}
    for row in rows:
        name = f"{row['model']}: {row['workload']}" if several else row["workload"]
        cells = [f"{_ours(row):.3g} s", f"{row['of_floor']:.0%}"]
        by_name.setdefault(name, []).append([*cells, *(_ratio(row["contestants"].get(peer)) for peer in peers)])
    head = ["workload", OURS, "of its floor", *peers]
    lines = [head, ["---"] * len(head)]
    for name, found in by_name.items():
        lines.append([name, *(", ".join(filter(None, own)) for own in zip(*found, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if "ratio" in record:
        return f"{record['ratio']:.2f}×"
    return "failed" if record["status"].startswith("FAILED") else "not installed"


def tell(record: Mapping[str, Any], out: str | None) -> None:
    """Print what was measured, with where and when; and write it: tell({"seconds": 1.3}, "results/heads-15.json")."""
    text = json.dumps({**record, "made": environment(torch.device("cpu"))}, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, date, commit and versions."""
    packages = ("torch", "transformers", "nnsight", "transformer-lens")
    return {
        "hardware": hardware(device),
        "date": str(date.today()),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {"hookdepth": __version__, **{package: _version(package) for package in packages}},
    }


def hardware(device: torch.device) -> str:
    """What ran this."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit that was measured, with + where the tree differs from it."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Log:
    """Prints, and keeps what it printed; writes table and JSON after every row, so that a stopped run loses none.

    Log(folder, "cpu").say("a line")
    """

    def __init__(self, folder: Path | None, suite: str) -> None:
        self.folder, self.suite = folder, suite
        self.lines: list[str] = []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Print now, keep for the file."""
        print(text, flush=True)
        self.lines.append(text)

    def write(self, summary: dict[str, Any]) -> None:
        """Bring the files up to date."""
        if self.folder is None:
            return
        head = f"{summary['hardware']}; {summary['date']}; commit {summary['commit']}; python {summary['python']}; "
        head += ", ".join(f"{name} {version or 'not installed'}" for name, version in summary["versions"].items())
        (self.folder / f"{self.suite}.txt").write_text("\n".join([head, *self.lines]) + "\n", encoding="utf-8")
        (self.folder / f"{self.suite}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
