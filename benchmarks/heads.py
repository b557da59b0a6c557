"""All attention heads set to zero, one by one, against the loops that people write by hand.

    python benchmarks/heads.py --tokens 15 --out benchmarks/results/heads-15.json

Every head's z := 0 on the whole prompt; effect: the largest over tokens of ‖softmax(z) − softmax(z̄)‖₂. Sides:
hookdepth; a hooked pass a head; a hooked pass a layer with a row a head; TransformerLens and nnsight, a pass a head,
where they are installed. All unembed every position; with --measure last, the effect is that after the prompt's last
token alone, and hookdepth and the two loops unembed nothing else. The demo model, float32. Results are compared before
times are; sides take turns, and each side's CPU time stands beside its wall time, since a machine that others use
distorts that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import hookdepth as hd
from benchmarks.output import tell
from benchmarks.peers import twin
from hookdepth.data import load_examples
from hookdepth.engine.passes import measure

PEERS = ("transformer-lens", "nnsight")
Heads = Callable[[Sequence[tuple[int, int]]], Tensor]


def main() -> None:
    """Compare, time in turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="loops run every n-th head only; their times are scaled")
    parser.add_argument("--measure", choices=("all", "last"), default="all", help="tokens at which the effect is taken")
    parser.add_argument("--out")
    options = parser.parse_args()
    model, last = hd.load("demo"), options.measure == "last"
    texts = "\n".join(example.text for example in load_examples("demo").examples)
    ids = model.ids(texts)[:, : options.tokens]
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    some = [one for one in heads if one[0] % options.every == 0]
    sides: dict[str, Heads] = {
        "hookdepth": lambda which: ours(model, ids, which, last),
        "plain loop": Loop(model, ids, False, last),
    }
    sides["loop batched by layer"] = Loop(model, ids, True, last)
    if find_spec("transformer_lens"):
        sides["TransformerLens"] = lens(model, ids, last)
    if find_spec("nnsight"):
        sides["nnsight"] = sight(model, ids, last)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    expected, apart = sides["plain loop"](some), 0.0
    for side in sides.values():  # also a warm-up
        apart = max(apart, (side(some) - expected).abs().max().item())
    if not apart < 1e-4:
        raise ValueError(f"the sides differ by {apart:.2g}")
    for _ in range(options.rounds):
        for name, side in sides.items():
            which, begin = heads if name == "hookdepth" else some, (time.perf_counter(), time.process_time())
            side(which)
            scale = len(heads) / len(which)
            taken[name].append(((time.perf_counter() - begin[0]) * scale, (time.process_time() - begin[1]) * scale))
    found = {name: [statistics.median(one[clock] for one in own) for clock in (0, 1)] for name, own in taken.items()}
    record = {
        "tokens": ids.shape[1],
        "heads": len(heads),
        "rounds": options.rounds,
        "every": options.every,
        "measure": options.measure,
        "apart": apart,
    }
    record |= {"sides": {name: dict(zip(("seconds", "cpu_seconds"), own, strict=True)) for name, own in found.items()}}
    wall, cpu = found["hookdepth"]
    record["times_as_long"] = {n: {"wall": own[0] / wall, "cpu": own[1] / cpu} for n, own in found.items()}
    tell(record, options.out)


@torch.no_grad()
def ours(model: hd.Decoder, ids: Tensor, which: Sequence[tuple[int, int]], last: bool = False) -> Tensor:
    """All heads, in as few passes as the engine takes."""
    where = [-1] if last else slice(None)
    branches = [hd.Branch((hd.Ablate("z", layer, head=head),), measured=where) for layer, head in which]
    return measure(model, [ids[0].tolist()], branches, [hd.OutputEffect()]).output["output"]


def effects(logits: Tensor, clean: Tensor) -> Tensor:
    """[row, token, word] → [row]."""
    return (torch.softmax(logits, -1) - clean).norm(dim=-1).amax(-1)


class Loop:
    """A pass a head, or a pass a layer with a row a head; either under one plain hook."""

    def __init__(self, model: hd.Decoder, ids: Tensor, batched: bool, last: bool = False) -> None:
        self.hf, self.ids, self.batched = model.hf, ids, batched
        self.unembedded = {"logits_to_keep": 1 if last else 0}  # 0: all
        self.size = model.shape_of("z", 0)[1]

    @torch.no_grad()
    def __call__(self, which: Sequence[tuple[int, int]]) -> Tensor:
        clean = torch.softmax(self.hf(self.ids, **self.unembedded).logits[0], -1)
        layers = {layer: [head for own, head in which if own == layer] for layer, _ in which}
        found = []
        for layer, heads in layers.items():
            passes = [heads] if self.batched else [[head] for head in heads]
            found += [effects(self._without(layer, rows), clean) for rows in passes]
        return torch.cat(found)

    def _without(self, layer: int, heads: Sequence[int]) -> Tensor:
        def zero(_module: Any, args: tuple[Any, ...]) -> Any:
            z = args[0].clone()
            for row, head in enumerate(heads):
                z[row, :, head * self.size : (head + 1) * self.size] = 0
            return (z,)

        with ExitStack() as stack:
            projection = self.hf.model.layers[layer].self_attn.o_proj
            stack.callback(projection.register_forward_pre_hook(zero).remove)
            logits: Tensor = self.hf(self.ids.expand(len(heads), -1), **self.unembedded).logits
        return logits


def lens(model: hd.Decoder, ids: Tensor, last: bool) -> Heads:
    """TransformerLens, a hooked pass a head."""
    from benchmarks.peers.transformer_lens_ import Lens

    bridge, size = Lens(twin(model.hf)).bridge, model.shape_of("z", 0)[1]
    from_ = -1 if last else 0

    @torch.no_grad()
    def run(which: Sequence[tuple[int, int]]) -> Tensor:
        clean, found = torch.softmax(bridge(ids, return_type="logits")[0, from_:], -1), []
        for layer, head in which:

            def zero(z: Tensor, hook: Any, head: int = head) -> Tensor:
                wide = z.clone().view(*ids.shape, -1)
                wide[..., head * size : (head + 1) * size] = 0
                return wide.view(z.shape)

            hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
            logits = bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
            found.append(effects(logits[:, from_:], clean))
        return torch.cat(found)

    return run


def sight(model: hd.Decoder, ids: Tensor, last: bool) -> Heads:
    """nnsight, a trace a head."""
    from nnsight import NNsight

    wrapped: Any = NNsight(twin(model.hf))
    size, from_ = model.shape_of("z", 0)[1], -1 if last else 0

    @torch.no_grad()
    def run(which: Sequence[tuple[int, int]]) -> Tensor:
        clean, found = torch.softmax(model.hf(ids).logits[0, from_:], -1), []
        for layer, head in which:
            with wrapped.trace(ids):
                projection = wrapped.model.layers[layer].self_attn.o_proj
                projection.input[:, :, head * size : (head + 1) * size] = 0
                logits = wrapped.output.logits.save()
            found.append(effects(logits[:, from_:], clean))
        return torch.cat(found)

    return run


if __name__ == "__main__":
    main()
