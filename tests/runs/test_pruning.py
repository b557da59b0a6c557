"""A pruned checkpoint is the path through the layers that stay, or is not written."""

import json

import pytest
import torch
from tiny_families import tiny as tiny_family
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import hookdepth
from hookdepth import Custom, HookdepthError, LayerPath, cli
from hookdepth.runs import pruning
from hookdepth.runs.pruning import prune

IDS = prompts(1, 20)[0]


def tiny(family, **overrides):
    return hookdepth.wrap(tiny_model(family, **overrides), tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "gemma3", "smollm3", "granite", "phi3"])
def test_what_is_left_is_the_path(family, tmp_path):
    model = tiny(family)
    before = json.dumps(model.config.to_dict(), default=str)
    prune(model, "0,2-3", tmp_path / "pruned")
    assert (model.n_layers, json.dumps(model.config.to_dict(), default=str)) == (5, before)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    left = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", attn_implementation=model.config._attn_implementation
    )
    assert left.config.num_hidden_layers == len(left.model.layers) == 3
    with torch.no_grad():
        logits = left(torch.tensor([IDS])).logits[0]
    tokens = [Custom(str(token), lambda view, token=token: view.logits[..., token], "mean") for token in (7, 99)]
    found = hookdepth.run(model, IDS, [LayerPath("0,2-3"), LayerPath("0,1,2")], tokens)
    for token in (7, 99):
        own, other = found[str(token)].tolist()
        assert own == pytest.approx(logits[:, token].mean().item(), abs=1e-5)
        assert own != pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "falcon-alibi", "llama4", "nemotron-h", "afmoe", "gemma4"])
def test_other_families_are_held_against_the_path_before_they_are_kept(family, tmp_path):
    model = hookdepth.wrap(tiny_family(family).eval(), tiny_tokenizer())
    prune(model, "1-3", tmp_path / "pruned")
    assert hookdepth.load(str(tmp_path / "pruned")).n_layers == 3


def test_layers_that_a_rule_of_their_number_makes_are_refused(tmp_path):
    model = hookdepth.wrap(tiny_family("jamba").eval(), tiny_tokenizer())
    with pytest.raises(HookdepthError, match=r"does not run|would be other layers"):
        prune(model, "1-3", tmp_path / "pruned")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["a\0b", "a-file/pruned", ""])
@pytest.mark.parametrize("command", ["prune", "verify"])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    command, out, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    keep = ["--keep", "0"] if command == "prune" else []
    where = out if command == "prune" else f"{out}/x.json" if out else "."
    assert cli.main([command, "--model", "nowhere/at-all", *keep, "--out", where]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "says"), [("no_rope_layers", "would be other layers"), ("layer_types", "cannot be written|does not run")]
)
def test_a_config_that_cannot_say_it_writes_nothing(field, says, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "_NOT_BY_LAYER", (field,))
    with pytest.raises(HookdepthError, match=says) as error:
        prune(tiny("smollm3"), "1-4", tmp_path / "pruned")
    assert error.value.exit_status == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("0-2,1-4", "repeats"),
        ("1,0", "repeats"),
        ("0,1+2", "repeats"),
        ([], "names none"),
        ("0-5", "layer 5 of a model of 5"),
        ("a", "names no layers"),
    ],
)
def test_layers_that_are_no_part_of_the_model(keep, says, tmp_path):
    with pytest.raises(HookdepthError, match=says):
        prune(tiny("llama"), keep, tmp_path / "pruned")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, monkeypatch, capsys):
    tiny("llama").hf.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    asked = ["prune", "--model", str(tmp_path / "whole"), "--keep", "0-1,4", "--out", str(tmp_path / "pruned")]
    assert cli.main(asked) == 0
    assert "kept layers 0-1,4 of 5" in capsys.readouterr().out
    assert hookdepth.load(str(tmp_path / "pruned")).n_layers == 3
    assert cli.main(asked) == 2
    assert "is there already" in capsys.readouterr().err
