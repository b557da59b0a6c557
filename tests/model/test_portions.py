"""Portions of rows: the same bits as the whole, and only of MLPs that treat each row by itself."""

import pytest
import torch
from tiny_families import tiny
from tiny_models import prompts

import hookdepth as hd
from hookdepth.model import portions

ROWS = 5


@pytest.fixture(autouse=True)
def of_few_tokens(monkeypatch):
    monkeypatch.setattr(portions, "_TOKENS", 40)


def seen(model, token_ids):
    """The numbers of rows with which each call of an MLP's own forward was made, and what came out."""
    mlp, rows = model.layers[1].mlp, []
    plain = type(mlp).forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(mlp), "forward", lambda self, x: (rows.append((self, len(x))), plain(self, x))[1])
        with torch.no_grad():
            hidden = model.forward(token_ids)
    return [n for own, n in rows if own is mlp], hidden


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_the_same_bits_in_portions(family, monkeypatch):
    model = hd.wrap(tiny(family))
    token_ids = torch.tensor(prompts(ROWS, 20))
    in_portions, hidden = seen(model, token_ids)
    assert in_portions == [2, 2, 1]
    assert not any("forward" in vars(module) for module in model.hf.modules()), "as it was"
    monkeypatch.setattr(portions, "_TOKENS", 1000)
    whole, expected = seen(model, token_ids)
    assert whole == [ROWS]
    assert torch.equal(hidden, expected)


def test_who_looks_inside_sees_all_rows():
    model = hd.wrap(tiny("gemma"))
    token_ids, rows = torch.tensor(prompts(ROWS, 20)), []
    with model.on("neurons", 1, lambda value: rows.append(len(value))), torch.no_grad():
        model.forward(token_ids)
    assert rows == [ROWS]
    hidden = model.forward(token_ids)
    assert hidden.requires_grad, "with gradients it is whole as well, and they flow"


@pytest.mark.parametrize("why", ["experts", "half", "taken"])
def test_others_are_left_alone(why):
    hf = tiny("mixtral" if why == "experts" else "gemma")
    model = hd.wrap(hf.bfloat16() if why == "half" else hf)
    mlps = [layer.mlp for layer in model.layers]
    if why == "taken":
        mlps[0].down_proj.forward = mlps[0].down_proj.forward  # as accelerate does it
        mlps = mlps[:1]
    with portions.in_portions(mlps):
        assert not any("forward" in vars(mlp) for mlp in mlps)
