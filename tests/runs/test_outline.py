"""Models known by their config alone, and the miniatures that stand for them."""

import json
import shutil
import types

import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.data import load_examples, make_probe
from hookdepth.errors import HookdepthError
from hookdepth.runs.outline import Words, load_outline, miniature


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_config("llama", intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_without_weights(folder):
    outline = load_outline(str(folder), dtype="bfloat16")
    assert not list(folder.glob("*.safetensors"))
    assert (outline.n_layers, outline.d_model, outline.dtype) == (5, 64, torch.bfloat16)
    assert (outline.device.type, outline.layer_device(3).type) == ("cpu", "cpu")
    assert all(parameter.device.type == "meta" for parameter in outline.hf.parameters())
    assert outline.tokenizer("the town")["input_ids"] == tiny_tokenizer()("the town")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_the_model_without_its_weights(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    outline, model = load_outline(str(tmp_path)), tiny_model(family)
    expected = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in outline.hf.named_parameters()} == expected
    assert outline.weight_bytes == sum(4 * tensor.numel() for tensor in model.parameters())
    small = miniature(outline, 2)
    assert (small.n_layers, small.device.type, small.dtype) == (2, "cpu", torch.float32)
    with torch.no_grad():
        assert torch.isfinite(small.forward(torch.arange(12)[None])).all()


BAD_CONFIGS = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0, which is no whole number"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    "three key heads": ({"num_key_value_heads": 3}, "num_attention_heads = 4, which num_key_value_heads = 3 does not"),
    "a thousand million layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "ten million wide": ({"hidden_size": 10**7}, "hidden_size = 10000000"),
    "an odd width": ({"hidden_size": 65, "head_dim": None}, ""),
    "layers in words": ({"num_hidden_layers": "five"}, ""),
    "half a layer": ({"num_hidden_layers": 5.5}, ""),
    "no words": ({"vocab_size": 0}, "vocab_size = 0"),
    "an activation of no name": ({"hidden_act": "nope"}, "nope"),
    "an epsilon in words": ({"rms_norm_eps": "x"}, ""),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("load", [load_outline, hookdepth.load])
def test_configs_that_no_model_can_have(folder, tmp_path, case, load, capfd):
    changes, says = BAD_CONFIGS[case]
    shutil.copytree(folder, tmp_path / "model")
    if load is hookdepth.load:
        tiny_model("llama", intermediate_size=128).save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    capfd.readouterr()
    with pytest.raises(HookdepthError) as caught:
        load(str(tmp_path / "model"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_miniature_that_does_not_fit_is_not_begun(folder, monkeypatch):
    outline = load_outline(str(folder))
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=1000))
    with pytest.raises(HookdepthError, match=r"2 layers of .* take .* GiB, and cpu has 0.0 GiB free") as caught:
        miniature(outline, 2)
    assert caught.value.exit_status == 1
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=1 << 30))
    assert miniature(outline, 2).n_layers == 2


def test_quantised_weights_are_smaller(folder):
    sizes = [load_outline(str(folder), dtype="bfloat16", quantize=q).weight_bytes for q in ("none", "8bit", "4bit")]
    matrices = 5 * (4 * 64 * 64 + 3 * 64 * 128)
    assert sizes[0] - sizes[1] == matrices
    assert sizes[0] - sizes[2] == matrices * (2 - 0.5625)


def test_a_quantised_checkpoint_is_seen_as_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for bits, stored in (("8bit", {"load_in_8bit": True}), ("4bit", {"load_in_4bit": True})):
        config["quantization_config"] = {"quant_method": "bitsandbytes", **stored}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        assert load_outline(str(tmp_path / "model")).quantize == bits
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HookdepthError, match="quantised by gptq cannot be planned for"):
        load_outline(str(tmp_path / "model"))


def test_nothing_there(tmp_path):
    with pytest.raises(HookdepthError, match="no model folder '/no/such/folder'"):
        load_outline("/no/such/folder")
    with pytest.raises(HookdepthError, match=r"cannot plan for the model .* config\.json of a causal language model"):
        load_outline(str(tmp_path))


def test_words_stand_in_for_a_tokenizer(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    outline = load_outline(str(tmp_path))
    assert isinstance(outline.tokenizer, Words)
    assert len(outline.tokenizer("5 + 7 = 12")["input_ids"]) == 8
    text = "Déjà vu,\n snake_case 1/2"
    spans = outline.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[begin:end] for begin, end in spans) == text, "nothing is left out"
    probe = make_probe(outline.tokenizer, "The spouse of the performer of Imagine is", " Yoko Ono")
    assert len(probe.answer_positions) == 2


@pytest.mark.demo
def test_words_are_about_as_many_as_tokens(demo_model):
    _, tokenizer = demo_model
    for example in load_examples("demo").examples:
        ratio = len(Words()(example.text)["input_ids"]) / len(tokenizer(example.text)["input_ids"])
        assert 0.8 < ratio < 1.25


@pytest.mark.demo
def test_the_demo_models_outline_is_the_demo_model(demo_model):
    outline, model = load_outline("demo"), hookdepth.load("demo", device="cpu")
    assert outline.name == model.name
    assert outline.weight_bytes == sum(4 * tensor.numel() for tensor in model.hf.parameters())
