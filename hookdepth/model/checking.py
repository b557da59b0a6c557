"""The self-check: does the adapter read this model rightly? On a short real input, before anything is measured.

    model = hookdepth.wrap(hf_model, tokenizer)     # the check is part of it
    check(model)                                    # raises where the sublayers do not add up

A family whose sublayer outputs are normed or scaled before they are added needs a line in `families`; one that has
none fails here, and not in a figure.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hookdepth.errors import DoesNotRunError, HookdepthError
from hookdepth.metrics import differs_by_rounding
from hookdepth.model.decoder import LOAD, Decoder, Edit
from hookdepth.model.families import unsupported


def wrap(model: nn.Module, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None) -> Decoder:
    """Make a model that you already hold ready for hookdepth, and check that it can be.

        model = hookdepth.wrap(AutoModelForCausalLM.from_pretrained(folder), tokenizer)

    The check runs one short input: the two sublayers' contributions must add up to the layer's, and the
    final norm and unembedding of the last residual must give the model's own logits.

    Raises:
        HookdepthError: the architecture is not one of those that work, or its weights are not finite.
    """
    decoder = Decoder(model, tokenizer, name=name, revision=revision)
    check(decoder)
    return decoder


def check(model: Decoder, text: str = "The capital of France is Paris.") -> None:
    """Verify on a real input that the adapter reads this model rightly (see `wrap`)."""
    _check_weights(model)
    if model.tokenizer is not None:
        token_ids = model.ids(text)
        model.check_ids(token_ids[0], "a short input")
    else:
        token_ids = torch.arange(8, device=model.device)[None] % int(model.config.vocab_size)
    sites: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int) -> Edit:
        return lambda value: sites.__setitem__((site, layer), value)

    with model.evaluating(), ExitStack() as stack:
        for layer in range(model.n_layers):
            for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
                stack.callback(getattr(model, f"on_{site}")(layer, keep(site, layer)).remove)
        try:
            logits = model.hf(input_ids=token_ids, use_cache=False).logits
        except torch.OutOfMemoryError as error:
            raise HookdepthError(f"no memory to run {model.name!r}", "free some, or use a smaller model", 1) from error
        except (RuntimeError, TypeError, ValueError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise DoesNotRunError(
                f"{model.name!r} cannot run on a short input ({why})",
                "bring the whole model to one device and one dtype, and see that it works without hookdepth",
            ) from error
        last = sites["resid_post", model.n_layers - 1]
        own = model.unembed(model.norm(last))
    for layer in range(model.n_layers):
        expected = sites["resid_post", layer]
        if not torch.isfinite(expected).all():
            raise HookdepthError(
                f"{model.name!r} gives non-finite values at layer {layer} on a short input",
                "check the checkpoint's weights, or load it with another --dtype",
                1,
            )
        terms = [sites[site, layer] for site in ("resid_pre", "attn_out", "mlp_out")]
        if not _close(sum(terms), expected, sum(term.abs() for term in terms)):
            if _has_hooks(model.layers[layer]):
                raise HookdepthError(
                    f"layer {layer} of {model.name!r} has hooks of its own that change the residual stream",
                    "remove them, or give the change to hookdepth as an intervention",
                )
            raise unsupported(model.name, model.family, f"layer {layer} is not resid_pre + attn_out + mlp_out")
    if not torch.isfinite(logits).all():
        raise HookdepthError(
            f"{model.name!r} gives non-finite logits on a short input",
            "check the checkpoint's weights, or load it with another --dtype",
            1,
        )
    if not _close(own, logits, logits.abs().amax(-1, keepdim=True)):
        raise unsupported(model.name, model.family, "final norm and unembedding do not give the model's logits")


def _check_weights(model: Decoder) -> None:
    for name, weight in model.hf.named_parameters():
        # accelerate keeps the weights of what it has offloaded on the meta device, and brings them when they run.
        if weight.is_meta and not any(hasattr(module, "_hf_hook") for module in model.hf.modules()):
            raise HookdepthError(f"the weights of {model.name!r} are not loaded ({name} is on the meta device)", LOAD)


def _has_hooks(layer: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def _close(a: Any, b: Tensor, size: Any) -> bool:
    return bool(differs_by_rounding(a.to(b.device), b, size.to(b.device)).all())
