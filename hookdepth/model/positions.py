"""Rotary factors that depend on a prompt's length, so that every prompt gets those of that prompt alone.

    rotary = LengthDependent(hf_model.model)
    rotary.key(12) == rotary.key(90)      # False where the two lengths have other factors
    with rotary.of_length(90):
        hf_model.model(input_ids=torch.tensor([[3] * 12]))   # the first 12 tokens of a prompt of 90

Two kinds of rotary embedding look at the positions of a forward call: `longrope` (Phi 3) takes other factors where one
lies beyond the original context, and `dynamic` scaling stretches them with the longest position seen, and keeps
them stretched for the calls that follow. A pass that computes the beginning of a prompt, or several prompts, would get
the factors of what it happens to hold. Here a copy stands in for the rotary module while the engine runs: it
computes the factors of the whole prompt and returns those at the pass's positions. The module itself, and the state
that the user's own calls left in it, is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth.model.turns import OwnThread


class LengthDependent:
    """The rotary modules of a decoder whose factors depend on the length; most models have none. See the module."""

    def __init__(self, base: nn.Module) -> None:
        children = [(parent, *child) for parent in base.modules() for child in parent.named_children()]
        self.places = [(parent, name) for parent, name, child in children if depends_on_length(child)]

    @property
    def reach(self) -> int | None:
        """Most tokens that dynamic scaling stretches the context to; None where nothing stretches it."""
        kinds = [(module, kind) for module in self._modules() for kind in _rope_types(module).values()]
        reaches = [_reach(module.config) for module, kind in kinds if "dynamic" in kind]
        return min(reaches, default=None)

    def key(self, length: int) -> Hashable:
        """Equal for lengths that have the same factors: only such prompts may share a pass."""
        own = []
        for module in self._modules():
            for layer_type in _rope_types(module):
                positions = torch.arange(length, dtype=torch.long, device=_device(module))[None]
                cos, sin = _fresh(module)(positions.new_zeros(1, dtype=torch.float32), positions, **_named(layer_type))
                own += [tuple(part[0, :2].flatten().tolist()) for part in (cos, sin)]
        return tuple(own)

    @contextmanager
    def of_length(self, length: int) -> Iterator[None]:
        """While the block runs, this thread's calls get the factors of prompts of `length` tokens."""
        with self._replaced(lambda module: _OfLength(module, length)):
            yield

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """While the block runs, calls find the modules as if there had been none before, and leave nothing behind."""
        with self._replaced(_fresh):
            yield

    @contextmanager
    def _replaced(self, stand_in: Callable[[Any], nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for (parent, name), module in zip(self.places, self._modules(), strict=True):
                new = stand_in(module)
                stack.callback(parent._modules.__setitem__, name, module)
                parent._modules[name] = new
            yield

    def _modules(self) -> list[Any]:
        return [parent._modules[name] for parent, name in self.places]


class _OfLength(nn.Module):
    def __init__(self, module: nn.Module, length: int) -> None:
        super().__init__()
        self.module, self.fresh, self.length = module, _fresh(module), length
        self.own_thread = OwnThread()

    def forward(self, x: Tensor, position_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if not self.own_thread:
            return self.module(x, position_ids, **options)
        whole = torch.arange(self.length, dtype=position_ids.dtype, device=position_ids.device)
        cos, sin = self.fresh(x, whole[None], **options)
        here = position_ids.to(cos.device)  # [1, token] where the positions of all rows are the same
        return cos[0, here], sin[0, here]


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    kinds = getattr(module, "rope_type", None)
    return dict(kinds) if isinstance(kinds, dict) else {None: str(kinds)}


def depends_on_length(module: nn.Module) -> bool:
    """Whether a rotary module's factors do: depends_on_length(hf_model.model.rotary_emb)."""
    return any("dynamic" in kind or kind == "longrope" for kind in _rope_types(module).values())


def _named(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _device(module: nn.Module) -> torch.device:
    own = next(module.buffers()).device
    return torch.device("cpu") if own.type == "meta" else own


def _fresh(module: Any) -> Any:
    """A copy that no call has stretched. Of a model without weights: made anew."""
    if next(module.buffers()).is_meta:
        with torch.device("cpu"):
            return type(module)(module.config)
    fresh = copy.deepcopy(module, {id(module.config): module.config})
    # A call of one token sets dynamic scaling back to the original factors.
    first = torch.zeros(1, 1, dtype=torch.long, device=_device(module))
    for layer_type in _rope_types(module):
        fresh(first.new_zeros(1, dtype=torch.float32), first, **_named(layer_type))
    return fresh


def _reach(config: Any) -> int:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_type = [each for each in given.values() if isinstance(each, dict)] or [given]
    return int(config.max_position_embeddings * min(float(each.get("factor", 1.0)) for each in by_type))
