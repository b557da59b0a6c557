"""One prompt through a model's own forward call, under one plain hook a site.

The hooks here are written apart from the engine's and the adapter's, so that a mistake there cannot be made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hookdepth.engine.ablation import Ablate, Clamp
from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import AddVector, Patch, Skip
from hookdepth.engine.tokens import positions
from hookdepth.model.contributions import INNER_SITE
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import part_of


def plain_pass(
    model: Decoder, prompt: Sequence[int], branch: Branch | None = None, clean: dict[Any, Tensor] | None = None
) -> dict[Any, Tensor]:
    """One prompt through the model's own forward call. Keys: l and ~l, a layer's output and input; sites; logits."""
    seen: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for site, layer in ((site, n) for n in range(model.n_layers) for site in model.sites.of(n)):
            edit = _edit(branch, clean, seen, (site, layer), len(prompt))
            if site == "attn_out" and "resid_mid" in model.sites.of(layer):
                edit = _with_middle(edit, _edit(branch, clean, seen, ("resid_mid", layer), len(prompt)), seen, layer)
            _hook(model, stack, site, layer, edit)
        output = model.hf(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
        seen["logits"] = output[0][0].float().cpu()
    for layer in range(model.n_layers):
        seen[layer], seen[~layer] = seen["resid_post", layer].float().cpu(), seen["resid_pre", layer].float().cpu()
    return seen


def _edit(
    branch: Branch | None, clean: Any, seen: dict[Any, Tensor], key: tuple[str, int], length: int
) -> Callable[[Tensor], Tensor]:
    own = [one for one in branch.interventions if (one.site, one.layer) == key] if branch else []

    def edit(value: Tensor) -> Tensor:  # [token, …]
        value = value.clone() if own else value
        for one in own:
            at = [t for t in positions(one.tokens, length) if branch is None or branch.cut is None or t < branch.cut]
            part = value if one.head is None else value[:, one.head]
            part[at] = _new(one, part[at], at, clean[key] if one.head is None else clean[key][:, one.head], seen)
        seen[key] = value
        return value

    return edit


def _with_middle(
    attn: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor], seen: dict[Any, Tensor], layer: int
) -> Callable[[Tensor], Tensor]:
    """resid_mid is no module's output: attention adds what makes the sum what it is to be."""

    def edit(value: Tensor) -> Tensor:
        value = attn(value)
        before = seen["resid_pre", layer] + seen.get(("mixer_out", layer), 0.0)
        mid = before + value
        changed = middle(mid)
        return torch.where(changed == mid, value, changed - before)

    return edit


def _new(one: Intervention, old: Tensor, at: list[int], clean: Tensor, seen: dict[Any, Tensor]) -> Tensor:
    if isinstance(one, Skip):
        return seen["resid_pre", one.layer][at] if one.part == "layer" else torch.zeros_like(old)
    if isinstance(one, Clamp):
        index = torch.tensor(one.index, device=old.device)
        return old.index_fill(-1, index, one.value)
    if isinstance(one, Ablate):
        mean = clean.float().mean(0).to(old.dtype)
        return mean.expand_as(old) if one.value == "mean" else torch.zeros_like(old)
    assert isinstance(one, Patch | AddVector)
    value = one.value.to(old.device)
    return (old.float() + value).to(old.dtype) if isinstance(one, AddVector) else value.to(old.dtype).expand_as(old)


def _hook(model: Decoder, stack: ExitStack, site: str, layer: int, edit: Callable[[Tensor], Tensor]) -> None:
    module, own = model.layers[layer], model.sites.found.contributions[layer].get(part_of(site) or "")

    def read(args: Any, kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        wide = value.reshape(-1, value.shape[-1])  # the one prompt's tokens
        heads = own.heads if own is not None and site == "z" else 0
        new = edit(wide.unflatten(-1, (heads, -1)) if heads else wide).reshape(value.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def gave(output: Any, scale: float) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        wide = value.reshape(-1, value.shape[-1])
        added = wide if scale == 1.0 else wide * scale
        new = edit(added.clone())
        new = torch.where(new == added, wide, new / scale).reshape(value.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if site == "resid_mid":
        return  # edited with what attention adds
    if site == "resid_pre" or site in INNER_SITE.values():
        where = module if own is None else own.inner
        assert where is not None
        handle = where.register_forward_pre_hook(lambda _m, args, kwargs: read(args, kwargs), with_kwargs=True)
    elif own is None:
        handle = module.register_forward_hook(lambda _m, _a, output: gave(output, 1.0))
    else:
        handle = own.output.register_forward_hook(lambda _m, _a, output: gave(output, own.scale))
    stack.callback(handle.remove)
