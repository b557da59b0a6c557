"""The options that change numbers, besides model and data. Nothing here needs torch, so that `--help` is fast.

Settings(parts=("layer", "attn")).parts     # ('layer', 'attn')
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hookdepth.engine.stages import parsed, path_text
from hookdepth.options import Options, between, one_of, option, some_of, text, whole

PARTS = ("layer", "attn", "mlp", "mixer", "extra")  # those of `model.sites`, which needs torch
OVER_PROMPTS = ("max", "mean", "median", "none")
METHODS = ("adaptive", "riemann", "gauss-legendre")
_ALSO_PARTS = {"all": "layer,attn,mlp", "both": "attn,mlp", "ffn": "mlp", "block": "layer"}
_ALSO_METHODS = {"gauss": "gauss-legendre", "paper": "riemann"}
_GRADIENTS = "integrated gradients"
_LEVELS = "depth by level"
_MAPS = "linear maps"
_ERASURE = "residual erasure"
_LENSES = "lenses"


def _a_model(given: Any) -> Any:
    """What `load` takes, or a model that is loaded."""
    return text(given) if isinstance(given, str | os.PathLike) else given


def _a_prompt(given: Any) -> str | tuple[int, ...] | None:
    if given is None or (isinstance(given, str) and given.strip()):
        return given
    ids = given.tolist() if getattr(given, "ndim", 0) == 1 else given
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not ids or not all(type(one) is int for one in ids):
        raise ValueError("is no prompt: give a text, or token ids")
    return tuple(ids)


def _paths(given: Any) -> tuple[str, ...]:
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, Sequence) or not all(isinstance(one, str) for one in listed):
        raise ValueError("is no list of paths, such as '0-9,4-9,10-29'")
    return tuple(dict.fromkeys(path_text(parsed(one)) for one in listed))


@dataclass(frozen=True)
class Settings(Options):
    """What changes the numbers of an analysis, besides model and inputs; each analysis names those that it reads.

        Settings(parts=("attn",))

    Attributes:
        parts: what is skipped or attributed: layer, attn, mlp; mixer or extra, where a family has them.
        keep_front: first tokens that are neither changed nor measured; None for what the analysis itself says.
        paths: sequences of layers to run along, beside those of the analysis itself.
        keep: how many layers pruning leaves; None for half of them.
        cut: where the answers of examples with a level are cut.
        erasure_baseline, erase, measure: what replaces a residual, at which tokens, and where that is measured.
        counterfactual: the prompt whose mean is the baseline "prompt", text or token ids; None for the probe itself.
        target: the model whose residual stream linear maps predict: a name, or one that is loaded.
        jacobian_tokens: how many first tokens of a prompt the Jacobian lens is a mean over; its time grows with them.
        lens_tokens: at how many tokens of each prompt that tests, evenly spread, the lenses are read; None for all.
        over_prompts: how the prompts' values become one: max (the paper's), mean, median; none for no value but the
            prompts' own. A maximum grows with the number of prompts.
        max_rows: most rows of a pass; None for as many as fit.
        ig_method, ig_steps, ig_tolerance, ig_max_evaluations: of integrated gradients; steps of the methods
            that have a fixed number, tolerance and most evaluations per layer of the adaptive one. Without a
            tolerance it is what the model's dtype can resolve.

    Raises:
        HookdepthError: a value that an option does not take.
    """

    parts: tuple[str, ...] = option(
        ("layer",), "of layer,attn,mlp, or a family's mixer,extra", some_of("part", *PARTS, also=_ALSO_PARTS), "P,…"
    )
    keep_front: int | None = option(
        None, "first tokens neither changed nor measured (default: 1 where layers are skipped, else 0)", whole(0), "N"
    )
    paths: tuple[str, ...] = option(
        (), "repeatable: layers in the order of the visits", _paths, "0-9,4-9,10-29", action="append"
    )
    over_prompts: str = option(
        "max", "max, mean, median or none, of what each prompt gives", one_of("reduction", *OVER_PROMPTS), "NAME"
    )
    keep: int | None = option(None, "layers that pruning leaves (default: half of them)", whole(1), "N")
    cut: str = option(
        "answer",
        "answer: before each answer token that is cut at; question: one earlier, where it is predicted",
        one_of("cut", "answer", "question"),
        "NAME",
        group=_LEVELS,
    )
    erasure_baseline: str = option(
        "dataset",
        "dataset, prompt (the probe itself) or zero: whose mean replaces a residual",
        one_of("baseline", "dataset", "prompt", "zero"),
        "NAME",
        group=_ERASURE,
    )
    counterfactual: Any = option(
        None,
        "the prompt of --erasure-baseline prompt, in place of the probe itself",
        _a_prompt,
        "PROMPT",
        group=_ERASURE,
    )
    erase: str = option(
        "token",
        "token, or before: all tokens before it",
        one_of("erasure", "token", "before"),
        "NAME",
        group=_ERASURE,
    )
    measure: str = option(
        "answer",
        "answer, or later: all positions after what is erased",
        one_of("measure", "answer", "later"),
        "NAME",
        group=_ERASURE,
    )
    target: Any = option(
        None, "predict the residual stream of this model (default: the model itself)", _a_model, "MODEL", group=_MAPS
    )
    jacobian_tokens: int = option(
        64, "first tokens of a prompt that the Jacobian lens is taken over", whole(1), "N", group=_LENSES
    )
    lens_tokens: int | None = option(
        None, "tokens of a prompt, evenly spread, at which lenses are read (default: all)", whole(1), "N", group=_LENSES
    )
    max_rows: int | None = option(None, "most rows of a pass (default: as many as fit)", whole(3), "N", group="how")
    ig_method: str = option(
        "adaptive",
        "adaptive, riemann (the paper's) or gauss-legendre",
        one_of("method", *METHODS, also=_ALSO_METHODS),
        "NAME",
        group=_GRADIENTS,
    )
    ig_steps: int = option(256, "of the other two", whole(1), "N", group=_GRADIENTS)
    ig_tolerance: float | None = option(
        None, "of f(x) − f(baseline) (default: 0.01, in 16 bits 0.1)", between(0, 1), "X", group=_GRADIENTS
    )
    # The adaptive method begins with nine.
    ig_max_evaluations: int = option(1024, "a layer", whole(9), "N", group=_GRADIENTS)
