"""The documentation as a static site: the API from the docstrings, and the pages in scripts/pages.

    python scripts/build_docs.py site       # then open site/index.html; `scripts/docs` installs what it needs

pdoc does the work. Our docstrings begin with a snippet that is plain Python, a paragraph of its own; for pdoc
each of them is fenced.
"""

import ast
import gc
import importlib
import inspect
import pkgutil
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import hookdepth

ROOT = Path(__file__).resolve().parents[1]
PAGES, FIGURES = ROOT / "scripts" / "pages", "benchmarks/results/demo"
TITLES = {
    "index": "Overview",
    "paper": "The paper, figure by figure",
    "analyses": "Your own analyses",
    "models": "Models",
    "results": "Results",
    "training": "Training",
    "gradients": "Integrated gradients",
    "engine": "The engine",
    "cookbook": "Cookbook",
    "numerics": "Numerics",
}


def paragraphs(docstring: str) -> Iterator[tuple[bool, str]]:
    """(is it Python, text) of each run of paragraphs; code that blank lines interrupt stays together.

    list(paragraphs("Sum.\\n\\nsum([1, 2])   # 3"))   # [(False, 'Sum.'), (True, 'sum([1, 2])   # 3')]
    """
    kind, held = False, ""
    for number, text in enumerate(inspect.cleandoc(docstring).split("\n\n")):
        code = number > 0 and _is_python(text)
        if held and code != kind:
            yield kind, textwrap.dedent(held) if kind else held
            held = ""
        kind, held = code, f"{held}\n\n{text}" if held else text
    yield kind, textwrap.dedent(held) if kind else held


def snippets(docstring: str | None) -> list[str]:
    """The Python in a docstring: snippets("Sum.\\n\\nsum([1, 2])   # 3") is ['sum([1, 2])   # 3']."""
    return [text for code, text in paragraphs(docstring or "") if code]


def fenced(docstring: str) -> str:
    """The docstring with its Python fenced, as Markdown wants it."""
    return "\n\n".join(f"```python\n{text}\n```" if code else text for code, text in paragraphs(docstring))


def _is_python(text: str) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(text.strip("\n")))
    except SyntaxError:
        return False
    # A word by itself parses as well.
    return bool(tree.body) and not (len(tree.body) == 1 and isinstance(getattr(tree.body[0], "value", None), ast.Name))


def modules() -> list[types.ModuleType]:
    """hookdepth and all its modules, with the names of every `__all__` in place."""
    names = [module.name for module in pkgutil.walk_packages(hookdepth.__path__, "hookdepth.")]
    public = [name for name in names if not name.rpartition(".")[2].startswith("_")]
    found = [hookdepth, *map(importlib.import_module, public)]
    for module in found:
        for name in getattr(module, "__all__", ()):  # some are imported when first asked for; pdoc does not ask
            setattr(module, name, getattr(module, name))
    return found


def page(name: str) -> types.ModuleType:
    """A page of scripts/pages as what pdoc knows: a module with a docstring and nothing else."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    text = text.replace(f"](../../{FIGURES}/", "](")  # they are copied beside the pages
    made = types.ModuleType(name, re.sub(r"\]\((\w+)\.md\)", r"](\1.html)", text))
    made.__dict__["__all__"] = []
    return made


def build(folder: Path) -> list[Path]:
    """Write the site; returns its pages.

    build(Path("site"))   # [Path('site/index.html'), …]
    """
    import jinja2
    import pdoc.doc
    import pdoc.render

    pdoc.render.configure(
        docformat="google",
        show_source=False,
        footer_text=f"hookdepth {hookdepth.__version__}",
        template_directory=PAGES,
    )
    convert = pdoc.render.env.filters["to_markdown"]

    @jinja2.pass_context
    def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
        ours = context["module"].fullname in TITLES
        return str(convert(context, docstring if ours else fenced(docstring)))

    pdoc.render.env.filters["to_markdown"] = to_markdown
    pdoc.render.env.globals["titles"] = TITLES
    documented = {module.__name__: pdoc.doc.Module(module) for module in [*map(page, TITLES), *modules()]}
    written = []
    try:
        for name, module in documented.items():
            target = folder / f"{name.replace('.', '/')}.html"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(pdoc.render.html_module(module, documented), encoding="utf-8")
            written.append(target)
        (folder / "search.js").write_text(pdoc.render.search_index(documented), encoding="utf-8")
    finally:
        pdoc.render.env.filters["to_markdown"] = convert
    for drawing in [*PAGES.glob("*.svg"), *(ROOT / FIGURES).glob("*.png")]:
        shutil.copy(drawing, folder)
    return written


if __name__ == "__main__":
    gc.disable()  # what is made is needed until the end, and to look through all of it again and again takes seconds
    sys.stdout.write(f"{build(Path(sys.argv[1]))[0]}\n")
