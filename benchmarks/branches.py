"""Activation patching and generation against the loops that people write by hand.

    OMP_NUM_THREADS=2 python benchmarks/branches.py --threads 2 --out benchmarks/results/branches.json

Patching: an IOI pair, the residual stream at every layer and token, against one hooked pass a cell, and against one a
layer with a row a token. Generation: 32 steered runs of 20 tokens, against `generate` under a hook, run by run. Results
are compared before times are. Demo model, float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hookdepth as hd
from benchmarks.output import tell
from benchmarks.peers.hooks import HookLoop, LayerLoop

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
METRIC = hd.LogitDifference(" Mary", " John")


def timed(body: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    begin = time.perf_counter()
    found = body()
    return time.perf_counter() - begin, found


def patching(model: hd.Decoder) -> dict[str, float]:
    """Seconds of ours and of both loops, and how far the results are apart."""
    clean, corrupted = model.ids(CLEAN), model.ids(CORRUPTED)
    words = [model.tokenizer(word)["input_ids"][0] for word in (" Mary", " John")]
    layers = range(model.n_layers)
    ours, found = timed(lambda: hd.patch_sweep(model, CLEAN, CORRUPTED, "resid_pre", METRIC)["score"])
    batched, second = timed(lambda: LayerLoop(model.hf).patching(corrupted, clean, words, layers))
    plain, first = timed(lambda: HookLoop(model.hf).patching(corrupted, clean, words, layers))
    apart = max((found - other).abs().max().item() for other in (first, second))
    return {"ours": ours, "plain": plain, "batched": batched, "apart": apart, "cells": found.numel()}


def attribution(model: hd.Decoder) -> dict[str, float]:
    """Correlation of first-order scores with the sweep's, over all layers and tokens."""
    found = {}
    for site in ("resid_pre", "attn_out", "mlp_out"):
        sweep = hd.patch_sweep(model, CLEAN, CORRUPTED, site, METRIC)["score"].flatten()
        for steps in (None, 8):
            own = hd.attribute(model, CLEAN, CORRUPTED, METRIC, [site], steps=steps)[site].flatten()
            found[f"{site}, {steps or 'no'} steps"] = torch.corrcoef(torch.stack([sweep, own]))[0, 1].item()
    return found


def generation(model: hd.Decoder, n_branches: int = 32, new: int = 20) -> dict[str, float]:
    """Seconds of ours and of `generate` branch by branch, and how many texts differ."""
    ids = model.ids("The capital of France is")
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    steer = [
        hd.AddVector("resid_post", 2 + n % 16, 2.0 * (1 + n // 16) * direction, tokens=slice(1, None))
        for n in range(n_branches)
    ]

    def alone(one: hd.AddVector) -> list[int]:
        def add(_: Any, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, 1 if hidden.shape[1] > 1 else 0 :] += one.value
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = model.hf.model.layers[one.layer].register_forward_hook(add)
        try:
            written = model.hf.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
        finally:
            hook.remove()
        return list(written[0, ids.shape[1] :].tolist())

    ours, found = timed(lambda: hd.generate(model, ids, steer, max_new_tokens=new))
    theirs, texts = timed(lambda: [alone(one) for one in steer])
    other = sum(text.tokens != plain for text, plain in zip(found[0], texts, strict=True))
    return {"ours": ours, "generate": theirs, "different": other}


def main() -> None:
    """Print JSON, once everything was run once to warm up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = hd.load("demo", dtype="float32", device="cpu")
    hd.patch_sweep(model, CLEAN, CORRUPTED, "resid_pre", METRIC, layers=[0, 20])
    record = {"patching": patching(model), "attribution": attribution(model), "generation": generation(model)}
    ours, their = record["patching"], record["generation"]
    record["times"] = {
        "plain loop": ours["plain"] / ours["ours"],
        "batched by layer": ours["batched"] / ours["ours"],
        "generate": their["generate"] / their["ours"],
    }
    tell(record, options.out)


if __name__ == "__main__":
    main()
