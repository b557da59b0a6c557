"""The report says where the first token alone makes a bar; all else of residual-stats is in test_against_naive."""

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses.registry import declared

TEXTS = ["Anna has 12 apples", "Imagine all the people of the town"]


def stats(bos, **options):
    """residual-stats of a model to which the token in front of every text is so long."""
    hf = tiny_model("llama-untied")
    with torch.no_grad():
        hf.model.embed_tokens.weight[0] *= bos
    return hookdepth.analyse(hookdepth.wrap(hf, tiny_tokenizer(bos=True)), "residual-stats", TEXTS, **options)


def notes(result):
    return declared(result).notes(result)


@pytest.mark.parametrize(
    ("bos", "name", "place"),
    [(1e-5, "relative_contribution.attn", "layer 0"), (1e5, "norm.resid", "point 0 and 5 more")],
)
def test_the_report_says_where_the_first_token_alone_makes_a_bar(bos, name, place):
    result, without = stats(bos), stats(bos, keep_front=1)
    (line,) = notes(result)
    number = int(place.split()[1])
    values = f"({result[name][number]:.3g}; {without[name][number]:.3g} without it)"
    assert f"{name} at {place} {values}" in line
    assert result[name][number] > 10 * without[name][number]
    assert line.endswith("--keep-front 1 leaves it out.")
    assert notes(without) == []
    assert not [own for own in without.tensors if "first_token" in own]


def test_where_it_makes_none_there_is_no_word():
    assert notes(stats(1.0)) == []


def test_one_token_a_prompt_is_not_compared_with_no_others():
    model = hookdepth.wrap(tiny_model("llama"), tiny_tokenizer())
    assert notes(hookdepth.analyse(model, "residual-stats", ["a", "b"])) == []
