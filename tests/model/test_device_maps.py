"""Models larger than a device: offloaded by accelerate to memory and disk, and spread over several devices."""

import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from places import Places, place_of, spread
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import hookdepth
from hookdepth.analyses import Inputs, Settings, Subject, chosen, known
from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.runs.sharing import groups_of

NAMES = tuple(name for name, kind in known().items() if kind.in_all)

FAMILIES = ("llama-untied", "gemma2")
PROMPTS = tuple(tuple(ids) for ids in prompts(2, (30, 21)))
PROBES = (Probe("", "", PROMPTS[1][:12], tuple(map(str, range(12))), (10, 11)),)
INPUTS = Inputs(PROMPTS, ((16, 8), (8,)), PROMPTS[:1], PROBES)


def measure(model, names=NAMES):
    """Everything that the analyses give, in one dictionary."""
    settings = Settings(parts=("layer", "attn", "mlp"), ig_method="riemann", ig_steps=4)
    found = {}
    for task in groups_of(chosen(names), Subject(model, INPUTS, settings)):
        finished = task.finish([task.run(unit, lambda: None) for unit in range(task.n_chunks)])
        found |= {(name, key): value for name, tensors in finished.items() for key, value in tensors.items()}
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def undivided(folders):
    return {family: measure(hookdepth.load(str(folders / family))) for family in FAMILIES}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


MODULES = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{n}" for n in range(5)))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk(folders, undivided, family):
    places = {name: "disk" if name.endswith((".1", ".3")) else "cpu" for name in MODULES}
    model = hookdepth.load(str(folders / family), device_map=places)
    assert any(parameter.device.type == "meta" for parameter in model.hf.parameters()), "it is not all in memory"
    assert {model.layer_device(layer).type for layer in range(5)} == {"cpu"}
    assert_same(measure(model), undivided[family])


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_weights_that_come_one_by_one(folders, undivided, tmp_path, offload):
    """accelerate's own offloading, of a model that is wrapped afterwards: hooks lie deep inside of the layers."""
    hf = AutoModelForCausalLM.from_pretrained(folders / FAMILIES[0])
    if offload == "memory":
        cpu_offload(hf, execution_device=torch.device("cpu"))
    else:
        disk_offload(hf, str(tmp_path), execution_device=torch.device("cpu"))
    model = hookdepth.wrap(hf)
    assert all(parameter.device.type == "meta" for parameter in hf.parameters())
    assert (model.device.type, model.layer_device(3).type) == ("cpu", "cpu")
    assert_same(measure(model), undivided[FAMILIES[0]])


@pytest.mark.parametrize("name", NAMES)
def test_layers_on_several_devices(folders, name):
    """Devices that are faked (see places.py): values move, and come out as from one device."""
    with Places() as places:
        model = hookdepth.wrap(spread(tiny_model(FAMILIES[0]), ["xpu:0", "xpu:1", "cpu"]))
        assert [str(model.layer_device(n)) for n in range(5)] == ["xpu:0", "xpu:0", "xpu:1", "xpu:1", "cpu"]
        places.moves = 0
        found = measure(model, [name])
    assert places.moves > 3
    assert all(place_of(value).type == "cpu" for value in found.values())
    # Alone there, too: an analysis that shares its passes with others may be padded otherwise.
    assert_same(found, measure(hookdepth.load(str(folders / FAMILIES[0])), [name]))


def test_two_devices_do_not_mix():
    with Places():
        a, b = torch.ones(3, device="xpu:0"), torch.ones(3, device="xpu:1")
        with pytest.raises(RuntimeError, match="two devices"):
            a + b
        assert (a + b.to("xpu:0")).device == torch.device("xpu:0")
        assert b.device == torch.device("xpu:1")


def test_maps_from_the_command_line(folders, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu"}))
    assert hookdepth.load(str(folders / "gemma2"), device_map=str(path)).device.type == "cpu"
    assert hookdepth.load(str(folders / "gemma2"), device_map="auto").n_layers == 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the device map"),
        ("{", "cannot read the device map"),
        ("[]", "is no object of modules and devices"),
        ("{}", "is no object of modules and devices"),
        ('{"model": [0]}', "is no object of modules and devices"),
    ],
)
def test_maps_that_do_not_work(folders, tmp_path, content, says):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(HookdepthError, match=says) as caught:
        hookdepth.load(str(folders / "gemma2"), device_map=str(path))
    assert caught.value.exit_status == 2


def test_a_map_that_nobody_knows(folders):
    with pytest.raises(HookdepthError, match="unknown device map 'evenly'; use one of auto, balanced"):
        hookdepth.load(str(folders / "gemma2"), device_map="evenly")
