"""Benchmarks of hookdepth against its peers, in one run, with the floor beside each figure.

    python benchmarks/run.py --suite cpu                    # demo model, float32 and bfloat16: < 20 minutes on 2 cores
    python benchmarks/run.py --suite gpu                    # random weights in Llama's shapes: < 8 minutes on one GPU
    python benchmarks/run.py --suite gpu --device cpu --models tiny --out out/benchmarks     # the same code, anywhere
    python benchmarks/run.py --suite cpu --only skip-current,sweeps --dtypes float32

Contestants are checked against each other before they are timed, and take turns. The peers nnsight and
TransformerLens come with `pip install 'hookdepth[bench]'`. A whole suite writes SUITE.txt, .json and figures to
benchmarks/results/; any other selection writes where --out says, or nothing. The last line is JSON. Exit status 1:
some row, or some peer, failed; all others are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import figures
from benchmarks.contest import Effort, contest, reference_of
from benchmarks.entries import Tensors, Workload
from benchmarks.limits import Meter
from benchmarks.measure import free
from benchmarks.models import NAMES, Subject, in_float32, make, shorter, warm_up
from benchmarks.output import Log, environment, heading, sweeps_table, table_of
from benchmarks.peers import Peers
from benchmarks.sweeps import run_sweeps
from benchmarks.workloads import WORKLOADS, six_experiments

MODELS = {"cpu": "demo", "gpu": "llama-3.1-8b,llama-3.2-1b"}
DTYPES = {"cpu": "float32,bfloat16", "gpu": "float32,bfloat16"}
SWEPT = {"cpu": "small", "gpu": "llama-3.2-1b"}
ROW_NAMES = tuple(make.__name__.replace("_", "-") for make in (*WORKLOADS, six_experiments))


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; the exit status."""
    options = _parse(arguments)
    device = torch.device(options.device)
    chosen = (options.only, options.models, options.dtypes, options.given_device)
    folder = options.out or (None if any(chosen) else Path(__file__).resolve().parent / "results")
    log = Log(folder, options.suite)
    summary: dict[str, Any] = {"suite": options.suite, **environment(device), "rows": []}
    begin = time.perf_counter()

    def effort() -> Effort:
        late = time.perf_counter() - begin > 60 * options.minutes
        if late:
            return Effort(1, 0.0, 0.0)
        least = 1 if device.type == "cuda" else min(2, options.rounds)
        return Effort(options.rounds, options.row_seconds, options.peer_seconds, least)

    for name in (options.models or MODELS[options.suite]).split(",") if _workloads(options) else ():
        rows = _rows_of(name, options, device, effort, log)
        for row in rows:
            summary["rows"].append(row)
            log.write(summary)
        free(device)
    if _wanted("sweeps", options):
        summary["sweeps"] = _sweeps(options, device, log)
    summary["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    log.say(f"\n{summary['minutes']} minutes in all")
    log.write(summary)
    if folder:
        _draw(summary, folder, log)
    print(json.dumps(summary))
    return int(_failed(summary))


def _draw(summary: dict[str, Any], folder: Path, log: Log) -> None:
    try:
        figures.draw_ratios(summary, folder / f"{summary['suite']}.png")
        if "axes" in summary.get("sweeps", {}):
            figures.draw_sweeps(summary, folder / f"{summary['suite']}-scaling.png")
    except Exception as error:  # noqa: BLE001 - the JSON line still comes; the run exits 1
        summary["figures"] = _failure(log, "", "", "figures", error)


def _rows_of(
    name: str, options: argparse.Namespace, device: torch.device, effort: Callable[[], Effort], log: Log
) -> Iterator[Any]:
    """All rows of a model: dtypes in turn, float32 first where it is timed at all."""
    references: dict[str, Tensors] = {}
    checked: dict[str, set[str]] = {}
    dtypes = (options.dtypes or DTYPES[options.suite]).split(",")
    if not options.dtypes and name == "llama-3.1-8b":
        dtypes = ["bfloat16"]  # float32 serves as the reference there, and is not timed
    for dtype in dtypes:
        try:
            subject = make(name, dtype, device)
            warm_up(subject)
            meter = Meter(subject.model)
        except Exception as error:  # noqa: BLE001 - a model that fails loses its own rows, no others; the run exits 1
            yield _failure(log, name, dtype, "all rows", error)
            continue
        log.say(heading(subject.label, device))
        if dtype != "float32" and not references:
            references = _references(subject, options, log)
        yield from _rows(subject, meter, options, effort, references, checked, log)
        free(device)


def _rows(
    subject: Subject,
    meter: Meter,
    options: argparse.Namespace,
    effort: Callable[[], Effort],
    references: dict[str, Tensors],
    checked: dict[str, set[str]],
    log: Log,
) -> Iterator[dict[str, Any]]:
    """A row for every workload, in this dtype."""
    peers = Peers(subject.model)
    dtype = str(subject.model.dtype).removeprefix("torch.")
    done: list[dict[str, Any]] = []
    for make_workload in _workloads(options):
        name = make_workload.__name__.replace("_", "-")
        try:
            workload: Workload = make_workload(subject, peers)
            right = set() if dtype == "float32" else checked.get(name, set())
            cold = _cold(make_workload, subject, peers) if options.suite == "gpu" else None
            row, basis = contest(workload, subject, meter, effort(), references.get(name), right, cold)
        except Exception as error:  # noqa: BLE001 - a row that fails loses no other; the run exits 1
            yield _failure(log, subject.name, dtype, name, error)
            free(subject.model.device)
            continue
        row["row"] = name
        if dtype == "float32":
            references[name] = basis
            checked[name] = {peer for peer, record in row["contestants"].items() if "seconds" in record}
        if make_workload is six_experiments:
            row["sums"] = _sums(done)
        done.append(row)
        log.say(table_of(row))
        yield row


def _cold(make_workload: Any, subject: Subject, peers: Peers) -> Callable[[int], Callable[[], object]]:
    """Of prompts that are so many tokens shorter, ours."""

    def made(tokens: int) -> Callable[[], object]:
        workload: Workload = make_workload(shorter(subject, tokens), peers)
        return workload.ours

    return made


def _references(subject: Subject, options: argparse.Namespace, log: Log) -> dict[str, Tensors]:
    """What float32 gives with the same weights, where it is not timed itself."""
    found: dict[str, Tensors] = {}
    exact = in_float32(subject)
    peers = Peers(exact.model)
    for make_workload in WORKLOADS:
        name = make_workload.__name__.replace("_", "-")
        if _wanted(name, options):
            try:
                found[name] = reference_of(make_workload(exact, peers))
            except Exception as error:  # noqa: BLE001 - the row then says nothing about float32
                log.say(f"{name}: no float32 reference: {_first_line(error)}")
                free(exact.model.device)
    return found


def _sweeps(options: argparse.Namespace, device: torch.device, log: Log) -> dict[str, Any]:
    tiny = (options.models or "") == "tiny"
    shape, dtype = ("tiny" if tiny else SWEPT[options.suite]), "float32" if device.type == "cpu" else "bfloat16"
    try:
        axes = run_sweeps(shape, dtype, device, quick=tiny, rounds=options.rounds)
    except Exception as error:  # noqa: BLE001 - the rows are not lost with the sweeps; the run exits 1
        return _failure(log, shape, dtype, "sweeps", error)
    log.say(f"\nsweeps: {shape} shape, {dtype}\n{sweeps_table(axes)}")
    return {"shape": shape, "dtype": dtype, "axes": axes}


def _workloads(options: argparse.Namespace) -> list[Any]:
    # All layers' gradients take minutes on a CPU, and with them the six experiments.
    listed = (*WORKLOADS, six_experiments) if options.suite == "gpu" else WORKLOADS
    return [make for make in listed if _wanted(make.__name__.replace("_", "-"), options)]


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.only or name in options.only.split(",")


def _sums(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each peer that did all rows that make up the six experiments: the sum of its times."""
    parts = ("residual-stats", "logit-lens", "skip-both", "residual-erasure", "gradients-riemann")
    tables = [row["contestants"] for row in rows if row["row"] in parts]
    if len(tables) < len(parts):
        return {}
    return {
        name: sum(table[name]["seconds"] for table in tables)
        for name in tables[0]
        if all("seconds" in table.get(name, {}) for table in tables) and name != "hookdepth"
    }


def _failure(log: Log, model: str, dtype: str, name: str, error: Exception) -> dict[str, Any]:
    line = _first_line(error)
    log.say(f"{name}: FAILED: {line}")
    return {"row": name, "model": model, "dtype": dtype, "error": line}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


def _failed(summary: dict[str, Any]) -> bool:
    records = [record for row in summary["rows"] for record in row.get("contestants", {}).values()]
    return (
        any("error" in row for row in summary["rows"])
        or "error" in summary.get("sweeps", {})
        or "figures" in summary
        or any(str(record.get("status", "")).startswith("FAILED") for record in records)
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--models", help=f"some of {', '.join(NAMES)}, separated by commas")
    parser.add_argument("--dtypes", help="float32, bfloat16 or both, separated by a comma")
    parser.add_argument("--only", help=f"some of {', '.join(ROW_NAMES)}, sweeps, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="most timed rounds of a row (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default the suite's")
    parser.add_argument("--row-seconds", type=float, help="when a row's rounds end; default 30 on a CPU, 10 on a GPU")
    parser.add_argument("--peer-seconds", type=float, help="most seconds of a peer's run; default 3, or 1.5 on a GPU")
    parser.add_argument("--minutes", type=float, help="then every contestant runs once; default 13, or 5 on a GPU")
    parser.add_argument("--out", type=Path, help="folder for table, JSON and figures")
    options = parser.parse_args(arguments)
    _check(parser, "--models", options.models, NAMES)
    _check(parser, "--dtypes", options.dtypes, ("float32", "bfloat16"))
    _check(parser, "--only", options.only, (*ROW_NAMES, "sweeps"))
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    options.given_device = options.device
    options.device = options.device or ("cuda" if options.suite == "gpu" else "cpu")
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU is to be seen here: --device cpu --models tiny tries the gpu suite's code anywhere")
    options.minutes = options.minutes or (5.0 if on_gpu else 13.0)
    options.row_seconds = options.row_seconds or (10.0 if on_gpu else 30.0)
    options.peer_seconds = options.peer_seconds or (1.5 if on_gpu else 3.0)
    return options


def _check(parser: argparse.ArgumentParser, option: str, given: str | None, known: tuple[str, ...]) -> None:
    for name in given.split(",") if given is not None else ():
        if name not in known:
            parser.error(f"{option}: {name!r} is none of {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
