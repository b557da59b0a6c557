"""`analyse` and `plot`: what the command line does, from Python."""

import warnings

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import cli
from hookdepth.analyses import known
from hookdepth.errors import HookdepthError
from hookdepth.runs.runner import Run

NAMES = tuple(name for name, kind in known().items() if kind.in_all)

TEXT = ["Anna has 12 apples and eats 3 of them.", "Imagine all the people of the town.", "The basket is full."]
PROBE = ("5 + 7 =", " 12")


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.txt"
    file.write_text("\n".join(TEXT), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def results(model, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tiny model's noise floor may not be 0
        return hookdepth.analyse(model, dataset=prompts, limit=2, probes=[PROBE], ig_method="riemann", ig_steps=4)


def test_every_analysis_has_a_result_and_figures(results):
    assert list(results) == list(NAMES)
    for name, result in results.items():
        assert result.analysis == name
        figures = hookdepth.plot(result)
        assert figures
        assert all(figure.axes and title.startswith(name) for title, figure in figures.items())


def test_the_same_as_the_command_line(results, prompts, tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = ["skip-current", "skip-future", "residual-erasure"]
    arguments = ["run", "--model", str(folder), "--dataset", str(prompts), "--limit", "2", "--probe", *PROBE]
    assert cli.main([*arguments, "--analyses", ",".join(names), "--out", str(tmp_path / "out")]) == 0
    stored = hookdepth.load_folder(tmp_path / "out")
    for name in names:
        assert stored[name].tensors.keys() == results[name].tensors.keys()
        for key, value in stored[name].tensors.items():
            same = torch.equal(value.nan_to_num(-1.0), results[name].tensors[key].nan_to_num(-1.0))
            assert same, (name, key)  # a prompt too short to be cut is NaN in both
    assert stored["skip-future"].metadata["settings"] == results["skip-future"].metadata["settings"]


def test_settings_reach_the_analysis(model, prompts, tmp_path):
    results = hookdepth.analyse(
        model, ["skip-current"], dataset=prompts, limit=1, parts="attn", keep_front=2, out=tmp_path / "out"
    )
    assert "attn.effect" in results["skip-current"].tensors
    assert results["skip-current"].metadata["settings"] == {
        "keep_front": 2,
        "max_rows": None,
        "over_prompts": "max",
        "parts": ["attn"],
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.json", "skip-current.safetensors"]
    with pytest.raises(HookdepthError, match="keep_front"):
        hookdepth.analyse(model, "skip-current", dataset=prompts, limit=1, parts="attn", out=tmp_path / "out")


def test_nothing_is_left_behind_without_a_folder(model, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hookdepth.analyse(model, ["residual-stats"], dataset=prompts, limit=1)
    assert not list(tmp_path.iterdir())


def test_warnings_point_at_the_caller(model, prompts):
    with pytest.warns(UserWarning, match="1 of 3 prompts are too short to be cut") as caught:
        hookdepth.analyse(model, "local-future", dataset=prompts, limit=3)
    assert any(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"analyses": "logit-lense"}, "did you mean logit-lens"),
        ({"analyses": []}, "names none"),
        ({"parts": ["atn"]}, "did you mean attn"),
        ({"limit": 0}, "at least 1"),
        ({"keepfront": 2}, "did you mean keep_front"),
        ({"keep_front": 2, "analyses": "integrated-gradients"}, "none of the chosen analyses reads --keep-front"),
        ({"keep_front": 1.0}, "keep_front=1.0 is not a whole number of at least 0"),
        ({"ig_steps": "many"}, "ig_steps='many' is not a whole number"),
        ({"ig_method": "rieman"}, "did you mean riemann"),
        ({"dataset": "no-such-file.txt"}, "no data set or file"),
    ],
)
def test_bad_input_is_named_before_anything_runs(model, prompts, arguments, message):
    with pytest.raises(HookdepthError, match=message) as caught:
        hookdepth.analyse(model, **{"dataset": prompts, **arguments})
    assert caught.value.exit_status == 2


def everything(model):
    """What every call of a notebook gives, as tensors."""
    one, other, metric = [5, 6, 7, 8], [5, 9, 7, 8], hookdepth.LogitDifference(5, 6)
    results = {
        "run": hookdepth.run(model, [one, other], [hookdepth.Skip(1)]).over_prompts("mean"),
        "patch": hookdepth.patch_sweep(model, one, other, "resid_pre", metric),
        "skip": hookdepth.skip_sweep(model, one, metric),
        "ablate": hookdepth.ablate_sweep(model, one, "mlp_out", metric, value="mean"),
        "attribute": hookdepth.attribute(model, one, other, metric, steps=2),
        "lens": hookdepth.analyse(model, "logit-lens", ["the people", "of the town"]),
        "heads": hookdepth.analyse(model, "head-ablation", ["the people", "of the town"]),
    }
    assert all(repr(result) and result._repr_html_() for result in results.values())
    hookdepth.generate(model, one, [hookdepth.Skip(1)], 2)
    return {f"{name} {key}": value for name, own in results.items() for key, value in own.tensors.items()}


def test_no_default_of_the_caller_changes_a_number(model):
    plain = everything(model)
    for dtype, device in (("bfloat16", "cpu"), ("float64", "cpu"), ("float32", "meta")):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                found = everything(model)
            assert torch.get_default_dtype() == getattr(torch, dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(found[name].nan_to_num(-1), value.nan_to_num(-1)), (dtype, device, name)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: hookdepth.analyse(model, "logit-lens", 3), "the texts are 3"),
        (lambda model: hookdepth.analyse(model, "logit-lens", {"a": 1}), "the texts are {'a': 1}"),
        (lambda model: hookdepth.load(3), "the model is 3"),
        (lambda model: hookdepth.load(model), "the model is an instance of Decoder"),
        (lambda model: hookdepth.wrap(model.hf, "gpt2"), "the tokenizer is 'gpt2'"),
        (
            lambda model: hookdepth.run(model, [5, 6], hookdepth.Skip(1, tokens=[])),
            "acts on tokens [], and prompt 0 has 2",
        ),
        (lambda model: hookdepth.run(model, [[5, 6], [5]], hookdepth.Skip(1)), "on tokens 1:None, and prompt 1 has 1"),
        (lambda model: hookdepth.generate(model, [], []), "there are no prompts"),
        (lambda model: hookdepth.generate(model, [5], [], stop=[True]), "stop has the token id True"),
        (lambda model: hookdepth.skip_sweep(model, [], hookdepth.Loss()), "there are no prompts"),
    ],
)
def test_what_is_no_text_or_model_is_refused(model, call, says):
    with pytest.raises(HookdepthError) as caught:
        call(model)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dry_run": True}, "plans, and analyse measures"), ({"dtype": "bfloat16"}, "dtype= says how a model is loaded")],
)
def test_an_option_that_would_do_nothing_is_refused(model, options, said):
    with pytest.raises(HookdepthError, match=said):
        hookdepth.analyse(model, "logit-lens", TEXT, **options)


def test_strict_refuses_a_noise_floor(model, monkeypatch):
    quiet = hookdepth.analyse(model, "skip-current", TEXT, strict=True)
    assert quiet.metadata["null_effect"] == 0
    execute = Run.execute

    def noisy(*arguments):
        found = execute(*arguments)
        found[0].metadata.update(null_effect=0.25, null_where="somewhere")
        return found

    monkeypatch.setattr(Run, "execute", noisy)
    assert hookdepth.analyse(model, "skip-current", TEXT).metadata["null_effect"] == 0.25
    with pytest.raises(HookdepthError, match=r"skip-current is 0\.25, not 0 \(somewhere\)"):
        hookdepth.analyse(model, "skip-current", TEXT, strict=True)


def test_a_device_map_is_heeded():
    with pytest.raises(HookdepthError, match="both --device cpu and --device-map auto"):
        hookdepth.analyse("demo", "logit-lens", TEXT, device="cpu", device_map="auto")


def test_a_model_without_a_tokenizer_is_refused(prompts):
    with pytest.raises(HookdepthError, match="no tokenizer"):
        hookdepth.analyse(hookdepth.wrap(tiny_model("llama")), dataset=prompts)


def test_a_result_of_another_version_is_not_plotted():
    with pytest.raises(HookdepthError, match="nobody knows the analysis"):
        hookdepth.plot(hookdepth.Result("tuned-lens", {}))
