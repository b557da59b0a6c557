"""How time grows: with layers, tokens, interventions, cuts, prompts and rows of a pass, for us and for the hook loop.

    sweeps = run_sweeps(subject_shape, "float32", device, quick=False)
    sweeps["layers"]["hookdepth"]        # {"x": [...], "seconds": [...], "exponent": 1.7}

Random weights; skip-current unless said otherwise. The exponent is the slope of log time against log x.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import OURS, RMS_IN_BFLOAT16, largest, rms
from benchmarks.measure import seconds
from benchmarks.models import SHAPES, cast, random_model, random_prompts
from benchmarks.peers.hooks import HookLoop
from hookdepth import Branch, Decoder, LayerEffect, OutputEffect, Skip, wrap
from hookdepth.analyses import erasure
from hookdepth.data import Probe
from hookdepth.engine.passes import measure

LOOP = "hook loop"
AXES: dict[str, tuple[Sequence[int], Sequence[int]]] = {  # axis → values, values of a quick run
    "layers": ((4, 8, 16, 32), (2, 4)),
    "tokens": ((48, 96, 192, 384), (16, 32)),
    "interventions": ((1, 2, 4, 8, 16), (1, 2)),  # tokens erased at each of the L + 1 layer points
    "cuts": ((1, 2, 4, 8), (1, 2)),
    "prompts": ((1, 2, 4, 8), (1, 2)),
    "rows": ((4, 8, 16, 32), (4, 8)),  # ours alone: most rows of a pass
}
Runs = dict[str, Callable[[], Tensor]]


def run_sweeps(shape: str, dtype: str, device: torch.device, quick: bool = False, rounds: int = 3) -> dict[str, Any]:
    """Time every axis; contestants are compared at every point before they are timed."""
    results: dict[str, Any] = {}
    decoders: dict[int, Decoder] = {}

    def decoder(layers: int) -> Decoder:
        if layers not in decoders:
            hf = random_model(shape, device, **{**SHAPES[shape], "num_hidden_layers": layers})
            decoders.clear()  # one at a time: the shapes of the GPU are large
            decoders[layers] = wrap(cast(hf, getattr(torch, dtype)), name=shape)
        return decoders[layers]

    usual = 4 if quick else 8
    for axis, (values, few) in AXES.items():
        curves: dict[str, dict[str, Any]] = {}
        for value in few if quick else values:
            model = decoder(value if axis == "layers" else 16 if axis == "rows" and not quick else usual)
            runs, x = _runs(axis, value, model, 16 if quick else 96)
            found = [run() for run in runs.values()]
            exact = model.dtype == torch.float32
            differ, bound = (largest, 1e-3) if exact else (rms, RMS_IN_BFLOAT16)
            if len(found) > 1 and not differ({"": found[1]}, {"": found[0]}) <= bound:
                raise ValueError(f"sweep over {axis} at {value}: the hook loop's numbers are not ours")
            for _ in range(rounds):
                for name, run in runs.items():
                    curve = curves.setdefault(name, {"x": [], "rounds": {}})
                    curve["rounds"].setdefault(x, []).append(seconds(run, device))
        for curve in curves.values():
            taken = curve.pop("rounds")
            curve["x"] = list(taken)
            curve["seconds"] = [statistics.median(values) for values in taken.values()]
            curve["exponent"] = exponent(curve["x"], curve["seconds"])
        results[axis] = curves
    return results


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x by least squares: exponent([1, 2, 4], [3, 12, 48]) is 2."""
    if len(set(x)) < 2:
        return math.nan
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


def _runs(axis: str, value: int, model: Decoder, usual_tokens: int) -> tuple[Runs, int]:
    """Contestants at one point of an axis, and its place on the axis."""
    if axis == "interventions":
        return _erasures(model, value, max(24, usual_tokens // 2))
    tokens = value if axis == "tokens" else usual_tokens
    prompts = random_prompts(model, (tokens,) * (value if axis == "prompts" else 1))
    cuts: list[int | None] = [None]
    if axis == "cuts":
        cuts = [max(2, tokens * (k + 1) // (value + 1)) for k in range(value)]
    skips = [Skip(layer) for layer in range(model.n_layers)]
    branches = [
        Branch((skip,), prompt=number, cut=cut) for number in range(len(prompts)) for cut in cuts for skip in skips
    ]
    max_rows = value if axis == "rows" else None
    ids = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    shape = (len(prompts), len(cuts), model.n_layers, model.n_layers)

    def ours() -> Tensor:
        result = measure(model, prompts, branches, [LayerEffect(), OutputEffect()], max_rows=max_rows)
        return result.layer["effect"].view(shape).amax(1)

    def loop() -> Tensor:
        return torch.stack([HookLoop(model.hf).skip(one, cuts, range(model.n_layers))[0].cpu() for one in ids])

    return ({OURS: ours} if axis == "rows" else {OURS: ours, LOOP: loop}), value


def _erasures(model: Decoder, per_point: int, tokens: int) -> tuple[Runs, int]:
    (ids,) = random_prompts(model, (tokens,))
    baseline = torch.zeros(model.n_layers + 1, model.d_model)
    probe = Probe("", "", ids, tuple(map(str, ids)), (tokens - 1,))
    seen = tokens - 1
    chosen = [int((k + 0.5) * seen / per_point) for k in range(per_point)]
    listed = erasure.erasure_branches(probe, baseline)
    branches = [listed[point * seen + token] for point in range(model.n_layers + 1) for token in chosen]
    tensor = torch.tensor([ids], device=model.device)
    points = range(model.n_layers + 1)

    def ours() -> Tensor:
        result = measure(model, [ids], branches, [OutputEffect()])
        return result.output["output"].view(model.n_layers + 1, -1)

    def loop() -> Tensor:
        return HookLoop(model.hf).erasure(tensor, probe.answer_positions, baseline, points, chosen).cpu()

    return {OURS: ours, LOOP: loop}, len(branches)
