"""Processes for tests: children of one that has imported everything and started no threads, so that they begin at once.

process = command(["info", "out"], tmp_path)     # as a user gives it, its output in files there
process.join()
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch

from hookdepth.cli import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["hookdepth.runs.workers", "hookdepth.runs.start", "transformers.models.llama.modeling_llama", "pytest"]
)


def command(arguments, folder, **environment):
    """`command(["info", "out"], tmp_path, RANK="1")`: the command in a process, started; its output lies in files."""
    process = FORKS.Process(target=_command, args=([str(one) for one in arguments], folder, environment))
    process.start()
    return process


def _command(arguments, folder, environment):
    for handle, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    torch.set_num_threads(1)
    sys.argv = ["hookdepth", *arguments]
    sys.exit(main())
