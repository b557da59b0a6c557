"""What each model family adds to its residual stream: the only file that knows module names.

    family = family_of("gemma2")
    family.attn_site      # 'post_attention_layernorm': what is added is the *normed* attention output

A decoder layer of every family here computes

    resid_mid  = resid_pre + attn_out
    resid_post = resid_mid + mlp_out

and differs only in which module's output `attn_out` and `mlp_out` are, and by which factor they are
multiplied before they are added. A family that is not listed is tried as a Llama; the self-check in
`checking.py` then decides, on a real input, whether that was right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hookdepth.errors import HookdepthError


@dataclass(frozen=True)
class Family:
    """Where a family's decoder layer makes its two contributions.

        Family("Granite", multiplier="residual_multiplier").scale(config)   # e.g. 0.22

    Attributes:
        name: as people say it.
        attn_site, mlp_site: submodule of the decoder layer whose output is added to the stream.
        multiplier: config attribute by which both outputs are multiplied first, if any.
    """

    name: str
    attn_site: str = "self_attn"
    mlp_site: str = "mlp"
    multiplier: str | None = None

    def scale(self, config: Any) -> float:
        """The factor on both sublayers' outputs: 1 except where the config has a multiplier."""
        return float(getattr(config, self.multiplier)) if self.multiplier else 1.0


_POST_NORM = {"attn_site": "post_attention_layernorm", "mlp_site": "post_feedforward_layernorm"}
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen 2"),
    "qwen3": Family("Qwen 3"),
    "smollm3": Family("SmolLM 3"),
    "olmo2": Family("OLMo 2", **_POST_NORM),
    "gemma2": Family("Gemma 2", **_POST_NORM),
    "gemma3_text": Family("Gemma 3 (text)", **_POST_NORM),
    "phi3": Family("Phi 3"),
    "granite": Family("Granite", multiplier="residual_multiplier"),
}
SUPPORTED = ", ".join(family.name for family in FAMILIES.values())


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; an unknown one is taken for a Llama until the self-check.

    family_of("llama").name   # 'Llama'
    """
    return FAMILIES.get(model_type, Family(f"{model_type} (as Llama)"))


def missing_modules(layer: nn.Module, family: Family) -> list[str]:
    """Submodules that a decoder layer of this family must have and this one has not.

    missing_modules(hf_model.model.layers[0], family_of("llama"))   # []
    """
    needed = ("self_attn", "mlp", family.attn_site, family.mlp_site)
    return sorted({name for name in needed if not hasattr(layer, name)})


def unsupported(name: str, family: Family, why: str) -> HookdepthError:
    """The error for a model that cannot be read.

    str(unsupported("gpt2", family_of("gpt2"), "it has no model.layers"))
    """
    return HookdepthError(f"{name!r} ({family.name}) is not supported: {why}", f"families that work: {SUPPORTED}")
