"""Every family: random branches of every kind against plain passes, by the check that users have (`verify`)."""

import pytest
import torch
from tiny_families import FAMILIES, REFUSED, tiny

import hookdepth
from hookdepth import Branch, Family, OutputEffect, Skip
from hookdepth.checks import verify
from hookdepth.errors import HookdepthError

IDS = [(7 * n) % 290 + 3 for n in range(14)]
RECURRENT = {"lfm2", "qwen3-next", "qwen3.5", "mamba", "mamba2", "falcon-h1", "nemotron-h", "jamba"}
PARALLEL = {"gpt-j", "gpt-neox", "falcon", "falcon-new", "phi", "cohere", "cohere2", "stablelm-parallel"}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    if name in REFUSED:
        with pytest.raises(HookdepthError, match=REFUSED[name]):
            hookdepth.wrap(tiny(name))
        return
    model = hookdepth.wrap(tiny(name))
    assert (model.prefixes, model.sites.parallel) == (name not in RECURRENT, name in PARALLEL)
    report = verify(model, n=1)
    assert report.ok, f"\n{report}"
    assert report.null_effect == 0
    assert max(one.difference for one in report.verdicts if one.kind != "gradients") < 1e-5
    assert all(one.effect > 0 for one in report.verdicts if one.branches and one.kind != "cuts"), f"\n{report}"


@pytest.mark.parametrize("name", ["gpt-j", "llama4", "falcon-h1", "gemma4-embeddings", "bloom"])
def test_every_part_of_every_layer_is_skipped(name):
    """By hand, on modules that are named here, not found."""
    hf = tiny(name)
    model = hookdepth.wrap(hf)
    modules = {
        "gpt-j": {"attn": "transformer.h.{}.attn", "mlp": "transformer.h.{}.mlp"},
        "llama4": {"attn": "model.layers.{}.self_attn", "mlp": "model.layers.{}.feed_forward"},
        "falcon-h1": {
            "attn": "model.layers.{}.self_attn",
            "mlp": "model.layers.{}.feed_forward",
            "mixer": "model.layers.{}.mamba",
        },
        "gemma4-embeddings": {
            "attn": "model.layers.{}.post_attention_layernorm",
            "mlp": "model.layers.{}.post_feedforward_layernorm",
            "extra": "model.layers.{}.post_per_layer_input_norm",
        },
        "bloom": {"attn": "transformer.h.{}.self_attention.dense", "mlp": "transformer.h.{}.mlp.dense_4h_to_h"},
    }[name]
    assert set(model.parts) == {"layer", *modules}
    cases = [(part, layer) for part in modules for layer in range(model.n_layers)]
    found = hookdepth.run(
        model, [IDS], [Branch((Skip(layer, part, slice(None)),)) for part, layer in cases], [OutputEffect()]
    )
    with torch.no_grad():
        clean = hf(torch.tensor([IDS])).logits[0].softmax(-1)
        for (part, layer), ours in zip(cases, found.output["output"], strict=True):

            def silent(_module, _args, output):
                return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

            handle = hf.get_submodule(modules[part].format(layer)).register_forward_hook(silent)
            moved = (hf(torch.tensor([IDS])).logits[0].softmax(-1) - clean).norm(dim=-1).max()
            handle.remove()
            assert ours.item() == pytest.approx(moved.item(), abs=1e-6)
            assert moved > 1e-3


def test_a_family_of_ones_own():
    class Odd(torch.nn.Module):
        """A GPT-2 whose parts are where nobody looks for them."""

        def __init__(self):
            super().__init__()
            self.whole = tiny("gpt2")
            self.config = self.whole.config
            self.config.model_type = "odd"
            for block in self.whole.transformer.h:
                block.mixing, block.thinking = block.attn, block.mlp
                del block._modules["attn"], block._modules["mlp"]
                type(block).attn, type(block).mlp = property(lambda b: b.mixing), property(lambda b: b.thinking)

        def get_input_embeddings(self):
            return self.whole.get_input_embeddings()

        def get_output_embeddings(self):
            return self.whole.get_output_embeddings()

        def forward(self, *args, **kwargs):
            return self.whole(*args, **kwargs)

    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    try:
        odd = Odd()
        with pytest.raises(HookdepthError, match=r"no list of decoder layers.*wrap\(model, family=Family\(…\)\)"):
            hookdepth.wrap(odd)
        family = Family("Odd", decoder="whole.transformer", parts={"attn": "mixing", "mlp": "thinking"})
        model = hookdepth.wrap(odd, family=family)
        assert verify(model, n=2).ok
    finally:
        del GPT2Block.attn, GPT2Block.mlp


def test_a_cut_without_keys_and_values_is_one_pass_from_the_start():
    model = hookdepth.wrap(tiny("mamba"))
    branches = [Branch((Skip(1),), cut=cut) for cut in (4, 8)] + [Branch((Skip(1),))]
    found = hookdepth.run(model, [IDS], branches, [OutputEffect()])
    assert [(pass_.start, pass_.prefix) for pass_ in found.plan.walk()] == [(0, "none")]
    assert (found.output["output"] > 0).all()


def test_a_site_that_a_layer_does_not_have_is_refused():
    model = hookdepth.wrap(tiny("mamba"))
    with pytest.raises(HookdepthError, match=r"layer 1 of .* has no attn_out; it has resid_pre, mixer_out, resid_post"):
        hookdepth.run(model, [IDS], [Branch((Skip(1, "attn"),))], [OutputEffect()])
    parallel = hookdepth.wrap(tiny("gpt-j"))
    with pytest.raises(HookdepthError, match=r"no resid_mid: its MLP reads the layer's input, beside attention"):
        hookdepth.run(parallel, [IDS], [Branch((hookdepth.Ablate("resid_mid", 1),))], [OutputEffect()])


def test_a_wrapper_runs_as_its_text_model():
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {**FAMILIES["gemma"][1], "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = hookdepth.wrap(AutoModelForImageTextToText.from_config(config).eval())
    assert (model.n_layers, model.d_model) == (4, 32)
    assert verify(model, n=2).ok
