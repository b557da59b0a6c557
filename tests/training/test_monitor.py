"""A sampled step of a plain loop: the numbers, what counts, and that nothing of the training changes."""

import copy
import logging

import pytest
import torch
from training_runs import (
    LAYERS,
    assert_close,
    assert_same,
    expected_stats,
    fresh_model,
    make_batches,
    n_hooks,
    seed_everything,
    train,
)

from hookdepth.cli import main
from hookdepth.errors import HookdepthError
from hookdepth.results import Result, read_log
from hookdepth.runs.contract import load_folder
from hookdepth.training import DepthMonitor, load_history, padding_mask, save_picture
from hookdepth.training.metrics import metrics_of
from hookdepth.training.reading import adds_up, products, statistics

IDS = list(range(3, 20))


@pytest.fixture(autouse=True)
def seeded():
    seed_everything()


def deterministic(family="llama", **overrides):
    return fresh_model(family, **overrides).eval()  # eval with gradients: a training without dropout


def sampled(model, batches, **options):
    """The first step's statistics, with the gradient of all batches and no optimiser."""
    monitor = DepthMonitor(model, every=1, strict=True, **options)
    with monitor.step():
        for batch in batches:
            model(**batch).loss.backward()
    return monitor.results["residual-stats"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
def test_a_step_gives_what_the_analysis_gives(family):
    model, batches = deterministic(family), make_batches(1)
    assert_close(sampled(model, batches), expected_stats(model, batches))


def test_accumulated_batches_count_by_their_tokens():
    model = deterministic()
    batches = make_batches(1, padding=(0, 0)) + make_batches(1, rows=1, tokens=5, padding=(3,), seed=1)
    result = sampled(model, batches)
    assert_close(result, expected_stats(model, batches))
    assert result.metadata["data"]["n_tokens"] == 26


def test_sixteen_bit_and_autocast():
    model, batches = deterministic(), make_batches(1)
    exact = expected_stats(model, batches)
    monitor = DepthMonitor(model, every=1, strict=True)
    train(model, batches, monitor, autocast=True)
    assert_close(monitor.results["residual-stats"], exact, 0.05)
    low = deterministic().to(torch.bfloat16)
    assert_close(sampled(low, batches), expected_stats(low, batches), 0.05)


def test_statistics_are_float32_whatever_the_precision_of_products():
    h, a, m = (torch.randn(1, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = products(h, a, m)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[3].double(), (a.double() * h.double()).sum(-1), rtol=1e-5, atol=1e-5)
    assert statistics(found[None]).shape == (10, 1, 1, 4)


def test_what_counts():
    ids = torch.arange(8).view(2, 4)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, -100]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert padding_mask({"input_ids": ids}) is None
    assert padding_mask({"input_ids": ids, "labels": labels}).tolist() == [[True] * 3 + [False], [False] * 4]
    assert padding_mask({"labels": labels, "attention_mask": mask}).tolist() == mask.bool().tolist()
    assert padding_mask({"attention_mask": mask[:, None, None]}) is None


@pytest.mark.parametrize("how", ["mask", "labels", "own", "positional"])
def test_padding_is_left_out(how):
    model, (batch,) = deterministic(), make_batches(1)
    exact = expected_stats(model, [batch])
    own = {}
    given = dict(batch)
    if how != "mask":
        del given["attention_mask"]
    if how == "own":
        del given["labels"]
        given["input_ids"] = given["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
        own = {"mask": lambda inputs: inputs["input_ids"] != 0}
    monitor = DepthMonitor(model, every=1, strict=True, **own)
    with monitor.step():
        if how == "positional":
            model(batch["input_ids"], batch["attention_mask"]).logits.sum().backward()
        else:
            model(**given).logits.sum().backward()
    assert_close(monitor.results["residual-stats"], exact)
    assert monitor.results["residual-stats"].metadata["data"]["n_tokens"] == batch["attention_mask"].sum()


def test_padding_that_is_not_a_number_does_not_spread():
    model, (batch,) = deterministic(), make_batches(1)
    exact = expected_stats(model, [batch])
    handle = model.model.layers[-1].mlp.register_forward_hook(  # in front of another layer it would spread itself
        lambda _m, _a, out: out.masked_fill(batch["attention_mask"][..., None] == 0, torch.nan)
    )
    monitor = DepthMonitor(model, every=1)
    with monitor.step():
        model(**batch)
    handle.remove()
    assert_close(monitor.results["residual-stats"], exact)


def test_a_plain_loop_does_not_notice(tmp_path):
    batches = make_batches(6)
    model = fresh_model()
    without = train(model, batches)
    assert_same(without, train(fresh_model(), batches))
    watched = fresh_model()
    names = ["residual-stats", "logit-lens", "skip-current", "residual-erasure", "integrated-gradients"]
    probe = _probe()
    monitor = DepthMonitor(watched, 2, probes=names, prompts=[probe, IDS], probe_every=3, out=tmp_path, strict=True)
    monitor.probes.settings = _cheap()
    assert_same(without, train(watched, batches, monitor))
    history = load_history(tmp_path)
    assert list(history["residual-stats"]) == [0, 2, 3, 4]
    assert list(history["skip-current"]) == list(history["integrated-gradients"]) == [0, 3]
    assert not torch.equal(history["logit-lens"][0].tensors["kl"], history["logit-lens"][3].tensors["kl"])


def _probe():
    from hookdepth.data import Probe

    return Probe("a", "b", tuple(IDS[:6]), tuple("abcdef"), (4, 5))


def _cheap():
    from hookdepth.analyses import Settings

    return Settings(ig_method="riemann", ig_steps=4)


def test_probes_measure_what_the_run_measures_before_the_step():
    from hookdepth.analyses.lens import lens_sums
    from hookdepth.model.decoder import Decoder

    model = fresh_model()
    exact = lens_sums(Decoder(copy.deepcopy(model)), IDS)["kl"] / len(IDS)
    monitor = DepthMonitor(model, 1, probes=["logit-lens"], prompts=[IDS], strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # weights cast without gradients must not stay behind
        train(model, make_batches(1), monitor)
    assert torch.allclose(monitor.results["logit-lens"].tensors["kl"], exact, atol=1e-6)


def test_autocast_around_the_step_keeps_its_gradients():
    def grads(watch):
        seed_everything()
        model = fresh_model()
        monitor = DepthMonitor(model, 1, probes=["logit-lens"], prompts=[IDS], strict=True) if watch else None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if monitor:
                monitor.begin(0)
            model(**make_batches(1)[0]).loss.backward()
            if monitor:
                monitor.end()
        return [parameter.grad for parameter in model.parameters()]

    assert_same(grads(False), grads(True))


def test_only_sampled_steps_have_hooks():
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, every=3)
    counts = []
    for _ in range(7):
        with monitor.step():
            counts.append(n_hooks(model))
            model(**batch).loss.backward()
        assert n_hooks(model) == 0
    assert [count > 0 for count in counts] == [True, False, False, True, False, False, True]
    assert counts[0] > counts[3], "the stream is checked once"


def test_nothing_accumulates():
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, every=1)
    sizes = []
    for _ in range(4):
        with monitor.step():
            model(**batch).loss.backward()
        sizes.append(
            (len(monitor.results), sum(t.numel() for r in monitor.results.values() for t in r.tensors.values()))
        )
        assert not any(t.requires_grad for r in monitor.results.values() for t in r.tensors.values())
        assert monitor._reader is None
    assert len(set(sizes)) == 1


def test_evaluation_within_a_step_does_not_count():
    model, batches = deterministic(), make_batches(1)
    monitor = DepthMonitor(model, every=1, strict=True)
    with monitor.step():
        model(**batches[0]).loss.backward()
        with torch.no_grad():
            model(**make_batches(1, seed=5)[0])
            model.generate(batches[0]["input_ids"][:, :3], max_new_tokens=2, do_sample=False)
    assert_close(monitor.results["residual-stats"], expected_stats(model, batches))


def test_an_error_is_said_once_and_the_training_goes_on(caplog):
    batches = make_batches(4)
    without = train(fresh_model(), batches)

    def broken(inputs):
        raise RuntimeError("no\nmask")

    model = fresh_model()
    monitor = DepthMonitor(model, every=1, mask=broken)
    with caplog.at_level(logging.WARNING):
        assert_same(without, train(model, batches, monitor))
    (record,) = caplog.records
    assert record.getMessage() == "depth diagnostics end at step 0, the training goes on: no mask"
    assert monitor.results == {}
    strict = DepthMonitor(fresh_model(), every=1, mask=broken, strict=True)
    with pytest.raises(RuntimeError, match="mask"):
        train(strict.target.outer, batches, strict)
    assert n_hooks(strict.target.outer) == 0


def raising(error):
    def run(*_args):
        raise error

    return run


def test_a_probe_that_fails_and_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    batches = make_batches(3)
    without = train(fresh_model(), batches)
    model = fresh_model()
    failing = DepthMonitor(model, 1, probes=["logit-lens"], prompts=[IDS])
    monkeypatch.setattr(failing.probes, "run", raising(RuntimeError("no memory")))
    assert_same(without, train(model, batches, failing))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "step-000000").write_text("in the way")
    model = fresh_model()
    assert_same(without, train(model, batches, DepthMonitor(model, 1, out=tmp_path / "out")))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "cannot write" in caplog.records[1].getMessage()


def test_an_error_of_the_training_leaves_no_hook():
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, every=1)

    def interrupted(error):
        with monitor.step():
            model(**batch)
            raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted(KeyboardInterrupt())
    with pytest.raises(IndexError), monitor.step():
        model(input_ids=torch.tensor([[10**6]]))
    assert n_hooks(model) == 0
    assert monitor.results == {}
    with monitor.step():
        model(**batch)
    assert monitor.results["residual-stats"].metadata["settings"]["step"] == 2


def test_a_stream_made_otherwise_is_noticed(caplog):
    model = fresh_model()

    def doubled(_module, _args, output):
        return 2 * output

    handle = model.model.layers[1].register_forward_hook(doubled)
    monitor = DepthMonitor(model, every=1)
    train(model, make_batches(2), monitor)
    handle.remove()
    (record,) = caplog.records
    assert "layer 1 is not resid_pre + attn_out + mlp_out" in record.getMessage()
    assert monitor.results == {}
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert not adds_up([one, one, one], one)
    assert adds_up([one, nan], torch.tensor([2.0, torch.nan])), (
        "a training that diverged is not a stream made otherwise"
    )


def test_a_step_without_a_forward_pass_says_so(caplog):
    monitor = DepthMonitor(fresh_model(), every=1)
    with monitor.step():
        pass
    assert "ran no forward pass with gradients" in caplog.records[0].getMessage()


def test_files_serve_compare_and_report(tmp_path, capsys):
    model = fresh_model()
    out = tmp_path / "depth"
    monitor = DepthMonitor(model, 2, probes=["logit-lens", "skip-current"], prompts=[IDS], out=out, strict=True)
    train(model, make_batches(3), monitor)
    folders = sorted(map(str, out.iterdir()))
    assert [folder.rpartition("/")[2] for folder in folders] == ["step-000000", "step-000002"]
    assert main(["compare", *folders, "--out", str(tmp_path / "compare")]) == 0
    assert main(["report", folders[1]]) == 0
    assert main(["info", folders[1]]) == 0
    assert "settings.step" in capsys.readouterr().out
    page = (tmp_path / "compare" / "compare.html").read_text()
    assert "step-000002" in page
    assert "residual-stats" in page
    assert set(load_folder(folders[0])) == {"residual-stats", "logit-lens", "skip-current"}
    assert save_picture(out, tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in save_picture(out, tmp_path / "depth.svg").read_bytes()
    with pytest.raises(HookdepthError, match="neither"):
        save_picture(out, tmp_path / "depth.gif")
    with pytest.raises(HookdepthError, match="no steps"):
        load_history(tmp_path / "compare")


def test_the_same_training_gives_the_same_bytes(tmp_path):
    """What differs from run to run (times) is in the log of each step, and nowhere else."""
    options = {"probes": ["logit-lens", "skip-current"], "prompts": [IDS], "strict": True}
    for name in ("one", "two"):
        model = fresh_model()
        train(model, make_batches(3), DepthMonitor(model, 2, out=tmp_path / name, **options))
    files = sorted((tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    for folder in (tmp_path / "one").iterdir():
        log = read_log(folder)
        assert set(log) == {"residual-stats", "logit-lens", "skip-current"}
        assert log["skip-current"]["passes"] > 0 < log["skip-current"]["wall_time_s"]


def test_metrics():
    tensors = {
        f"{kind}.{part}": torch.arange(LAYERS).float()
        for kind in ("relative_contribution", "cosine")
        for part in ("attn", "mlp", "layer")
    }
    tensors["norm.resid"] = torch.ones(LAYERS + 1)
    results = {"residual-stats": Result("residual-stats", tensors)}
    found = metrics_of(results)
    assert found["depth/cosine.mlp"] == 1.0
    assert found["depth/contribution_depth"] == pytest.approx(5 / 3)
    assert metrics_of(results, per_layer=True)["depth/norm.resid/003"] == 1.0
    assert "depth/effective_depth.kl" not in found
    assert metrics_of({}) == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"probes": ["logit-lense"], "prompts": [IDS]}, "did you mean logit-lens"),
        ({"probes": ["logit-lens"]}, "prompts are missing"),
        ({"prompts": [IDS]}, "probes are missing"),
        ({"probes": ["logit-lens"], "prompts": ["text"]}, "no tokenizer"),
        ({"probes": ["logit-lens"], "prompts": [[]]}, "is no prompt"),
        ({"probes": ["logit-lens"], "prompts": [[1, "a"]]}, "is no prompt"),
        ({"probes": ["skip-future"], "prompts": [[1, 2]]}, "long enough"),
        ({"probes": ["residual-erasure"], "prompts": [IDS]}, "no prompt has one"),
        ({"out": __file__}, "is a file"),
        ({"every": True}, "every is True"),
        ({"probe_every": 0}, "probe_every is 0"),
        ({"mask": None}, "mask=None is no function"),
        ({"probes": ["logit-lens"], "prompts": [IDS], "settings": {"ig_steps": 4}}, "are no Settings"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_training(options, says):
    with pytest.raises(HookdepthError, match=says):
        DepthMonitor(fresh_model(), **options)


def test_models_that_cannot_be_read_are_refused():
    with pytest.raises(HookdepthError, match=r"no list of decoder layers"):
        DepthMonitor(torch.nn.Linear(2, 2))
    with pytest.raises(HookdepthError, match="DataParallel"):
        DepthMonitor(torch.nn.DataParallel(fresh_model()))
