"""What a user hands to `run`, made plain, or refused in one line before anything runs.

prompts = as_prompts(model, [[5, 6, 7]])                          # lists of ints
branches = as_branches(model, [Branch((Skip(4),))], prompts)
measurements = as_measurements(model, [LogitDifference(5, 6)])    # bound to the model
check_targets(branches, prompts, measurements)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.measurement import LayerMeasurement, Measurement, OutputMeasurement
from hookdepth.engine.plan import ROWS_PER_PROMPT
from hookdepth.engine.tokens import positions
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.metrics import check_reduction
from hookdepth.model.decoder import Decoder
from hookdepth.results import CLEAN, PER_PROMPT

LEAST_ROWS = ROWS_PER_PROMPT + 1
"""Rows of the smallest pass: a clean run, its null branch and one branch."""


def as_prompts(model: Decoder, given: Any) -> list[list[int]]:
    """Prompts as lists of token ids, from texts or ids. One alone is taken for a list of one.

    as_prompts(model, "The capital of France is")   # [[…]]
    """
    advice = "give a text, texts, or lists of token ids, one a prompt"
    if isinstance(given, str):
        given = [given]
    if isinstance(given, bytes) or not (isinstance(given, Sequence) or hasattr(given, "tolist")):
        raise HookdepthError(f"the prompts are {shown(given)}", advice)
    if getattr(given, "ndim", 2) not in (1, 2):
        raise HookdepthError(f"the prompts are {shown(given)}", advice)
    prompts = list(given)
    if not prompts:
        raise HookdepthError("there are no prompts", "give at least one")
    if all(_is_number(item) for item in prompts):
        prompts = [prompts]
    return [_as_prompt(model, prompt, number) for number, prompt in enumerate(prompts)]


def is_one(given: Any) -> bool:
    """Whether token ids are those of one prompt: flat, or with a batch axis of one. is_one([[5, 6]])   # True"""
    if isinstance(given, str | bytes) or not (isinstance(given, Sequence) or hasattr(given, "tolist")):
        return False
    listed = list(given) if getattr(given, "ndim", 1) else []
    alone = len(listed) == 1 and not isinstance(listed[0], str)
    return alone or (bool(listed) and all(_is_number(item) for item in listed))


def _is_number(item: Any) -> bool:
    return not isinstance(item, str | bytes | Sequence) and not getattr(item, "ndim", 0)


def _as_prompt(model: Decoder, given: Any, number: int) -> list[int]:
    what = f"prompt {number}"
    if isinstance(given, str):
        given = model.ids(given)[0]
    ndim = getattr(given, "ndim", 1)
    if isinstance(given, bytes) or ndim != 1 or not (isinstance(given, Sequence) or hasattr(given, "tolist")):
        raise HookdepthError(f"{what} is {shown(given)}", "give a text or a flat list of token ids")
    ids = given.tolist() if hasattr(given, "tolist") else list(given)
    if not ids:
        raise HookdepthError(f"{what} has no tokens", "give at least one token")
    limit = model.context_length
    if limit is not None and len(ids) > limit:
        raise HookdepthError(f"{what} has {len(ids)} tokens, the model's context {limit}", "shorten the prompt")
    plain = [token.item() if isinstance(token, Tensor) and not token.ndim else token for token in ids]
    if any(isinstance(token, bool) for token in plain):
        raise HookdepthError(f"{what} holds bools", "give token ids; a mask is not needed")
    model.check_ids(plain, what)
    return [int(token) for token in plain]


def as_branches(model: Decoder, given: Any, prompts: Sequence[Sequence[int]]) -> list[Branch]:
    """Branches that fit the model and their prompts; a bare intervention is a branch, one alone is a list of one."""
    branches = listed_branches(given)
    for branch in branches:
        if branch.prompt >= len(prompts):
            raise HookdepthError(f"a branch of prompt {branch.prompt} of {len(prompts)}", "give one of the prompts")
        branch.check(model, len(prompts[branch.prompt]))
    return branches


def listed_branches(given: Any) -> list[Branch]:
    """Branches, and interventions that stand for one: listed_branches(Skip(4))   # [Branch((Skip(4),))]

    Raises:
        HookdepthError: a class, a text, or anything else that is neither.
    """
    if isinstance(given, Branch | Intervention):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, str | Tensor):
        raise HookdepthError(f"the branches are {shown(given)}", "give a list of interventions or branches: [Skip(4)]")
    branches = [Branch((one,)) if isinstance(one, Intervention) else one for one in given]
    for branch in branches:
        if not isinstance(branch, Branch):
            raise HookdepthError(
                f"{shown(branch)} where a branch is meant", "give instances: Skip(4), or Branch((Skip(4),))"
            )
    return branches


def as_measurements(model: Decoder, given: Any) -> list[Measurement]:
    """Measurements that are complete, each of its own name, bound to the model."""
    if isinstance(given, LayerMeasurement | OutputMeasurement):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, str | Tensor):
        raise HookdepthError(f"the measurements are {shown(given)}", "give a list: [OutputEffect()]")
    bound: list[Measurement] = []
    for measurement in given:
        if not isinstance(measurement, LayerMeasurement | OutputMeasurement):
            raise HookdepthError(f"{shown(measurement)} where a measurement is meant", "give instances: OutputEffect()")
        _check_measurement(measurement)
        bound.append(measurement.bind(model))
    names = [measurement.name for measurement in bound]
    for name in names:
        if names.count(name) > 1:
            raise HookdepthError(f"{names.count(name)} measurements are called {name!r}", "give each its own name")
    return bound


def _check_measurement(measurement: Measurement) -> None:
    kind = type(measurement)
    if kind.values in (LayerMeasurement.values, OutputMeasurement.values):
        raise HookdepthError(f"the measurement {kind.__name__} says nothing to measure", "define values(view)")
    name = getattr(measurement, "name", None)
    if not isinstance(name, str) or not name:
        raise HookdepthError(f"the measurement {kind.__name__} has the name {shown(name)}", "give it a word for a name")
    if name != name.strip() or "/" in name or name.startswith((CLEAN, PER_PROMPT)):
        problem = f"the measurement {kind.__name__} has the name {shown(name)}"
        raise HookdepthError(problem, f"give it a word that does not begin with {CLEAN} or {PER_PROMPT}")
    check_reduction(measurement.reduce, f" of the measurement {name!r}:")
    for flag in ("change", "needs_target"):
        if not isinstance(value := getattr(measurement, flag, False), bool):
            raise HookdepthError(f"the measurement {name!r} has {flag} = {shown(value)}", "set it to True or False")


def check_targets(
    branches: Sequence[Branch], prompts: Sequence[Sequence[int]], measurements: Sequence[Measurement]
) -> None:
    """Refuse a lens along a path, and a next token where a branch is measured at its prompt's last token alone."""
    looking = next((m.name for m in measurements if getattr(m, "lenses", ())), None)
    if looking is not None and any(branch.path is not None for branch in branches):
        raise HookdepthError(f"{looking!r} along a path of layers", "measure it on branches without a LayerPath")
    wanting = next((m.name for m in measurements if isinstance(m, OutputMeasurement) and m.needs_target), None)
    for branch in branches if wanting is not None else ():
        length = len(prompts[branch.prompt])
        if set(branch.measured_positions(length)) <= {length - 1}:
            raise HookdepthError(
                f"{wanting!r} of a branch that is measured at its prompt's last token alone, which no token follows",
                "measure it at a token before",
            )


def check_acts(branches: Sequence[Branch], prompts: Sequence[Sequence[int]]) -> None:
    """Refuse a change of no token: it would look like one without an effect. check_acts([Branch((Skip(4),))], [ids])"""
    for branch in branches:
        length = len(prompts[branch.prompt])
        for one in branch.interventions:
            if not positions(one.tokens, length):
                own = f"{one.tokens.start}:{one.tokens.stop}" if isinstance(one.tokens, slice) else shown(one.tokens)
                raise HookdepthError(
                    f"{type(one).__name__} at layer {one.layer} acts on tokens {own}, and prompt {branch.prompt} has "
                    f"{length}: none of these",
                    "give tokens that the prompt has, e.g. tokens=slice(0, None)",
                )


def check_limit(what: str, given: Any) -> int | None:
    """A limit of a pass: None, or at least what the smallest one needs.

    check_limit("max_rows", 32)   # 32
    """
    return None if given is None else whole_number(what, given, LEAST_ROWS)
