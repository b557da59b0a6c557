"""What discovery cannot know of a family: one line each. The self-check (`checking`), on a real input, decides.

    family_of("bloom").outputs["attn"]      # 'self_attention.dense': the module around it adds the stream itself

A decoder layer adds some contributions to its stream,

    resid_post = scale · (resid_pre + Σ contributions)

each with a name (attn, mlp; mixer where a layer has nothing else, or a third branch), the module whose output it is
and a factor. `contributions` finds them by the names that transformers gives its modules. So most families need nothing
here but their name; one that is not listed is tried all the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from hookdepth.errors import HookdepthError


@dataclass(frozen=True)
class Family:
    """Where a family keeps what hookdepth hooks; every field but the name is found where it is not given.

        Family("Mine", decoder="net", layers="stack", parts={"mlp": "ffn"})    # for wrap(hf_model, family=…)

    Attributes:
        name: as people say it.
        decoder: path of the module that runs the layers; layers, norm: of their list and of the final norm inside it.
        parts: contribution → the submodule of a layer that computes it.
        outputs: contribution → the submodule whose output is added, where that is not the same.
        multipliers: contribution → the config's attribute by which it is multiplied first.
        inner: contribution → the projection inside it, whose input is `z` (attn) or `neurons` (mlp).
        flat: the MLP gives rows and tokens as one axis, [row · token, width].
        in_place: the layer adds to a contribution in place, so that what is read must be a copy.
        refused: why it cannot be measured, where that is known.
    """

    name: str
    decoder: str | None = None
    layers: str | None = None
    norm: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    multipliers: Mapping[str, str] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    in_place: bool = False
    refused: str = ""


_FALCON_H1 = {"mixer": "ssm_out_multiplier", "attn": "attention_out_multiplier"}
FAMILIES = {
    **{
        model_type: Family(name)
        for model_type, name in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen 2"),
            ("qwen3", "Qwen 3"),
            ("smollm3", "SmolLM 3"),
            ("olmo2", "OLMo 2"),
            ("gemma2", "Gemma 2"),
            ("gemma3_text", "Gemma 3 (text)"),
            ("phi3", "Phi 3"),
            ("granite", "Granite"),
            ("gpt2", "GPT-2"),
            ("gpt_neo", "GPT-Neo"),
            ("gptj", "GPT-J"),
            ("gpt_neox", "GPT-NeoX, Pythia"),
            ("phi", "Phi 1, 2"),
            ("cohere", "Cohere"),
            ("cohere2", "Cohere 2"),
            ("olmo", "OLMo"),
            ("olmo3", "OLMo 3"),
            ("olmoe", "OLMoE"),
            ("exaone4", "EXAONE 4"),
            ("glm4", "GLM 4"),
            ("nanochat", "nanochat"),
            ("gpt_oss", "gpt-oss"),
            ("granitemoe", "Granite MoE"),
            ("lfm2", "LFM 2"),
            ("qwen3_next", "Qwen 3 Next"),
            ("qwen3_5_text", "Qwen 3.5 (text)"),
            ("mamba", "Mamba"),
            ("mamba2", "Mamba 2"),
            ("nemotron_h", "Nemotron-H"),
            ("jamba", "Jamba"),
            ("gemma", "Gemma"),
            ("gemma4_text", "Gemma 4 (text)"),
            ("starcoder2", "StarCoder 2"),
            ("stablelm", "StableLM"),
            ("qwen2_moe", "Qwen 2 MoE"),
            ("qwen3_moe", "Qwen 3 MoE"),
            ("mixtral", "Mixtral"),
            ("deepseek_v3", "DeepSeek V3"),
        )
    },
    "opt": Family("OPT", flat=True),
    "bloom": Family("BLOOM", outputs={"attn": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}),
    "falcon": Family("Falcon", in_place=True),
    "falcon_h1": Family("Falcon-H1", multipliers=_FALCON_H1),
    "llama4_text": Family("Llama 4 (text)", flat=True),
    "mpt": Family("MPT", outputs={"mlp": "ffn.down_proj"}),
    "minimax": Family("MiniMax", refused="its residual stream is the normed input of each sublayer"),
    "gemma3n_text": Family("Gemma 3n", refused="it has four residual streams"),
    "deepseek_v4": Family("DeepSeek V4", refused="it has several residual streams (hyper-connections)"),
}
SUPPORTED = ", ".join(family.name for family in FAMILIES.values() if not family.refused)


def table() -> str:
    """What `hookdepth families` prints.

    print(table())
    """
    rows = []
    for model_type, family in FAMILIES.items():
        given = ", ".join(name for name, value in vars(family).items() if value and name not in ("name", "refused"))
        rows.append((model_type, family.name, f"refused: {family.refused}" if family.refused else given or "found"))
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in (("model_type", "family", "parts"), *rows)]
    last = (
        "All others are looked at by their structure, and the self-check decides. Sites: resid_pre, z, attn_out, "
        "resid_mid, neurons, mlp_out, resid_post (mixer_out, extra_out where a family has them); `hookdepth verify "
        "--model M` compares yours with plain passes."
    )
    return "\n".join([*lines, "", *textwrap.wrap(last, 100)])


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; an unknown one is looked at until the self-check has decided."""
    return FAMILIES.get(model_type, Family(f"{model_type}, by its structure"))


def unsupported(name: str, family: Family, why: str) -> HookdepthError:
    """The error for a model that cannot be read."""
    remedy = "see `hookdepth families` for those that work, or say where its parts are: wrap(model, family=Family(…))"
    return HookdepthError(f"{name!r} ({family.name}) is not supported: {why}", remedy)
