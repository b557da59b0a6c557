"""The benchmarks measure what they say: the gpu suite's path on a tiny model, wrong peers found, floors by hand."""

import json

import pytest
import torch

from benchmarks import peers as peers_module
from benchmarks import run
from benchmarks.contest import OURS, Effort, contest, spread
from benchmarks.limits import Machine, Meter, Need, Size, floor, model_size, typical
from benchmarks.measure import once
from benchmarks.models import in_float32, make, shorter, twin
from benchmarks.peers import LISTED, Peers
from benchmarks.peers.hooks import HookLoop
from benchmarks.sweeps import exponent, run_sweeps
from benchmarks.workloads import residual_erasure, skip_both, skip_current
from hookdepth import LogitDifference, patch_sweep

CPU = torch.device("cpu")
QUICK = Effort(rounds=1, row_seconds=0.0, peer_seconds=0.05)
MACHINE = Machine(1e9, 1e9)


def steady():
    return MACHINE


ALONE = [listed for listed in LISTED if listed.module in ("benchmarks.peers.hooks", "benchmarks.peers.batch")]


@pytest.fixture(scope="module")
def tiny():
    return make("tiny", "float32", CPU)


@pytest.fixture
def no_libraries(monkeypatch):
    """Only the peers that need nothing but PyTorch: the others take seconds to import."""
    monkeypatch.setattr(peers_module, "LISTED", ALONE)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The gpu suite, whole, on a tiny model: (exit status, folder, what it printed)."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = "--suite gpu --device cpu --models tiny --rounds 1 --row-seconds 0.1 --peer-seconds 0.05 --out"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("benchmarks.limits._FLOPS", 1e8)  # rates that nobody reads
        patch.setattr("benchmarks.limits._BYTES", 1 << 20)
        patch.setattr("builtins.print", lambda text="", **_: printed.append(text))
        status = run.main([*command.split(), str(folder)])
    return status, folder, printed


def test_the_gpu_suite_runs_whole_on_a_tiny_model(suite):
    status, folder, printed = suite
    summary = json.loads(printed[-1])
    assert status == 0, [line for text in printed for line in text.splitlines() if "FAILED" in line]
    assert summary == json.loads((folder / "gpu.json").read_text())
    assert {row["row"] for row in summary["rows"]} == set(run.ROW_NAMES)
    assert len(summary["rows"]) == 2 * len(run.ROW_NAMES)
    assert {"hardware", "date", "commit", "versions", "sweeps", "minutes"} <= set(summary)
    assert (folder / "gpu.png").stat().st_size > 10_000
    assert (folder / "gpu-scaling.png").stat().st_size > 10_000
    table = (folder / "gpu.txt").read_text()
    assert summary["hardware"] in table
    assert all(row["workload"] in table for row in summary["rows"])


def test_every_row_shows_what_the_issue_asks_for(suite):
    for row in json.loads(suite[2][-1])["rows"]:
        assert row["floor_s"] > 0
        assert row["of_floor"] > 0
        assert row["null_effect"] in (0.0, None)
        assert row["mfu"] == pytest.approx(
            row["least_flops"] / row["contestants"][OURS]["seconds"] / row["gflops"] / 1e9
        )
        assert row["contestants"][OURS]["cold_seconds"] > 0
        read_only = row["row"] in ("residual-stats", "logit-lens", "six-experiments")
        assert (row["interventions_per_s"] > 0) != read_only
        for name, record in row["contestants"].items():
            if "not installed" in record.get("status", ""):
                continue
            assert record["seconds"] > 0
            if row["dtype"] == "bfloat16" and row["row"] != "six-experiments":
                assert 0 < record["from_float32"] < 0.25
            if name != OURS and row["dtype"] == "float32":
                assert record["difference"] < 1e-4


def test_the_six_experiments_stand_beside_the_sums_of_the_peers_rows(suite):
    rows = [row for row in json.loads(suite[2][-1])["rows"] if row["dtype"] == "float32"]
    (six,) = (row for row in rows if row["row"] == "six-experiments")
    parts = ("residual-stats", "logit-lens", "skip-both", "residual-erasure", "gradients-riemann")
    expected = sum(row["contestants"]["hook loop"]["seconds"] for row in rows if row["row"] in parts)
    assert six["sums"]["hook loop"] == pytest.approx(expected)
    assert "whole batch" not in six["sums"]  # it does not do all of them


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peer_whose_numbers_are_wrong_is_not_timed(tiny, monkeypatch, no_libraries, dtype):
    right = HookLoop.skip
    factor = 1.001 if dtype == "float32" else 1.5

    def wrong(self, *args):
        effect, output = right(self, *args)
        return effect * factor, output

    monkeypatch.setattr(HookLoop, "skip", wrong)
    subject = tiny if dtype == "float32" else make("tiny", dtype, CPU)
    row, _ = contest(skip_current(subject, Peers(subject.model)), subject, steady, QUICK)
    assert row["contestants"]["hook loop"]["status"].startswith("FAILED")
    assert "seconds" not in row["contestants"]["hook loop"]
    assert row["contestants"]["whole batch"]["ratio"] > 0
    if dtype == "bfloat16":  # it gave our numbers in float32: then the difference is bfloat16's, and shown
        row, _ = contest(skip_current(subject, Peers(subject.model)), subject, steady, QUICK, None, {"hook loop"})
        assert row["contestants"]["hook loop"]["difference"] == pytest.approx(0.5, rel=1e-3)


def test_what_fails_loses_its_own_line_and_the_exit_status(tmp_path, monkeypatch, no_libraries, capsys):
    def broken(subject, peers):
        raise ValueError("no such luck")

    def raises(self, *args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(run, "WORKLOADS", (broken, residual_erasure))
    monkeypatch.setattr(HookLoop, "erasure", raises)
    status = run.main(f"--suite cpu --models tiny --dtypes float32 --rounds 1 --out {tmp_path}".split())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1
    failed, kept = summary["rows"]
    assert failed["error"] == "ValueError: no such luck"
    assert kept["contestants"]["hook loop"]["status"] == "FAILED: RuntimeError: out of luck"
    assert kept["contestants"]["whole batch"]["seconds"] > 0
    assert "error" in summary["sweeps"]  # the sweep over interventions needs the loop as well


def test_a_peer_that_is_not_installed_keeps_its_line(tiny, monkeypatch):
    real = peers_module.importlib.import_module

    def without(name):
        if name == "benchmarks.peers.nnsight_":
            raise ModuleNotFoundError("No module named 'nnsight'", name="nnsight")
        return real(name)

    monkeypatch.setattr(peers_module.importlib, "import_module", without)
    monkeypatch.setattr(peers_module, "LISTED", [listed for listed in LISTED if "lens" not in listed.module])
    row, _ = contest(skip_current(tiny, Peers(tiny.model)), tiny, steady, QUICK)
    assert row["contestants"]["nnsight, one trace"] == {"status": "not installed (nnsight)"}


@pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.name)
def test_peers_do_what_they_are_listed_for(listed):
    module = pytest.importorskip(listed.module, exc_type=ImportError)
    kinds = {"skip", "local", "erasure", "patching", "stats", "lens", "gradients"}
    does = {kind for kind in kinds if hasattr(getattr(module, listed.type), kind)}
    assert listed.does <= does
    assert listed.does == does or listed.type in ("FrozenLoop", "LayerLoop")


def test_a_floor_by_hand():
    size = Size(layer_flops=10, unembed_flops=100, weight_bytes=1000, state_bytes=8)
    need = Need(token_layers=20, positions=3)
    # 20·10 + 3·100 = 500 FLOPs; 1000 + 2·20·8 = 1320 bytes
    assert floor(size, need, Machine(flops=50.0, bandwidth=1000.0)).seconds == 10.0
    assert floor(size, need, Machine(flops=50.0, bandwidth=1000.0)).bound == "compute"
    assert floor(size, need, Machine(flops=500.0, bandwidth=100.0)).seconds == 13.2
    assert floor(size, need, Machine(flops=500.0, bandwidth=100.0)).bound == "memory"
    # with gradients, the products twice
    assert floor(size, Need(20, 3, passes=2), Machine(50.0, 1000.0)).seconds == 20.0
    assert Need(20, 3, passes=2) + Need(5, 1) == Need(45, 7)


def test_a_floor_is_made_of_readings_beside_our_runs(tiny, no_libraries):
    rates = iter([1e9, 2e9, 4e9, 8e9, 16e9, 32e9])
    once_a_round = Effort(rounds=3, row_seconds=1e9, peer_seconds=0.05)
    row, _ = contest(skip_current(tiny, Peers(tiny.model)), tiny, lambda: Machine(next(rates), 1e12), once_a_round)
    assert row["rounds"] == 3
    assert row["gflops"] == 6.0  # the median of six readings
    assert row["floor_s"] == pytest.approx(row["least_flops"] / 6e9)
    assert row["of_floor"] == pytest.approx(row["floor_s"] / row["contestants"][OURS]["seconds"])
    assert typical([Machine(1.0, 5.0), Machine(2.0, 4.0), Machine(9.0, 3.0)]) == Machine(2.0, 4.0)


def test_the_meter_measures_what_a_product_takes(tiny):
    machine = Meter(tiny.model)()
    assert 1e8 < machine.flops < 1e14  # a clock that counts in other units, or work that is not done, is far outside
    assert 1e8 < machine.bandwidth < 1e13


def test_the_size_of_a_model_by_hand(tiny):
    size = model_size(tiny.model)
    attention = 64 * (64 + 32 + 32 + 64)  # queries, keys, values, output: 4 heads and 2 of width 16
    assert size.layer_flops == 2 * (attention + 3 * 64 * 96)
    assert size.unembed_flops == 2 * 64 * 300
    assert size.state_bytes == 64 * 4


def test_the_least_work_by_hand(tiny, no_libraries):
    """Prompts of 24 and 16 tokens, 4 layers: skipping layer s changes the L − 1 − s layers above on all but token 0."""
    assert [len(prompt) for prompt in tiny.inputs.prompts] == [24, 16]
    peers = Peers(tiny.model)
    alone = skip_current(tiny, peers).need(None)
    assert alone == Need((3 + 2 + 1) * (23 + 15) + 4 * (24 + 16), 5 * (24 + 16))
    behind = [24 - cut for cut in tiny.inputs.cuts[0]] + [16 - cut for cut in tiny.inputs.cuts[1]]
    both = skip_both(tiny, peers).need(None)
    assert both.token_layers == alone.token_layers + (3 + 2 + 1) * sum(behind)
    assert both.positions == alone.positions + 4 * sum(behind)


def test_a_part_of_the_work_is_scaled_by_its_passes(tiny, no_libraries):
    (loop, _) = skip_both(tiny, Peers(tiny.model)).contestants
    cuts = sum(map(len, tiny.inputs.cuts))
    assert loop.passes(3) == 2 * 2 + 3 * (2 + cuts)  # clean runs of both prompts, twice; then 3 layers
    assert spread(range(30), 2) == [7, 22]
    assert spread(range(4), 4) == [0, 1, 2, 3]


def test_a_twin_shares_weights_and_nothing_else(tiny):
    other = twin(tiny.model.hf)
    assert other.model.layers[0].mlp.up_proj.weight is tiny.model.hf.model.layers[0].mlp.up_proj.weight
    other.model.layers[0].register_forward_hook(lambda m, a, o: o * 0)
    assert not tiny.model.hf.model.layers[0]._forward_hooks


def test_the_float32_reference_has_the_weights_that_bfloat16_has():
    subject = make("tiny", "bfloat16", CPU)
    exact, plain = in_float32(subject), make("tiny", "float32", CPU)
    for a, b, c in zip(*(s.model.hf.parameters() for s in (subject, exact, plain)), strict=True):
        assert torch.equal(a.float(), b)
        assert torch.equal(b, c)


def test_the_peak_of_memory_is_that_of_the_call():
    held = []
    _, peak, _ = once(lambda: held.append(torch.ones(1 << 24)), CPU)  # 64 MiB
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 60 << 20 < peak < 90 << 20
    _, peak, _ = once(lambda: None, CPU)
    assert peak < 8 << 20


@pytest.mark.parametrize("name", ["HookLoop", "LayerLoop"])
def test_loops_patch_what_the_sweep_does(tiny, name):
    loop = getattr(pytest.importorskip("benchmarks.peers.hooks"), name)(tiny.model.hf)
    base, source = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
    expected = patch_sweep(tiny.model, [5, 9, 7, 8], [5, 6, 7, 8], "resid_pre", LogitDifference(10, 11))["score"]
    torch.testing.assert_close(loop.patching(base, source, [10, 11], [0, 2]), expected[[0, 2]], rtol=1e-3, atol=1e-4)


def test_what_is_cold_is_shorter_and_asks_the_same(tiny):
    less = shorter(tiny, 3)
    assert [len(one) for one in less.inputs.prompts] == [len(one) - 3 for one in tiny.inputs.prompts]
    ((before,), (after,)) = (one.inputs.probes for one in (tiny, less))
    assert after.token_ids == before.token_ids[3:]
    assert [after.token_ids[at] for at in after.answer_positions] == [
        before.token_ids[at] for at in before.answer_positions
    ]
    assert all(
        0 < cut < len(ids) for own, ids in zip(less.inputs.cuts, less.inputs.prompts, strict=True) for cut in own
    )


def test_a_cast_model_keeps_its_rotary_frequencies():
    model = make("tiny", "bfloat16", CPU).model
    assert model.dtype == torch.bfloat16
    frequencies = model.hf.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, make("tiny", "float32", CPU).model.hf.model.rotary_emb.inv_freq)


def test_exponents_and_sweeps():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with pytest.MonkeyPatch.context() as patch:
        right = HookLoop.skip
        patch.setattr(HookLoop, "skip", lambda self, *a: (1.01 * right(self, *a)[0], None))
        with pytest.raises(ValueError, match="not ours"):
            run_sweeps("tiny", "float32", CPU, quick=True, rounds=1)


@pytest.mark.parametrize(
    "arguments", ["--only skips", "--models gpt", "--dtypes float64", "--rounds 0"], ids=lambda text: text.split()[0]
)
def test_what_the_user_gives_is_checked(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments.split())
    assert stopped.value.code == 2
    assert "is" in capsys.readouterr().err
