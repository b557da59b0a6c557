"""The sites of a layer, and the hooks that read and write there.

    sites = Sites(found, "mine", family, model.layer_device)
    handle = sites.on("z", 3, lambda z: z * 0.5)     # z: [row, token, head, head_dim]
    handle.remove()

Sites of a layer, in the order in which a forward pass meets them: resid_pre → z → attn_out → resid_mid → neurons →
mlp_out → resid_post. A family may have more: `mixer_out` in front (a state-space mixer, alone or beside attention) and
`extra_out` behind the MLP (Gemma 4's embedding of the token, layer by layer). Nothing above this module knows that a
layer's output is a tensor from transformers 4.54 on and a tuple before, that attention takes its input by keyword, or
what a family multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookdepth.errors import HookdepthError
from hookdepth.model.contributions import INNER_SITE, Contribution, Found, module_at, width_read
from hookdepth.model.families import Family
from hookdepth.model.hooks import (
    Edit,
    Handles,
    Projected,
    by_head,
    copied,
    input_hook,
    middle_change,
    multiplied,
    output_hook,
    pattern_hook,
    projected,
    register,
    value_of,
    with_hidden,
    with_value,
)
from hookdepth.model.turns import OwnThread

SITES = ("resid_pre", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post")
"""Sites of a layer of attention and MLP, in the order in which a forward pass meets them."""
ORDER = ("resid_pre", "mixer_out", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "extra_out", "resid_post")
"""Those of any layer."""
AT_OUTPUT = len(ORDER) - 1
"""The place of the last site: what joins there does not run through the layer."""
READ_ONLY = ("q", "k", "v", "pattern")
"""What can be read besides: before positions are applied [row, token, head, head_dim]; and [row, head, query, key]."""
PARTS = ("layer", "attn", "mlp", "mixer", "extra")
"""What a layer can be skipped by: the whole, or one contribution."""
_INSIDE = {site: part for part, site in INNER_SITE.items()}


def part_site(part: str) -> str:
    """Where a part's output is: part_site("attn") is "attn_out", part_site("layer") "resid_post"."""
    return "resid_post" if part == "layer" else f"{part}_out"


def part_of(site: str) -> str | None:
    """The contribution that a site is in; None for the residual stream: part_of("z") is "attn"."""
    return _INSIDE.get(site) or (site.removesuffix("_out") if site.endswith("_out") else None)


class Sites:
    """The hooks of one model; see the module. `device` says where a layer runs."""

    def __init__(self, found: Found, name: str, family: Family, device: Callable[[int], torch.device]) -> None:
        self.found, self.name, self.family, self.device = found, name, family, device
        self.parallel = False  # whether the MLP reads the layer's input; the self-check finds out
        self._known: dict[tuple[int, bool], tuple[str, ...]] = {}
        self.shapes: dict[tuple[str, int, bool], tuple[int, ...]] = {}  # of a token's values, as they are asked for

    def of(self, layer: int) -> tuple[str, ...]:
        """The sites of a layer, in their order."""
        key = layer, self.parallel
        if key not in self._known:  # every intervention of a plan asks
            self._known[key] = self._sites(layer)
        return self._known[key]

    def _sites(self, layer: int) -> tuple[str, ...]:
        parts = self.found.contributions[layer]
        inside = [f"{part}_out" for part in parts]
        inside += [INNER_SITE[part] for part, own in parts.items() if part in INNER_SITE and own.inner]
        if "attn" in parts and "mlp" in parts and not self.parallel:
            inside.append("resid_mid")
        return tuple(site for site in ORDER if site in ("resid_pre", "resid_post") or site in inside)

    def on(self, site: str, layer: int, edit: Edit, raw: bool = False) -> Handles:
        """Hook a site. `raw`: what the module gave, before the family multiplies it."""
        if site not in self.of(layer) and site not in READ_ONLY:
            raise self.missing(site, layer)
        if site == "resid_pre":
            return Handles(self._on_input(layer, edit))
        if site == "resid_post":
            return Handles(self.found.layers[layer].register_forward_hook(partial(output_hook, edit)))
        if site == "resid_mid":
            return self._on_middle(layer, edit)
        if site in READ_ONLY:
            return self._on_attention(site, layer, edit)
        own = self.found.contributions[layer][part_of(site) or ""]
        if site in INNER_SITE.values():
            assert own.inner is not None
            return self._rows_apart(
                layer, own, edit if site != "z" else by_head(edit, own.heads), own.inner, input_hook
            )
        scaled = edit if raw or own.scale == 1.0 else partial(multiplied, edit, own.scale)
        if self.family.in_place:
            scaled = partial(copied, scaled)
        return self._rows_apart(layer, own, scaled, own.output, output_hook)

    def on_reads(self, part: str, layer: int, edit: Edit) -> Handles:
        """Hook what a contribution's module reads, the (normed) stream. `edit` may return fewer rows."""
        own = self.found.contributions[layer][part]
        return self._rows_apart(layer, own, edit, own.reads, input_hook)

    def missing(self, site: str, layer: int) -> HookdepthError:
        """The error for a site that a layer does not have."""
        what = f"layer {layer} of {self.name!r} has no {site}{self._why_not(site, layer)}"
        having = [str(other) for other in range(len(self.found.contributions)) if site in self.of(other)]
        others = f"; {site} is there in layers {', '.join(having)}" if having else ""
        return HookdepthError(what, f"it has {', '.join(self.of(layer))}{others}")

    def _why_not(self, site: str, layer: int) -> str:
        parts = self.found.contributions[layer]
        if site == "resid_mid" and self.parallel:
            return ": its MLP reads the layer's input, beside attention"
        if site == "neurons" and "mlp" in parts:
            return ": its MLP has no single down projection (experts?)"
        if site == "z" and "attn" in parts:
            return ": its mixer has no heads"
        return ""

    def _on_input(self, layer: int, edit: Edit) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            # accelerate would move it there only after the hooks.
            edited = edit(hidden.to(self.device(layer)))
            now = hidden if edited is None else edited
            rows = now.shape[0]
            return with_hidden(now, tuple(_mask_for(rows, one) for one in args), self._for_rows(kwargs, rows))

        return self.found.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def _for_rows(self, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
        """What a layer or an attention is given beside the stream, for so many rows: it was made for the prompts."""
        alibi = kwargs.get("alibi")
        if "attention_mask" in kwargs:
            kwargs = {**kwargs, "attention_mask": _mask_for(rows, kwargs["attention_mask"])}
        turned = kwargs.get("position_embeddings")
        if isinstance(turned, tuple) and all(isinstance(one, Tensor) and 1 < one.shape[0] != rows for one in turned):
            kwargs = {**kwargs, "position_embeddings": tuple(one[:1] for one in turned)}
        # A bias for every row and head, the same for all rows; Falcon may give rows an axis of their own.
        if isinstance(alibi, Tensor):
            each = 1 if alibi.ndim == 4 else self.found.heads
            if alibi.shape[0] != rows * each:
                kwargs = {**kwargs, "alibi": alibi[:each].repeat(rows, *(1,) * (alibi.ndim - 1))}
        return kwargs

    def _rows_apart(self, layer: int, own: Contribution, edit: Edit, module: nn.Module, hook: Any) -> Handles:
        fit = self._for_rows if own.reads is module else None
        if not self.family.flat:
            return Handles(register(module, partial(hook, edit, fit) if hook is input_hook else partial(hook, edit)))
        seen = [1]

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[0] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        def apart(value: Tensor) -> Tensor | None:
            if value.ndim != 2:
                return edit(value)
            edited = edit(value.view(-1, seen[0], value.shape[-1]))
            return None if edited is None else edited.flatten(0, 1)

        body = partial(hook, apart, fit) if hook is input_hook else partial(hook, apart)
        # Behind the hooks that may change it, the number of tokens is the same.
        return Handles(
            self.found.layers[layer].register_forward_pre_hook(note, with_kwargs=True), register(module, body)
        )

    def _on_middle(self, layer: int, edit: Edit) -> Handles:
        """resid_mid is no module's output: what attention adds is changed so that the sum is what is wanted."""
        before: list[Tensor] = []

        def keep(value: Tensor) -> None:
            before[:] = [value]

        def add(value: Tensor) -> None:
            before[0] = before[0] + value

        def middle(value: Tensor) -> Tensor | None:
            mid = before[0] + value
            edited = edit(mid)
            return None if edited is None else middle_change(before[0], value, mid, edited)

        sites = self.found.contributions[layer]
        beside = [self.on("mixer_out", layer, add)] if "mixer" in sites else []
        return Handles(self.on("resid_pre", layer, keep), *beside, self.on("attn_out", layer, middle))

    def _on_attention(self, site: str, layer: int, edit: Edit) -> Handles:
        own = self.found.contributions[layer].get("attn")
        if own is None or own.inner is None:
            raise self.missing(site, layer)
        if site == "pattern":
            return Handles(register(own.reads, partial(pattern_hook, edit, self.name)))
        size = int(getattr(own.reads, "head_dim", width_read(own.inner) // own.heads))
        projection = module_at(own.reads, f"{site}_proj") or module_at(own.reads, f"attention.{site}_proj")
        what, form = f"{site} of layer {layer} of {self.name!r}", ""
        if projection is None and self.family.fused:
            projection, form = module_at(own.reads, self.family.fused), "by head" if self.family.by_head else "fused"
        elif site == "q":
            size, form = int(getattr(own.reads, "qk_head_dim", size)), "gated" if self.family.gated else ""
        if projection is None:
            problem = f"{what} cannot be read: it has no {site}_proj of its own"
            raise HookdepthError(problem, "read z, or attention patterns")
        body = partial(projected, edit, Projected(site, what, size, own.heads, form))
        return Handles(projection.register_forward_hook(partial(output_hook, body)))

    def only_at(self, layer: int, tokens: Int[Tensor, " token"]) -> Handles:
        """See `Decoder.mlp_only_at`; no hooks where the MLP is not one plain module with a hidden layer."""
        own = self.found.contributions[layer].get("mlp")
        beside = [] if own is None else [own.reads, *self.found.layers[layer].children()]
        if own is None or own.inner is None or own.output not in beside or self.family.flat:
            return Handles()
        if "extra" in self.found.contributions[layer]:
            return Handles()
        length, mine = 0, OwnThread()

        def narrow(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            nonlocal length
            if not mine:
                return None
            length = args[0].shape[1]
            return (args[0].index_select(1, tokens.to(args[0].device)), *args[1:])

        def widen(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not mine:
                return None
            value = value_of(output)
            zeros = value.new_zeros(value.shape[0], length, value.shape[2])
            return with_value(zeros.index_copy(1, tokens.to(value.device), value), output)

        return Handles(
            own.reads.register_forward_pre_hook(narrow), own.reads.register_forward_hook(widen, prepend=True)
        )


def _mask_for(rows: int, given: Any) -> Any:
    """Masks made for several unpadded rows are copies of one: one broadcasts over grown rows."""
    made_for_others = isinstance(given, Tensor) and given.ndim == 4 and 1 < given.shape[0] != rows
    return given[:1] if made_for_others else given
