"""hookdepth: what the layers of a language model do.

    import hookdepth

    model = hookdepth.load("demo")
    results = hookdepth.analyse(model, ["residual-stats"], limit=1)
    results["residual-stats"].tensors["cosine.layer"]     # [L]

Names are imported when they are first asked for, so that `hookdepth --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookdepth._version import __version__
from hookdepth.errors import HookdepthError
from hookdepth.showing import shown_by

if TYPE_CHECKING:
    from hookdepth.analyses.base import Analysis
    from hookdepth.analyses.jacobian import load_lens
    from hookdepth.api import analyse, plot, run
    from hookdepth.checks import verify
    from hookdepth.engine.ablation import Ablate, Clamp
    from hookdepth.engine.branches import Branch
    from hookdepth.engine.decoding import generate
    from hookdepth.engine.intervention import Intervention
    from hookdepth.engine.interventions import AddVector, Erase, Identity, Patch, Scale, Skip, Subtract
    from hookdepth.engine.measurement import LayerMeasurement, OutputMeasurement
    from hookdepth.engine.measurements import (
        KL,
        Custom,
        LayerEffect,
        LogitDifference,
        LogitLens,
        Loss,
        Norm,
        OutputEffect,
        Probability,
        TargetProbability,
        Top1,
    )
    from hookdepth.engine.paths import LayerPath
    from hookdepth.engine.reading import Activations, capture
    from hookdepth.engine.texts import Generated, Generations
    from hookdepth.model.checking import wrap
    from hookdepth.model.decoder import Decoder
    from hookdepth.model.families import Family
    from hookdepth.model.loading import load
    from hookdepth.results import Result
    from hookdepth.runs.contract import load_folder
    from hookdepth.runs.extending import merge
    from hookdepth.sweeps.attribution import attribute
    from hookdepth.sweeps.patching import ablate_sweep, patch_sweep, skip_sweep

_HOME = {
    "analyses.base": "Analysis",
    "runs.contract": "load_folder",
    "runs.extending": "merge",
    "analyses.jacobian": "load_lens",
    "api": "analyse plot run",
    "engine.branches": "Branch",
    "engine.paths": "LayerPath",
    "engine.reading": "Activations capture",
    "engine.ablation": "Ablate Clamp",
    "checks": "verify",
    "engine.decoding": "generate",
    "engine.texts": "Generated Generations",
    "engine.interventions": "AddVector Erase Identity Intervention Patch Scale Skip Subtract",
    "model.loading": "load",
    "engine.measurements": (
        "Custom KL LayerEffect LayerMeasurement LogitDifference LogitLens Loss Norm OutputEffect OutputMeasurement "
        "Probability TargetProbability Top1"
    ),
    "model.checking": "wrap",
    "model.decoder": "Decoder",
    "model.families": "Family",
    "results": "Result",
    "sweeps.attribution": "attribute",
    "sweeps.patching": "ablate_sweep patch_sweep skip_sweep",
}


def _shown(result: "Result", what: str, *arguments: Any, **options: Any) -> Any:
    """Who only makes or reads results need not wait for figures."""
    from hookdepth.analyses.registry import declared
    from hookdepth.report import notebook

    return getattr(notebook, what)(result, declared(result), *arguments, **options)


shown_by(_shown)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names.split():
            return getattr(import_module(f"hookdepth.{module}"), name)
    raise AttributeError(f"module 'hookdepth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "KL",
    "Ablate",
    "Activations",
    "AddVector",
    "Analysis",
    "Branch",
    "Clamp",
    "Custom",
    "Decoder",
    "Erase",
    "Family",
    "Generated",
    "Generations",
    "HookdepthError",
    "Identity",
    "Intervention",
    "LayerEffect",
    "LayerMeasurement",
    "LayerPath",
    "LogitDifference",
    "LogitLens",
    "Loss",
    "Norm",
    "OutputEffect",
    "OutputMeasurement",
    "Patch",
    "Probability",
    "Result",
    "Scale",
    "Skip",
    "Subtract",
    "TargetProbability",
    "Top1",
    "__version__",
    "ablate_sweep",
    "analyse",
    "attribute",
    "capture",
    "generate",
    "load",
    "load_folder",
    "load_lens",
    "merge",
    "patch_sweep",
    "plot",
    "run",
    "skip_sweep",
    "verify",
    "wrap",
]
