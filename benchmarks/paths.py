"""All spans left out and all repeated, against whole passes through the rearranged layers.

    python benchmarks/paths.py --tokens 180                # demo model: some minutes; takes turns, medians of --rounds
    python benchmarks/paths.py --tokens 180 --every 4      # a quarter of the spans, for about the same ratio

Both give loss, KL and agreement of every path, and are compared before they are timed. The other side runs every path
from layer 0, 32 at a time, and at each step all that visit the same layer in one call; both unembed with the same code,
every token once. Prints what a plan of 80 layers takes, too. It prints JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import hookdepth
from benchmarks.output import tell
from hookdepth import KL, Branch, Decoder, LayerPath, Loss, Top1
from hookdepth.analyses.spans import rearranged
from hookdepth.data import load_examples
from hookdepth.engine.passes import measure
from hookdepth.engine.planner import make_plan
from hookdepth.metrics import kl_divergence

TOGETHER = 32


def main() -> None:
    """Compare, time in turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=180)
    parser.add_argument("--every", type=int, default=1, help="only every n-th of the spans")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", help="a JSON file")
    options = parser.parse_args()
    model = hookdepth.load("demo")
    texts = "\n".join(example.text for example in load_examples("demo").examples)
    ids = model.ids(texts)[0, : options.tokens].tolist()
    paths = _paths(model.n_layers)[:: options.every]
    branches = [Branch((LayerPath(path),)) for path in paths]
    peer = Rearranged(model, ids)
    own, other = Timed(lambda: _ours(model, ids, branches)), Timed(lambda: peer.run(paths))
    for _ in range(options.rounds):
        difference = ((found := own()) - (expected := other())).abs() / expected.abs().amax(0)
        if not difference.max() <= 1e-4:
            raise ValueError(f"the two differ by {difference.max():.2g} of the largest: {found}, {expected}")
    plan = make_plan(branches, [len(ids)], model.n_layers)
    many = [Branch((LayerPath(path),)) for path in _paths(80)]
    begin = time.process_time()
    make_plan(many, [180], 80)
    said = {
        "paths": len(paths),
        "tokens": len(ids),
        "threads": torch.get_num_threads(),
        "hookdepth_s": own.median(0),
        "rearranged_s": other.median(0),
        "share": own.median(0) / other.median(0),
        "share_of_cpu_time": own.median(1) / other.median(1),
        "share_of_layer_visits": plan.work / len(ids) / sum(map(len, paths)),
        "work_to_least": plan.work / plan.least,
        "difference": difference.max().item(),
        "planning_80_layers_s": time.process_time() - begin,
    }
    tell(said, options.out)


def _paths(n: int) -> list[list[Any]]:
    return [rearranged(kind, a, b, n) for kind in ("skip", "repeat") for a in range(n) for b in range(a, n)]


def _ours(model: Decoder, ids: Sequence[int], branches: Sequence[Branch]) -> Tensor:
    found = measure(model, [ids], branches, [Loss(), KL(), Top1()]).output
    return torch.stack([found["loss"], found["kl"], found["top1"]], dim=1)


class Timed:
    """A function and the (wall, CPU) seconds of its calls."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.taken: list[tuple[float, float]] = []

    def __call__(self) -> Tensor:
        begin = time.perf_counter(), time.process_time()
        found = self.function()
        self.taken.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        return found

    def median(self, clock: int) -> float:
        """Of the wall (0) or the CPU (1)."""
        return statistics.median(one[clock] for one in self.taken)


class Rearranged:
    """Plain passes through layers in any order, several paths at a time."""

    def __init__(self, model: Decoder, ids: Sequence[int]) -> None:
        self.model, self.ids = model, torch.tensor(ids)
        self.given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with ExitStack() as stack, torch.no_grad():
            for number, layer in enumerate(model.layers):

                def note(_module: Any, args: Any, kwargs: Any, number: int = number) -> None:
                    self.given[number] = args, kwargs

                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            hidden = model.forward(self.ids[None])
            self.clean = torch.log_softmax(model.unembed(hidden[0]), -1)

    @torch.no_grad()
    def run(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Loss, KL and agreement of each path."""
        chunks = [paths[begin : begin + TOGETHER] for begin in range(0, len(paths), TOGETHER)]
        return torch.cat([self._chunk(chunk) for chunk in chunks])

    def _chunk(self, paths: Sequence[Sequence[int]]) -> Tensor:
        args, kwargs = self.given[0]
        embedded = args[0] if args else kwargs["hidden_states"]
        states = embedded.repeat(len(paths), 1, 1)
        for step in range(max(map(len, paths))):
            for layer in {path[step] for path in paths if step < len(path)}:
                rows = [n for n, path in enumerate(paths) if step < len(path) and path[step] == layer]
                states[rows] = self._layer(layer, states[rows])
        found = []
        for hidden in self.model.norm(states):
            logs = torch.log_softmax(self.model.unembed(hidden), -1)
            loss = -logs[:-1].gather(-1, self.ids[1:, None]).mean()
            same = (logs.argmax(-1) == self.clean.argmax(-1)).float().mean()
            found.append(torch.stack([loss, kl_divergence(self.clean, logs).mean(), same]))
        return torch.stack(found)

    def _layer(self, number: int, states: Tensor) -> Tensor:
        args, kwargs = self.given[number]
        if args:
            output = self.model.layers[number](states, *args[1:], **kwargs)
        else:
            output = self.model.layers[number](**{**kwargs, "hidden_states": states})
        return output[0] if isinstance(output, tuple) else output


if __name__ == "__main__":
    main()
