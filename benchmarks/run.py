"""Benchmarks of hookdepth against plain hook loops, in one run, with the floor beside each figure.

    python benchmarks/run.py --suite cpu                      # the demo model, float32 and bfloat16
    python benchmarks/run.py --suite cpu --only skip-current

Each workload is verified (our numbers against the loop's) before it is timed; times are medians over rounds
in which all contestants take turns. The floor is the least work of the workload at the rate of matrix
products measured in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.measure import alternate, layer_flops, least_flops, matmul_rate, unembed_flops
from hookdepth import Decoder, LayerEffect, OutputEffect, Skip, load_model, run_branches
from hookdepth.analyses import erasure, integrated_gradients, lens
from hookdepth.analyses.task import Settings
from hookdepth.branching import plan_for
from hookdepth.data import DEFAULT_PROBES, encode, load_examples, make_probe, sample_cuts
from hookdepth.interventions import Branch

IG_LAYERS = (0, 15, 29)


@dataclass
class Workload:
    """One row of the table: contestants by name (ours first), verified, with the FLOPs it needs at least."""

    name: str
    runs: dict[str, Callable[[], Any]]
    verify: Callable[[Any, Any], float]
    flops: float
    tolerance: float
    target: float


def main() -> None:
    """Run a suite and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["cpu"], default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", help="names of workloads, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="also write table and JSON to this file")
    options = parser.parse_args()
    records, lines = [], []
    for dtype in options.dtypes.split(","):
        model = load_model("demo", dtype=dtype, device="cpu")
        rate = matmul_rate(model)
        lines.append(f"\n{model.name}, {dtype}, {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s")
        print(lines[-1], flush=True)
        for make in (skip_current, skip_both, residual_erasure, logit_lens, gradients):
            workload = make(model)
            if options.only and workload.name not in options.only.split(","):
                continue
            record = measure(workload, rate, options.rounds)
            records.append({"dtype": dtype, **record})
            lines.append(row(record))
            print(lines[-1], flush=True)
    summary = {"hardware": hardware(), "date": str(date.today()), "commit": commit(), **versions(), "rows": records}
    text = "\n".join([*lines, json.dumps(summary)]) + "\n"
    if options.out:
        Path(options.out).write_text(text)
    print(json.dumps(summary))


def measure(workload: Workload, rate: float, rounds: int) -> dict[str, Any]:
    """Verify, time, compare."""
    results = {name: run() for name, run in workload.runs.items()}  # also the warm-up
    ours = next(iter(results))
    worst = max((workload.verify(results[ours], other) for name, other in results.items() if name != ours), default=0.0)
    if not worst <= workload.tolerance:
        raise SystemExit(f"{workload.name}: contestants differ by {worst:.2g} of the largest entry: nothing to time")
    times = alternate(workload.runs, rounds)
    floor = workload.flops / rate
    return {
        "workload": workload.name,
        "seconds": {name: round(value, 3) for name, value in times.items()},
        "speedup": {name: round(value / times[ours], 2) for name, value in times.items() if name != ours},
        "target": workload.target,
        "floor_s": round(floor, 3),
        "of_floor": round(floor / times[ours], 2),
        "difference": worst,
    }


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    ours, *others = record["seconds"].items()
    peers = ", ".join(f"{name} {value:.2f} s = {record['speedup'][name]:.2f}x" for name, value in others)
    floor = f"floor {record['floor_s']:.2f} s ({record['of_floor']:.0%} of it reached)"
    return f"  {record['workload']:24} {ours[1]:7.2f} s | {peers} | {floor} | differ by {record['difference']:.1g}"


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over largest entry."""
    return ((a.float().cpu() - b.float().cpu()).abs().max() / b.abs().max().cpu()).item()


def _prompt(model: Decoder, tokens: int) -> list[int]:
    """The demo problem whose length is nearest."""
    texts = [example.text for example in load_examples("demo").examples]
    return min((encode(model.tokenizer, text) for text in texts), key=lambda ids: abs(len(ids) - tokens))


def _tolerance(model: Decoder) -> float:
    # Float32: the sums' order. bfloat16: the loop's rows met other kernels than ours, which is the loop's noise.
    return 1e-4 if model.dtype == torch.float32 else 1.0


def skip_current(model: Decoder) -> Workload:
    """All layer skips on one prompt of about 180 tokens."""
    return _skip(model, "skip-current", [None], 1.7)


def skip_both(model: Decoder) -> Workload:
    """All layer skips, on all tokens and left of four cuts."""
    ids = _prompt(model, 180)
    (cuts,) = sample_cuts([len(ids)])
    return _skip(model, "skip-current+future", [None, *cuts], 3.0)


def _skip(model: Decoder, name: str, cuts: list[int | None], target: float) -> Workload:
    ids = _prompt(model, 180)
    tensor = torch.tensor([ids], device=model.device)
    skips = [Skip(layer) for layer in range(model.n_layers)]
    branches = [Branch((skip,), cut=cut) for cut in cuts for skip in skips]

    def ours() -> dict[int | None, tuple[Tensor, Tensor]]:
        result = run_branches(model, [ids], branches, [LayerEffect(), OutputEffect()])
        effect = result.layer["effect"].view(len(cuts), model.n_layers, -1)
        output = result.output["output"].view(len(cuts), -1)
        return {cut: (effect[n], output[n]) for n, cut in enumerate(cuts)}

    def loop() -> dict[int | None, tuple[Tensor, Tensor]]:
        return {cut: plain.skip_loop(model.hf, tensor, [cut]) for cut in cuts}

    def verify(a: Any, b: Any) -> float:
        return max(max(relative(a[cut][0], b[cut][0]), relative(a[cut][1], b[cut][1])) for cut in cuts)

    positions = sum((model.n_layers + 1) * (len(ids) - (cut or 0)) for cut in cuts)
    flops = least_flops(model, plan_for(model, branches, [len(ids)]), positions)
    return Workload(name, {"hookdepth": ours, "hook loop": loop}, verify, flops, _tolerance(model), target)


def residual_erasure(model: Decoder) -> Workload:
    """Every layer point and token of the arithmetic probe."""
    probe = make_probe(model.tokenizer, *DEFAULT_PROBES[0])
    texts = [example.text for example in load_examples("demo").examples[:10]]
    baseline = erasure.uninformative_residual(model, [encode(model.tokenizer, text) for text in texts])
    tensor = torch.tensor([probe.token_ids], device=model.device)
    branches = erasure.erasure_branches(probe, baseline)

    def ours() -> Tensor:
        effect = run_branches(model, [probe.token_ids], branches, [OutputEffect()]).output["output"]
        return effect.view(model.n_layers + 1, -1)

    def loop() -> Tensor:
        return plain.erasure_loop(model.hf, tensor, probe.answer_positions, baseline)

    plan = plan_for(model, branches, [len(probe.token_ids)])
    flops = least_flops(model, plan, (len(branches) + 1) * len(probe.answer_positions))
    return Workload(
        "residual-erasure",
        {"hookdepth": ours, "hook loop": loop},
        lambda a, b: relative(a, b[:, : a.shape[1]]),
        flops,
        _tolerance(model),
        10.0,
    )


def logit_lens(model: Decoder) -> Workload:
    """All layers of one prompt of about 180 tokens."""
    ids = _prompt(model, 180)
    tensor = torch.tensor([ids], device=model.device)

    def ours() -> tuple[Tensor, Tensor]:
        sums = lens.lens_sums(model, ids)
        return sums["kl"][:-1] / len(ids), sums["topk_overlap"][:-1] / len(ids)

    flops = len(ids) * (model.n_layers * layer_flops(model) + (model.n_layers + 1) * unembed_flops(model))
    return Workload(
        "logit-lens",
        {"hookdepth": ours, "all logits kept": lambda: plain.lens_all_logits(model.hf, tensor)},
        lambda a, b: max(relative(a[0], b[0]), relative(a[1], b[1])),
        flops,
        _tolerance(model),
        2.2,
    )


def gradients(model: Decoder) -> Workload:
    """The 256-step sum at three layers of the arithmetic probe, and the adaptive integral of the same."""
    probe = make_probe(model.tokenizer, *DEFAULT_PROBES[0])
    tensor = torch.tensor([probe.token_ids], device=model.device)
    arguments = (model.hf, tensor, probe.answer_positions, IG_LAYERS, 256)

    def ours() -> Tensor:
        path = integrated_gradients.Path(model, probe, "layer")
        return integrated_gradients.attribute(path, Settings(ig_method="riemann"), IG_LAYERS)["attribution"]

    def adaptive() -> Tensor:
        path = integrated_gradients.Path(model, probe, "layer")
        settings = Settings(ig_tolerance=integrated_gradients.default_tolerance(model))
        integrated_gradients.attribute(path, settings, IG_LAYERS)
        return ours_once

    ours_once = ours()
    runs: dict[str, Callable[[], Any]] = {"hookdepth": ours, "adaptive": adaptive}
    runs["notebook's way"] = lambda: plain.gradients(*arguments, block=16, frozen=False)
    for block in (16, 32, 64):
        runs[f"frozen, blocks of {block}"] = partial(plain.gradients, *arguments, block=block, frozen=True)
    tokens = len(probe.token_ids) - 1
    per_step = sum((model.n_layers - 1 - layer) * tokens for layer in IG_LAYERS) * layer_flops(model)
    per_step += len(IG_LAYERS) * len(probe.answer_positions) * unembed_flops(model)
    # Forward and the gradient with respect to activations: each costs the same products.
    return Workload("integrated-gradients", runs, relative, 2.0 * 256 * per_step, _tolerance(model), 1.6)


def hardware() -> str:
    """What ran this."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit that was measured, with + where the tree differs from it."""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions that matter."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    random.seed(0)
    main()
