"""Two processes that train together over gloo: all of them take part, rank 0 writes. The checks are in
training_processes.py, which runs once for both tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("training_processes.py")
TESTS = str(Path(__file__).parents[1])  # where the script finds tiny_models, as pytest's own pythonpath does


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    both = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return folder, "\n".join(said)


@pytest.mark.parametrize("check", ["ddp", "ddp_with_an_error_on_one_rank", "fsdp2"])
def test_two_processes(processes, check):
    folder, said = processes
    assert (folder / f"{check}.0").exists(), said
    assert (folder / f"{check}.1").exists(), said
