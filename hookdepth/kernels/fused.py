"""Fused kernels for one model: made when asked for, tried against the plain path, in use while the engine works.

    model.fused = Fused(model.hf, model.device)
    model.fused.differences          # {"norm": 0.0, "lens": 3e-7, …}: how far they were from the plain path

They need liger-kernel and Triton (`pip install 'hookdepth[gpu]'`) and a GPU. Numbers differ from those of the plain
path by rounding, so that what is compared must be run with the same kernels: they are part of what a result says
about its model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth import metrics
from hookdepth.errors import HookdepthError

_DEVICES = {"cuda"}
_MOST_DIFFERENCE = 1e-4  # of a reduction, in float32; other orders of the same sums are a hundredth of it apart


class Fused:
    """See the module.

        fused = Fused(hf_model, torch.device("cuda:0"))
        with fused.in_use(True):
            hf_model(token_ids)

    Attributes:
        replaced: kind → how many modules have a fused forward; differences: kind → the largest seen from the plain one.

    Raises:
        HookdepthError: no GPU, parts on several devices, no liger-kernel, or a kernel that gives other numbers.
    """

    def __init__(self, hf: nn.Module, device: torch.device) -> None:
        places = {parameter.device for parameter in hf.parameters()}
        if device.type not in _DEVICES or places != {device}:
            where = ", ".join(sorted(map(str, places)))
            raise HookdepthError(f"fused kernels for a model on {where}", "use one GPU, or --kernels plain")
        try:
            from hookdepth.kernels import _modules, _reductions
        except ImportError as error:
            raise HookdepthError(
                f"fused kernels need a package that is not installed ({error.name})", "pip install 'hookdepth[gpu]'"
            ) from error
        self.device, self.reductions = device, _reductions
        self.differences: dict[str, float] = {}
        self.on = False
        with _on(device):
            self._forwards = list(_modules.replacements(hf, self.differences))
            self._try_reductions()
        self.replaced = dict(Counter(kind for kind, _, _ in self._forwards))

    @contextmanager
    def in_use(self, on: bool) -> Iterator[None]:
        """Put the fused forwards on their modules, or take them off, until the block ends."""
        before = self.on
        with ExitStack() as stack:
            if on != before:
                stack.callback(self._switch, before)
                self._switch(on)
            if on:
                stack.enter_context(_on(self.device))
            yield

    def describe(self) -> dict[str, Any]:
        """What a result says about them: JSON-able."""
        packages = {name: version(name) for name in ("liger-kernel", "triton")}
        return {**packages, "replaced": self.replaced, "differences": self.differences}

    def layer_change(self, resid_pre: Tensor, resid_post: Tensor, clean_runs: slice, slots: Tensor | None) -> Tensor:
        """As `metrics.layer_change`: [row, token]."""
        own = torch.zeros(resid_pre.shape[0], dtype=torch.long, device=resid_pre.device) if slots is None else slots
        found: Tensor = self.reductions.layer_change(resid_pre, resid_post, own + clean_runs.start)
        return found

    def output_change(self, logits: Tensor) -> Tensor:
        """As `metrics.output_change`: [row, position]."""
        found: Tensor = self.reductions.output_change(logits)
        return found

    def lens(self, logits: Tensor, k: int) -> Tensor:
        """KL from the last point, and the share of the k likeliest tokens in common: [2, point, token]."""
        found: Tensor = self.reductions.lens(logits, k)
        return found

    def _switch(self, on: bool) -> None:
        for _, module, forward in self._forwards:
            if on:
                vars(module)["forward"] = forward
            else:
                del vars(module)["forward"]
        self.on = on

    def _try_reductions(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device)

        pre, post, logits = drawn(4, 3, 257), drawn(4, 3, 257), 3 * drawn(4, 3, 3001)
        slots = torch.tensor([0, 1, 0, 1], device=self.device)
        logs = logits.log_softmax(-1)
        divergence = metrics.kl_divergence(logs, logs[-1:])
        overlap = metrics.topk_overlap(logits, logits[-1:], 5)
        moved = (pre, post, slice(0, 2), slots)
        pairs = {
            "layer change": (metrics.layer_change(*moved), self.layer_change(*moved)),
            "output change": (metrics.output_change(logits), self.output_change(logits)),
            "lens": (torch.stack([divergence, overlap]), self.lens(logits, 5)),
        }
        for name, (plain, fused) in pairs.items():
            self.differences[name] = difference = (plain - fused).abs().max().item()
            if not difference <= _MOST_DIFFERENCE:
                raise HookdepthError(
                    f"the fused kernel of the {name} is {difference:.3g} off the plain path", "use --kernels plain", 1
                )


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Kernels start on the current device."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
