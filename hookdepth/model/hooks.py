"""The bodies of hooks: what a module is given or gives, read and replaced, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookdepth.errors import HookdepthError

Edit = Callable[[Tensor], Tensor | None]
"""A hook's body: gets a site's value, returns its replacement or None to leave it."""


class Handles:
    """Several hooks that come off together; a context manager as PyTorch's own handle is."""

    def __init__(self, *handles: RemovableHandle | Handles) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def middle_change(before: Tensor, attn: Tensor, mid: Tensor, edited: Tensor) -> Tensor:
    """What attention has to add so that `mid` becomes `edited`; what was not edited stays to the last bit."""
    return _kept(edited == mid, attn, (edited.float() - before.float()).to(attn.dtype))


def rescaled(change: Callable[[Tensor], Tensor], raw: Tensor, scale: float) -> Tensor:
    """A change of what is added, made to what is multiplied first; what it leaves alone stays to the last bit."""
    if scale == 1.0:
        return change(raw)
    added = raw * scale
    changed = change(added.clone())
    return _kept(changed == added, raw, changed / scale)


def _kept(same: Tensor, own: Tensor, changed: Tensor) -> Tensor:
    """`own` to the last bit where nothing was edited; gradients flow to what an edit gave all the same."""
    if changed.requires_grad:
        own = own.detach() + (changed - changed.detach())
    return torch.where(same, own, changed)


@dataclass(frozen=True)
class Projected:
    """What of a projection is asked for: q, k or v, by head.

    Attributes:
        site: q, k or v; what: how an error calls it.
        size, heads: of a query head, and how many of them.
        form: "" of a projection of its own, "gated" where each query is followed by a gate, "fused" where q, k and v
            follow one another, "by head" where they do so in each head.
    """

    site: str
    what: str
    size: int
    heads: int
    form: str = ""

    def of(self, given: Tensor) -> Tensor:
        """[row, token, head, size] of what the projection gives."""
        each = given.unflatten(-1, (-1, self.size)) if given.shape[-1] % self.size == 0 else given[..., None, :]
        which, found = ("q", "k", "v").index(self.site), each.shape[-2]
        if self.form == "by head":
            each = each.unflatten(-2, (self.heads, 3))[..., which, :]
        elif self.form == "fused":
            others = (found - self.heads) // 2
            each = each.split([self.heads, others, others], -2)[which]
        elif self.form == "gated":
            each = each.unflatten(-2, (self.heads, 2))[..., 0, :]
        elif self.heads % found or (which == 0 and found != self.heads):
            problem = f"{self.what} cannot be read: {given.shape[-1]} numbers a token, for {self.heads} query heads"
            raise HookdepthError(f"{problem} of {self.size}", "read z, or attention patterns")
        return each.clone()  # a fused kernel applies positions in place


def projected(edit: Edit, asked: Projected, given: Tensor) -> None:
    """An edit, which only reads, of a part of what a projection gives."""
    edit(asked.of(given))


def by_head(edit: Edit, heads: int) -> Edit:
    """An edit of [row, token, head, head_dim], made one of the projection's input."""

    def each(value: Tensor) -> Tensor | None:
        edited = edit(value.unflatten(-1, (heads, -1)))
        return None if edited is None else edited.flatten(-2)

    return each


def multiplied(edit: Edit, scale: float, raw: Tensor) -> Tensor | None:
    """An edit of what is added, where the module's output is multiplied first."""
    edited = edit(raw * scale)
    if edited is None:
        return None
    return rescaled(lambda _: edited, raw, scale) if edited.shape == raw.shape else edited / scale


def copied(edit: Edit, value: Tensor) -> Tensor:
    """What the layer gets is never what was read, since it adds to it in place."""
    edited = edit(value)
    return (value if edited is None else edited).clone()


def register(module: nn.Module, hook: Any) -> RemovableHandle:
    """A hook in front of a module, or behind it, by its body."""
    if hook.func is input_hook:
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook)


def input_hook(edit: Edit, fit: Any, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In front of a module: `edit` gets what it reads; `fit` is told the rows that are left."""
    edited = edit(args[0] if args else kwargs["hidden_states"])
    if edited is None:
        return None
    return with_hidden(edited, args, fit(kwargs, edited.shape[0]) if fit else kwargs)


def output_hook(edit: Edit, _module: nn.Module, _args: Any, output: Any) -> Any:
    """Behind a module: `edit` gets its output, or the first of a tuple."""
    edited = edit(value_of(output))
    return None if edited is None else with_value(edited, output)


def pattern_hook(edit: Edit, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    """Behind attention: `edit` gets its weights."""
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, Tensor):
        raise HookdepthError(
            f"{name!r} gives no attention patterns with this kernel", 'load it with attn_implementation="eager"'
        )
    edit(weights)


def with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of a module with another stream."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def value_of(output: Any) -> Tensor:
    """The output of a module, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_value(value: Tensor, output: Any) -> Any:
    """The output of a module with another value, in a tuple where it was in one."""
    return (value, *output[1:]) if isinstance(output, tuple) else value
