"""hookdepth: what the layers of a language model do."""

from hookdepth._version import __version__
from hookdepth.branching import BranchResults, run_branches
from hookdepth.errors import HookdepthError
from hookdepth.interventions import AddVector, Branch, Erase, Identity, Intervention, Patch, Scale, Skip, Subtract
from hookdepth.loading import load_model
from hookdepth.measurements import (
    Custom,
    LayerEffect,
    LayerMeasurement,
    LogitDifference,
    OutputEffect,
    OutputMeasurement,
    TargetProbability,
)
from hookdepth.models import Decoder, wrap

__all__ = [
    "AddVector",
    "Branch",
    "BranchResults",
    "Custom",
    "Decoder",
    "Erase",
    "HookdepthError",
    "Identity",
    "Intervention",
    "LayerEffect",
    "LayerMeasurement",
    "LogitDifference",
    "OutputEffect",
    "OutputMeasurement",
    "Patch",
    "Scale",
    "Skip",
    "Subtract",
    "TargetProbability",
    "__version__",
    "load_model",
    "run_branches",
    "wrap",
]
