"""Who may import whom: read off the source, so that no import order can hide anything.

A *room* is a module directly in the package, or one of its folders. Imports point from a room to rooms below it.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hookdepth
from hookdepth.analyses.registry import known

PACKAGE = Path(hookdepth.__file__).parent
MOST_FLOORS, MOST_MODULES = 9, 12
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
HEAVY = {
    "matplotlib": {name for name in FILES if name.split(".")[0] == "report"} | {"api"},
    "transformers": {name for name in FILES if name.startswith("model.")}
    | {"model.kv_cache", "runs.runner", "runs.outline", "training.callback"},
    "accelerate": {"model.decoder", "model.loading", "engine.memory"},
    "bitsandbytes": {"model.loading"},
    "triton": {"kernels._reductions"},
    "liger_kernel": {"kernels._modules"},
    "datasets": {"data.hub"},
    "gguf": {"model.demo"},
    "huggingface_hub": {"model.hub"},
    "tqdm": {"runs.saying"},
    "argparse": {"cli.arguments", "cli.commands"},
}
EXAMPLES = ("__init__", "api")  # of what a user types
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


def named(node_tree):
    """Every module that a string names, as `import_module` takes it: `f"hookdepth.data.{name}"` may be any of these."""
    docstrings = {id(node.value) for node in ast.walk(node_tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(node_tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            begins = node.values[0].value
            yield from (full for name in FILES if (full := f"hookdepth.{name}").startswith(begins))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def own(name, node_tree=None):
    """Modules of the package that a module imports; that a folder's own __init__ runs first is no import of it."""
    node_tree = node_tree or tree(name)
    for full in (*imported(node_tree), *named(node_tree)):
        inner = full.removeprefix("hookdepth.")
        if full != inner and inner in FILES and inner != name and not name.startswith(f"{inner}."):
            yield inner


def room(name):
    return name.partition(".")[0]


def floors(graph):
    """How high each node stands: above all that it imports. Raises where imports go in circles."""
    height = {}
    for name in TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[other] for other in graph.get(name, ())), default=0)
    return height


MODULES = {name: set(own(name)) for name in FILES if name != "__init__"}
ROOMS = {}
for _name, _others in MODULES.items():
    ROOMS.setdefault(room(_name), set()).update(room(other) for other in _others if room(other) != room(_name))


def test_no_imports_go_in_circles_and_floors_are_few():
    floors(MODULES)
    height = floors(ROOMS)
    assert max(height.values()) <= MOST_FLOORS, height


def test_a_circle_would_be_seen():
    with pytest.raises(ValueError, match="cycle"):
        floors({"a": {"b"}, "b": {"a"}})


def test_a_module_that_a_string_names_is_imported():
    late = ast.parse(
        """"hookdepth.data.lines"; f(import_module("hookdepth.report.page"), f"hookdepth.sweeps.{name}")"""
    )
    found = set(own("results", late))
    assert {"report.page", "sweeps.grid", "sweeps.patching"} <= found
    assert "data.lines" not in found, "a docstring imports nothing"


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES


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


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in ("cli", "__main__")])
def test_only_the_command_line_prints_or_exits(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FOR_THE_COMMAND_LINE, f"line {node.lineno}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc), f"line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_only_the_adapter_knows_module_names(name):
    """What a decoder's submodules are called is written in the folder `model` alone."""
    if name.startswith("model."):
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


@pytest.mark.parametrize("name", [name for name in FILES if name not in EXAMPLES])
def test_an_analysis_is_named_in_its_own_module_alone(name):
    """Whoever else speaks of analyses reads what they declare; so do the examples in docstrings."""
    text = FILES[name].read_text(encoding="utf-8")
    for other, kind in known().items():
        if "-" in other and kind.__module__ != f"hookdepth.{name}":  # `lenses` is a word besides
            assert other not in text
