"""Rotary factors that depend on the length: every prompt's numbers are those of that prompt alone."""

import copy

import pytest
import torch
from naive import overwrite, run_with
from tiny_models import COMMON, prompts, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from hookdepth import Branch, LayerEffect, OutputEffect, Patch, Skip, wrap
from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.data import Probe, sample_cuts
from hookdepth.engine.machines import PassCost
from hookdepth.engine.passes import measure, plan_for
from hookdepth.errors import HookdepthError
from hookdepth.model.positions import LengthDependent
from hookdepth.runs.sharing import groups_of

LENGTHS = (12, 90, 16, 17, 40, 33)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + n for n in range(8)],
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "phi3": (
        "phi3",
        {"original_max_position_embeddings": 16, "max_position_embeddings": 128, "rope_scaling": LONGROPE},
    ),
    "llama-longrope": ("llama", {"max_position_embeddings": 128, "rope_scaling": LONGROPE}),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
    ),
}


def make(kind):
    family, config = KINDS[kind]
    return tiny_model(family, **copy.deepcopy(config))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def effects(kind, prompt, edits, measured):
    """(layer effects, output effect) by plain passes of a model that has seen no other prompt."""
    clean, changed = (run_with(make(kind), prompt, own) for own in ((), edits))
    layers = [
        ((b[:, measured] - a[:, measured]).norm(dim=-1) / a[:, measured].norm(dim=-1)).max()
        for a, b in zip(clean.contributions(), changed.contributions(), strict=True)
    ]
    probabilities = [run.logits.softmax(-1)[:, measured] for run in (clean, changed)]
    return torch.stack(layers), (probabilities[1] - probabilities[0]).norm(dim=-1).max()


def skipped(layer, tokens):
    """Edits of a plain pass: what the layer adds becomes 0 at these tokens."""
    kept = {}

    def note(value):
        kept["pre"] = value
        return value

    def put_back(value):
        value = value.clone()
        value[:, tokens] = kept["pre"][:, tokens]
        return value

    return [("resid_pre", layer, note), ("resid_post", layer, put_back)]


@pytest.mark.parametrize("cut", [None, 6, 10])
def test_skips_of_mixed_lengths(kind, cut):
    texts = prompts(len(LENGTHS), LENGTHS)
    branches = [Branch((Skip(1),), prompt=n, cut=cut) for n in range(len(texts))]
    result = measure(wrap(make(kind)), texts, branches, [LayerEffect(), OutputEffect()])
    for n, text in enumerate(texts):
        layers, output = effects(kind, text, skipped(1, slice(1, cut)), slice(cut, None))
        assert torch.allclose(result.layer["effect"][n], layers, atol=2e-5, rtol=2e-5)
        assert torch.allclose(result.output["output"][n], output, atol=2e-5)


def test_erasures_start_from_the_factors_of_the_whole_prompt(kind):
    texts = prompts(3, (12, 90, 40))
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    branches = [
        Branch((Patch("resid_pre", 2, vector, [token]),), prompt=n, measured=[len(text) - 3])
        for n, text in enumerate(texts)
        for token in range(len(text) - 2)
    ]
    model = wrap(make(kind))
    plan = plan_for(model, branches, [len(text) for text in texts])
    assert any(pass_.start for pass_ in plan.walk())
    found = measure(model, texts, branches, [OutputEffect()]).output["output"]
    for place in (0, 5, 10, 40, 97, 110, -1):
        branch = branches[place]
        text, (token,) = texts[branch.prompt], branch.interventions[0].tokens
        edits = [("resid_pre", 2, overwrite(token, vector))]
        assert torch.allclose(found[place], effects(kind, text, edits, branch.measured)[1], atol=2e-5)


def test_a_pass_that_stops_early(kind):
    (text,) = prompts(1, 40)
    branch = Branch((Skip(0, tokens=slice(1, 4)),), measured=slice(4, 9))
    found = measure(wrap(make(kind)), [text], [branch], [OutputEffect()])
    assert max(pass_.stop for pass_ in found.plan.walk()) == 9
    expected = effects(kind, text, skipped(0, slice(1, 4)), slice(4, 9))[1]
    assert torch.allclose(found.output["output"][0], expected, atol=2e-5)


def inputs_of(texts):
    cuts = sample_cuts([len(text) for text in texts], 3)
    texts = [tuple(text) for text in texts]
    probes = [Probe("", "", text, ("",) * len(text), (len(text) - 2, len(text) - 1)) for text in texts]
    return Inputs(tuple(texts), tuple(cuts), tuple(texts), tuple(probes))


NAMES = ("residual-stats", "logit-lens", "skip-current", "skip-future", "local-current", "local-future")


def test_analyses_of_prompts_together_are_the_means_of_those_alone(kind):
    """Chunks of prompts and sums over them; the numbers of the lens and the stats are sums over tokens."""
    texts = prompts(2, (14, 60))

    def partials(model, texts):
        for task in groups_of(
            chosen([*NAMES, "residual-erasure", "integrated-gradients"]), Subject(model, inputs_of(texts), SETTINGS)
        ):
            yield task.name, task.finish([task.run(n, lambda: None) for n in range(task.n_chunks)])

    both = dict(partials(wrap(make(kind)), texts))
    alone = [dict(partials(wrap(make(kind)), [text])) for text in texts]
    for task, results in both.items():
        for name, tensors in results.items():
            if name == "residual-erasure":
                continue  # its baseline is the mean over both prompts
            for tensor, value in tensors.items():
                if name == "integrated-gradients":
                    stem, number = tensor.rsplit(".", 1)
                    expected = alone[int(number)][task][name][f"{stem}.0"]
                elif tensor.startswith("per_prompt."):
                    expected = torch.cat([one[task][name][tensor] for one in alone])
                elif name in ("residual-stats", "logit-lens") and "max" not in tensor:
                    alone_in_each = tensor.endswith(".last") or tensor.startswith("first_token.")
                    counts = [1 if alone_in_each else len(text) for text in texts]
                    own = [one[task][name][tensor] * count for one, count in zip(alone, counts, strict=True)]
                    expected = sum(own) / sum(counts)
                else:
                    continue
                assert torch.allclose(value, expected, atol=1e-4, rtol=1e-4), (name, tensor)


SETTINGS = Settings(ig_method="riemann", ig_steps=4)


def test_what_the_users_own_calls_stretched_is_not_seen_and_stays(kind):
    texts = prompts(2, (16, 12))
    branches = [Branch((Skip(1),), prompt=n) for n in range(2)]
    used, fresh = make(kind), make(kind)
    with torch.no_grad():
        used(input_ids=torch.tensor(prompts(1, 90)))
    factors = used.model.rotary_emb.inv_freq.clone()
    state = {name: value for name, value in vars(used.model.rotary_emb).items() if isinstance(value, int | float)}
    found = measure(wrap(used), texts, branches, [LayerEffect()])
    assert torch.equal(found.layer["effect"], measure(wrap(fresh), texts, branches, [LayerEffect()]).layer["effect"])
    assert torch.equal(used.model.rotary_emb.inv_freq, factors)
    assert {name: vars(used.model.rotary_emb)[name] for name in state} == state


def test_prompts_of_equal_factors_still_share_passes(monkeypatch):
    monkeypatch.setattr("hookdepth.engine.passes.cost_of", lambda model: PassCost(1000))
    model = wrap(make("phi3"))
    branches = [Branch((Skip(1),), prompt=n) for n in range(4)]
    plan = plan_for(model, branches, [10, 20, 12, 30])
    assert [pass_.prompts for pass_ in plan.walk()] == [(0, 2), (1, 3)]
    plain = wrap(tiny_model("llama"))
    assert plan_for(plain, branches, [10, 20, 12, 30]).n_passes == 1


def test_dynamic_scaling_reaches_beyond_the_original_context():
    model = wrap(make("llama-dynamic"))
    assert model.context_length == 128
    with pytest.raises(HookdepthError, match="context 128"):
        measure(model, prompts(1, 129), [Branch((Skip(1),))], [OutputEffect()])


def test_the_self_check_tries_a_length_of_other_factors(kind, monkeypatch):
    """A model whose factors the adapter cannot pin is refused, and not measured wrongly."""
    model = make(kind)
    broken = wrap(model).rotary
    monkeypatch.setattr(type(broken), "of_length", lambda self, length: self.as_loaded())
    with pytest.raises(HookdepthError, match="position factors change from 17 tokens on"):
        wrap(make(kind))


def test_an_outline_knows_which_prompts_share(kind):
    family, config = KINDS[kind]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(family, **copy.deepcopy(config)))
    outline, real = LengthDependent(empty.model), wrap(make(kind)).rotary
    for one in (8, 16, 17, 90):
        for other in (8, 16, 17, 90):
            assert (outline.key(one) == outline.key(other)) == (real.key(one) == real.key(other))


UNUSUAL = {  # a norm without weight, and an MLP that returns a tuple
    "olmo": ({}, "sdpa"),
    "nanochat": ({}, "sdpa"),
    "gpt_oss": ({"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "eager"),
}


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_norms_without_weight_and_mlps_that_give_tuples(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know the family")
    specific, attention = UNUSUAL[model_type]
    config = AutoConfig.for_model(model_type, **{**COMMON, **specific})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model = wrap(hf)
    assert model.dtype == torch.float32
    texts = prompts(2, (20, 12))
    branches = [Branch((Skip(2, part),), prompt=n, measured=[8, 9]) for n in range(2) for part in ("attn", "mlp")]
    found = measure(model, texts, branches, [OutputEffect()]).output["output"]  # the last MLP at two tokens
    site = {"attn": "self_attn", "mlp": "mlp"}
    for branch, value in zip(branches, found, strict=True):
        part = branch.interventions[0].part
        ids = torch.tensor([texts[branch.prompt]])

        def nothing(_module, _args, output):
            first = (output[0] if isinstance(output, tuple) else output).clone()
            first[:, 1:] = 0.0
            return (first, *output[1:]) if isinstance(output, tuple) else first

        with torch.no_grad():
            clean = hf(input_ids=ids).logits.softmax(-1)
            with getattr(hf.model.layers[2], site[part]).register_forward_hook(nothing):
                changed = hf(input_ids=ids).logits.softmax(-1)
        expected = (changed - clean)[0, [8, 9]].norm(dim=-1).max()
        assert expected > 1e-3
        assert torch.allclose(value, expected, atol=2e-5)
