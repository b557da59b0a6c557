"""The calls into an analysis's own code, and what they must give.

An analysis of somebody else's may raise anything and give anything; both end in one line that names it, after the
first item and not after the last.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import known
from hookdepth.analyses.subject import Measured, OnPass, Partial, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.errors import HookdepthError, line_in, shown
from hookdepth.runs.contract import wrong_tensors


def branches_of(analysis: Analysis, subject: Subject, item: int, *, planned: bool = False) -> list[Branch]:
    """The branches of an item; for a plan, those that take as long."""
    found = _asked(analysis, what := "planned" if planned else "branches", subject, item)
    if not isinstance(found, list | tuple) or not all(isinstance(one, Branch) for one in found):
        raise HookdepthError(
            f"`{what}` of {analysis.name} gives {shown(found)}", "give a list: [Branch((Skip(4),))]", 1
        )
    return list(found)


def collected(analysis: Analysis, subject: Subject, item: int, measured: Measured) -> Tensors:
    """What an analysis makes of its measured branches: collected(HalfMlp(), subject, 0, measured)["output"]"""
    found = _asked(analysis, "collect", subject, item, measured)
    return _tensors(analysis, subject, "collect", found)


def measured_by(analysis: Analysis, subject: Subject, item: int, on_pass: OnPass) -> Partial:
    """What an analysis measures itself: measured_by(analysis, subject, 0, lambda: None)"""
    found = _asked(analysis, "measure", subject, item, on_pass)
    if not isinstance(found, Partial):
        raise HookdepthError(f"`measure` of {analysis.name} gives {shown(found)}", "give a Partial(tensors, passes)", 1)
    found.tensors = _tensors(analysis, subject, "measure", found.tensors)
    return found


def reduced(analysis: Analysis, subject: Subject, items: Sequence[Tensors]) -> Tensors:
    """One result from all items: reduced(analysis, subject, items)["kl"]"""
    found = _asked(analysis, "reduce", subject, items)
    return _plain(analysis, "reduce", found)


def _tensors(analysis: Analysis, subject: Subject, what: str, found: object) -> Tensors:
    tensors = _plain(analysis, what, found)
    if type(analysis).reduce is Analysis.reduce:  # another one may make anything of what one item gives
        wrong = wrong_tensors(analysis.tensors, analysis.reduce(subject, [tensors]), subject.model.n_layers, True)
        if wrong:
            remedy = "mend that, or the `tensors` that it declares"
            raise HookdepthError(f"`{what}` of {analysis.name} gives what it does not declare: {wrong}", remedy, 1)
    return tensors


def _plain(analysis: Analysis, what: str, found: object) -> Tensors:
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        problem = f"`{what}` of {analysis.name} gives no dict of tensors but {shown(found)}"
        raise HookdepthError(problem, "give name → tensor", 1)
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.is_complex():
            problem = f"`{what}` of {analysis.name} gives no dict of tensors: {name!r} is {shown(value)}"
            raise HookdepthError(problem, "give name → tensor of real numbers", 1)
    return {name: value if value.is_floating_point() else value.float() for name, value in found.items()}


def _asked(analysis: Analysis, what: str, *given: object) -> Any:
    method = getattr(analysis, what)
    if type(analysis) in known().values():  # ours: what it raises is a fault, to be seen whole
        return method(*given)
    try:
        return method(*given)
    except (HookdepthError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it is the user's code: anything may happen there
        own = (value.__code__.co_filename for value in vars(type(analysis)).values() if inspect.isfunction(value))
        where = line_in(next(own, ""), error)
        raise HookdepthError(f"`{what}` of {analysis.name} raised {error!r}{where}", "mend it", 1) from error
