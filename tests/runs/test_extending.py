"""A larger limit goes on from a finished run, and runs over different prompts become one."""

import csv
import dataclasses

import pytest
import torch
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.analyses import Inputs, Settings, find
from hookdepth.cli import main
from hookdepth.errors import HookdepthError
from hookdepth.results import Result, read_log
from hookdepth.runs import runner
from hookdepth.runs.extending import merge
from hookdepth.runs.sharing import Group

NAMES = ("residual-stats", "logit-lens", "skip-current", "skip-future", "local-current")
PROMPTS = tuple(tuple(ids) for ids in prompts(4, (30, 41, 20, 35), seed=2))
CUTS = ((16,), (24, 8), (), (8,))
DATA = {"name": "some", "prompts_sha256": "0"}


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama", num_hidden_layers=3), name="tiny")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A chunk a prompt: then passes are the same ones, whichever prompts are there."""

    def one_each(lengths, rows):
        return [range(n, n + 1) for n in range(len(lengths))]

    monkeypatch.setattr("hookdepth.runs.sharing._consecutive", one_each)


@pytest.fixture
def make(model, tmp_path):
    def make(folder, which=slice(None), settings=None, names=NAMES, **more):
        inputs = Inputs(PROMPTS[which], CUTS[which])
        run = runner.Run(model, inputs, settings or Settings(), DATA, 123, tmp_path / folder, **more)
        run.execute([find(name) for name in names])
        return tmp_path / folder

    return make


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def counted(monkeypatch):
    ran, plain = [], Group.run
    monkeypatch.setattr(Group, "run", lambda self, chunk, move: ran.append(self.name) or plain(self, chunk, move))
    return ran


def test_a_larger_limit_computes_the_new_prompts_only_and_gives_the_same_bytes(make, monkeypatch):
    whole = files(make("whole"))
    folder = make("out", slice(2))
    ran = counted(monkeypatch)
    make("out")
    assert sorted(ran) == sorted(2 * ["residual-stats", "logit-lens", "skip", "local"])
    assert files(folder) == whole
    assert read_log(folder)["logit-lens"]["passes"] == 4
    make("out")
    assert len(ran) == 8, "what is finished is not measured"


def test_an_extension_that_was_stopped_goes_on(make, monkeypatch):
    whole = files(make("whole"))
    folder = make("out", slice(1))
    ran, plain = [], Group.run

    def stops(self, chunk, move):
        if len(ran) == 7:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append((self.name, chunk))
        return plain(self, chunk, move)

    monkeypatch.setattr(Group, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        make("out")
    make("out")
    assert len(ran) == 1 + 4 * 3
    assert files(folder) == whole


def test_members_of_a_group_may_be_of_different_lengths(make):
    whole = hookdepth.load_folder(make("whole"))
    folder = make("out", slice(1), names=("skip-current",))
    make("out", slice(2), names=("skip-future",))
    make("out")
    for name, result in hookdepth.load_folder(folder).items():  # from passes of their own, which round otherwise
        for key, values in whole[name].tensors.items():
            torch.testing.assert_close(result[key], values, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_other_settings_are_refused_and_fewer_prompts_too(make):
    make("out", slice(2), names=("skip-current",))
    with pytest.raises(HookdepthError, match=r"keep_front = 1, this run has 2"):
        make("out", settings=Settings(keep_front=2), names=("skip-current",))
    with pytest.raises(HookdepthError, match=r"data.n_prompts = 2, this run has 1"):
        make("out", slice(1), names=("skip-current",))
    with pytest.raises(HookdepthError, match=r"data\."):
        make("out", slice(1, 4), names=("skip-current",))


def test_merged_runs_are_one_run_over_all_prompts(make, tmp_path, capsys, monkeypatch):
    whole = make("whole")
    first, second = make("first", slice(2)), make("second", slice(2, 4))
    lines = []
    merged = merge([first, second], tmp_path / "both", lines.append)
    assert not lines
    assert merged.keys() == set(NAMES)
    for name in NAMES:
        alone, both = (Result.load(folder / f"{name}.safetensors") for folder in (whole, tmp_path / "both"))
        assert both.tensors.keys() == alone.tensors.keys()
        for key, values in alone.tensors.items():
            assert torch.equal(both[key].nan_to_num(-1), values.nan_to_num(-1)), (name, key)
        for key in ("n_prompts", "lengths", "prompts"):
            assert both.metadata["data"][key] == alone.metadata["data"][key]
        assert both.metadata["settings"] == alone.metadata["settings"]
    reported = []
    monkeypatch.setattr("hookdepth.runs.reporting.report", lambda out: reported.append(out) or tmp_path / "report.html")
    assert main(["merge", str(first), str(second), "--out", str(tmp_path / "again")]) == 0
    assert list(map(str, reported)) == [str(tmp_path / "again")]
    assert hookdepth.load_folder(tmp_path / "again").keys() == set(NAMES)


def test_what_cannot_be_merged_is_refused_in_a_line(make, tmp_path, capsys):
    first = make("first", slice(2), names=("skip-current", "logit-lens"))
    other = make("other", slice(2, 4), settings=Settings(keep_front=2), names=("skip-current",))
    overlapping = make("overlapping", slice(1, 3), names=("skip-current",))
    out = str(tmp_path / "both")
    for folders, says in (
        ([first], "merge puts several runs together"),
        ([first, first], "holds prompts that another of the runs has"),
        ([first, overlapping], "holds prompts that another of the runs has"),
        ([first, other], "keep_front = 2, this run has 1"),
        ([first, tmp_path / "no"], "no folder"),
    ):
        assert main(["merge", *map(str, folders), "--out", out]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert main(["merge", str(first), str(other), "--out", str(first)]) == 2
    assert "holds results already" in capsys.readouterr().err


def test_what_is_no_sum_over_prompts_is_left_out_of_a_merger(model, tmp_path):
    ids = [tuple(own) for own in prompts(36, 30, seed=4)]
    for name, own in (("first", ids[:18]), ("second", ids[18:])):
        small = hookdepth.wrap(tiny_model("llama-gqa", num_hidden_layers=2, hidden_size=32), name="tiny")
        run = runner.Run(small, Inputs(tuple(own)), Settings(), DATA, 123, tmp_path / name)
        run.execute([find("residual-stats"), find("linear-maps")])
    lines = []
    merged = merge([tmp_path / "first", tmp_path / "second"], tmp_path / "both", lines.append)
    assert merged.keys() == {"residual-stats"}
    assert len(lines) == 1
    assert lines[0].startswith("linear-maps cannot be put together")


@pytest.mark.parametrize("how", ["max", "mean", "median", "none"])
def test_over_prompts(make, how):
    folder = make(how, settings=Settings(over_prompts=how), names=("skip-current", "local-future"))
    for name, tensor in (("skip-current", "layer.output"), ("local-future", "layer.effect")):
        result = hookdepth.load_folder(folder)[name]
        each = result[f"per_prompt.{tensor}"]
        assert result.metadata["settings"]["over_prompts"] == how
        if how == "none":
            assert tensor not in result.tensors
            continue
        expected = {"max": lambda v: v.nan_to_num(-1).amax(0), "mean": lambda v: v.nanmean(0)}
        expected["median"] = lambda v: v.nanquantile(0.5, dim=0)
        torch.testing.assert_close(result[tensor], expected[how](each))
        assert (each.isnan().all(-1).any()) == (name == "local-future"), "the prompt without a cut does not count"
        said = hookdepth.plot(result)[f"{name}-{tensor.replace('.', '-')}"]._supxlabel.get_text().replace("\n", " ")
        assert (", mean over prompts" in said) == (how == "mean")


def test_export(make, capsys):
    folder = make("out", slice(2), names=("skip-current",))
    assert main(["export", str(folder / "skip-current.safetensors"), "--to", "csv"]) == 0
    with open(folder / "skip-current.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    result = hookdepth.load_folder(folder)["skip-current"]
    assert len(rows) == sum(values.numel() for values in result.tensors.values())
    row = next(row for row in rows if (row["tensor"], row["layer"], row["layer_2"]) == ("layer.effect", "0", "2"))
    assert float(row["value"]) == result["layer.effect"][0, 2].item()
    assert row["prompt"] == ""
    assert main(["export", str(folder / "skip-current.safetensors"), "--to", "excel"]) == 2
    assert "unknown format 'excel'" in capsys.readouterr().err
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        assert main(["export", str(folder / "skip-current.safetensors"), "--to", "parquet"]) == 2
        assert "pip install pyarrow" in capsys.readouterr().err


def test_inputs_have_the_fields_that_a_beginning_cuts():
    assert {"prompts", "cuts", "texts"} <= {one.name for one in dataclasses.fields(Inputs)}
