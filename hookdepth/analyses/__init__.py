"""The analyses: one class each, which declares what it measures, what it depends on, and how it is drawn.

    from hookdepth.analyses import find, known

    [one.question for one in known().values()]     # of all of ours
    find("my_analyses.py:HalfSkip")                # a class in a file of one's own

A module in this folder that holds a subclass of `Analysis` is all that it takes to add one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookdepth.analyses.base import Analysis
    from hookdepth.analyses.registry import chosen, declared, find, known
    from hookdepth.analyses.settings import Settings
    from hookdepth.analyses.subject import BASELINE_PROMPTS, Inputs, Partial, Subject, noise_floor

_HOME = {
    "base": "Analysis",
    "registry": "chosen declared find known",
    "settings": "Settings",
    "subject": "BASELINE_PROMPTS Inputs Partial Subject noise_floor",
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names.split():
            return getattr(import_module(f"hookdepth.analyses.{module}"), name)
    raise AttributeError(f"module 'hookdepth.analyses' has no attribute {name!r}")


__all__ = [
    "BASELINE_PROMPTS",
    "Analysis",
    "Inputs",
    "Partial",
    "Settings",
    "Subject",
    "chosen",
    "declared",
    "find",
    "known",
    "noise_floor",
]
