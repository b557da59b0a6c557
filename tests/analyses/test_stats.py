"""The report says where the first token alone makes a bar; all else of residual-stats is in test_against_naive."""

import pytest
import torch
from tiny_families import tiny
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import capture
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


PARTS = {
    "mamba": {"mixer": ()},
    "gpt-neox": {"attn": (), "mlp": ()},
    "falcon-h1": {"mixer": (), "attn": (), "mlp": ("mixer", "attn")},
    "granite-moe-shared": {"attn": (), "mlp": ("attn",), "extra": ("attn", "mlp")},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_any_family_adds_is_compared_with_the_stream_it_is_added_to(name):
    model = hookdepth.wrap(tiny(name), tiny_tokenizer())
    result = hookdepth.analyse(model, "residual-stats", TEXTS[:1])
    sites = ["resid_pre", "resid_post", *(f"{part}_out" for part in PARTS[name])]
    with capture(model, *sites) as acts, model.evaluating():
        model.forward(model.ids(TEXTS[0]))
    found = {name.partition(".")[2] for name in result.tensors if name.startswith("cosine.")}
    assert found == {*PARTS[name], "layer"}
    for layer in range(model.n_layers):
        added = {part: acts[f"{part}_out", layer][0] for part in PARTS[name]}
        for part, before in PARTS[name].items():
            stream = acts["resid_pre", layer][0] + sum(added[other] for other in before)
            share = (added[part].norm(dim=-1) / stream.norm(dim=-1)).mean()
            cosine = torch.cosine_similarity(added[part], stream, dim=-1).mean()
            torch.testing.assert_close(result[f"relative_contribution.{part}"][layer], share)
            torch.testing.assert_close(result[f"cosine.{part}"][layer], cosine, rtol=1e-4, atol=1e-6)
        grown = acts["resid_post", layer][0] - acts["resid_pre", layer][0]
        torch.testing.assert_close(result["norm.layer"][layer], grown.norm(dim=-1).mean())
