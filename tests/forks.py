"""Processes for tests: children of one that has imported everything and started no threads, so that they begin at once.

process = command(["info", "out"], tmp_path)     # as a user gives it, its output in files there
process.join()
"""

import multiprocessing
import os
import runpy
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from hookdepth.cli import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "hookdepth.runs.workers",
        "hookdepth.runs.start",
        "hookdepth.runs.reporting",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.tokenization_auto",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "pytest",
    ]
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"hookdepth": "hookdepth", "accelerate": "accelerate.commands.accelerate_cli"}  # of commands


def command(arguments, folder, cwd=".", longest=None, **environment):
    """`command(["info", "out"], tmp_path, RANK="1")`: the command in a process, started; its output lies in files.

    `longest` is how many bytes long a file of it may become.
    """
    own = [str(one) for one in arguments]
    return _started(_command, own, folder, Path(cwd).resolve(), longest, environment)


def typed(code, folder):
    """`typed("print(1)", tmp_path)`: code as `python -c` takes it; the process, started, its output in files."""
    return _started(_typed, code, folder)


def as_written(text, folder, language="sh"):
    """`as_written("hookdepth info out", tmp_path)`: a command, or Python, of the documentation, run in the folder.

    Nothing of hookdepth is imported there before, so that it cannot lean on what another has imported.
    """
    (log := folder.with_name("output")).mkdir(exist_ok=True)
    process = _started(_written, text, folder, log, language)
    process.join(900)
    running = process.is_alive()
    process.kill()
    process.join()
    printed = "".join((log / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    assert not running, f"not done after 900 s: {text}\n{printed}"
    assert process.exitcode == 0, f"exit status {process.exitcode}: {text}\n{printed}"
    assert "Traceback" not in printed, printed


def said(process, folder):
    """`status, out, err = said(process, tmp_path)`: once it has ended."""
    process.join(120)
    return process.exitcode, *((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))


def _started(work, *given):
    process = FORKS.Process(target=work, args=given)
    process.start()
    return process


def _command(arguments, folder, cwd, longest, environment):
    _into_files(folder)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    os.chdir(cwd)
    if longest is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
    sys.argv = ["hookdepth", *arguments]
    sys.exit(main())


def _typed(code, folder):
    _into_files(folder)
    _run_typed(code)


def _run_typed(code):
    sys.modules["__main__"] = own = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(own))


def _written(text, folder, log, language):
    _into_files(log)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)  # of processes that the command starts
    for name in [name for name in sys.modules if name.partition(".")[0] == "hookdepth"]:
        del sys.modules[name]
    if language == "sh":
        sys.argv = shlex.split(text, comments=True)
        runpy.run_module(MODULES[sys.argv[0]], run_name="__main__", alter_sys=True)
    else:
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # as in pyproject.toml
            warnings.filterwarnings("error", category=kind, module="hookdepth")
        _run_typed(text)


def _into_files(folder):
    for handle, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    torch.set_num_threads(1)
