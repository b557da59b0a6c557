"""Hooks that read: the values that passed, and no trace afterwards."""

import naive
import pytest
import torch
from hooks import hooks_of
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.engine.reading import capture, each_layer
from hookdepth.errors import HookdepthError
from hookdepth.model.sites import SITES

L, D, T = 5, 64, 20
STREAM = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@pytest.fixture(scope="module", params=["llama", "olmo2", "gemma2", "granite"])
def family(request):
    hf = tiny_model(request.param)
    return hf, hookdepth.wrap(hf), torch.tensor(prompts(2, T))


@pytest.fixture(scope="module")
def llama():
    hf = tiny_model("llama")
    return hf, hookdepth.wrap(hf), torch.tensor(prompts(2, T))


def test_every_site_of_every_layer(family):
    hf, model, ids = family
    with torch.no_grad():
        reference = naive.run_with(hf, ids)
        with capture(model, *STREAM) as acts:
            logits = hf(ids).logits
    assert torch.equal(logits, reference.logits), "reading changes nothing"
    assert set(acts) == {(site, layer) for site in STREAM for layer in range(L)}
    for site in STREAM:
        torch.testing.assert_close(acts.stack(site), torch.stack(getattr(reference, site)))
        assert acts.stack(site).shape == (L, 2, T, D)


def test_chosen_layers_in_order(llama):
    _, model, ids = llama
    with torch.no_grad(), capture(model, "resid_post", layers=[3, 1]) as acts:
        model.forward(ids)
    assert set(acts) == {("resid_post", 1), ("resid_post", 3)}
    assert torch.equal(acts.stack("resid_post"), torch.stack([acts["resid_post", 1], acts["resid_post", 3]]))


def test_the_last_pass_counts(llama):
    _, model, ids = llama
    with torch.no_grad(), capture(model, "resid_pre", layers=[2]) as acts:
        model.forward(ids)
        first = acts["resid_pre", 2]
        model.forward(ids[:1, :7])
    assert acts["resid_pre", 2].shape == (1, 7, D)
    assert first.shape == (2, T, D)


def test_captured_values_carry_no_graph(llama):
    _, model, ids = llama
    with capture(model, *SITES) as acts:
        assert model.forward(ids).requires_grad
    assert not any(value.requires_grad for value in acts.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_keep_their_masks(attention, side):
    hf = tiny_model("llama", attn_implementation=attention)
    model = hookdepth.wrap(hf)
    ids = torch.tensor(prompts(3, T))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    with torch.no_grad():
        plain = hf(ids, attention_mask=mask, output_hidden_states=True)
        with capture(model, "resid_pre") as acts:
            logits = hf(ids, attention_mask=mask).logits
    assert torch.equal(logits, plain.logits)
    for layer in range(L):
        assert torch.equal(acts["resid_pre", layer], plain.hidden_states[layer])


def test_each_layer_is_given_when_it_is_done(family):
    hf, model, ids = family
    seen = []
    with torch.no_grad():
        reference = naive.run_with(hf, ids)
        with each_layer(model, lambda layer, sites: seen.append((layer, sites))):
            model.forward(ids)
    assert [layer for layer, _ in seen] == list(range(L))
    for layer, sites in seen:
        given = {"resid_pre": sites.resid_pre, "resid_post": sites.resid_post}
        given |= {f"{part}_out": added for part, added in sites.added.items()}
        for site in STREAM:
            torch.testing.assert_close(given[site], getattr(reference, site)[layer])


@pytest.mark.parametrize("opened", [lambda m: capture(m, *SITES), lambda m: each_layer(m, lambda layer, sites: None)])
@pytest.mark.parametrize("error", [None, ValueError("broken"), KeyboardInterrupt()])
def test_hooks_are_gone_whatever_happens(llama, opened, error):
    hf, model, ids = llama
    before = hooks_of(hf)

    def use():
        with opened(model):
            assert hooks_of(hf) != before
            model.forward(ids)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            use()
    else:
        use()
    assert hooks_of(hf) == before


def test_an_error_in_the_body_of_each_layer(llama):
    hf, model, ids = llama
    before = hooks_of(hf)

    def fail(layer, _sites):
        raise ValueError(f"at {layer}")

    with pytest.raises(ValueError, match="at 0"), each_layer(model, fail):
        model.forward(ids)
    assert hooks_of(hf) == before


def test_a_name_is_no_model():
    with pytest.raises(HookdepthError, match="the model is 'gpt2'; give what load or wrap gave"), capture("gpt2", "z"):
        pass


@pytest.mark.parametrize(
    ("sites", "layers", "says"),
    [
        ((), None, "no site; name one or more of resid_pre, mixer_out, z, attn_out"),
        (("resid_mif",), None, "unknown site 'resid_mif'"),
        (("resid_pre",), [5], "layer 5 of a model of 5; give 0 to 4"),
        (("resid_pre",), [-1], "layer -1"),
    ],
)
def test_refusals(llama, sites, layers, says):
    hf, model, _ = llama
    before = hooks_of(hf)
    with pytest.raises(HookdepthError, match=says), capture(model, *sites, layers=layers):
        pass
    assert hooks_of(hf) == before
