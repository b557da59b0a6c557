"""verify: is what the engine measures on this model, on this machine, what plain single passes give?

Random branches of every kind run through the engine, many in a pass, and one by one through the model's own forward
call under one plain hook each (`plain`). That the contributions add up is the self-check's to say, which runs first.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookdepth import metrics
from hookdepth.checks.drawn import LENGTHS, random_branches
from hookdepth.checks.plain import plain_pass
from hookdepth.checks.slopes import HALF, compare_slopes
from hookdepth.checks.verdicts import Verdict, Verification
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurements import Custom, LayerEffect, OutputEffect
from hookdepth.engine.passes import measure
from hookdepth.errors import whole_number
from hookdepth.model.ambient import plainly
from hookdepth.model.checking import check, checked
from hookdepth.model.decoder import Decoder

KINDS = ("sites", "skips", "tokens", "heads", "neurons", "cuts", "several", "lengths", "gradients")
_ROUNDING = 1e-4  # of the largest value, in float32: as SPEC has it for runs that share work


@plainly
def verify(model: Decoder, n: int = 6, seed: int = 0) -> Verification:
    """Compare the engine with plain single passes, on random branches of every kind, `n` of each.

        hookdepth.verify(model).ok      # True; print it for the table

    Per kind *right*: equal bits; *rounding*: as far apart as the dtype explains, which in 16 bits means that a float32
    copy of the model is right to 1e-4 of the largest value; or *wrong*, with the smallest case. Gradients are compared
    with finite differences.

    Raises:
        HookdepthError: no model, or one that the self-check refuses.
    """
    checked(model)
    n, began = whole_number("the number of branches", n, 1), time.perf_counter()
    check(model)
    found, floor = _verdicts(model, n, seed)
    if model.dtype in HALF and any(one.verdict == "wrong" for one in found):
        beside = {one.kind: one for one in _verdicts(_in_float32(model), n, seed)[0]}
        for one in found:
            if one.verdict == "wrong" and beside[one.kind].verdict != "wrong":
                one.verdict, one.case = "rounding", ""
    spent = time.perf_counter() - began
    dtype = str(model.dtype).removeprefix("torch.")
    about = (model.name, model.family.name, dtype, str(model.device), model.prefixes, floor, spent)
    return Verification(*about, found)


def _in_float32(model: Decoder) -> Decoder:
    copied = Decoder(copy.deepcopy(model.hf).float(), model.tokenizer, name=model.name, family=model.family)
    check(copied)
    return copied


def _verdicts(model: Decoder, n: int, seed: int) -> tuple[list[Verdict], float]:
    source = random.Random(seed)
    rows = int(model.hf.get_input_embeddings().weight.shape[0])
    tokens = [token for token in range(rows) if token not in model.placeholders]
    prompts = [[source.choice(tokens) for _ in range(length)] for length in LENGTHS]
    found, floor = [], 0.0
    with model.evaluating():
        clean = [plain_pass(model, prompt) for prompt in prompts]
    for kind in KINDS:
        branches = list(random_branches(model, kind, n, source)) if kind != "gradients" else []
        if kind == "gradients":
            found.append(compare_slopes(model, tokens, source))
        elif branches:
            verdict, own = _compared(model, kind, prompts, branches, clean, source.choice(tokens))
            found.append(verdict)
            floor = max(floor, own)
        else:
            found.append(Verdict(kind))
    return found, floor


def _compared(
    model: Decoder,
    kind: str,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    clean: Sequence[dict[Any, Tensor]],
    token: int,
) -> tuple[Verdict, float]:
    logit = Custom("logit", lambda view: view.logits[..., token].float(), "mean")
    # Measurements of changes alone let passes leave out what is left of them; the others need it. Prompts as short as
    # these are seldom worth a pass of their own: branches with cuts hand on keys and values though it does not pay, and
    # run once as it is planned.
    ways = (True, False) if any(branch.cut is not None for branch in branches) else (True,)
    changes = [measure(model, prompts, branches, [OutputEffect()], hand_on=way) for way in ways]
    values = measure(model, prompts, branches, [LayerEffect(), logit], hand_on=True)
    ours = [*(one.output["output"] for one in changes), values.output["logit"], *values.layer["effect"].T]
    with model.evaluating():
        plainly_run = (plain_pass(model, prompts[one.prompt], one, clean[one.prompt]) for one in branches)
        rows = [
            _measured(branch, clean[branch.prompt], own, token)
            for branch, own in zip(branches, plainly_run, strict=True)
        ]
    output, *others = torch.tensor(rows).T
    theirs = [*[output] * len(ways), *others]
    verdict = Verdict(kind, "right", len(branches), effect=output.max().item())
    wrong: set[int] = set()
    for mine, plain in zip(ours, theirs, strict=True):
        apart = (mine - plain).abs()
        verdict.difference = max(verdict.difference, apart.max().item())
        wrong |= set((~(apart <= _ROUNDING * max(1.0, plain.abs().max().item()))).nonzero().flatten().tolist())
    if wrong:
        smallest = min(wrong, key=lambda number: (len(branches[number].interventions), number))
        verdict.verdict, verdict.case = "wrong", _shown(branches[smallest])
    elif verdict.difference:
        verdict.verdict = "rounding"
    return verdict, max(one.null_effect for one in (*changes, values))


def _shown(branch: Branch) -> str:
    own = [
        f"{type(one).__name__} at {one.site} of layer {one.layer}, tokens {one.tokens}" for one in branch.interventions
    ]
    more = [f"{name} {value}" for name in ("cut", "measured") if (value := getattr(branch, name)) is not None]
    return "; ".join([*own, f"prompt {branch.prompt}", *more])


def _measured(branch: Branch, clean: dict[Any, Tensor], own: dict[Any, Tensor], token: int) -> list[float]:
    at, layers = branch.measured_positions(len(clean["logits"])), range(sum(isinstance(key, int) for key in clean) // 2)
    moved = torch.softmax(own["logits"][at], -1) - torch.softmax(clean["logits"][at], -1)
    added = [[one[layer] - one[~layer] for one in (clean, own)] for layer in layers]
    effects = [metrics.relative_change(a[at], b[at], a[at].norm(dim=-1)).max().item() for a, b in added]
    return [moved.norm(dim=-1).max().item(), own["logits"][at][:, token].mean().item(), *effects]
