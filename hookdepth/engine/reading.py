"""Hooks that read, and are gone afterwards whatever happens.

from hookdepth.engine.reading import capture

with capture(model, "resid_post", "attn_out", layers=[3, 4]) as acts:
    model.forward(token_ids)
acts["resid_post", 3]            # [row, token, width]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.errors import HookdepthError, choose, shown, whole_number
from hookdepth.model.checking import checked
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.model.sites import ORDER, READ_ONLY
from hookdepth.model.turns import in_this_thread, turn_of


class Activations(dict[tuple[str, int], Tensor]):
    """Captured values by (site, layer): those of the last forward pass.

    acts["resid_pre", 0]         # [row, token, width]
    acts.stack("resid_pre")      # [layer, row, token, width], captured layers in order
    """

    def stack(self, site: str) -> Float[Tensor, "layer row token width"]:
        """All captured layers of a site, in order, on the device of the first.

        acts.stack("resid_pre")[3]      # [row, token, width]
        """
        layers = [self[key] for key in sorted(self) if key[0] == site]
        return torch.stack([value.to(layers[0].device) for value in layers])

    def grad(self, site: str, layer: int) -> Tensor:
        """The gradient of what was called `backward` on, by a captured value: acts.grad("attn_out", 3).

        Raises:
            HookdepthError: there is none.
        """
        if (found := self[site, layer].grad) is None:
            raise HookdepthError(f"no gradient at {site} {layer}", "capture with grad=True, and call backward() before")
        return found


@contextmanager
def capture(
    model: Decoder, *sites: str, layers: Iterable[int] | None = None, grad: bool = False
) -> Iterator[Activations]:
    """Keep what passes the named sites while the block runs.

        with capture(model, "mlp_out") as acts:
            model.hf(input_ids)
        acts["mlp_out", 7]

        with model.evaluating(grad=True), capture(model, "attn_out", grad=True) as acts:
            model.unembed(model.forward(input_ids)[:, -1])[0, 9].backward()
        acts.grad("attn_out", 3)     # [row, token, width], how logit 9 moves with it

    Args:
        model: from `load` or `wrap`.
        sites: at least one of `model.sites.ORDER`, and of q, k, v and pattern, which can only be read.
        layers: default all that have the sites.
        grad: keep them in the graph, and their gradients once `backward` was called. Where no parameter wants a
            gradient, the graph begins at the first that is captured.

    Yields:
        Activations, without `grad` detached, on the devices where they arose: of this thread's forward passes, in the
        state (autocast, inference mode) in which they are called. Other threads that use hookdepth on this model wait
        meanwhile.

    Raises:
        HookdepthError: unknown site, or a layer that the model does not have; a forward pass without gradients, where
            they are wanted.
    """
    checked(model)
    if not sites:
        raise HookdepthError("capture was given no site", f"name one or more of {', '.join(ORDER)}")
    for site in sites:
        choose("site", site, (*ORDER, *READ_ONLY))
        if grad and site in READ_ONLY:
            raise HookdepthError(f"the site {site} can only be read, without gradients", f"use {', '.join(ORDER)}")
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise HookdepthError(f"the layers are {shown(layers)}", "give a list, e.g. layers=[3]")
    given = range(model.n_layers) if layers is None else layers
    chosen = [whole_number("a layer to capture", layer) for layer in given]
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise HookdepthError(f"layer {layer} of a model of {model.n_layers}", f"give 0 to {model.n_layers - 1}")
    acts = Activations()

    def keep(key: tuple[str, int], value: Tensor) -> Tensor | None:
        acts[key] = _in_graph(value) if grad else value.detach()
        return acts[key] if grad else None  # returned, so that what is captured is what is passed on

    with turn_of(model.hf), ExitStack() as hooks:
        for site in sites:
            for layer in chosen if layers is not None else _having(model, site):
                hooks.enter_context(model.on(site, layer, in_this_thread(partial(keep, (site, layer)))))
        yield acts


def _in_graph(value: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        raise HookdepthError("capture(grad=True) around a pass without gradients", "use model.evaluating(grad=True)")
    held = value if value.requires_grad else value.detach().requires_grad_()
    held.retain_grad()
    return held


def points_of(model: Decoder, prompt: Sequence[int], front: int = 0) -> Float[Tensor, "point token width"]:
    """The residual stream of one forward pass before each layer and after the last, at the tokens from `front` on.

    points_of(model, ids)   # [L+1, token, d]
    """
    last = model.n_layers - 1
    with model.evaluating(), capture(model, "resid_pre") as acts, capture(model, "resid_post", layers=[last]) as end:
        model.forward(send([list(prompt)], model.device))
    points = [*(acts["resid_pre", layer] for layer in range(model.n_layers)), end["resid_post", last]]
    return torch.stack([point[0, front:].to(points[-1].device) for point in points])


@dataclass
class LayerSites:
    """What one layer read, added (by part: attn, mlp, …) and gave: [row, token, width], in the model's dtype."""

    resid_pre: Tensor
    added: dict[str, Tensor]
    resid_post: Tensor


def _having(model: Decoder, site: str) -> list[int]:
    """The layers that have a site; all of them where none has, so that the error says why."""
    needed = "z" if site in READ_ONLY else site
    return [layer for layer in range(model.n_layers) if needed in model.sites.of(layer)] or [0]


def first_not_finite(model: Decoder, token_ids: Sequence[int]) -> int | None:
    """The first layer whose output on a prompt is not finite, L where only the logits are not; None where all is well.

    first_not_finite(model, ids)   # 3
    """
    bad: list[int] = []

    def look(layer: int, sites: LayerSites) -> None:
        if not torch.isfinite(sites.resid_post).all():
            bad.append(layer)

    with model.evaluating():
        with each_layer(model, look):
            hidden = model.forward(torch.tensor([list(token_ids)], device=model.device))
        if not bad and not torch.isfinite(model.unembed(hidden[:, -1])).all():
            bad.append(model.n_layers)
    return min(bad, default=None)


@contextmanager
def each_layer(model: Decoder, body: Callable[[int, LayerSites], None]) -> Iterator[None]:
    """Call `body(layer, sites)` whenever a layer is done in this thread: reduce there, where the data is."""
    seen: dict[str, Tensor] = {}

    def note(site: str, value: Tensor) -> None:
        seen[site] = value

    def finish(layer: int, resid_post: Tensor) -> None:
        sites = LayerSites(seen.pop("resid_pre"), dict(seen), resid_post)
        seen.clear()
        body(layer, sites)

    with turn_of(model.hf), ExitStack() as hooks:
        for layer in range(model.n_layers):
            hooks.enter_context(model.on("resid_pre", layer, in_this_thread(partial(note, "resid_pre"))))
            for part in model.sites.found.contributions[layer]:
                hooks.enter_context(model.on(f"{part}_out", layer, in_this_thread(partial(note, part))))
            hooks.enter_context(model.on("resid_post", layer, in_this_thread(partial(finish, layer))))
        yield
