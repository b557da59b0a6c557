"""What a model's forward pass allows, tried on a short input: nothing here is known of a family beforehand.

Whether the MLP reads the layer's input beside attention; whether a pass may start from another's keys and values;
whether the batch may grow inside the model, and prompts of several lengths share a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookdepth.metrics import differs_by_rounding
from hookdepth.model.families import unsupported
from hookdepth.model.shape import described
from hookdepth.model.turns import in_this_thread

if TYPE_CHECKING:
    from hookdepth.model.decoder import Decoder

# What transformers raises where a model cannot be called so.
_CANNOT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_ROUNDING = 64  # times what one sum may differ by: layers pass on what another kernel rounds otherwise


class _SeenEnoughError(Exception):
    """Ends a forward pass before its end."""


def first_layer(model: Decoder, run: Callable[[], object], n_tokens: int) -> Tensor:
    """What the first layer gives at the first tokens, without running the others."""
    seen: list[Tensor] = []

    def stop(value: Tensor) -> None:
        seen.append(value[:, :n_tokens])
        raise _SeenEnoughError

    with model.on("resid_post", 0, in_this_thread(stop)), suppress(_SeenEnoughError):
        run()
    return seen[0]


def try_out(model: Decoder, token_ids: Tensor) -> None:
    """Set what the model's passes allow; one that is not causal, or inside which the batch cannot grow, is refused."""
    if not _is_causal(model, token_ids):
        raise unsupported(model.name, model.family, "its tokens see those that come after them (it is not causal)")
    model.sites.parallel = _is_parallel(model, token_ids)
    model.prefixes = model.prefixes and _takes_prefixes(model, token_ids)
    why = _grows(model, [token_ids[0], token_ids[0, :-1].flip(0)])
    model.shares = why is None
    if why is not None and (why := _grows(model, [token_ids[0]])) is not None:
        raise unsupported(model.name, model.family, f"its batch cannot grow from layer to layer ({why})")


def _is_causal(model: Decoder, token_ids: Tensor) -> bool:
    """Left of a change, a branch is the clean run only in a model whose tokens never see later ones."""
    other = token_ids.clone()
    other[:, -1] = (token_ids[:, -1] + 1) % int(model.config.vocab_size)
    before, after = (model.forward(ids) for ids in (token_ids, other))
    if _near(after[:, :-1], before[:, :-1]):
        return True
    # Some quantised kernels couple tokens a little (LLM.int8 chooses columns by all of them); attention that looks to
    # the right moves all tokens alike.
    moved = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1)
    return described(model.hf.config)["quantization"] != "none" and bool(moved[:, :-1].max() < moved[:, -1].min() / 4)


def _is_parallel(model: Decoder, token_ids: Tensor) -> bool:
    layer = next((n for n, own in enumerate(model.sites.found.contributions) if {"attn", "mlp"} <= set(own)), None)
    if layer is None:
        return False
    seen: list[Tensor] = []

    def stop(value: Tensor) -> None:
        seen.append(value.clone())
        raise _SeenEnoughError

    def other(value: Tensor) -> Tensor:
        # Not the same for all entries: a norm would take that out again.
        ramp = torch.linspace(-1, 1, value.shape[-1], device=value.device, dtype=value.dtype)
        return value + ramp * value.abs().amax().clamp(min=1)

    for edit in (lambda value: None, other):
        with (
            model.on("attn_out", layer, in_this_thread(edit)),
            model.on("mlp_out", layer, in_this_thread(stop)),
            suppress(_SeenEnoughError),
        ):
            model.forward(token_ids)
    return torch.equal(*seen)


def _takes_prefixes(model: Decoder, token_ids: Tensor) -> bool:
    """Where not, every pass starts at token 0: slower, and as right."""
    from hookdepth.model.kv_cache import PrefixCache

    cut = token_ids.shape[1] // 2
    recorder = PrefixCache(record=slice(None))
    try:
        whole = model.forward(token_ids, recorder)
        if not _near(whole, model.forward(token_ids)):
            return False

        def left(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = recorder.recorded[layer]
            return keys[:, :, :cut], values[:, :, :cut]

        rest = model.forward(token_ids[:, cut:], PrefixCache(cut, left), token_ids.shape[1])
    except _CANNOT:
        return False
    return _near(rest, whole[:, cut:])


def _grows(model: Decoder, prompts: list[Tensor]) -> str | None:
    """Why rows cannot join inside; None where the rows that joined are what their prompt is alone."""
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.stack([torch.cat([one, one[-1:].repeat(longest - len(one))]) for one in prompts])
    last, first = model.n_layers - 1, min(1, model.n_layers - 1)

    def join(value: Tensor) -> Tensor:
        return torch.cat([value, value, value[-1:]])

    def leave(value: Tensor) -> Tensor:
        return value[: len(prompts) + 1]

    def narrow(value: Tensor) -> Tensor:
        return value[:-1]

    def widen(value: Any) -> Tensor:
        return torch.cat([value, value[-1:]])

    part = next(iter(model.sites.found.contributions[first]))
    try:
        with ExitStack() as stack:
            for layer in range(model.n_layers):  # as in a pass, every layer's masks are made to fit
                body = join if layer == first else lambda value: None
                stack.enter_context(model.on("resid_pre", layer, in_this_thread(body)))
            stack.enter_context(model.sites.on_reads(part, first, in_this_thread(narrow)))
            stack.enter_context(model.on(f"{part}_out", first, in_this_thread(widen)))
            stack.enter_context(model.on("resid_post", last, in_this_thread(leave)))
            together = model.forward(padded)
        alone = [model.forward(one[None])[0] for one in prompts]
    except _CANNOT as error:
        return (str(error) or type(error).__name__).splitlines()[0][:120]
    for row, prompt in zip(together, [*range(len(prompts)), 0], strict=True):
        if not _near(row[: len(prompts[prompt])], alone[prompt]):
            return "rows that joined differ from their prompt alone"
    return None


def _near(a: Tensor, b: Tensor) -> bool:
    size = _ROUNDING * b.float().abs().amax(-1, keepdim=True)
    eps = torch.finfo(b.dtype).eps / torch.finfo(torch.float32).eps
    return bool(differs_by_rounding(a.float(), b.float(), size * eps).all())
