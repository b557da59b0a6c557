"""What discovery cannot know of a family: one line each. The self-check (`checking`), on a real input, decides.

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

from hookdepth.errors import HookdepthError, choose, shown

CONTRIBUTIONS = ("mixer", "attn", "mlp", "extra")
INSIDE = ("attn", "mlp")


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
        fused: attention's projection that gives q, k and v at once, one after the other; by_head: so of each head.
        gated: attention's q_proj gives the query of each head and, behind it, a gate.
        flat: the MLP gives rows and tokens as one axis, [row · token, width].
        in_place: the layer adds to a contribution in place, so that what is read must be a copy.
        sites: those between resid_pre and resid_post, for the table alone; in brackets: in some layers, or configs.
        tested: on what all kinds of branches were compared with plain passes (`verify`), for the table alone.
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
    fused: str = ""
    by_head: bool = False
    gated: bool = False
    flat: bool = False
    in_place: bool = False
    sites: str = "z attn_out resid_mid neurons mlp_out"
    tested: str = "random weights"
    refused: str = ""

    def __post_init__(self) -> None:
        for where in ("parts", "outputs", "multipliers", "inner"):
            given = getattr(self, where)
            if not isinstance(given, Mapping):
                raise HookdepthError(f"Family: {where} is {shown(given)}", 'give a dict, e.g. {"mlp": "ffn"}')
            for part, place in given.items():
                choose(f"contribution in {where}", part, INSIDE if where == "inner" else CONTRIBUTIONS)
                if not isinstance(place, str) or not place:
                    raise HookdepthError(f"Family: {where} of {part} is {shown(place)}", "give a name as text")


_FALCON_H1 = {"mixer": "ssm_out_multiplier", "attn": "attention_out_multiplier"}
COMMON = "z attn_out resid_mid neurons mlp_out"
PARALLEL = "z attn_out neurons mlp_out"  # the MLP reads the layer's input, so that there is no stream between them
EXPERTS = "z attn_out resid_mid mlp_out"
SOME_EXPERTS = "z attn_out resid_mid (neurons) mlp_out"
LINEAR = "(z) attn_out resid_mid neurons mlp_out"
LINEAR_EXPERTS = "(z) attn_out resid_mid mlp_out"
_BLOOM = {"attn": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}
FAMILIES = {
    "llama": Family("Llama", tested="random weights; SmolLM2-135M"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen 2"),
    "qwen3": Family("Qwen 3"),
    "smollm3": Family("SmolLM 3"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3 (text)"),
    "phi3": Family("Phi 3", fused="qkv_proj"),
    "granite": Family("Granite"),
    "gpt2": Family("GPT-2", fused="c_attn"),
    "gpt_neo": Family("GPT-Neo"),
    "exaone4": Family("EXAONE 4"),
    "glm4": Family("GLM 4"),
    "nanochat": Family("nanochat"),
    "starcoder2": Family("StarCoder 2"),
    "stablelm": Family("StableLM"),
    "gptj": Family("GPT-J", sites=PARALLEL),
    "gpt_neox": Family("GPT-NeoX, Pythia", sites=PARALLEL, fused="query_key_value", by_head=True),
    "phi": Family("Phi 1, 2", sites=PARALLEL),
    "cohere": Family("Cohere", sites=PARALLEL),
    "cohere2": Family("Cohere 2", sites=PARALLEL),
    "olmoe": Family("OLMoE", sites=EXPERTS),
    "mixtral": Family("Mixtral", sites=EXPERTS),
    "gpt_oss": Family("gpt-oss", sites=EXPERTS),
    "granitemoe": Family("Granite MoE", sites=EXPERTS),
    "qwen2_moe": Family("Qwen 2 MoE", sites=EXPERTS),
    "qwen3_moe": Family("Qwen 3 MoE", sites=EXPERTS),
    "deepseek_v3": Family("DeepSeek V3", sites=SOME_EXPERTS),
    "laguna": Family("Laguna", sites=SOME_EXPERTS),
    "afmoe": Family("AFMoE", sites=SOME_EXPERTS),
    "granitemoeshared": Family("Granite MoE with a shared expert", sites=f"{EXPERTS} extra_out"),
    "granitemoehybrid": Family("Granite 4", sites=f"{LINEAR_EXPERTS} extra_out"),
    "gemma4_text": Family("Gemma 4 (text)", sites=f"{COMMON} (extra_out)"),
    "lfm2": Family("LFM 2", sites=LINEAR),
    "qwen3_5_text": Family("Qwen 3.5 (text)", sites=LINEAR, gated=True),
    "qwen3_next": Family("Qwen 3 Next", sites=LINEAR_EXPERTS, gated=True),
    "jamba": Family("Jamba", sites="(z) attn_out resid_mid (neurons) mlp_out"),
    "mamba": Family("Mamba", sites="mixer_out"),
    "mamba2": Family("Mamba 2", sites="mixer_out"),
    "nemotron_h": Family("Nemotron-H", sites="mixer_out"),
    "opt": Family("OPT", flat=True),
    "bloom": Family("BLOOM", outputs=_BLOOM, fused="query_key_value", by_head=True),
    "falcon": Family("Falcon", sites=PARALLEL, in_place=True),
    "falcon_h1": Family("Falcon-H1", sites=f"mixer_out {COMMON}", multipliers=_FALCON_H1),
    "llama4_text": Family("Llama 4 (text)", sites=SOME_EXPERTS, flat=True),
    "mpt": Family("MPT", outputs={"mlp": "ffn.down_proj"}),
    "minimax": Family("MiniMax", refused="its residual stream is the normed input of each sublayer"),
    "gemma3n_text": Family("Gemma 3n", refused="it has four residual streams"),
    "deepseek_v4": Family("DeepSeek V4", refused="it has several residual streams (hyper-connections)"),
}
"""model_type → what is known of it; of one that other lines of a config change (Falcon, StableLM), the usual one."""
TESTED = "transformers 5.23.0 and torch 2.13.0"


def table() -> str:
    """What `hookdepth families` prints."""
    rows = [("model_type", "family", "sites", "tested with")]
    for model_type, one in FAMILIES.items():
        given = (one.sites, one.tested) if not one.refused else (f"refused: {one.refused}", "")
        rows.append((model_type, one.name, *given))
    widths = [max(len(row[n]) for row in rows if not row[2].startswith("refused")) for n in range(3)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    last = (
        f"Tested with {TESTED}: random branches of every kind against plain passes, as `hookdepth verify --model M` "
        "does with yours. Every layer has resid_pre and resid_post too; a site in brackets is in some layers, or with "
        "some configs. Where there is z, attention patterns can be read, and q, k and v where the attention projects "
        "each by itself, or is GPT-2's, GPT-NeoX's, BLOOM's or Phi 3's. All other model types are looked at by their "
        "structure, and the self-check decides."
    )
    return "\n".join([*(line.rstrip() for line in lines), "", *textwrap.wrap(last, 100)])


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; an unknown one is looked at until the self-check has decided."""
    return FAMILIES.get(model_type, Family(f"{model_type}, by its structure"))


def unsupported(name: str, family: Family, why: str) -> HookdepthError:
    """The error for a model that cannot be read."""
    remedy = "see `hookdepth families` for those that work, or say where its parts are: wrap(model, family=Family(…))"
    return HookdepthError(f"{name!r} ({family.name}) is not supported: {why}", remedy)
