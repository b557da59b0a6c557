"""The naive reference checked by itself: against the model, the notebook's numbers, and cases known in closed form."""

import naive
import pytest
import torch
from tiny_models import FAMILIES, VOCAB, prompts, tiny_model
from torch import nn

T, CUT = 20, 11
ANSWER = [T - 2, T - 1]
# The analyses reach a family's modules through run_with and unembed alone, which are tried on all: a family each of
# what those do in another way (sublayers as they are, normed afterwards, capped logits, multiplied contributions).
WAYS = ("llama", "olmo2", "gemma2", "granite")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """`model, ids = tiny`: one family's tiny model and a prompt of 20 tokens."""
    return tiny_model(request.param), prompts(1, T, seed=1)[0]


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return tiny_model(request.param), prompts(1, T, seed=1)[0]


def hooks(model: nn.Module) -> int:
    """`hooks(model) == 0`: how many forward hooks are on the model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def plain(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """`plain(model, ids)`: the model's own logits, [1, T, vocab]."""
    return model(input_ids=torch.tensor([ids])).logits


def upper(effect: torch.Tensor) -> torch.Tensor:
    """`upper(effect)`: the entries i > s."""
    return effect[torch.triu(torch.ones_like(effect), 1).bool()]


# The tiny models


def test_tiny_models_are_deterministic_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    first, second, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_tiny_sliding_window_matters():
    ids = prompts(1, T)[0]
    window, full = plain(tiny_model("mistral"), ids), plain(tiny_model("mistral-full"), ids)
    torch.testing.assert_close(window[:, :8], full[:, :8])
    assert (window[:, 8:] - full[:, 8:]).abs().amax(-1).min() > 1e-2


# run_with


@torch.no_grad()
def test_no_edits_are_the_model_itself(tiny):
    model, ids = tiny
    run = naive.run_with(model, ids)
    assert torch.equal(run.logits, plain(model, ids))
    assert torch.equal(naive.unembed(model, run.stream()[-1]), run.logits)
    same = [(site, 2, torch.clone) for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    assert torch.equal(naive.run_with(model, ids, same).logits, run.logits)


@torch.no_grad()
def test_sublayers_add_up(tiny):
    model, ids = tiny
    run = naive.run_with(model, ids)
    assert len(run.resid_pre) == model.config.num_hidden_layers
    for before, a, m, after in zip(run.resid_pre, run.attn_out, run.mlp_out, run.resid_post, strict=True):
        torch.testing.assert_close(before + a + m, after, rtol=1e-5, atol=1e-5)
        assert min(a.norm(), m.norm()) > 0.1 * after.norm()  # neither is trivially small
    for after, before in zip(run.resid_post, run.resid_pre[1:], strict=False):
        assert torch.equal(after, before)


@torch.no_grad()
def test_an_edit_changes_what_follows_and_nothing_else(tiny):
    model, ids = tiny
    clean = naive.run_with(model, ids)
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        run = naive.run_with(model, ids, [(site, 2, naive.overwrite(CUT, 0.5))])
        assert torch.equal(getattr(run, site)[2][:, CUT], torch.full_like(clean.resid_pre[2][:, CUT], 0.5))
        for now, then in zip(run.stream(), clean.stream(), strict=True):  # causal: nothing moves left of the edit
            assert torch.equal(now[:, :CUT], then[:, :CUT])
        for now, then in zip(run.resid_post[:2], clean.resid_post[:2], strict=True):
            assert torch.equal(now, then)
        assert (run.logits - clean.logits)[:, CUT:].abs().amax(-1).min() > 1e-4
        for h, a, m, post in zip(run.resid_pre, run.attn_out, run.mlp_out, run.resid_post, strict=True):
            if site != "resid_post" or h is not run.resid_pre[2]:
                torch.testing.assert_close(h + a + m, post, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_skipped_attention_is_followed_by_the_mlp_of_the_untouched_stream():
    model, ids = tiny_model("llama-gqa"), prompts(1, T)[0]
    run = naive.run_with(model, ids, [("attn_out", 1, torch.zeros_like)])
    layer, h = model.model.layers[1], run.resid_pre[1]
    torch.testing.assert_close(run.resid_post[1], h + layer.mlp(layer.post_attention_layernorm(h)))


def test_hooks_are_gone_whatever_happens(tiny):
    model, ids = tiny
    naive.run_with(model, ids)
    assert hooks(model) == 0

    def fails(_):
        raise RuntimeError("inside an edit")

    with pytest.raises(RuntimeError, match="inside an edit"):
        naive.run_with(model, ids, [("mlp_out", 1, fails)])
    assert hooks(model) == 0


# The analyses


def test_residual_stats_are_means_over_tokens(tiny):
    model, _ = tiny
    several = prompts(3, (T, 7, 12))
    stats = naive.residual_stats(model, several)
    assert len(stats) == 23
    assert stats["norm.resid"].shape == (6,)
    single = [naive.residual_stats(model, [p]) for p in several]
    for name, value in stats.items():
        each = torch.stack([s[name] for s in single])
        counts = [1 if name.endswith("last") or name.startswith("first_token.") else len(p) for p in several]
        weights = torch.tensor(counts).view(-1, *[1] * value.ndim)
        expected = each.amax(0) if "max" in name else (each * weights).sum(0) / weights.sum()
        torch.testing.assert_close(value, expected)
    assert max(stats[f"cosine.{part}"].abs().max() for part in ("attn", "mlp", "layer")) <= 1


def test_logit_lens_ends_at_the_model(tiny):
    model, _ = tiny
    lens = naive.logit_lens(model, prompts(2, (T, 9)))
    assert lens["kl"].shape == lens["topk_overlap"].shape == (6,)
    assert (lens["kl"][-1], lens["topk_overlap"][-1]) == (0, 1)
    assert lens["kl"][:-1].min() > 1e-3
    assert 0 <= lens["topk_overlap"].min() < 0.9


@pytest.mark.parametrize("part", ["layer", "attn", "mlp"])
def test_skip(tiny, part):
    model, ids = tiny
    current, current_out = naive.skip(model, ids, part)
    future, future_out = naive.skip(model, ids, part, cut=CUT)
    for effect in (current, future):
        assert torch.all(torch.tril(effect, -1) == 0)
        assert upper(effect).min() > 1e-2
    assert torch.all(future.diagonal() == 0)  # what a layer reads left of the cut is its input, which is clean
    if part == "layer":
        assert torch.all(current.diagonal() == 1)
    assert current_out.min() > 1e-3
    assert future_out[:-1].min() > 1e-4
    assert future_out[-1] == 0
    nothing, nothing_out = naive.skip(model, ids, part, cut=1)
    assert torch.all(nothing == 0)
    assert torch.all(nothing_out == 0)


def test_local_effects(way):
    model, ids = way
    current, future = naive.local(model, ids), naive.local(model, ids, cut=CUT)
    for effect in (current, future):
        assert torch.all(torch.tril(effect) == 0)
        assert upper(effect).min() > 1e-2
    propagated, _ = naive.skip(model, ids)  # for the next layer, direct is all there is
    torch.testing.assert_close(current.diagonal(1), propagated.diagonal(1), rtol=1e-4, atol=1e-5)


def test_erasure(way):
    model, ids = way
    ids, answer = ids[:12], [10, 11]
    baseline = naive.erasure_baseline(model, prompts(3, (T, 7, 12)))
    effect = naive.erasure(model, ids, answer, baseline)
    assert baseline.shape == (6, 64)
    assert effect.shape == (6, 12)
    assert torch.equal(naive.erasure(model, ids, answer, baseline, layers=[1, 5]), effect[[1, 5]])
    assert torch.all(effect[:, -1] == 0)  # nothing is predicted from the last token
    assert torch.all(effect[-1, : answer[0] - 1] == 0)  # the final residual only matters where answers are predicted
    assert effect[:-2, : answer[0]].max(0).values.min() > 1e-4
    assert effect[-1, answer[0] - 1 : -1].min() > 1e-3


# Integrated gradients


def bag_of_words(scale: float = 1.0) -> nn.Module:
    """`bag_of_words(1e-3)`: a tiny Llama whose layers add nothing and whose logits are scale · W h."""
    model = tiny_model("llama-untied", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(scale)
    model.model.norm = nn.Identity()
    return model


def test_integrated_gradients_of_a_nearly_linear_model_are_complete_at_once():
    model, ids = bag_of_words(1e-3), prompts(1, T)[0]
    attribution, f_x, f_base = naive.integrated_gradients(model, ids, ANSWER, layer=1, steps=1)
    assert attribution.sum().item() == pytest.approx(f_x - f_base, rel=1e-2)
    assert torch.all(attribution[: ANSWER[0] - 1] == 0)
    assert attribution[-1] == 0
    weight = model.lm_head.weight[ids[ANSWER[0]]] - model.lm_head.weight.mean(0)
    h = model.model.embed_tokens.weight[ids]
    expected = weight @ (h[ANSWER[0] - 1] - h.mean(0)) / VOCAB  # d softmax ≈ (W_a − mean W) / vocab
    assert attribution[ANSWER[0] - 1].item() == pytest.approx(expected.item(), rel=2e-2)


def test_integrated_gradients_converge_as_a_riemann_sum_does():
    model, ids = bag_of_words(), prompts(1, T, seed=3)[0]
    errors = []
    for steps in (64, 128, 256):
        attribution, f_x, f_base = naive.integrated_gradients(model, ids, ANSWER, layer=0, steps=steps)
        errors.append(abs(attribution.sum().item() - (f_x - f_base)))
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2] > 0
    attribution, *_ = naive.integrated_gradients(model, ids, ANSWER, layer=0, steps=256, method="midpoint")
    assert attribution.sum().item() == pytest.approx(f_x - f_base, abs=1e-5)


@pytest.mark.parametrize("part", ["layer", "attn", "mlp"])
def test_integrated_gradients_are_complete(way, part):
    model, ids = way
    attribution, f_x, f_base = naive.integrated_gradients(
        model, ids, ANSWER, layer=2, part=part, steps=256, method="midpoint", block=64
    )
    assert attribution.shape == (T,)
    assert attribution[-1] == 0
    p = plain(model, ids).softmax(-1)[0]
    assert f_x == pytest.approx(sum(p[t - 1, ids[t]].item() for t in ANSWER), rel=1e-5)
    scale = max(attribution.abs().sum().item(), abs(f_x - f_base))
    assert abs(attribution.sum().item() - (f_x - f_base)) < 0.02 * scale
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == 0


# The notebook's numbers


@pytest.fixture(scope="module")
def two(demo_model, gsm8k_texts):
    """`model, prompts = two`: the demo model and the first two GSM8K problems."""
    model, tokenizer = demo_model
    return model, [tokenizer(text)["input_ids"] for text in gsm8k_texts[:2]]


@pytest.mark.demo
def test_golden_residual_stats(two, golden):
    stats = naive.residual_stats(*two)
    for name, expected in golden("residual-stats").items():
        torch.testing.assert_close(stats[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.demo
def test_golden_logit_lens(two, golden):
    layers = [0, 14, 29]  # all 30 agree as well, and take six times as long
    lens = naive.logit_lens(*two, layers=[*layers, 30])
    for name, expected in golden("logit-lens").items():  # the notebook leaves out the final residual
        torch.testing.assert_close(lens[name][:-1], expected[layers], rtol=1e-5, atol=1e-6)
    assert (lens["kl"][-1], lens["topk_overlap"][-1]) == (0, 1)


@pytest.mark.demo
def test_golden_skip_current(two, golden):
    model, both = two
    layers = [0, 14, 29]  # all 30 agree as well, and take eight times as long
    effects, outputs = zip(*(naive.skip(model, prompt, layers=layers) for prompt in both), strict=True)
    found = {"layer.effect": torch.stack(effects).amax(0), "layer.output": torch.stack(outputs).amax(0)}
    for name, expected in golden("skip-current").items():
        torch.testing.assert_close(found[name][layers], expected[layers], rtol=1e-4, atol=1e-5)


@pytest.mark.demo
def test_golden_residual_erasure(demo_model, gsm8k_texts, golden):
    model, tokenizer = demo_model
    baseline = naive.erasure_baseline(model, [tokenizer(text)["input_ids"] for text in gsm8k_texts])
    ids = tokenizer("5 + 7 + 5 + 3 + 1 + 7 = 28")["input_ids"]
    layers = [14, 30]  # all 31 agree to the last bit, and take fifteen times as long
    effect = naive.erasure(model, ids, [18, 19], baseline, layers)
    expected = golden("residual-erasure")["effect.0"][layers]
    torch.testing.assert_close(effect, expected, rtol=1e-4, atol=1e-5)
