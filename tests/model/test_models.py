"""The adapter: families that work, models that are refused, and nothing changed by looking."""

import hashlib
import json

import naive
import pytest
import torch
from tiny_models import EAGER, FAMILIES, SPECIFIC, prompts, tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM, set_seed
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hookdepth
from hookdepth import Branch, LayerEffect, OutputEffect, Skip
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError
from hookdepth.model import families
from hookdepth.model.checking import check
from hookdepth.model.decoder import Decoder

L, D, T = 5, 64, 20


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, tiny_model(request.param)


def test_every_family_passes_the_check(family):
    name, hf = family
    model = hookdepth.wrap(hf, tiny_tokenizer())
    assert model.family is families.FAMILIES[SPECIFIC[name][0]], "known by its own name, not taken for a Llama"
    assert (model.n_layers, model.d_model, model.dtype) == (L, D, torch.float32)
    assert (model.device, model.context_length) == (torch.device("cpu"), 512)
    assert all(model.layer_device(layer) == torch.device("cpu") for layer in range(L))


def test_forward_and_unembed_are_the_models_own(family):
    _, hf = family
    model = hookdepth.wrap(hf)
    ids = torch.tensor(prompts(2, T))
    with torch.no_grad():
        assert torch.equal(model.unembed(model.forward(ids)), hf(ids, use_cache=False).logits)
        last = naive.run_with(hf, ids).resid_post[-1]
        assert torch.equal(model.norm(last), model.forward(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_check_holds_in_half_precision(family, dtype, attention):
    name, _ = family
    if attention == "sdpa" and name in EAGER:
        pytest.skip("transformers refuses sdpa here")
    model = hookdepth.wrap(tiny_model(name, attn_implementation=attention).to(dtype))
    assert model.dtype == dtype


# A Llama that adds something else.


class Louder(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return 1.05 * super().forward(*args, **kwargs)


class Normed(LlamaDecoderLayer):
    """Adds the norm of its MLP's output, as OLMo 2 does, but its config says Llama."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.after = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        attended = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return attended + self.after(self.mlp(self.post_attention_layernorm(attended)))


def with_layers(kind, only=2):
    hf = tiny_model("llama")
    layer = kind(hf.config, only).eval()
    layer.load_state_dict(hf.model.layers[only].state_dict(), strict=False)
    hf.model.layers[only] = layer
    return hf


@pytest.mark.parametrize("kind", [Louder, Normed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("massive", [False, True])
def test_a_layer_that_adds_something_else_is_refused(kind, dtype, massive):
    hf = with_layers(kind).to(dtype)
    if massive:  # one entry of the stream far larger than the rest, as in every trained model
        with torch.no_grad():
            hf.model.layers[0].mlp.down_proj.weight[5] *= 1000
    with pytest.raises(HookdepthError) as caught:
        hookdepth.wrap(hf)
    message = str(caught.value)
    assert "'LlamaForCausalLM' (Llama) is not supported: layer 2 is not resid_pre + attn_out + mlp_out" in message
    assert "(found: attn_out behind self_attn, mlp_out behind mlp" in message
    assert "see `hookdepth families`" in message


def test_logits_of_another_kind_are_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    hf = Scaled(tiny_config("llama")).eval()
    with pytest.raises(HookdepthError, match="final norm and unembedding do not give the model's logits"):
        hookdepth.wrap(hf)


def test_layers_without_the_needed_modules_are_refused():
    hf = tiny_model("llama")
    del hf.model.layers[0].self_attn
    with pytest.raises(HookdepthError, match="layer 0 has neither attention nor a mixer that is known") as caught:
        hookdepth.wrap(hf)
    assert "wrap(model, family=Family(…))" in str(caught.value)
    with pytest.raises(HookdepthError, match=r"it has no list of decoder layers at model"):
        hookdepth.wrap(nn.Linear(2, 2))


def test_an_unknown_family_that_works_is_accepted():
    hf = tiny_model("llama")
    hf.config.model_type = "new"
    assert hookdepth.wrap(hf).family.name == "new, by its structure"


def test_weights_that_are_not_finite():
    hf = tiny_model("llama")
    with torch.no_grad():
        hf.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(HookdepthError, match="non-finite values at layer 3") as caught:
        hookdepth.wrap(hf)
    assert caught.value.exit_status == 1
    hf = tiny_model("llama-untied")
    with torch.no_grad():
        hf.lm_head.weight[7] = float("inf")
    with pytest.raises(HookdepthError, match="non-finite logits") as caught:
        hookdepth.wrap(hf)
    assert caught.value.exit_status == 1


# A layer that returns a tuple, as before transformers 4.54.


def as_tuples(hf):
    for layer in hf.model.layers:

        def forward(*args, plain=layer.forward, **kwargs):
            return (plain(*args, **kwargs), "weights")

        layer.forward = forward
    plain = hf.model.forward

    def whole(*args, **kwargs):
        # The model's own loop over layers of then: the first of what a layer returns goes on.
        handles = [layer.register_forward_hook(lambda _m, _a, output: output[0]) for layer in hf.model.layers]
        try:
            return plain(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    hf.model.forward = whole
    return hf


def test_layers_that_return_tuples():
    ids = prompts(1, T)
    branches = [Branch((Skip(layer, part),)) for layer in range(L) for part in ("layer", "attn", "mlp")]
    plain = measure(hookdepth.wrap(tiny_model("llama")), ids, branches, [LayerEffect(), OutputEffect()])
    model = hookdepth.wrap(as_tuples(tiny_model("llama")))
    seen = []
    handle = model.on("resid_post", 2, lambda value: seen.append(value.shape))
    results = measure(model, ids, branches, [LayerEffect(), OutputEffect()])
    handle.remove()
    assert seen[0][1:] == (T, D)
    assert torch.equal(results.layer["effect"], plain.layer["effect"])
    assert torch.equal(results.output["output"], plain.output["output"])


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_a_hook_reads_and_replaces(family, site):
    _, hf = family
    model = hookdepth.wrap(hf)
    ids = torch.tensor(prompts(1, T))
    with torch.no_grad():
        reference = naive.run_with(hf, ids[0].tolist(), [(site, 2, lambda x: 1.5 * x)])
        handle = model.on(site, 2, lambda value: 1.5 * value)
        ours = hf(ids).logits
        handle.remove()
        assert (ours - reference.logits).abs().max() <= 1e-5 * reference.logits.abs().max()
        clean = hf(ids).logits
        assert (ours - clean).abs().max() > 0.01
        handle = model.on(site, 2, lambda value: None)
        assert torch.equal(hf(ids).logits, clean), "None leaves a value as it is"
        handle.remove()


# With and without a tokenizer.


def test_ids_need_a_tokenizer():
    hf = tiny_model("llama")
    model = hookdepth.wrap(hf, tiny_tokenizer())
    text = "the people of the town"
    assert model.ids(text).tolist() == [tiny_tokenizer()(text)["input_ids"]]
    with pytest.raises(HookdepthError, match="give one text; of several, one at a time"):
        model.ids([text, text])
    with pytest.raises(HookdepthError, match=r"no tokenizer; give token ids, or wrap\(model, tokenizer\)"):
        hookdepth.wrap(hf).ids(text)


def test_a_small_vocabulary_is_enough_for_the_check():
    hookdepth.wrap(tiny_model("llama", vocab_size=5))


# Evaluating.


def test_evaluating_gives_flags_back():
    hf = tiny_model("llama")
    hf.train()
    hf.model.layers[1].eval()
    next(hf.parameters()).requires_grad_(False)
    model = Decoder(hf)
    modes = [module.training for module in hf.modules()]
    flags = [parameter.requires_grad for parameter in hf.parameters()]

    def use(grad):
        with model.evaluating(grad=grad):
            assert not any(module.training for module in hf.modules())
            assert torch.is_grad_enabled() == grad
            if grad:
                assert not any(parameter.requires_grad for parameter in hf.parameters())
            raise ValueError("inside")

    for grad in (False, True):
        with pytest.raises(ValueError, match="inside"):
            use(grad)
        assert [module.training for module in hf.modules()] == modes
        assert [parameter.requires_grad for parameter in hf.parameters()] == flags
        assert torch.is_grad_enabled()


def test_gradients_reach_activations_and_no_parameter():
    hf = tiny_model("llama")
    model = Decoder(hf)
    leaf = torch.zeros(D, requires_grad=True)
    with model.evaluating(grad=True):
        handle = model.on("resid_pre", 2, lambda value: value + leaf)
        model.unembed(model.forward(torch.tensor(prompts(1, T)))).sum().backward()
        handle.remove()
    assert leaf.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_the_check_leaves_the_model_as_it_was():
    hf = tiny_model("llama", attention_dropout=0.5)
    hf.train()
    state = torch.get_rng_state()
    check(Decoder(hf))
    assert all(module.training for module in hf.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


# What results say.


def test_describe():
    set_seed(0)
    model = hookdepth.wrap(tiny_model("granite").bfloat16(), name="tiny", revision="r1")
    about = model.describe()
    assert json.loads(json.dumps(about)) == about
    assert len(about.pop("config_sha256")) == len(hashlib.sha256().hexdigest())
    assert about == {
        "id": "tiny",
        "revision": "r1",
        "family": "Granite",
        "n_layers": L,
        "d_model": D,
        "n_parameters": sum(p.numel() for p in model.hf.parameters()),
        "dtype": "bfloat16",
        "quantization": "none",
        "attn_implementation": "sdpa",
        "device": "cpu",
    }


def test_the_config_hash_is_about_the_architecture():
    def digest(hf):
        return Decoder(hf).describe()["config_sha256"]

    one = tiny_model("llama")
    same = digest(one)
    one.config._name_or_path = "elsewhere"
    assert digest(one.bfloat16()) == same
    assert digest(tiny_model("llama", rms_norm_eps=1e-5)) != same
    assert digest(tiny_model("llama", num_hidden_layers=4)) != same
