"""The self-check: does the adapter read this model rightly? On a short real input, before anything is measured.

A family whose parts are not where others have them needs a line in `families`; one that has none fails here, and not
in a figure.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth.errors import DoesNotRunError, HookdepthError, shown
from hookdepth.metrics import differs_by_rounding
from hookdepth.model.contributions import layer_scale
from hookdepth.model.decoder import Decoder
from hookdepth.model.families import Family, unsupported
from hookdepth.model.hooks import Edit
from hookdepth.model.trials import first_layer, try_out
from hookdepth.model.turns import in_this_thread


def wrap(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    family: Family | None = None,
) -> Decoder:
    """Make a model that you already hold ready for hookdepth, and check that it can be.

        model = hookdepth.wrap(AutoModelForCausalLM.from_pretrained(folder), tokenizer)

    The check runs short inputs: what is found in each layer must add up to what the layer does, the final norm and
    unembedding of the last residual must give the model's own logits, and rows must be able to join inside.

    Raises:
        HookdepthError: the architecture is not one of those that work, or its weights are not finite.
    """
    if not isinstance(model, nn.Module):
        remedy = "give a Hugging Face model, or its name to load"
        raise HookdepthError(f"the model to wrap is {shown(model)}", remedy)
    if family is not None and not isinstance(family, Family):
        raise HookdepthError(f"the family is {shown(family)}", 'give an instance: Family("Mine", layers="blocks")')
    if tokenizer is not None and not callable(tokenizer):
        raise HookdepthError(f"the tokenizer is {shown(tokenizer)}", "give the model's own, from AutoTokenizer")
    decoder = Decoder(model, tokenizer, name=name, revision=revision, family=family)
    check(decoder)
    return decoder


def checked(model: Any) -> Decoder:
    """The model, if it is one: checked(model)"""
    if not isinstance(model, Decoder):
        raise HookdepthError(f"the model is {shown(model)}", "give what load or wrap gave")
    return model


def check(model: Decoder, text: str = "The capital of France is Paris.") -> None:
    """Verify on a real input that the adapter reads this model rightly (see `wrap`)."""
    _check_weights(model)
    with model.evaluating(), model.rotary.as_loaded():
        token_ids = _short_input(model, text)
        _check_sums(model, token_ids)
        try_out(model, token_ids)
        if model.rotary.places:
            _check_positions(model)


def _short_input(model: Decoder, text: str) -> Tensor:
    if model.tokenizer is None:
        return torch.arange(8, device=model.device)[None] % int(model.config.vocab_size)
    token_ids = model.ids(text)
    model.check_ids(token_ids[0], "a short input")
    return token_ids


def _check_sums(model: Decoder, token_ids: Tensor) -> None:
    sites: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int) -> Edit:
        def look(value: Tensor) -> None:
            if site == "resid_pre" and value.ndim != token_ids.ndim + 1:
                why = f"its stream is no [row, token, width] but {list(value.shape)}: several residual streams?"
                raise unsupported(model.name, model.family, why)
            sites[site, layer] = value

        return look

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            for site in model.sites.of(layer):
                stack.enter_context(model.on(site, layer, in_this_thread(keep(site, layer))))
        try:
            logits = model.hf(input_ids=token_ids, use_cache=False)[0]
        except torch.OutOfMemoryError as error:
            raise HookdepthError(f"no memory to run {model.name!r}", "free some, or use a smaller model", 1) from error
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            remedy = "bring the whole model to one device and one dtype, and see that it works without hookdepth"
            raise DoesNotRunError(f"{model.name!r} cannot run on a short input ({why})", remedy) from error
    for layer in range(model.n_layers):
        added = [f"{part}_out" for part in model.sites.found.contributions[layer]]
        unseen = [site for site in model.sites.of(layer) if (site, layer) not in sites]
        if unseen:
            raise unsupported(model.name, model.family, f"{unseen[0]} of layer {layer} is no call of a module")
        expected = sites["resid_post", layer]
        _check_finite(expected, f"{model.name!r} gives non-finite values at layer {layer}")
        terms = [sites[site, layer] for site in ("resid_pre", *added)]
        scale = layer_scale(model.layers[layer])
        alike = all(term.shape == expected.shape for term in terms)
        if not alike or not _close(sum(terms) * scale, expected, sum(term.abs() for term in terms) * scale):
            if any(one._forward_hooks or one._forward_pre_hooks for one in model.layers[layer].modules()):
                what = f"layer {layer} of {model.name!r} has hooks of its own that change the residual stream"
                raise HookdepthError(what, "remove them, or give the change to hookdepth as an intervention")
            sum_of = " + ".join(["resid_pre", *added])
            raise unsupported(model.name, model.family, f"layer {layer} is not {sum_of} ({_found_at(model, layer)})")
    _check_finite(logits, f"{model.name!r} gives non-finite logits")
    if not _close(model.unembed(model.norm(expected)), logits, logits.abs().amax(-1, keepdim=True)):
        raise unsupported(model.name, model.family, "final norm and unembedding do not give the model's logits")


def _found_at(model: Decoder, layer: int) -> str:
    places = {module: name for name, module in model.layers[layer].named_modules()}
    parts = model.sites.found.contributions[layer].items()
    return "found: " + ", ".join(f"{part}_out behind {places.get(own.output, '?')}" for part, own in parts)


def _check_finite(values: Tensor, problem: str) -> None:
    if not torch.isfinite(values).all():
        remedy = "check the checkpoint's weights, or load it with another --dtype"
        raise HookdepthError(f"{problem} on a short input", remedy, 1)


def _check_positions(model: Decoder) -> None:
    """The beginning of a prompt that has other rotary factors than a short one: as the whole prompt gives it.

    One layer is run, since all get the same factors: the prompt may have to be long.
    """
    short, reach = 8, model.context_length or 8
    lengths = range(short, reach + 1)
    first = bisect_left(lengths, True, key=lambda length: model.rotary.key(length) != model.rotary.key(short))
    if first == len(lengths):
        return  # within its context, all lengths have the same factors
    token_ids = torch.arange(lengths[first], device=model.device)[None] % int(model.config.vocab_size)

    whole = first_layer(model, lambda: model.hf(input_ids=token_ids, use_cache=False), short)
    part = first_layer(model, lambda: model.forward(token_ids[:, :short], length=lengths[first]), short)
    if not _close(part, whole, whole.abs().amax(-1, keepdim=True)):
        raise unsupported(model.name, model.family, f"its position factors change from {lengths[first]} tokens on")


def _check_weights(model: Decoder) -> None:
    # accelerate keeps the weights of what it has offloaded on the meta device, and brings them when they run.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.hf.modules())
    for name, weight in model.hf.named_parameters():
        if weight.is_meta and not offloaded:
            what = f"the weights of {model.name!r} are not loaded ({name} is on the meta device)"
            raise HookdepthError(what, "load it with from_pretrained, or give hookdepth the folder")


def _close(a: Any, b: Tensor, size: Any) -> bool:
    return bool(differs_by_rounding(a.to(b.device), b, size.to(b.device)).all())
