"""The README's examples run as they are written, in an empty folder.

Every command of the `sh` blocks and every `python` block runs in a process of its own. One rule leaves lines out: those
that begin with `scripts/` or `pip `, which install (continuous integration runs `scripts/test` itself), or with
`python benchmarks/`, which take minutes and want the machine alone (test_benchmarks.py runs them on tiny models).
"""

import json
import re
from pathlib import Path

import pytest
from forks import as_written

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


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_there_are_examples():
    assert len(blocks("sh")) >= 1
    assert len(blocks("python")) >= 2


@pytest.mark.demo
def test_the_shell_examples_run(demo_model, work):
    for line in "".join(blocks("sh")).splitlines():
        assert not re.search(r"[;&|<>$`\\]", line.partition(" #")[0]), f"more than one plain command: {line}"
        as_written(line, work)
    assert (work / "out" / "first" / "report.html").is_file()
    assert (work / "out" / "comparison" / "compare.html").is_file()


@pytest.mark.demo
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_examples_run(demo_model, work, number):
    as_written(blocks("python")[number], work, "python")


def test_the_pages_and_figures_it_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_table_is_that_of_the_last_run():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    newer = {"patching"}  # than that run
    assert {row["row"] for row in results["rows"]} == {make.__name__.replace("_", "-") for make in WORKLOADS} - newer
    assert f"\n\n{readme_table(results)}\n\n" in README
