"""A tiny random model of every family that the installed transformers has: `tiny("gpt2")`, in float32.

Each line of `FAMILIES` is a model_type and what makes it tiny; `REFUSED` says which are not to work, and why.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 300
IDS = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 4, "max_position_embeddings": 128}
OLD = {**IDS, **LAYERS, "hidden_size": 32, "num_attention_heads": 4}
DENSE = {**OLD, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GPT = {**IDS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 48}
OPT = {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32}
LOCAL = {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {**DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {**DENSE, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
WINDOW = {**DENSE, "sliding_window": 8}
MIXED = {**DENSE, "layer_types": ["linear_attention", "full_attention"] * 2}
LINEAR = {
    f"linear_{name}": size for name, size in (("num_value_heads", 4), ("num_key_heads", 2), ("conv_kernel_dim", 3))
}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
GEMMA4 = {**WINDOW, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
NEMOTRON = {name: value for name, value in ROUTED.items() if name != "num_hidden_layers"} | {"mamba_num_heads": 8}
NEMOTRON |= {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}
NEMOTRON |= {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", GPT),
    "gpt-neo": (
        "gpt_neo",
        {**IDS, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    ),
    "gpt-j": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt-neox": ("gpt_neox", DENSE),
    "gpt-neox-in-a-row": ("gpt_neox", {**DENSE, "use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "opt-projected": ("opt", {**OPT, "word_embed_proj_dim": 16}),
    "opt-post-norm": ("opt", {**OPT, "do_layer_norm_before": False}),
    "bloom": ("bloom", {**IDS, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": ("falcon", OLD),
    "falcon-new": ("falcon", {**OLD, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-alibi": ("falcon", {**OLD, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "phi": ("phi", DENSE),
    "phi3": ("phi3", DENSE),
    "cohere": ("cohere", DENSE),
    "cohere2": ("cohere2", WINDOW),
    "olmo": ("olmo", DENSE),
    "olmo3": ("olmo3", WINDOW),
    "olmoe": ("olmoe", EXPERTS),
    "nanochat": ("nanochat", DENSE),
    "gpt-oss": ("gpt_oss", {**LOCAL, "sliding_window": 8}),
    "llama4": (
        "llama4_text",
        {**LOCAL, "intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
        | {"attention_chunk_size": 8},
    ),
    "granite-moe": ("granitemoe", {**LOCAL, "residual_multiplier": 0.7, "logits_scaling": 1.7}),
    "granite-moe-shared": (
        "granitemoeshared",
        {**LOCAL, "shared_intermediate_size": 24, "residual_multiplier": 0.7, "logits_scaling": 1.7},
    ),
    "granite-moe-hybrid": (
        "granitemoehybrid",
        {**LOCAL, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"] * 2}
        | {"residual_multiplier": 0.7},
    ),
    "laguna": ("laguna", {**EXPERTS, "sliding_window": 8, "num_attention_heads_per_layer": [4, 8, 4, 2]}),
    "afmoe": ("afmoe", {**EXPERTS, "sliding_window": 8, "num_dense_layers": 1, "num_shared_experts": 1}),
    "exaone4": ("exaone4", WINDOW),
    "glm4": ("glm4", DENSE),
    "lfm2": ("lfm2", {**DENSE, "layer_types": ["conv", "full_attention"] * 2}),
    "qwen3-next": ("qwen3_next", {**EXPERTS, **MIXED, **LINEAR, "shared_expert_intermediate_size": 24}),
    "qwen3.5": ("qwen3_5_text", {**MIXED, **LINEAR}),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", LOCAL),
    "deepseek-v3": ("deepseek_v3", {**ROUTED, **LATENT, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}),
    "minimax": ("minimax", {**LOCAL, "block_size": 8}),
    "mamba": ("mamba", {**IDS, **LAYERS, "hidden_size": 32, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {**IDS, **LAYERS, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
        | {"chunk_size": 16},
    ),
    "falcon-h1": (
        "falcon_h1",
        {**DENSE, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "ssm_out_multiplier": 0.7}
        | {"attention_out_multiplier": 1.3},
    ),
    "nemotron-h": ("nemotron_h", NEMOTRON),
    "jamba": (
        "jamba",
        {**LOCAL, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "gemma": ("gemma", DENSE),
    "gemma3n": (
        "gemma3n_text",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4-embeddings": (
        "gemma4_text",
        {**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    ),
    "starcoder2": ("starcoder2", DENSE),
    "stablelm": ("stablelm", DENSE),
    "stablelm-parallel": ("stablelm", {**DENSE, "use_parallel_residual": True}),
    "deepseek-v4": ("deepseek_v4", DENSE),
    "whisper": (
        "whisper",
        {**IDS, "d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 2, "encoder_layers": 1, "pad_token_id": 0, "max_target_positions": 128},
    ),
    "hy-v4": ("hy_v4", {**ROUTED, **LATENT, "num_key_value_heads": 4}),
    "mpt": ("mpt", {**IDS, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}),
}
REFUSED = {
    "opt-post-norm": "it norms the stream itself after each sublayer",
    "minimax": "its residual stream is the normed input of each sublayer",
    "gemma3n": "it has four residual streams",
    "hy-v4": r"its stream is no \[row, token, width\] but \[1, 8, 4, 32\]",
    "deepseek-v4": "it has several residual streams",
}


def tiny(name: str, **overrides: object) -> torch.nn.Module:
    """`tiny("bloom")`: the same weights every time, large enough that every layer changes every other."""
    model_type, specific = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**specific, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for own, weight in model.named_parameters():
                size = 0.4 if any(word in own for word in ("embed", "wte", "head")) else weight.shape[-1] ** -0.5
                weight.add_(0.1 * torch.randn(weight.shape)) if weight.ndim == 1 else weight.normal_(std=size)
    return model
