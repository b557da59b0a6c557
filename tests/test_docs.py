"""The documentation: the site builds, is complete and needs no network; the pages' examples run as written."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import hookdepth
import hookdepth.training
from hookdepth.analyses import registry
from hookdepth.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "scripts" / "pages"
TITLES = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"))["TITLES"]
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


class Links(HTMLParser):
    """What a page loads by itself, and where it leads."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.leads, self.ids = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if given.get(LOADS.get(tag)):
            self.loads.append(given[LOADS[tag]])
        if tag == "a" and given.get("href"):
            self.leads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("pdoc", reason="the site needs hookdepth[docs]")
    folder = tmp_path_factory.mktemp("site")
    # In a process of its own: pdoc runs blocks that are for type checkers, and changes modules.
    command = [sys.executable, str(ROOT / "scripts" / "build_docs.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # pdoc warns of what it cannot resolve. Libraries also log there what they lack: that is not about the site.
    assert "Warning: " not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def links(site):
    return {page.relative_to(site).as_posix(): Links(page) for page in site.rglob("*.html")}


def test_pages_and_every_module_are_there(site, links):
    package = Path(hookdepth.__file__).parent
    modules = {path.relative_to(package.parent).with_suffix("").as_posix() for path in package.rglob("*.py")}
    modules = {name.removesuffix("/__init__") for name in modules}
    modules = {name for name in modules if "/_" not in name}
    assert {name.removesuffix(".html") for name in links} == modules | set(TITLES)


def test_every_page_is_in_the_list():
    assert {page.stem for page in PAGES.glob("*.md")} == set(TITLES)


def test_what_the_package_offers_is_documented(links):
    assert set(hookdepth.__all__) - {"__version__"} <= links["hookdepth.html"].ids


def test_nothing_is_fetched_and_no_link_is_broken(site, links):
    for name, found in links.items():
        here = (site / name).parent
        for target in found.loads:
            assert target.startswith("data:") or (here / target).is_file(), (name, target)
        for target in found.leads:
            place, _, anchor = target.partition("#")
            if target.startswith("https://"):
                continue
            page = (here / place).resolve() if place else (site / name).resolve()
            assert page.is_file(), (name, target)
            assert not anchor or anchor in links[page.relative_to(site.resolve()).as_posix()].ids, (name, target)


def test_what_the_training_offers_is_documented(links):
    assert set(hookdepth.training.__all__) <= links["hookdepth/training.html"].ids


def test_snippets_are_set_as_code(site):
    page = (site / "hookdepth.html").read_text(encoding="utf-8")
    assert page.count('<div class="pdoc-code codehilite">') > 20


def test_prose_is_not_taken_for_code():
    snippets = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"))["snippets"]
    assert snippets("Sum.\n\n    sum([1])\n\n    sum([2])\n\nNothing.\n\nArgs:\n    a: b") == ["sum([1])\n\nsum([2])"]
    assert snippets("x = 1") == snippets(None) == []


def held_to_its_shape(line):
    """`value  # [30, 5], …` fails where the value has another shape; other lines stay as they are."""
    if not (found := re.match(r"(\S.*\S)  # (\[[\d, ]+\])(?=\W|$)", line)):
        return line
    value, shape = found.groups()
    alone = isinstance(ast.parse(value).body[0].value, ast.Call | ast.Subscript | ast.BinOp)
    return f"held = {value}; assert list(held.shape) == {shape}, held.shape" if alone else line


def test_shapes_in_comments_are_held():
    assert held_to_its_shape("x = 1  # one") == "x = 1  # one"
    with pytest.raises(AssertionError, match=r"2, 3"):
        exec(held_to_its_shape("torch.ones(2, 3)[:]  # [2]: rows"), {"torch": torch})


def run_script(code, folder, monkeypatch):
    """Run it in `folder`, with no name but its own, as a process that has not met the classes of others."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_SEEN", {})
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    script.unlink()


@pytest.mark.parametrize("name", TITLES)
def test_pages_import_what_they_name(name):
    """They run where all is imported already, so what they take from hookdepth must be there without."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    modules = set(re.findall(r"^import hookdepth\.(\w+)", code, re.MULTILINE))
    assert set(re.findall(r"(?<!from )(?<!import )hookdepth\.(\w+)", code)) <= {*hookdepth.__all__, *modules}


@pytest.mark.demo
@pytest.mark.parametrize("name", TITLES)
def test_the_pages_examples_run(demo_model, name, tmp_path, monkeypatch, capsys):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert code
    code = "\n".join(map(held_to_its_shape, code.splitlines()))
    run_script(code, tmp_path, monkeypatch)  # and then what reads the results that it has kept
    for command in re.findall(r"^hookdepth ((?:merge|export|report) .*)$", text, re.MULTILINE):
        assert main(shlex.split(command, comments=True)) == 0, capsys.readouterr().err
