"""First-order sweeps, against finite differences and against the sweeps that they stand for."""

import pytest
import torch
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import (
    AddVector,
    Branch,
    LayerEffect,
    LogitDifference,
    OutputEffect,
    Top1,
    attribute,
    capture,
    patch_sweep,
)
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError

A, B = 17, 91
METRIC = LogitDifference(A, B)


@pytest.fixture
def model():
    return hookdepth.wrap(tiny_model("llama-gqa"))


def pair(seed, length=7, differ=3):
    clean, other = prompts(2, length, seed=seed)
    return clean, [*clean[:differ], other[differ], *clean[differ + 1 :]]


def states(model, ids, site):
    with model.evaluating(), capture(model, site) as acts:
        model.forward(torch.tensor([ids]))
    return acts.stack(site)[:, 0]


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "granite", "smollm3"])
def test_scores_are_the_slope_of_moving_towards_the_other_run(family, denoise):
    model = hookdepth.wrap(tiny_model(family))
    clean, corrupted = pair(1)
    base, source = (corrupted, clean) if denoise else (clean, corrupted)
    sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    found = attribute(model, clean, corrupted, METRIC, sites=sites, denoise=denoise)
    span = (found["clean"] - found["corrupted"]) * (1 if denoise else -1)
    for site in sites:
        way = states(model, source, site) - states(model, base, site)
        cells = [(layer, token) for layer in range(5) for token in (3, 4, 6)]
        move = [
            AddVector(site, layer, sign * 1e-2 * way[layer, token], [token])
            for layer, token in cells
            for sign in (1, -1)
        ]
        values = measure(model, [base], [Branch((one,), measured=[-1]) for one in move], [METRIC]).output[
            "logit_difference"
        ]
        slopes = (values[::2] - values[1::2]) / 2e-2 / span
        own = torch.stack([found[site][cell] for cell in cells])
        assert torch.allclose(own, slopes, atol=2e-2 * max(1.0, slopes.abs().max().item()))
        assert found[site][:, :3].abs().max() < 1e-5


@pytest.mark.parametrize("steps", [None, 3])
def test_of_a_small_change_scores_are_those_of_the_sweep(steps):
    hf = tiny_model("llama-gqa", tie_word_embeddings=False)
    clean, corrupted = pair(0)  # whose difference of logits is far from rounding: scores are shares of it
    with torch.no_grad():  # two tokens that are nearly the same
        weight = hf.model.embed_tokens.weight
        weight[corrupted[3]] = weight[clean[3]] + 1e-2 * weight[corrupted[3]]
    model = hookdepth.wrap(hf)
    found = attribute(model, clean, corrupted, METRIC, ["resid_pre", "attn_out", "mlp_out"], steps=steps)
    for site in ("resid_pre", "attn_out", "mlp_out"):
        sweep = patch_sweep(model, clean, corrupted, site, METRIC)["score"]
        assert torch.allclose(found[site], sweep, atol=2e-2 * sweep.abs().max().item())
        assert sweep.abs().max() > 0.01


def test_heads_and_neurons_have_scores_of_their_own(model):
    clean, corrupted = pair(1)
    found = attribute(model, clean, corrupted, METRIC, ["z", "neurons", "attn_out", "mlp_out"])
    assert found["z"].shape == (5, 7, 4)
    assert found["neurons"].shape == (5, 7, 96)
    # What projections without a bias add is a sum over heads, and over neurons.
    assert torch.allclose(found["z"].sum(-1), found["attn_out"], atol=1e-5)
    assert torch.allclose(found["neurons"].sum(-1), found["mlp_out"], atol=1e-5)


def test_heads_and_neurons_are_drawn_over_all_tokens(model):
    pairs = [[5, 6, 7, 8, 9, 10], [9, 8, 7]], [[5, 6, 99, 8, 98, 9, 10], [9, 8, 5]]
    found = attribute(model, *pairs, METRIC, ["z", "neurons"], align="ends")
    for site, node, count in (("z", "head", 4), ("neurons", "neuron", 96)):
        assert found.axes(f"{site}.all_tokens") == ("layer", node)
        own = found[f"per_prompt.{site}"]
        assert own.isnan().any()
        by_hand = torch.stack([one[:, ~one[0, :, 0].isnan()].sum(1) for one in own])
        assert torch.allclose(found[f"per_prompt.{site}.all_tokens"], by_hand)
        assert found.plot(f"{site}.all_tokens").axes[0].images[0].get_array().shape == (5, count)
    assert found.plot().axes[0].get_xlabel() == "Head"
    assert attribute(model, *pair(1), METRIC, ["neurons"]).plot().axes[0].get_xlabel() == "Neuron"


def test_averaged_gradients_add_up_to_the_whole_metric(model):
    """Completeness: the attributions to the embeddings are the difference of both runs' metrics."""
    for seed in (3, 5):
        scores = attribute(model, *pair(seed), METRIC, steps=400, layers=[0])["resid_pre"]
        assert scores.sum().item() == pytest.approx(1, abs=1e-2)
    clean, corrupted = [5, 6, 7, 8, 9, 10], [5, 6, 99, 8, 98, 9, 10]
    aligned = attribute(model, clean, corrupted, METRIC, align="ends")["resid_pre"]
    assert aligned[0].isnan().tolist() == [False, False, True, True, True, False, False]


def test_many_pairs_are_each_as_alone(model):
    both = [pair(1), pair(2, length=9, differ=5)]
    clean, corrupted = zip(*both, strict=True)
    together = attribute(model, clean, corrupted, METRIC, ["mlp_out"])
    assert together["per_prompt.mlp_out"].shape == (2, 5, 9)
    for number, (one, other) in enumerate(both):
        alone = attribute(model, one, other, METRIC, ["mlp_out"])["mlp_out"]
        assert torch.equal(together["per_prompt.mlp_out"][number, :, 9 - len(one) :], alone)


def test_captured_gradients_are_autograds(model):
    ids = torch.tensor(prompts(1, 6))
    with model.evaluating(grad=True), capture(model, "resid_pre", "attn_out", grad=True) as acts:
        model.unembed(model.forward(ids)[:, -1])[0, A].backward()
    assert not any(parameter.grad is not None for parameter in model.hf.parameters())
    for site, layer in (("resid_pre", 0), ("resid_pre", 3), ("attn_out", 2)):
        step = 1e-2 * torch.nn.functional.normalize(acts.grad(site, layer)[0, 2], dim=0)
        moves = [Branch((AddVector(site, layer, sign * step, [2]),), measured=[-1]) for sign in (1, -1)]
        logit = hookdepth.Custom("logit", lambda view: view.logits[..., A].float())
        up, down = measure(model, ids.tolist(), moves, [logit]).output["logit"]
        assert ((up - down) / 2e-2).item() == pytest.approx(acts.grad(site, layer)[0, 2].norm().item(), rel=2e-2)


def test_gradients_flow_to_parameters_that_want_them():
    hf = tiny_model("llama").train()
    model = hookdepth.wrap(hf)
    hf.train()
    with capture(model, "resid_post", layers=[2], grad=True) as acts:
        hf(torch.tensor(prompts(1, 6))).logits.sum().backward()
    assert acts.grad("resid_post", 2).abs().sum() > 0
    assert hf.model.layers[0].mlp.up_proj.weight.grad is not None


def test_what_has_no_gradients_is_refused(model):
    one, other = pair(1)
    wrong = [
        ((one, other, LayerEffect()), {}, "layers"),
        ((one, other, METRIC), {"sites": "resid_pre"}, "sites"),
        ((one, other, METRIC), {"sites": []}, "sites"),
        ((one, other, METRIC), {"sites": ["residual"]}, "residual"),
        ((one, other, METRIC), {"sites": ["q"]}, "only be read"),
        ((one, other, METRIC), {"sites": ["z", "z"]}, "twice"),
        ((one, other, METRIC), {"steps": 0}, "steps"),
        ((one, other, METRIC), {"measured": [9]}, "token 9"),
        ((one, other, METRIC), {"measured": -1}, "tokens are -1"),
        ((one, other, METRIC), {"measured": [1.5]}, "one of the tokens is 1.5"),
        ((one, other, METRIC), {"measured": []}, "needs a token to be read at"),
        ((one, other, METRIC), {"layers": ()}, r"the layers are \(\)"),
        ((one, other, OutputEffect()), {}, "'output' compares with a clean run"),
        ((one, other, Top1()), {}, "'top1' has no gradient"),
        ((one, other, LogitDifference(5, 6, reduce=None)), {}, "leaves a value a token"),
        ((one, other, hookdepth.TargetProbability()), {}, "next token"),
        ((one, one, METRIC), {}, "the same"),
    ]
    for arguments, options, named in wrong:
        with pytest.raises(HookdepthError, match=named):
            attribute(model, *arguments, **options)
    with (
        pytest.raises(HookdepthError, match="without gradients"),
        capture(model, "resid_pre", grad=True),
        torch.no_grad(),
    ):
        model.forward(torch.tensor([one]))
    with model.evaluating(), capture(model, "resid_pre") as acts:
        model.forward(torch.tensor([one]))
    with pytest.raises(HookdepthError, match="no gradient"):
        acts.grad("resid_pre", 0)
