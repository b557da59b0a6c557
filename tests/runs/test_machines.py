"""A run told for machines that are not there."""

import pytest
import torch
from tiny_models import tiny_config

from hookdepth.cli import main
from hookdepth.engine.work import Work
from hookdepth.runs.machines import MACHINES
from hookdepth.runs.outline import load_outline

WEIGHTS = 1 << 20


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
    fast = MACHINES["h100"].seconds(outline, work, WEIGHTS)
    assert 0 < fast < slow.seconds(outline, work, WEIGHTS)
    for more in ({"token_layers": 1e9}, {"positions": 1e9}, {"backward": 1e9}, {"algebra": 1e18}):
        assert MACHINES["h100"].seconds(outline, work + Work(**more), WEIGHTS) > fast
    # Tiny passes are bound by the host that launches their kernels.
    assert slow.seconds(outline, Work(passes=1000), 0) == MACHINES["h100"].seconds(outline, Work(passes=1000), 0) > 0.1


def test_float32_products_take_longer_than_those_of_16_bit(folder):
    work = Work(passes=1, token_layers=1e9, width=100)
    whole, half = (
        load_outline(str(folder), dtype=dtype, machine=MACHINES["h100"]) for dtype in ("float32", "bfloat16")
    )
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert MACHINES["h100"].seconds(whole, work, WEIGHTS) > 2 * MACHINES["h100"].seconds(half, work, WEIGHTS)


def test_the_command_line_tells_one_machine_or_all(folder, capsys):
    status, said = planned(folder, capsys, "--dry-run", "--on", "h100", "--analyses", "skip-current")
    assert status == 0
    assert "NVIDIA H100" in said
    assert "nothing was measured" in said
    status, said = planned(folder, capsys, "--dry-run", "--on", "all", "--analyses", "skip-current")
    assert status == 0
    assert [line.split()[0] for line in said.splitlines()[2:] if line.split()[0] in MACHINES] == list(MACHINES)


def test_a_model_that_does_not_fit_is_said_not_to(folder, monkeypatch, capsys):
    monkeypatch.setattr("hookdepth.runs.dry_run.weight_bytes", lambda outline: 1 << 40)
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
