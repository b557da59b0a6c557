"""`hookdepth.run`: what a notebook gives and gets back."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth as hd
from hookdepth.errors import HookdepthError
from hookdepth.runs.reporting import comparison, report

TEXT = "Anna has 12 apples and eats 3 of them."
TEXTS = [TEXT, "The basket is full.", "Imagine all the people of the town."]
L = 4


@pytest.fixture(scope="module")
def hf():
    return tiny_model("llama", num_hidden_layers=L)


@pytest.fixture(scope="module")
def model(hf):
    return hd.wrap(hf, tiny_tokenizer(), name="tiny")


def skips():
    return [hd.Skip(layer) for layer in range(L)]


def test_one_text_and_bare_interventions(model, hf):
    result = hd.run(model, TEXT, skips())
    assert result["effect"].shape == (L, L)
    assert result.clean["output"].shape == (L,)
    assert result.noise == result.metadata["null_effect"]
    assert result.axes("effect") == ("branch", "layer")
    ids = model.ids(TEXT)[0].tolist()
    for same in (model.ids(TEXT), model.ids(TEXT)[0], ids, [ids]):
        assert torch.equal(hd.run(model, same, skips())["effect"], result["effect"])
    assert torch.equal(hd.run(model, TEXT, hd.Skip(2))["effect"][0], result["effect"][2])
    assert torch.equal(hd.run(model, TEXT, hd.Branch((hd.Skip(2),)))["effect"][0], result["effect"][2])


def test_a_list_has_an_axis_of_prompts_and_every_prompt_its_own_numbers(model):
    result = hd.run(model, TEXTS, skips())
    assert result["effect"].shape == (3, L, L)
    assert result.axes("clean.output") == ("prompt", "branch")
    for number, text in enumerate(TEXTS):
        alone = hd.run(model, text, skips())
        for name in ("effect", "output"):
            torch.testing.assert_close(result[name][number], alone[name], rtol=1e-4, atol=1e-5)
    assert hd.run(model, TEXTS[:1], skips())["effect"].shape == (1, L, L)


def test_branches_that_name_their_prompts(model):
    branches = [hd.Branch((hd.Skip(1),), prompt=2), hd.Branch((hd.Skip(3),), prompt=0)]
    result = hd.run(model, TEXTS, branches)
    assert result["effect"].shape == (2, L)
    torch.testing.assert_close(result["effect"][0], hd.run(model, TEXTS[2], hd.Skip(1))["effect"][0])
    with pytest.raises(HookdepthError, match="out= for branches that name their prompts"):
        hd.run(model, TEXTS, branches, out="nowhere")


def test_measurements_against_plain_passes(model, hf):
    """Skipping on all tokens, against a model without that layer."""
    ids = prompts(1, 13, seed=3)[0]
    measurements = [hd.KL(), hd.Loss(), hd.Top1(), hd.Probability(5), hd.LogitDifference(5, 7), hd.Norm("resid_pre")]
    result = hd.run(model, ids, [hd.Skip(s, tokens=slice(None)) for s in range(L)], measurements)
    with torch.no_grad():
        clean = hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    following = torch.tensor(ids[1:])
    for skipped in range(L):
        layers = torch.nn.ModuleList(layer for n, layer in enumerate(hf.model.layers) if n != skipped)
        whole, hf.model.layers = hf.model.layers, layers
        try:
            with torch.no_grad():
                logits = hf(torch.tensor([ids]), use_cache=False).logits[0].float()
        finally:
            hf.model.layers = whole
        logs = logits.log_softmax(-1)
        expected = {
            "kl": (clean.exp() * (clean - logs)).sum(-1).mean(),
            "loss": torch.nn.functional.cross_entropy(logits[:-1], following),
            "top1": (logs.argmax(-1) == clean.argmax(-1)).float().mean(),
            "probability": logs[:, 5].exp().mean(),
            "logit_difference": (logits[:, 5] - logits[:, 7]).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(result[name][skipped], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.clean["loss"][0], -clean[:-1].gather(-1, following[:, None]).mean())
    assert result.clean["kl"].eq(0).all()
    assert result.clean["top1"].eq(1).all()
    assert result["norm"].shape == (L, L)


def test_the_lens_of_a_branch(model, hf):
    """Against hooks that skip a layer and read the stream, before and after it and on the clean run."""
    ids = model.ids(TEXT)
    lenses = [hd.LogitLens(layer) for layer in range(L)] + [hd.LogitLens(3, hd.Probability(5))]
    result = hd.run(model, ids, [hd.Skip(1, tokens=slice(None)), hd.Skip(3, "mlp")], lenses)
    clean = hd.analyse(model, "logit-lens", [TEXT])["kl"]
    for layer in range(L):
        assert result.clean[f"logit_lens_{layer}"][0].item() == pytest.approx(clean[layer].item(), rel=1e-4)
    whole, hf.model.layers = hf.model.layers, torch.nn.ModuleList(hf.model.layers[n] for n in (0, 2, 3))
    try:
        with torch.no_grad():
            states = hf(ids, output_hidden_states=True, use_cache=False)
    finally:
        hf.model.layers = whole
    final = states.logits[0].log_softmax(-1)
    resid = [states.hidden_states[n] for n in (0, 1, 1, 2)]
    logs = [hf.lm_head(hf.model.norm(state))[0].detach().log_softmax(-1) for state in resid]
    for layer, lens in enumerate(logs):
        expected = (lens.exp() * (lens - final)).sum(-1).mean()
        torch.testing.assert_close(result[f"logit_lens_{layer}"][0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["logit_lens_3_probability"][0], logs[3][:, 5].exp().mean())
    with pytest.raises(HookdepthError, match="along a path of layers"):
        hd.run(model, TEXT, hd.LayerPath("0-3"), hd.LogitLens(1))
    with pytest.raises(HookdepthError, match="the layer is 9"):
        hd.run(model, TEXT, skips(), hd.LogitLens(9))


def test_loss_and_kl_share_the_logits(model, monkeypatch):
    calls, unembed = [], model.unembed
    monkeypatch.setattr(model, "unembed", lambda hidden: calls.append(1) or unembed(hidden))
    hd.run(model, TEXT, skips(), [hd.KL()])
    once = len(calls)
    hd.run(model, TEXT, skips(), [hd.KL(), hd.Loss(), hd.Top1()])
    assert len(calls) == 2 * once


@pytest.mark.parametrize("how", ["max", "min", "mean", "sum"])
def test_a_value_a_token_reduces_to_the_others(model, how):
    branches = [hd.Branch((hd.Skip(1),), measured=[2, 5, -1]), hd.Branch((hd.Skip(2),), cut=4)]
    kinds = (hd.LayerEffect, hd.OutputEffect, hd.Loss)
    each = [kind(reduce=None, name=f"{kind.name} of each") for kind in kinds]
    result = hd.run(model, TEXTS, branches, [*each, *(kind(reduce=how) for kind in kinds)])
    reduce = {"max": lambda v: v.nan_to_num(-1e9).amax(-1), "min": lambda v: v.nan_to_num(1e9).amin(-1)}
    reduce |= {"mean": lambda v: v.nanmean(-1), "sum": lambda v: v.nansum(-1)}
    for kind in kinds:
        values = result[f"{kind.name} of each"]
        assert values.shape[-1] == max(model.ids(text).shape[1] for text in TEXTS)
        torch.testing.assert_close(reduce[how](values), result[kind.name], rtol=1e-4, atol=1e-5)
        length = model.ids(TEXTS[1]).shape[1]
        measured = {2, 5, length - 1} - ({length - 1} if kind is hd.Loss else set())
        assert set(values[1, 0].isfinite().nonzero()[:, -1].tolist()) == measured


def test_measured_says_where(model):
    last = hd.run(model, TEXT, skips(), measured=[-1])
    own = hd.run(model, TEXT, [hd.Branch((one,), measured=[-1]) for one in skips()])
    assert torch.equal(last["output"], own["output"])


def test_over_prompts(model):
    every = hd.run(model, TEXTS, skips())["output"]
    for how, expected in (("mean", every.mean(0)), ("max", every.amax(0)), ("median", every.median(0).values)):
        reduced = hd.run(model, TEXTS, skips(), over_prompts=how)
        torch.testing.assert_close(reduced["output"], expected)
        assert torch.equal(reduced["per_prompt.output"], every)
        assert reduced.metadata["settings"]["over_prompts"] == how
    with pytest.raises(HookdepthError, match="unknown reduction over prompts 'average'"):
        hd.run(model, TEXTS, skips(), over_prompts="average")
    with pytest.raises(HookdepthError, match="no prompt's own values"):
        hd.run(model, TEXT, skips()).over_prompts("mean")


def test_a_run_in_a_folder_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    from hookdepth.runs.sharing import Group

    branches = [*skips(), hd.AddVector("resid_post", 1, torch.ones(model.d_model))]
    measurements = [hd.KL(), hd.Custom("top", lambda view: view.probabilities.amax(-1))]
    alone = [range(number, number + 1) for number in range(3)]
    monkeypatch.setattr("hookdepth.runs.sharing._consecutive", lambda lengths, rows: alone)
    run, done = Group.run, []

    def stops(self, chunk, on_pass):
        if chunk == 2 and chunk not in done:
            done.append(chunk)
            raise KeyboardInterrupt
        done.append(chunk)
        return run(self, chunk, on_pass)

    monkeypatch.setattr(Group, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        hd.run(model, TEXTS, branches, measurements, out=tmp_path)
    result = hd.run(model, TEXTS, branches, measurements, out=tmp_path)
    assert done == [0, 1, 2, 2], "what was measured is not measured again"
    here = hd.run(model, TEXTS, branches, measurements)
    for name, values in here.tensors.items():
        torch.testing.assert_close(result[name], values)
    assert hd.load_folder(tmp_path)["run"].axes("kl") == ("prompt", "branch")
    with pytest.raises(HookdepthError, match="branches_sha256"):
        hd.run(model, TEXTS, skips(), measurements, out=tmp_path)
    with pytest.raises(HookdepthError, match="branches_sha256"):
        hd.run(model, TEXTS, branches, [hd.KL(), hd.Custom("top", lambda view: view.logits[..., 0])], out=tmp_path)


class Times(hd.OutputMeasurement):
    name, reduce = "times", "mean"

    def __init__(self, factor):
        self.factor = factor

    def values(self, view):
        return view.logits[..., 5] * float(getattr(self.factor, "start", self.factor))


def times(factor):
    return hd.Custom("times", lambda view: view.logits[..., 5] * float(factor))


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(300, 1)


def through(module):
    return hd.Custom("times", lambda view: module(view.logits)[..., 0])


def scaled(view, by=1.0):
    return by * view.logits[..., 5]


# What differs, in two calls that must not be taken for the same.
NOT_THE_SAME = {
    "first token": [hd.Skip(1, tokens=slice(n, None)) for n in (1, 2)],
    "measured from": [hd.Branch((hd.Skip(1),), measured=slice(n, None)) for n in (2, 3)],
    "an array": [times(np.array(n)) for n in (1.0, 2.0)],
    "a number of numpy's": [Times(np.float32(n)) for n in (1.0, 2.0)],
    "a fraction": [Times(Fraction(1, n)) for n in (1, 2)],
    "a slice": [Times(slice(n, 9)) for n in (1, 2)],
    "a partial function": [hd.Custom("times", partial(scaled, by=n)) for n in (1.0, 2.0)],
    "a module": [through(linear(n)) for n in (1, 2)],
    "a dtype": [
        hd.Custom("times", lambda view, to=to: view.logits[..., 5].to(to)) for to in (torch.float32, torch.float16)
    ],
}


@pytest.mark.parametrize("case", NOT_THE_SAME)
def test_what_was_computed_of_one_thing_is_not_given_for_another(model, tmp_path, case):
    def run(one):
        is_branch = isinstance(one, hd.Intervention | hd.Branch)
        measured = [one] if not is_branch else [hd.OutputEffect()]
        return hd.run(model, TEXTS, one if is_branch else hd.Skip(1), measured, out=tmp_path)

    first, other = NOT_THE_SAME[case]
    assert run(first).tensors.keys() == run(first).tensors.keys()
    with pytest.raises(HookdepthError, match="branches_sha256"):
        run(other)


def test_it_shows_itself(model, tmp_path):
    result = hd.run(model, TEXTS, skips())
    lines = repr(result).splitlines()
    assert lines[0].startswith("run: tiny, 3 prompts, noise floor ")
    assert lines[2].split()[:4] == ["effect", "prompt,", "branch,", "layer"]
    assert "data:image/png;base64," in result._repr_html_()
    again = hd.Result.load(result.save(tmp_path / "mine.safetensors"))
    assert repr(again).splitlines()[0] == lines[0]
    assert torch.equal(again["effect"], result["effect"])
    assert again.axes("effect") == result.axes("effect")


def test_its_figures(model):
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    result = hd.run(model, TEXT, skips())
    figure = result.plot("effect", cmap="magma", vmin=0.0, vmax=2.0, figsize=(3.3, 2.8))
    (image,) = figure.axes[0].images
    assert image.get_cmap().name == "magma"
    assert image.get_clim() == (0.0, 2.0)
    assert tuple(figure.get_size_inches()) == (3.3, 2.8)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"Skip resid_post {n}" for n in range(L)]
    axes = Figure().subplots(1, 2)
    assert result.plot("output", ax=axes[0], vmax=3.0) is axes[0].figure
    assert axes[0].get_ylim()[1] == 3.0
    assert len(axes[0].patches) == L
    assert not axes[1].patches
    assert isinstance(result.plot("effect", norm=LogNorm(0.1, 2.0)).axes[0].images[0].norm, LogNorm)
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]
    for options, says in (
        ({"cmap": "magmma"}, "did you mean magma"),
        ({"cmap": 3}, "cmap is 3"),
        ({"norm": "logg"}, "did you mean log"),
        ({"vmin": "a"}, "vmin is 'a'"),
        ({"vmax": float("nan")}, "vmax is nan"),
        ({"figsize": (0, 0)}, r"figsize is \(0, 0\)"),
        ({"figsize": 3}, "figsize is 3"),
        ({"ax": 3}, "ax is 3"),
        ({"colour": "red"}, "unknown option of a figure"),
        ({"name": "efect"}, "unknown tensor 'efect'"),
    ):
        with pytest.raises(HookdepthError, match=says):
            result.plot(**{"name": "effect", **options})
    with pytest.raises(HookdepthError, match="no colours for cmap"):
        result.plot("output", cmap="magma")


def test_a_data_frame_needs_pandas(model):
    result = hd.run(model, TEXT, skips())
    pandas = pytest.importorskip("pandas")
    frame = result.to_dataframe("effect")
    assert list(frame.columns) == ["branch", "branch_label", "layer", "value"]
    assert isinstance(frame, pandas.DataFrame)
    assert len(result.to_dataframe()) == 2 * (L * L + L)


NONSENSE = {
    "a class": (lambda m: hd.run(m, TEXT, hd.Skip), "the branches are the class Skip"),
    "a class among them": (lambda m: hd.run(m, TEXT, [hd.Skip]), "the class Skip where a branch is meant"),
    "a word": (lambda m: hd.run(m, TEXT, "skip"), "the branches are 'skip'"),
    "no branch": (lambda m: hd.run(m, TEXT, []), "there are no branches"),
    "no prompt": (lambda m: hd.run(m, [], skips()), "there are no prompts"),
    "an empty text": (lambda m: hd.run(m, "", skips()), "prompt 0 has no tokens"),
    "bytes": (lambda m: hd.run(m, b"text", skips()), "the prompts are b'text'"),
    "a number": (lambda m: hd.run(m, 3, skips()), "the prompts are 3"),
    "no measurement": (lambda m: hd.run(m, TEXT, skips(), []), "there are no measurements"),
    "a class to measure": (lambda m: hd.run(m, TEXT, skips(), hd.KL), "the measurements are the class KL"),
    "a typo": (lambda m: hd.run(m, TEXT, skips(), hd.KL(reduce="maen")), "did you mean mean"),
    "a word of several tokens": (lambda m: hd.run(m, TEXT, skips(), hd.Probability("apples pears")), "tokens"),
    "half a token": (lambda m: hd.run(m, TEXT, skips(), hd.Probability(0.5)), "is 0.5; give a whole number"),
    "another norm": (lambda m: hd.run(m, TEXT, skips(), hd.Norm("resid")), "unknown norm 'resid'"),
    "no model": (lambda m: hd.run(m.hf, TEXT, skips()), "the model is LlamaForCausalLM"),
    "a layer too many": (lambda m: hd.run(m, TEXTS, hd.Skip(9)), "layer 9 of a model of 4"),
    "no target": (lambda m: hd.run(m, TEXTS, skips(), hd.Loss(), measured=[-1]), "which no token follows"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_ends_in_a_line(model, case, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *_: pytest.fail("something ran"))
    call, says = NONSENSE[case]
    with pytest.raises(HookdepthError) as caught:
        call(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_run_over_prompts_is_reported_with_the_names_of_its_branches(model, tmp_path):
    """Bars and maps are means over prompts; a place along them is a branch, never a prompt."""
    found = hd.run(model, TEXTS, skips(), [hd.LayerEffect(), hd.KL()], out=str(tmp_path))
    names = [f"Skip resid_post {layer}" for layer in range(L)]
    bars, effect = found.plot("kl").axes[0], found.plot("effect").axes[0]
    assert [text.get_text() for text in bars.get_xticklabels()] == names
    assert [text.get_text() for text in effect.get_yticklabels()] == names
    blank = [patch.get_width() for patch in effect.patches]  # a layer before the one that is skipped cannot notice
    assert blank == list(range(L))
    page = report(tmp_path).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.glob("*.png")} == {"run-effect.png", "run-kl.png"}
    assert "0 Skip resid_post 0, 1: " in page  # on hover
    comparison([tmp_path, tmp_path], tmp_path / "both")
