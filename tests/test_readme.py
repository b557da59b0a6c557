"""The README's examples run as they are written, in an empty folder.

Every `sh` block runs in bash and every `python` block in Python. One rule leaves lines out: those that begin with
`scripts/` or `pip `, which install (continuous integration runs `scripts/test` itself), or with `python benchmarks/`,
which take minutes and want the machine alone (test_benchmarks.py runs them on tiny models).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.output import readme_table
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of a language, less the lines that the rule leaves out."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    left_out = ("scripts/", "pip ", "python benchmarks/")
    kept = ["".join(line for line in block.splitlines(True) if not line.startswith(left_out)) for block in found]
    return [block for block in kept if block.strip()]


def environment(folder):
    """The environment of a user who has installed this hookdepth: its commands are on the path."""
    (folder / "bin").mkdir()
    for name, module in (("hookdepth", "hookdepth"), ("accelerate", "accelerate.commands.accelerate_cli")):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def run(command, folder):
    work = folder / "work"
    work.mkdir()
    done = subprocess.run(
        command, cwd=work, env=environment(folder), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return work


def test_there_are_examples():
    assert len(blocks("sh")) >= 1
    assert len(blocks("python")) >= 2


@pytest.mark.demo
def test_the_shell_examples_run(demo_model, tmp_path):
    work = run(["bash", "-euo", "pipefail", "-c", "\n".join(blocks("sh"))], tmp_path)
    assert (work / "out" / "first" / "report.html").is_file()
    assert (work / "out" / "comparison" / "compare.html").is_file()


@pytest.mark.demo
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_examples_run(demo_model, tmp_path, number):
    run([sys.executable, "-W", "error::DeprecationWarning:hookdepth", "-c", blocks("python")[number]], tmp_path)


def test_the_pages_and_figures_it_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_table_is_that_of_the_last_run():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    newer = {"patching"}  # than that run
    assert {row["row"] for row in results["rows"]} == {make.__name__.replace("_", "-") for make in WORKLOADS} - newer
    assert f"\n\n{readme_table(results)}\n\n" in README
