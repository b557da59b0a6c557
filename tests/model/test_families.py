"""Every family: random branches of every kind against plain passes, by the check that users have (`verify`)."""

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, REFUSED, tiny
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import Ablate, Branch, Family, OutputEffect, Skip
from hookdepth.analyses.settings import PARTS as SETTINGS_PARTS
from hookdepth.checks import verify
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError
from hookdepth.model.families import FAMILIES as TABLE
from hookdepth.model.families import table
from hookdepth.model.sites import ORDER, PARTS

PAGE = Path(__file__).parents[2] / "scripts" / "pages" / "models.md"
IDS = [(7 * n) % 290 + 3 for n in range(14)]
RECURRENT = {
    "whisper",
    "lfm2",
    "qwen3-next",
    "qwen3.5",
    "mamba",
    "mamba2",
    "falcon-h1",
    "nemotron-h",
    "jamba",
    "granite-moe-hybrid",
}
USUAL = {"gemma3_text": "gemma3"}
IN_BRACKETS_BY_CONFIG = {"gemma4_text"}
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
    # Products of Laguna's odd sizes depend on how many rows there are; the control row shows it.
    assert report.null_effect == 0 or (name == "laguna" and report.null_effect < 1e-6)
    assert max(one.difference for one in report.verdicts if one.kind != "gradients") < 1e-5
    assert all(one.effect > 0 for one in report.verdicts if one.branches and one.kind != "cuts"), f"\n{report}"


@pytest.mark.parametrize("model_type", [key for key, one in TABLE.items() if not one.refused])
def test_the_table_names_the_sites(model_type):
    names = [name for name, (own, _) in FAMILIES.items() if own == model_type]
    models = [tiny(name) for name in names] or [tiny_model(USUAL.get(model_type, model_type))]
    layers = []
    for model in map(hookdepth.wrap, models[: 1 if model_type not in IN_BRACKETS_BY_CONFIG else None]):
        layers += [set(model.sites.of(layer)) for layer in range(model.n_layers)]
    between = [site for site in ORDER[1:-1] if any(site in own for own in layers)]
    told = [site if all(site in own for own in layers) else f"({site})" for site in between]
    assert TABLE[model_type].sites == " ".join(told)


def test_the_page_of_models_has_the_table():
    for line in table().splitlines()[: len(TABLE) + 1]:
        assert line in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["laguna", "whisper"])
def test_heads_are_those_of_the_layer(name):
    """Laguna has other heads in every layer; Whisper's config counts the heads of the encoder."""
    hf = tiny(name)
    model = hookdepth.wrap(hf)
    layers = hf.model.layers if name == "laguna" else hf.model.decoder.layers
    heads = [4, 8, 4, 2] if name == "laguna" else [4] * 4
    assert [model.shape_of("z", layer) for layer in range(4)] == [
        (own, (8 if name == "laguna" else 32 // own)) for own in heads
    ]
    assert model.n_heads == max(heads)
    cases = [(layer, head) for layer in range(4) for head in range(heads[layer])]
    found = measure(model, [IDS], [Branch((Ablate("z", *case),)) for case in cases], [OutputEffect()])
    with torch.no_grad():
        clean = hf(torch.tensor([IDS]), use_cache=False).logits[0].softmax(-1)
        for (layer, head), ours in zip(cases, found.output["output"], strict=True):
            attention, size = layers[layer].self_attn, model.shape_of("z", layer)[1]

            def without(_module, args, here=slice(head * size, (head + 1) * size)):
                z = args[0].clone()
                z[..., here] = 0
                return (z,)

            projection = attention.o_proj if name == "laguna" else attention.out_proj
            handle = projection.register_forward_pre_hook(without)
            moved = (hf(torch.tensor([IDS]), use_cache=False).logits[0].softmax(-1) - clean).norm(dim=-1).max()
            handle.remove()
            assert ours.item() == pytest.approx(moved.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "bloom", "phi3", "qwen3-moe", "starcoder2"])
def test_what_attention_reads_makes_its_heads(name):
    """z is the pattern times v, and the pattern comes from q and k, of the first token's head whatever its position."""
    hf = tiny(name)
    hf.set_attn_implementation("eager")
    model = hookdepth.wrap(hf)
    with model.evaluating(), hookdepth.capture(model, "q", "k", "v", "pattern", "z") as acts:
        model.forward(torch.tensor([IDS]))
    for layer in range(model.n_layers):
        q, k, v, z = (acts[site, layer][0] for site in ("q", "k", "v", "z"))
        values = v.repeat_interleave(z.shape[1] // v.shape[1], 1)
        made = torch.einsum("hqk,khd->qhd", acts["pattern", layer][0], values)
        torch.testing.assert_close(made, z, rtol=1e-4, atol=1e-5)
        assert q.shape == z.shape
        assert k.shape == v.shape
        assert not torch.equal(k, v)
    if name == "gpt2":  # nothing is rotated
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(len(IDS), len(IDS)).triu(1).bool()
        torch.testing.assert_close(scores.masked_fill(future, -torch.inf).softmax(-1), acts["pattern", layer][0])


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next", "gpt-neo"])
def test_queries_are_what_attention_takes_for_them(name):
    """Qwen's projection gives a gate behind each query; GPT-Neo's is one module further in."""
    hf = tiny(name)
    model = hookdepth.wrap(hf)
    attention = hf.transformer.h[1].attn.attention if name == "gpt-neo" else hf.model.layers[1].self_attn
    taken = []

    def keep(_module, given):
        taken.append(given[0].detach())

    attention.register_forward_pre_hook(keep) if name == "gpt-neo" else attention.q_norm.register_forward_pre_hook(keep)
    with model.evaluating(), hookdepth.capture(model, "q", layers=[1]) as acts:
        model.forward(torch.tensor([IDS]))
    queries = attention.q_proj(taken[0]).unflatten(-1, (4, 8)) if name == "gpt-neo" else taken[0]
    assert torch.equal(acts["q", 1], queries)


def test_what_is_no_query_for_each_head_is_not_read():
    model = hookdepth.wrap(tiny("qwen3.5"), family=Family("Unknown"))
    refused = pytest.raises(HookdepthError, match=r"q of layer 1 of .* cannot be read: 64 numbers a token, for 4 query")
    with refused, model.evaluating(), hookdepth.capture(model, "q", layers=[1]):
        model.forward(torch.tensor([IDS]))


@pytest.mark.parametrize("name", ["gpt2", "falcon-alibi"])
def test_masks_and_biases_fit_grown_rows(name):
    """By this kernel GPT-2's layers get a mask by position, and Falcon's a bias with an axis of rows."""
    model = hookdepth.wrap(tiny(name, attn_implementation="eager"))
    assert model.shares
    report = verify(model, n=1)
    assert report.ok, f"\n{report}"


def test_layers_that_share_a_module_are_refused():
    for part in ("layer", "mlp"):
        hf = tiny("olmo")
        if part == "layer":
            hf.model.layers[2] = hf.model.layers[0]
        else:
            hf.model.layers[2].mlp = hf.model.layers[0].mlp
        with pytest.raises(HookdepthError, match="layers 0 and 2 are one module in part"):
            hookdepth.wrap(hf)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_that_looks_to_the_right_is_refused(quantized, monkeypatch):
    """Also where its kernels may couple tokens a little, as those of quantised weights do."""
    hf = tiny_model("gemma3", use_bidirectional_attention=True)
    if quantized:
        monkeypatch.setattr("hookdepth.model.trials.described", lambda config: {"quantization": "8bit"})
    with pytest.raises(HookdepthError, match="its tokens see those that come after them"):
        hookdepth.wrap(hf)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"parts": {"mpl": "mlp"}}, r"unknown contribution in parts 'mpl'; did you mean mlp\?"),
        ({"parts": "mlp"}, "Family: parts is 'mlp'; give a dict"),
        ({"parts": {"mlp": None}}, "Family: parts of mlp is None; give a name as text"),
        ({"parts": {"mlp": "nope"}}, "no layer has 'nope', which parts says of mlp"),
        ({"outputs": {"attn": "nope"}}, "no layer has 'nope', which outputs says of attn"),
        ({"inner": {"z": "attn.c_proj"}}, "unknown contribution in inner 'z'; use one of attn, mlp"),
        ({"inner": {"mlp": "mlp.c_fc"}}, "'mlp.c_fc', inner of mlp, gives 48 numbers, not 32"),
        ({"multipliers": {"attn": "nope"}}, "its config has no 'nope', which multipliers says of attn"),
    ],
)
def test_a_family_with_a_mistake_is_refused(given, says):
    with pytest.raises(HookdepthError, match=says):
        hookdepth.wrap(tiny("gpt2"), family=Family("Mine", **given))


@pytest.mark.parametrize(
    ("model", "family", "says"),
    [
        ("gpt2", None, "the model to wrap is 'gpt2'; give a Hugging Face model"),
        (None, "gpt2", "the family is 'gpt2'; give an instance"),
        (None, Family, "the family is the class Family; give an instance"),
    ],
)
def test_what_is_no_model_or_no_family_is_refused(model, family, says):
    with pytest.raises(HookdepthError, match=says):
        hookdepth.wrap(model or tiny("gpt2"), family=family)


def test_sweeps_where_layers_have_other_heads():
    """NaN where there is no such head; the fewest of all layers were taken for all."""
    model, metric = hookdepth.wrap(tiny("laguna")), hookdepth.LogitDifference(5, 6)
    other = [IDS[0], *(299 - one for one in IDS[1:])]
    patched = hookdepth.patch_sweep(model, IDS, other, "z", metric, tokens="all", heads="all")["score"]
    attributed = hookdepth.attribute(model, IDS, other, metric, sites=["z"])["z.all_tokens"]
    for found in (patched, attributed, hookdepth.ablate_sweep(model, IDS, "z", metric, heads="all")["score"]):
        assert found.isnan().sum(1).tolist() == [4, 0, 4, 6]
    last = hookdepth.ablate_sweep(model, IDS, "z", metric, heads=[7])["score"]
    assert last.isnan().tolist() == [[True], [False], [True], [True]]
    with pytest.raises(HookdepthError, match="a head is 8; give a whole number from 0 to 7"):
        hookdepth.ablate_sweep(model, IDS, "z", metric, heads=[8])


def test_parts_that_only_some_families_have(tmp_path):
    (tmp_path / "texts.txt").write_text("the cat sat on the mat\n", encoding="utf-8")
    model = hookdepth.wrap(tiny("falcon-h1"), tiny_tokenizer())
    given = {"parts": "mixer,mlp", "ig_method": "riemann", "ig_steps": 2, "probes": [("the cat sat on", " the mat")]}
    found = hookdepth.analyse(
        model, ["skip-current", "integrated-gradients"], dataset=tmp_path / "texts.txt", limit=1, **given
    )
    ids = model.ids("the cat sat on the mat")[0].tolist()
    skipped = hookdepth.run(model, ids, [Skip(layer, "mixer") for layer in range(4)])["output"]
    assert torch.equal(found["skip-current"]["mixer.output"], skipped)
    assert "mixer.attribution.0" in found["integrated-gradients"].tensors
    assert SETTINGS_PARTS == PARTS


def test_what_can_only_be_read_says_so():
    with pytest.raises(HookdepthError, match=r"Patch at q, which can only be read; change z"):
        hookdepth.Patch("q", 1, torch.zeros(8))


def test_head_ablation_where_layers_have_other_heads(tmp_path):
    (tmp_path / "texts.txt").write_text("the cat sat on the mat\n", encoding="utf-8")
    model = hookdepth.wrap(tiny("laguna"), tiny_tokenizer())
    found = hookdepth.analyse(model, "head-ablation", dataset=tmp_path / "texts.txt", limit=1)
    assert found["zero.output"].isnan().sum(1).tolist() == [4, 0, 4, 6]
    assert (found["zero.output"].nan_to_num() >= 0).all()


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
    found = measure(
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
    found = measure(model, [IDS], branches, [OutputEffect()])
    assert [(pass_.start, pass_.prefix) for pass_ in found.plan.walk()] == [(0, "none")]
    assert (found.output["output"] > 0).all()


def test_a_site_that_a_layer_does_not_have_is_refused():
    model = hookdepth.wrap(tiny("mamba"))
    with pytest.raises(HookdepthError, match=r"layer 1 of .* has no attn_out; it has resid_pre, mixer_out, resid_post"):
        measure(model, [IDS], [Branch((Skip(1, "attn"),))], [OutputEffect()])
    parallel = hookdepth.wrap(tiny("gpt-j"))
    with pytest.raises(HookdepthError, match=r"no resid_mid: its MLP reads the layer's input, beside attention"):
        measure(parallel, [IDS], [Branch((hookdepth.Ablate("resid_mid", 1),))], [OutputEffect()])


def test_a_wrapper_runs_as_its_text_model():
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {**FAMILIES["gemma"][1], "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_id=7)
    torch.manual_seed(0)
    model = hookdepth.wrap(AutoModelForImageTextToText.from_config(config).eval())
    assert (model.n_layers, model.d_model) == (4, 32)
    assert verify(model, n=2).ok
    with pytest.raises(HookdepthError, match=r"token id 7, in whose place 'Gemma3.*' puts what it sees or hears"):
        hookdepth.run(model, [[5, 6, 7, 8]], Skip(1), OutputEffect())
