"""Small models with random weights, one for each family and for each quirk that matters.

    model = tiny_model("gemma2")                   # float32, eval, the same weights every time
    ids = prompts(2, lengths=(20, 13))             # two random prompts

Weights are large enough that attention is far from uniform and every layer changes every other.
"""

import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VOCAB = 300
WINDOW = 8  # sliding windows are shorter than the prompts of the tests, so that they matter

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (model_type, what differs from COMMON)
SPECIFIC: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),  # layers 1 and 3 have no position embedding
    "olmo2": ("olmo2", {}),
    "gemma2": (
        "gemma2",  # sliding and full layers alternate
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3_text",  # every third layer is full
        {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 512}),
    "granite": (
        "granite",
        {
            "residual_multiplier": 0.7,
            "logits_scaling": 1.7,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
        },
    ),
}
FAMILIES = tuple(SPECIFIC)
EAGER = ("gemma2",)  # transformers refuses sdpa where attention scores are soft-capped
ZERO_CENTRED = ("gemma2", "gemma3_text")  # norms that multiply by 1 + weight


def tiny_config(family: str, **overrides) -> PretrainedConfig:
    """`tiny_config("llama", num_hidden_layers=3)`: a configuration of about 5 layers and width 64."""
    model_type, specific = SPECIFIC[family]
    return AutoConfig.for_model(model_type, **{**COMMON, **specific, **overrides})


def tiny_model(family: str, seed: int = 0, attn_implementation: str | None = None, **overrides) -> nn.Module:
    """`tiny_model("qwen3", seed=1, num_hidden_layers=4)`: a float32 causal LM in eval mode with random weights.

    Attention is sdpa, eager for Gemma 2. The global random state is left as it was.
    """
    config = tiny_config(family, **overrides)
    attention = attn_implementation or ("eager" if family in EAGER else "sdpa")
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, config.model_type))
    return model


def _scaled(name: str, noise: torch.Tensor, model_type: str) -> torch.Tensor:
    """`_scaled("model.norm.weight", noise, "llama")`: unit noise as weights of that parameter's kind and size."""
    if noise.dim() == 1:
        around = 0.0 if model_type in ZERO_CENTRED or name.endswith("bias") else 1.0
        return around + 0.2 * noise
    if "embed_tokens" in name or "lm_head" in name:  # smaller where the model multiplies its embeddings
        return {"gemma2": 0.15, "gemma3_text": 0.15, "granite": 0.25}.get(model_type, 0.4) * noise
    gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
    return gain * noise / noise.shape[1] ** 0.5


def prompts(n: int, lengths: int | Sequence[int] = 20, vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """`prompts(3, lengths=(20, 13))`: n lists of random token ids, of these lengths in turn."""
    cycle = [lengths] if isinstance(lengths, int) else list(lengths)
    source = random.Random(seed)
    return [[source.randrange(3, vocab) for _ in range(cycle[i % len(cycle)])] for i in range(n)]
