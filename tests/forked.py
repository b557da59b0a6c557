"""Commands and scripts in processes of their own, as a user starts them, less the seconds that libraries take.

    said = command("hookdepth info out/first/residual-stats.safetensors", folder)
    said = script("import hookdepth", folder)

Each process is forked from one that has imported torch, transformers and the rest, but nothing of hookdepth: no
process can lean on what another has imported of it. stdout and stderr come back together, once the exit status was 0.
"""

import multiprocessing
import os
import runpy
import shlex
import sys
import warnings
from pathlib import Path

LIBRARIES = [
    "torch",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "transformers.generation",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "jinja2",
]
COMMANDS = {"hookdepth": "hookdepth", "accelerate": "accelerate.commands.accelerate_cli"}  # and their modules
ROOT = str(Path(__file__).resolve().parents[1])
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(LIBRARIES)


def command(line: str, folder: Path) -> str:
    return _run(_command, shlex.split(line, comments=True), folder)


def script(code: str, folder: Path) -> str:
    return _run(_script, code, folder)


def _run(target, given, folder):
    log = folder.with_name(f"{folder.name}.log")
    environment = {**os.environ, "PYTHONPATH": ROOT}  # for processes that the command starts
    process = FORKING.Process(target=_child, args=(target, given, str(folder), str(log), environment))
    process.start()
    process.join(900)
    running = process.is_alive()
    process.kill()
    process.join()
    said = log.read_text(encoding="utf-8", errors="replace")
    assert not running, f"not done after 900 s: {given}\n{said}"
    assert process.exitcode == 0, f"exit status {process.exitcode}: {given}\n{said}"
    assert "Traceback" not in said, said
    return said


def _child(target, given, folder, log, environment):
    assert not [name for name in sys.modules if name.partition(".")[0] == "hookdepth"], "imported before its process"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # pytest has taken the descriptors of the process that this one is forked from.
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    target(given)


def _command(words):
    sys.argv = words
    runpy.run_module(COMMANDS[words[0]], run_name="__main__", alter_sys=True)


def _script(code):
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # as pyproject.toml has it for tests
        warnings.filterwarnings("error", category=kind, module="hookdepth")
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
