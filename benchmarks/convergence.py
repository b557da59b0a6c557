"""How far the 256-step sum and the adaptive integral are from a brute-force sum, layer by layer.

    python benchmarks/convergence.py --layers 28,20,3 --steps 16384

Differences are the largest over tokens, relative to the brute-force sum's largest attribution. Demo model, float32,
the arithmetic probe. An early layer takes some twenty minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path as FilePath

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1]))

from torch import Tensor

import hookdepth
from hookdepth.analyses import Settings
from hookdepth.analyses.integrals import Path, attribute
from hookdepth.data import DEFAULT_PROBES, make_probe


def main() -> None:
    """Print a line a layer, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="28,20,3")
    parser.add_argument("--steps", type=int, default=16384)
    options = parser.parse_args()
    model = hookdepth.load("demo", dtype="float32", device="cpu")
    path = Path(model, make_probe(model.tokenizer, *DEFAULT_PROBES[0]), "layer")

    def row(layer: int, settings: Settings) -> tuple[Tensor, float, float]:
        result = attribute(path, settings, [layer])
        return result["attribution"][0], result["completeness_error"].item(), result["evaluations"].item()

    records = []
    for layer in map(int, options.layers.split(",")):
        brute, brute_error, _ = row(layer, Settings(ig_method="riemann", ig_steps=options.steps))
        record = {"layer": layer, "steps": options.steps, "brute_completeness_error": brute_error}
        for name, settings in (
            ("riemann-256", Settings(ig_method="riemann", ig_steps=256)),
            ("adaptive", Settings(ig_method="adaptive")),
        ):
            attribution, error, evaluations = row(layer, settings)
            record[name] = {
                "difference": ((attribution - brute).abs().max() / brute.abs().max()).item(),
                "completeness_error": error,
                "evaluations": evaluations,
            }
        records.append(record)
        print(record, flush=True)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
