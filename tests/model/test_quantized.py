"""Models quantised by bitsandbytes, on the CPU: loaded, saved and loaded again, and measured."""

import pytest
import torch
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import Branch, LayerEffect, OutputEffect, Skip
from hookdepth.cli import main
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError
from hookdepth.runs.contract import load_folder

pytest.importorskip("bitsandbytes")

# Median relative difference of a skip's effect from the unquantised model's: (what it is at least, at most).
# Measured with weights of unit noise, which is the worst case: 0.0055 and 0.066 (Llama), 0.0045 and 0.056 (Qwen 3).
CLOSE = {"8bit": (0.001, 0.015), "4bit": (0.02, 0.12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", intermediate_size=128).save_pretrained(folder)  # 4 bit wants multiples of 64
    tiny_tokenizer().save_pretrained(folder)
    return folder


def effects(model):
    ids = prompts(2, (30, 20))
    skips = [(n, Skip(layer, part)) for n in (0, 1) for part in ("layer", "attn", "mlp") for layer in range(5)]
    branches = [Branch((skip,), prompt=n) for n, skip in skips]
    return measure(model, ids, branches, [LayerEffect(), OutputEffect()])


@pytest.mark.parametrize("bits", CLOSE)
def test_effects_are_close_to_the_unquantised_ones(folder, bits):
    plain, quantised = effects(hookdepth.load(str(folder))), effects(hookdepth.load(str(folder), quantize=bits))
    expected, found = plain.layer["effect"], quantised.layer["effect"]
    assert torch.equal(found > 0, expected > 0), "before a branch is born there is no effect, quantised or not"
    there = expected > 0
    difference = ((found - expected).abs()[there] / expected[there]).median().item()
    least, most = CLOSE[bits]
    assert least < difference < most
    assert quantised.null_effect < 1e-3


@pytest.mark.parametrize("bits", CLOSE)
def test_a_quantised_checkpoint_loads_as_it_is(folder, bits, tmp_path):
    first = hookdepth.load(str(folder), quantize=bits)
    first.hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = hookdepth.load(str(tmp_path))
    assert again.describe()["quantization"] == f"bitsandbytes {bits}"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again.forward(ids), first.forward(ids))


@pytest.mark.parametrize("bits", CLOSE)
def test_the_command_shows_the_floor(folder, bits, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Anna has 12 apples and eats 3 of them.\n")
    out = tmp_path / "out"
    command = ["run", "--model", str(folder), "--dataset", str(tmp_path / "prompts.txt"), "--out", str(out)]
    assert main([*command, "--analyses", "skip-current", "--quantize", bits]) == 0
    assert "noise floor" in capsys.readouterr().out
    metadata = load_folder(out)["skip-current"].metadata
    assert metadata["model"]["quantization"] == f"bitsandbytes {bits}"
    assert 0 <= metadata["null_effect"] < 1e-3


def test_shapes_that_the_kernel_does_not_take(folder, monkeypatch):
    # Which shapes those are differs from machine to machine; what bitsandbytes raises is taken from one of them.
    def refuses(*_args, **_options):
        raise RuntimeError("expected mat1 and mat2 to have the same dtype\nand rows of a multiple of 64, got 96")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", refuses)
    with pytest.raises(HookdepthError, match=r"is loaded, but does not run \(.*\); try .* or no --quantize") as caught:
        hookdepth.load(str(folder), quantize="4bit")
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)
