"""lenses: what a layer's residual would predict, by three ways of carrying it to the end.

    found = hookdepth.analyse("demo", "lenses", dataset="demo-text", limit=84)
    found["linear.kl"], found["jacobian.kl"], found["jacobian.error"]       # [L+1], [L+1], [L]
    resid = resid_pre[3, 0]                                                 # [token, d], of layer 3
    model.norm(resid @ found["linear.weight"][3] + found["linear.bias"][3])      # as the linear lens sees it
    model.norm(resid @ found["jacobian.weight"][3].T)                            # as the Jacobian lens does

The logit lens takes h_l for the final residual, the linear lens its ridge regression on h_l (`ridge`), the Jacobian
lens J_l h_l (`jacobian`), and final norm and unembedding follow. Prompts are split as in linear maps: KL(lens‖final)
and the overlap of the top 5 are of those that test, at `lens_tokens` of each or all, with token-weighted means. The
Jacobian is of the others: each of
its rows of `samples` prompts, the first `jacobian_tokens` of each; its error is the standard error over prompts,
relative to J.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookdepth.analyses.base import Analysis, token_means
from hookdepth.analyses.jacobian import mean_jacobian
from hookdepth.analyses.lens import stream_sums
from hookdepth.analyses.ridge import refuse_few, ridge_map, split_prompts, states_of, stream_of
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.engine.work import Work, plain_work
from hookdepth.errors import HookdepthError
from hookdepth.report.figures import Bars, Lines
from hookdepth.results import Result

_LENSES = {"logit": "logit lens", "linear": "linear lens", "jacobian": "Jacobian lens"}
_KINDS = ("kl", "topk_overlap")


class Lenses(Analysis):
    """Three lenses: analyse(model, "lenses", dataset="demo-text", limit=84)["linear.kl"]."""

    name = "lenses"
    question = "what each layer would predict, by the logit, a linear and the Jacobian lens"
    heading = "Lenses: logit, linear and Jacobian"
    order = 22
    options = ("keep_front", "jacobian_tokens", "lens_tokens")
    keep_front = 1
    samples = 2
    tensors = {
        **{f"{lens}.{kind}": "point" for lens in _LENSES for kind in _KINDS},
        "jacobian.error": "layer",
        "linear.weight": "point width width",
        "linear.bias": "point width",
        "jacobian.weight": "point width width",
    }
    figures = (
        Lines(
            "*.kl",
            "The lower a curve, the nearer is what that lens reads before a layer to the final prediction. Where the "
            "linear lens lies far below the logit lens, the prediction is there, but written in other directions.",
            label="KL divergence (nats)",
            caption="KL divergence from the final prediction",
            name="kl",
            labels=_LENSES,
            reduction="mean over tokens of the prompts that test",
            compared="linear",
        ),
        Lines(
            "*.topk_overlap",
            "How many of the five likeliest tokens of each lens are among the final five.",
            label="Top-5 overlap",
            caption="overlap of the five likeliest tokens",
            name="overlap",
            labels=_LENSES,
            reduction="mean over tokens of the prompts that test",
            compared="linear",
            over_training=None,
        ),
        Bars(
            "jacobian.error",
            "How well the mean Jacobian is known: its standard error over prompts as a share of its size. Where it "
            "nears 1, the Jacobian lens reads noise.",
            label="Relative error",
            caption="standard error of the mean Jacobian",
            name="error",
            reduction="over the prompts that do not test",
            over_training=None,
        ),
    )

    def items(self, subject: Subject) -> Sequence[int]:
        """All prompts make one item: no lens comes of a single one."""
        return range(1)

    def refuse(self, subject: Subject) -> None:
        """Too few prompts or training tokens."""
        super().refuse(subject)
        tokens = self.measured_tokens(subject)
        train, _, _ = split_prompts(len(tokens))
        refuse_few(sum(tokens[number] for number in train), subject.model.d_model, self.name)
        front, longest = self.front(subject.settings), subject.settings.jacobian_tokens
        if front >= longest:
            raise HookdepthError(
                f"--keep-front {front} leaves nothing of the {longest} tokens that the Jacobian lens is taken over",
                f"give --jacobian-tokens {front + 1} or more",
            )

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """The lenses from the prompts that train, then what they read in those that test."""
        model, prompts, front = subject.model, subject.inputs.prompts, self.front(subject.settings)
        train, valid, test = split_prompts(len(prompts))
        read = {number: (prompts[number], range(front, len(prompts[number]))) for number in range(len(prompts))}
        states = [states_of(model, [read[number] for number in part], on_pass) for part in (train, valid)]
        weight, bias = _linear_lens(states, model.device)
        others = [prompts[number] for number in sorted(train + valid)]
        longest = subject.settings.jacobian_tokens
        jacobian, error = mean_jacobian(model, others, front, self.samples, longest, on_pass)
        found: dict[str, list[Tensor]] = {f"{lens}.{kind}": [] for lens in _LENSES for kind in _KINDS}
        for number in test:
            with model.evaluating():
                ids, positions = read[number]
                h = stream_of(model, ids, spread(positions, subject.settings.lens_tokens)).to(model.device)
                exact = h.float()
                carried = {"logit": h, "linear": exact @ weight + bias[:, None]}
                carried["jacobian"] = exact @ jacobian.to(model.device).mT
                for lens, resid in carried.items():
                    for kind, sums in zip(
                        _KINDS, stream_sums(model, torch.cat([resid[:-1].to(h.dtype), h[-1:]])), strict=True
                    ):
                        found[f"{lens}.{kind}"].append(sums.cpu() / h.shape[1])
            on_pass()
        given = {name: torch.stack(own) for name, own in found.items()}
        given |= {"linear.weight": weight, "linear.bias": bias, "jacobian.weight": jacobian, "jacobian.error": error}
        return Partial({name: value.cpu() for name, value in given.items()}, len(prompts) + len(others))

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Means over all tokens that test, each prompt's own, and the lenses."""
        (whole,) = items
        _, _, test = split_prompts(len(subject.inputs.prompts))
        tokens = self.measured_tokens(subject)
        by_prompt = [name for name in whole if name.split(".")[1] in _KINDS]
        own = [{name: whole[name][place] for name in by_prompt} for place in range(len(test))]
        lenses = {name: value for name, value in whole.items() if name not in by_prompt}
        return token_means(own, [tokens[number] for number in test]) | lenses

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """Which prompts test: `per_prompt.…` is of these, in this order."""
        return {"tested": split_prompts(len(subject.inputs.prompts))[2]}

    def notes(self, result: Result) -> list[str]:
        """At how many tokens the lenses are read, where not at all."""
        most = (result.metadata.get("settings") or {}).get("lens_tokens")
        return [f"The lenses are read at {most} tokens of each prompt at most, evenly spread."] if most else []

    def work(self, subject: Subject) -> Work:
        """A pass of each prompt, those that test unembedded three times, and the way back for each row of the Jacobian,
        which costs what the way there does, and begins at the last residual."""
        model, prompts = subject.model, subject.inputs.prompts
        longest = min(subject.settings.jacobian_tokens, max(map(len, prompts), default=0))
        tokens = longest * model.d_model * self.samples * model.n_layers
        algebra = 2.0 * (model.n_layers + 1) * sum(map(len, prompts)) * model.d_model**2 * 2
        _, _, test = split_prompts(len(prompts))
        most = subject.settings.lens_tokens or max(map(len, prompts), default=0)
        read = 3 * (model.n_layers + 1) * sum(min(len(prompts[number]), most) for number in test)
        work = replace(plain_work(model, prompts, unembedded=1, kept=4 * model.n_layers), positions=read)
        return work + Work(token_layers=tokens, width=longest, algebra=algebra)


def _linear_lens(states: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and offsets of each point, [L+1, d, d] and [L+1, d]; those of the last are the identity's."""
    last = [one[:, -1].to(device).float() for one in states]
    width = states[0].shape[2]
    weights, biases = [], []
    for point in range(states[0].shape[1] - 1):
        weight, bias = ridge_map([one[:, point].to(device).float() for one in states], last)
        weights.append(weight)
        biases.append(bias)
    weights.append(torch.eye(width, device=device))
    biases.append(torch.zeros(width, device=device))
    return torch.stack(weights), torch.stack(biases)


def spread(positions: Sequence[int], most: int | None) -> list[int]:
    """At most so many of them, evenly spread, each in the middle of its share: spread(range(10), 2)   # [2, 7]"""
    count = min(len(positions), most or len(positions))
    return [positions[(2 * number + 1) * len(positions) // (2 * count)] for number in range(count)]
