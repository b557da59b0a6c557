"""A run told for machines that are not there."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config

from hookdepth.cli import main
from hookdepth.engine.machines import MACHINES, cost_of
from hookdepth.engine.work import Work, plain_work
from hookdepth.runs.outline import Outline, load_outline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_config("llama").save_pretrained(folder)
    return folder


def planned(folder, capsys, *options):
    command = ["run", "--model", str(folder), "--limit", "2", "--out", str(folder / "out"), *options]
    status = main(command)
    said = capsys.readouterr()
    return status, said.out or said.err


def test_an_outline_lies_on_the_machine_it_is_planned_for(folder):
    outline = load_outline(str(folder), machine=MACHINES["h100"])
    assert (outline.device.type, outline.device_memory) == ("cuda", 79 << 30)
    assert outline.describe()["device"] == "NVIDIA H100"


def test_seconds_grow_with_every_kind_of_work_and_with_slower_machines(folder):
    outline, slow = load_outline(str(folder), machine=MACHINES["h100"]), MACHINES["l4"]
    work = Work(passes=2, token_layers=1e9, positions=1e9, width=100)
    fast = work.seconds(outline, MACHINES["h100"])
    assert 0 < fast < work.seconds(outline, slow)
    for more in ({"token_layers": 1e9}, {"positions": 1e9}, {"backward": 1e9}, {"algebra": 1e18}, {"overhead": 1e9}):
        assert (work + Work(**more)).seconds(outline, MACHINES["h100"]) > fast


def test_tiny_passes_are_bound_by_the_host_that_launches_their_kernels(folder):
    outlines = [load_outline(str(folder), machine=MACHINES[name]) for name in ("h100", "l4")]
    fast, slow = (
        plain_work(own, [[1]] * 1000).seconds(own, MACHINES[name])
        for name, own in zip(("h100", "l4"), outlines, strict=True)
    )
    assert fast == pytest.approx(slow, rel=0.02)
    assert fast == pytest.approx(1000 * outlines[0].n_layers * 62 * 7e-6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B300", "a100"),
    ],
)
def test_a_gpu_plans_by_its_own_numbers_or_by_those_of_an_a100(folder, monkeypatch, name, known):
    outline = load_outline(str(folder), machine=MACHINES["h200"])
    monkeypatch.setattr(type(outline), "device_name", name)
    assert cost_of(outline) == MACHINES[known].cost(outline)


def test_what_a_pass_costs_on_a_gpu():
    """Of Llama-3.1-8B on an H100: as long as 180 tokens to read a layer's weights, and 530 to launch its kernels."""
    shape = {"d_model": 4096, "d_mlp": 14336, "n_layers": 32, "weight_bytes": 16_060_000_000, "dtype": torch.bfloat16}
    (layer,) = [torch.nn.ParameterList([torch.empty(1, 218_103_808, device="meta")])]
    cost = MACHINES["h100"].cost(SimpleNamespace(layers=[layer], **shape))
    assert cost.start == pytest.approx(202, abs=5)
    assert cost.least == pytest.approx(527, abs=10)
    assert cost.full == 32 * cost.start


def test_float32_products_take_longer_than_those_of_16_bit(folder):
    work = Work(passes=1, token_layers=1e9, width=100)
    whole, half = (
        load_outline(str(folder), dtype=dtype, machine=MACHINES["h100"]) for dtype in ("float32", "bfloat16")
    )
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert work.seconds(whole, MACHINES["h100"]) > 2 * work.seconds(half, MACHINES["h100"])


def test_the_command_line_tells_one_machine_or_all(folder, capsys):
    status, said = planned(folder, capsys, "--dry-run", "--on", "h100", "--analyses", "skip-current")
    assert status == 0
    assert "NVIDIA H100" in said
    assert "nothing was measured" in said
    status, said = planned(folder, capsys, "--dry-run", "--on", "all", "--analyses", "skip-current")
    assert status == 0
    assert [line.split()[0] for line in said.splitlines()[2:] if line.split()[0] in MACHINES] == list(MACHINES)


def test_a_model_that_does_not_fit_is_said_not_to(folder, monkeypatch, capsys):
    monkeypatch.setattr(Outline, "weight_bytes", 1 << 40)
    _, said = planned(folder, capsys, "--dry-run", "--on", "h100", "--analyses", "skip-current")
    assert "it does not fit: NVIDIA H100 has 79 GiB" in said
    _, said = planned(folder, capsys, "--dry-run", "--on", "all", "--analyses", "skip-current")
    assert said.count("too small") == len(MACHINES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "h100"], "add --dry-run"),
        (["--dry-run", "--on", "h10"], "did you mean h100?"),
        (["--dry-run", "--on", "h100", "--device", "cpu"], "give one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, capsys, options, message):
    status, said = planned(folder, capsys, *options)
    assert status == 2
    assert message in said
    assert said.count("\n") == 1
