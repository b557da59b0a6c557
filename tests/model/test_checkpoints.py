"""Checkpoints quantised by others than bitsandbytes: MXFP4, in which gpt-oss is published, and what torchao makes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import hookdepth
from hookdepth.model.identity import weights_digest

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 128}


def in_mxfp4(folder):
    """A checkpoint as gpt-oss's: of experts' weights [expert, in, out], two values a byte and a scale every 32."""
    generator = torch.Generator().manual_seed(0)
    GptOssForCausalLM(GptOssConfig(**SHAPE, **EXPERTS)).save_pretrained(folder)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            weights[name] = weight
            continue
        n, wide, out = weight.shape
        blocks = torch.randint(256, (n, out, wide // 32, 16), generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 122, dtype=torch.uint8)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore")  # where there is no GPU, transformers says that it dequantises
def test_mxfp4_is_read_and_verified(tmp_path):
    in_mxfp4(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    values = hf.model.layers[0].mlp.experts.down_proj.detach().unique()
    assert 2 < len(values) <= 16, "a value of four bits, all of one scale"
    verified = hookdepth.verify(hookdepth.wrap(hf), n=3)
    assert verified.ok
    assert {"sites", "heads", "cuts", "gradients"} <= {one.kind for one in verified.verdicts if one.branches}


def test_torchao_is_verified_and_its_parts_are_identity(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from tiny_models import tiny_model
    from transformers import TorchAoConfig

    tiny_model("llama").save_pretrained(tmp_path)
    how = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    before = weights_digest(hf)
    assert hookdepth.verify(hookdepth.wrap(hf), n=3).ok
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.qdata[0, 0] += 1
    assert weights_digest(hf) != before
