"""The demo model: the notebook's own numbers where shared/ is there, the naive reference where it is not.

`pytest -m demo`. Through the runner, so that what is compared is what `hookdepth run` writes. On the kind of CPU that
gave the notebook's numbers skip-current is theirs to the last bit; another kind adds in another order, and 30 layers
turn that into some hundred-thousandths of the largest effect.
"""

import naive
import pytest
import torch

import hookdepth
from hookdepth import Branch, LayerEffect, OutputEffect, Skip
from hookdepth.analyses import Inputs, Settings
from hookdepth.data import load_examples, make_probe, questions_of
from hookdepth.data.questions import is_right
from hookdepth.engine.passes import measure
from hookdepth.model.demo import demo_folder
from hookdepth.results import read_log
from hookdepth.runs.runner import Run

pytestmark = pytest.mark.demo

PROBE = ("5 + 7 + 5 + 3 + 1 + 7 = ", "28")
PROMPT = "Anna has 12 apples, eats 3 of them and gives 4 to the other children of the town."


@pytest.fixture(scope="module")
def model(demo_model):
    hf, tokenizer = demo_model
    return hookdepth.wrap(hf, tokenizer, name="demo")


@pytest.fixture(scope="module")
def run(model, gsm8k_texts, tmp_path_factory):
    """`run("logit-lens").tensors`: an analysis on what the notebook ran it on."""
    prompts = tuple(tuple(model.tokenizer(text)["input_ids"]) for text in gsm8k_texts)
    inputs = Inputs(prompts[:2], ((), ()), prompts, (make_probe(model.tokenizer, *PROBE),))
    one = Run(model, inputs, Settings(), {"name": "gsm8k_head"}, 123, tmp_path_factory.mktemp("demo"))

    def run(name):
        return one.execute([name])[0]

    run.passes = lambda name: read_log(one.out)[name]["passes"]
    return run


def near(ours, expected, scale):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max().item() <= scale * expected.abs().max().item()


def test_skip_current_is_the_notebooks(run, golden):
    result = run("skip-current")
    assert result.metadata["null_effect"] == 0
    assert run.passes("skip-current") == 2, "one for each prompt"
    for name, expected in golden("skip-current").items():
        near(result.tensors[name], expected, 1e-4)


def test_residual_stats_are_the_notebooks(run, golden):
    tensors = run("residual-stats").tensors
    for name, expected in golden("residual-stats").items():
        torch.testing.assert_close(tensors[name], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_logit_lens_is_the_notebooks(run, golden):
    tensors = run("logit-lens").tensors
    for name, expected in golden("logit-lens").items():  # the notebook leaves out the final residual
        ours = tensors[name][:-1]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert (tensors["kl"][-1], tensors["topk_overlap"][-1]) == (0, 1)


def test_residual_erasure_is_the_notebooks(run, golden):
    result = run("residual-erasure")
    near(result.tensors["effect.0"], golden("residual-erasure")["effect.0"], 1e-4)
    assert result.metadata["null_effect"] < 1e-4


# Without the notebook's numbers.

LAYERS = (0, 1, 9, 20, 29)
PARTS = ("layer", "attn", "mlp")


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer(PROMPT)["input_ids"]


CUT = 8
SKIPS = [Skip(layer, part) for part in PARTS for layer in LAYERS]
BRANCHES = [Branch((skip,), cut=at) for skip in SKIPS for at in (None, CUT)]


@pytest.fixture(scope="module")
def skipped(model, ids):
    return measure(model, [ids], BRANCHES, [LayerEffect(), OutputEffect()])


@torch.no_grad()
def plain_skip(hf, ids, skip, clean, cut=None):
    tokens = slice(1, cut)
    value = clean.resid_pre[skip.layer][:, tokens] if skip.part == "layer" else 0.0
    changed = naive.run_with(hf, ids, [(skip.site, skip.layer, naive.overwrite(tokens, value))])
    measured = slice(cut, None)
    pairs = zip(clean.contributions(), changed.contributions(), strict=True)
    effect = torch.stack([naive.relative_change(a, b, measured) for a, b in pairs])
    return effect, naive.output_change(clean.logits, changed.logits, measured)


def test_skips_are_plain_passes(model, ids, skipped):
    assert skipped.passes == 2
    with torch.no_grad():
        clean = naive.run_with(model.hf, ids)
    for number, branch in enumerate(BRANCHES):
        effect, output = plain_skip(model.hf, ids, branch.interventions[0], clean, branch.cut)
        assert (skipped.layer["effect"][number] - effect).abs().max() <= 1e-4 * effect.max()
        assert abs(skipped.output["output"][number] - output) <= 1e-4
    assert skipped.null_effect < 1e-4


def test_bfloat16_has_no_noise_between_equal_rows(ids, skipped):
    half = hookdepth.load("demo", dtype="bfloat16", device="cpu")
    some = slice(None, None, 3)  # of all parts, with cuts and without
    results = measure(half, [ids], BRANCHES[some], [LayerEffect(), OutputEffect()])
    assert (results.null_effect, results.null_where) == (0, None)
    # The two precisions tell the same story: what matters to whom.
    both = torch.stack([results.layer["effect"].flatten(), skipped.layer["effect"][some].flatten()])
    assert torch.corrcoef(both.log1p())[0, 1] > 0.98


def test_the_demo_folder_is_made_once(demo_model):
    folder = demo_folder()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo_folder() == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not any(name.endswith((".bin", ".gguf")) for name in before)


def test_load_gives_the_demo_model(model, ids):
    loaded = hookdepth.load(device="cpu")
    assert (loaded.name, loaded.dtype, loaded.n_layers) == ("SmolLM2-135M-Instruct", torch.float32, 30)
    with torch.no_grad():
        assert torch.equal(loaded.forward(torch.tensor([ids])), model.forward(torch.tensor([ids])))


def test_the_demo_model_answers_the_facts_that_ship(model):
    asked = questions_of(load_examples("demo-facts"), model.tokenizer)
    found = hookdepth.generate(model, [one.token_ids for one in asked], max_new_tokens=12)
    assert all(is_right(text, one.answer) for text, one in zip(found.clean, asked, strict=True))
    assert max(one.most_tokens for one in asked) == 12
