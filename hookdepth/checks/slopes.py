"""Gradients of the engine, against differences of plain passes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from hookdepth.checks.drawn import LENGTHS
from hookdepth.checks.plain import plain_pass
from hookdepth.checks.verdicts import Verdict
from hookdepth.engine.branches import Branch
from hookdepth.engine.gradients import Given, differentiate
from hookdepth.engine.interventions import Patch
from hookdepth.engine.measurements import Custom
from hookdepth.model.decoder import Decoder

HALF = (torch.bfloat16, torch.float16)
_PROMPTS = 5  # are tried for one beside which nothing jumps
_DIFFERENCES = 0.05  # of a derivative: what finite differences in float32 resolve
_STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def compare_slopes(model: Decoder, tokens: Sequence[int], source: random.Random) -> Verdict:
    """Along a random direction, against differences of plain passes, on a prompt beside which no router switches."""
    verdict = Verdict("gradients")
    if model.dtype in HALF:
        return verdict  # finite differences resolve nothing there
    for _ in range(_PROMPTS):
        verdict, smooth = _gradients_on(model, [source.choice(tokens) for _ in range(LENGTHS[0])], source)
        if smooth:
            return verdict
    return Verdict("gradients", case=f"a router switched beside each of {_PROMPTS} prompts")


def _gradients_on(model: Decoder, prompt: Sequence[int], source: random.Random) -> tuple[Verdict, bool]:
    """The verdict, and whether the differences settle as their steps become smaller: a jump makes them grow."""
    where = [("resid_pre", model.n_layers // 2), ("resid_post", 0)]
    branches = [Branch((Given(site, layer),)) for site, layer in where]
    logit = Custom("logit", lambda view: view.logits[..., 0].float(), "mean")
    with model.evaluating():
        clean = plain_pass(model, prompt)
        points = torch.stack([clean[place].float().cpu() for place in where])
        generator = torch.Generator().manual_seed(source.randrange(1 << 30))
        along = torch.randn(points.shape, generator=generator) * points.abs().mean()

        def difference(number: int, step: float) -> float:
            moved = [points[number] + sign * step * along[number] for sign in (1, -1)]
            up, down = (plain_pass(model, prompt, Branch((Patch(*where[number], one),)), clean) for one in moved)
            return float((up["logits"][:, 0].mean() - down["logits"][:, 0].mean()) / (2 * step))

        plain = [torch.tensor([difference(number, step) for step in _STEPS]) for number in range(len(where))]
    verdict = Verdict("gradients", "rounding", len(where))
    found = differentiate(
        model, prompt, branches, logit, lambda rows: points[list(rows)].to(model.device), lambda _rows, own: own
    )
    for part in found:
        for row, gradient in zip(part.branches, part.reduced, strict=True):
            own, expected = float((gradient * along[row]).sum()), plain[row]
            apart = float((expected - own).abs().min())
            verdict.difference = max(verdict.difference, apart)
            verdict.effect = max(verdict.effect, float(expected.abs().max()))
            if apart > _DIFFERENCES * float(expected.abs().min()) + 1e-4:
                verdict.verdict, verdict.case = "wrong", f"{where[row]}: {own:.4g}, differences {expected.tolist()}"
    settled = [(one.diff().abs() <= _DIFFERENCES * one[1:].abs() + 1e-4).any() for one in plain]
    return verdict, all(settled)
