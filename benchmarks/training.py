"""What the depth diagnostics cost a training: the same steps with and without, in one run.

    python benchmarks/training.py                             # a Llama of about 10 M parameters on a CPU
    python benchmarks/training.py --shape 1b --tokens 4096    # the shape of Llama 3.2 1B, bfloat16, on a GPU

Rounds of a few steps each take turns: without, sampled every step, the same with result files, sampled every 50 steps.
Reported are the medians of the rounds' ratios to the round without beside them, so that drift of the machine hits
both alike; for every 50 steps the ratio of all rounds together, which takes a hundred steps or more to mean anything.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import seconds
from benchmarks.output import environment
from hookdepth.training import DepthMonitor

SHAPES: dict[str, dict[str, Any]] = {
    "10m": {"hidden_size": 320, "intermediate_size": 832, "num_hidden_layers": 8, "num_attention_heads": 5},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = {"10m": 4096, "1b": 128256}


class Training:
    """A model, its optimiser and one batch that is learnt again and again."""

    def __init__(self, shape: str, rows: int, tokens: int, device: torch.device) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY[shape], tie_word_embeddings=True, **SHAPES[shape])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = llama(config).to(device, dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.ids = torch.randint(0, VOCABULARY[shape], (rows, tokens), device=device)

    def step(self) -> None:
        """Forward, backward, optimiser."""
        self.model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self, steps: int) -> None:
        """Steps without a monitor."""
        for _ in range(steps):
            self.step()

    def watched(self, monitor: DepthMonitor, steps: int) -> None:
        """Steps with one."""
        for _ in range(steps):
            with monitor.step():
                self.step()


def llama(config: LlamaConfig) -> Any:
    """A model with random weights."""
    return LlamaForCausalLM(config)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--seconds", type=float, default=150.0, help="about how long to measure")
    parser.add_argument("--out", help="also write table and JSON to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(options.shape, options.rows, options.tokens, device)
    with tempfile.TemporaryDirectory() as folder:
        every_step = DepthMonitor(training.model, every=1, strict=True)
        with_files = DepthMonitor(training.model, every=1, strict=True, out=folder)
        every_50 = DepthMonitor(training.model, every=50, strict=True)
        runs: dict[str, Callable[[], None]] = {
            "without": lambda: training.plain(options.steps),
            "every step": lambda: training.watched(every_step, options.steps),
            "every step, files": lambda: training.watched(with_files, options.steps),
            "every 50 steps": lambda: training.watched(every_50, options.steps),
            "without, again": lambda: training.plain(options.steps),
        }
        taken = measure(runs, options.seconds, device)
    text = table(taken, options.steps)
    machine = environment(device)
    what = f"{options.shape}, {options.rows} × {options.tokens} tokens, {training.model.dtype}, {machine['hardware']}"
    summary = {
        "workload": what,
        **machine,
        "rounds": len(taken["without"]),
        "step_s": {name: statistics.median(values) / options.steps for name, values in taken.items()},
        "ratio": {name: ratio(taken, name) for name in taken},
    }
    lines = f"{what}\n{text}\n{json.dumps(summary)}\n"
    print(lines, end="")
    if options.out:
        Path(options.out).write_text(lines)


def measure(runs: dict[str, Callable[[], None]], enough: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round, in rounds of all, each begun by another, until there is enough."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, begin = list(runs), time.perf_counter()
    while time.perf_counter() - begin < enough or len(taken["without"]) < 3:
        for name in names:
            taken[name].append(seconds(runs[name], device))
        names = names[1:] + names[:1]
    return taken


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Median over rounds of the ratio to the round without; of rare samples the ratio of the sums, since a median over
    rounds would leave them out."""
    if name == "every 50 steps":
        return sum(taken[name]) / sum(taken["without"])
    return statistics.median(own / plain for own, plain in zip(taken[name], taken["without"], strict=True))


def table(taken: dict[str, list[float]], steps: int) -> str:
    """A line a way of running; the last tells how well the machine repeats itself."""
    return "\n".join(
        f"  {name:18} {statistics.median(values) / steps * 1e3:9.2f} ms a step  {ratio(taken, name):7.4f}x"
        for name, values in taken.items()
    )


if __name__ == "__main__":
    main()
