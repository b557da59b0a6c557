"""Is `--dry-run` right about time? Its estimate against a real run of each analysis on the demo model.

    python benchmarks/dry_run.py --limit 1

On a machine that others use as well, `--clock cpu` compares seconds of the processor (on one thread) instead.
Prints estimate, truth and their ratio for each analysis and for all. The last line is JSON. Fails where a ratio
is beyond 1.5 either way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hookdepth
from benchmarks.output import environment
from hookdepth.analyses import Settings, chosen
from hookdepth.data import load_examples
from hookdepth.runs.config import Config
from hookdepth.runs.dry_run import estimate
from hookdepth.runs.outline import load_outline
from hookdepth.runs.runner import Run
from hookdepth.runs.start import make_inputs

FACTOR = 1.5


def main() -> None:
    """Estimate everything, then run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1, help="prompts (default: 1)")
    parser.add_argument("--analyses", default="all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    analyses, settings = chosen(options.analyses), Settings()
    dataset = load_examples("demo")

    outline = load_outline("demo", dtype=options.dtype)
    inputs = make_inputs(Config(limit=options.limit), analyses, dataset, outline, print)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    begin = clock()
    estimates = estimate(outline, analyses, inputs, settings, clock=clock)
    print(f"estimated in {clock() - begin:.1f} s")

    model = hookdepth.load("demo", dtype=options.dtype)
    rows: list[dict[str, Any]] = []
    worst = 1.0
    for one in estimates:
        guess, names = one.seconds, " and ".join(one.group.analyses)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(model, inputs, settings, {"name": "demo"}, 123, Path(folder))
            begin = clock()
            run.execute(one.group.members)
            real = clock() - begin
        rows.append({"analyses": names, "estimate_s": round(guess, 2), "real_s": round(real, 2)})
        print(f"{names:36} {guess:8.1f} s estimated {real:8.1f} s real {guess / real:6.2f}", flush=True)
        worst = max(worst, guess / real, real / guess)
    guess, real = (sum(float(row[key]) for row in rows) for key in ("estimate_s", "real_s"))
    print(f"{'all':36} {guess:8.1f} s estimated {real:8.1f} s real {guess / real:6.2f}")
    summary = {**environment(torch.device("cpu")), "rows": rows}
    print(
        json.dumps(
            {
                **summary,
                "dtype": options.dtype,
                "limit": options.limit,
                "clock": options.clock,
                "worst": round(worst, 2),
            }
        )
    )
    if worst > FACTOR:
        raise SystemExit(f"an estimate is beyond a factor of {FACTOR}")


if __name__ == "__main__":
    main()
