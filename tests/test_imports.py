"""Who may import whom: read off the source, so that no import order can hide anything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hookdepth

PACKAGE = Path(hookdepth.__file__).parent
# From the bottom to the top, as the design has it. A module imports from rows above its own here only, or, where a
# row is one idea in several files, from those that stand before it in the row.
LAYERS = [
    ["_version", "errors"],
    ["metrics"],
    ["hub"],
    ["data"],
    ["contract", "results", "processes"],
    ["unembedding", "families", "prefix", "models", "checking"],
    ["loading", "outline"],
    ["tokens", "interventions", "branches", "measurements"],
    ["capturing"],
    ["plans", "planning", "rows", "launching", "branching"],
    ["analyses.quadrature", "analyses.task"],
    ["analyses.skip"],
    ["analyses.erasure", "analyses.integrated_gradients", "analyses.lens", "analyses.local", "analyses.stats"],
    ["analyses"],
    ["units", "runner"],
    ["workload", "rates", "estimating"],
    ["summary", "tables"],
    ["plots_base"],
    ["plots_layers", "plots_tokens", "plots_compare", "plots", "plots_training"],
    ["training.statistics", "training.history", "training.wrapping"],
    ["training.reading", "training.probing", "training.monitor"],
    ["training.callback"],
    ["training"],
    ["report_texts", "report_html", "report_values", "report", "report_compare"],
    ["session"],
    ["api"],
    ["cli"],
    ["__main__"],
]
RANK = {name: (number, place) for number, row in enumerate(LAYERS) for place, name in enumerate(row)}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "__init__"]
HEAVY = {
    "matplotlib": {name for name in FILES if name.startswith(("plots", "report"))} | {"api"},
    "transformers": {"models", "loading", "outline", "prefix", "data", "runner", "training.callback"},
    "accelerate": {"models", "loading", "branching", "analyses.integrated_gradients"},
    "bitsandbytes": {"loading"},
    "datasets": {"data"},
    "gguf": {"loading"},
    "huggingface_hub": {"hub"},
    "tqdm": {"runner"},
    "argparse": {"cli", "session"},
}
FOR_THE_COMMAND_LINE = {"print", "exit", "quit", "breakpoint", "sys.exit", "os._exit"}
FOR_THE_COMMAND_LINE |= {"sys.stdout.write", "sys.stderr.write", "tqdm.write"}


def tree(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported(node_tree):
    """Every module that is imported anywhere in a file, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(node_tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """Modules of the package that a module imports."""
    for full in imported(tree(name)):
        inner = full.removeprefix("hookdepth.")
        if full != inner and inner in FILES and inner != name:
            yield inner


def test_every_module_has_a_place():
    assert set(MODULES) <= set(RANK), "a new module: give it a row in LAYERS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    upward = [other for other in own(name) if RANK[other] >= RANK[name]]
    # Importing a module of a package runs the package's __init__, which is no import of what it gathers.
    upward = [other for other in upward if not (other == "analyses" and name.startswith("analyses."))]
    assert not upward


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_from_the_package_itself(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module == "hookdepth":
            assert {alias.name for alias in node.names} <= set(FILES), "from hookdepth.<module>, not from hookdepth"


@pytest.mark.parametrize("name", FILES)
def test_libraries_stay_where_they_belong(name):
    for full in imported(tree(name)):
        library = full.partition(".")[0]
        if library in HEAVY:
            assert name in HEAVY[library], f"{library} belongs in {', '.join(sorted(HEAVY[library]))}"


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("cli", "__main__")])
def test_only_the_command_line_prints_or_exits(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FOR_THE_COMMAND_LINE, f"line {node.lineno}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc), f"line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_only_the_adapter_knows_module_names(name):
    """What a decoder's submodules are called is written in families.py and models.py alone."""
    if name in ("families", "models"):
        return
    words = ("self_attn", "lm_head", "embed_tokens", "post_attention_layernorm", "post_feedforward_layernorm")
    for node in ast.walk(tree(name)):
        text = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
        assert text not in words, f"line {node.lineno}"


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, hookdepth.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    assert not {"torch", "transformers", "accelerate", "matplotlib", "numpy"} & set(run_python(code))


def test_the_package_gives_every_name_it_promises():
    for name in hookdepth.__all__:
        assert hasattr(hookdepth, name)
    assert set(hookdepth.__all__) <= set(dir(hookdepth))
    with pytest.raises(AttributeError, match="has no attribute 'wrapp'"):
        hookdepth.wrapp  # noqa: B018
    typed = next(node for node in tree("__init__").body if isinstance(node, ast.If))
    for_types = {alias.name for node in typed.body for alias in node.names}
    assert for_types | {"__version__", "HookdepthError"} == set(hookdepth.__all__), "type checkers see the same names"
