"""No code out of data: weights as numbers only, text as text only, files only where they belong."""

import ast
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import bad_files
import pytest
from synthetic_results import some_results

import hookdepth
from hookdepth.model import demo
from hookdepth.report.drawing import style
from hookdepth.runs.reporting import comparison, report

PACKAGE = Path(hookdepth.__file__).parent
TREES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "ctypes"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen"}
NEVER_CALLED |= {"np.load", "numpy.load", "yaml.load", "torch.hub.load", "input"}


@pytest.mark.parametrize("name", TREES)
def test_nothing_that_runs_data_as_code(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and names != ["UnpicklingError"]:  # what a refused file raises
                names = [node.module]
            assert not {found.partition(".")[0] for found in names} & NEVER_IMPORTED, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            only_tensors = called == "torch.load" and "weights_only=True" in ast.unparse(node)
            assert only_tensors or called not in NEVER_CALLED, f"line {node.lineno}"
            for keyword in node.keywords:
                if only_tensors and keyword.arg == "weights_only":
                    continue
                if keyword.arg in ("trust_remote_code", "weights_only", "allow_pickle", "shell"):
                    assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"


def test_transformers_is_asked_for_safetensors_and_for_no_code(tmp_path, monkeypatch):
    """Every call that loads something says so, whatever the defaults of this transformers are."""
    import transformers

    asked = []

    def note(plain):
        def load(source, *args, **options):
            asked.append(options)
            return plain(source, *args, **options)

        return load

    folder = bad_files.model_folder(tmp_path / "tiny")
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        auto = getattr(transformers, name)
        monkeypatch.setattr(auto, "from_pretrained", note(auto.from_pretrained))
    hookdepth.load(str(folder))
    assert len(asked) == 2
    assert all(options["trust_remote_code"] is False for options in asked)
    assert asked[0]["use_safetensors"] is True


def test_a_pickle_is_not_opened(tmp_path):
    """A checkpoint whose pickle would leave a trace when it is opened."""
    folder = bad_files.model_folder(tmp_path / "tiny")
    (folder / bad_files.WEIGHTS).unlink()
    trace = tmp_path / "opened"
    code = f"cposix\nsystem\n(S'touch {trace}'\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(code)
    with pytest.raises(hookdepth.HookdepthError):
        hookdepth.load(str(folder))
    assert not trace.exists()


def test_the_demo_is_pinned():
    assert len(demo._DEMO_SHA256) == 64
    folder = demo.cache_folder() / f"{demo.DEMO_NAME}-{demo._DEMO_VERSION}"
    spec = demo.importlib.util.find_spec(demo._DEMO_PACKAGE)
    if spec is None:
        pytest.skip(f"{demo._DEMO_PACKAGE} is not installed")
    demo._check_package(Path(spec.origin).parent)
    assert folder.name.endswith("0.1.2")


# Text that would like to be markup.

TRICKS = [
    '<script>alert("x")</script>',
    "</script><script src=//example.org/x.js></script>",
    "</title><img src=https://example.org/a.png onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "</style><style>body{background:url(//example.org/x)}</style>",
    "} body { background: url(https://example.org/x) } .x {",
    "<!-- <svg/onload=alert(1)> --> <a href=javascript:alert(1)>a</a>",
    "&lt;script&gt;&#60;script&#62; &amp;",
    "]]><svg:script xmlns:svg='http://www.w3.org/2000/svg'>alert(1)</svg:script>",
    "$\\frac{1}{0}$ \\input{/etc/passwd} %s {0} ${x}",
    "a\x1b[2Jb\x00\u202egnp.exe\u2028\ud800",
]
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "h4", "p", "cite", "code", "b"}
ALLOWED |= {"section", "nav", "a", "dl", "div", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "details"}
ALLOWED |= {"summary", "figure", "figcaption", "img", "svg", "path"}
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "id", "href", "scope", "tabindex", "style"}
ATTRIBUTES |= {"alt", "src", "viewbox", "preserveaspectratio", "d"}


class Strict(HTMLParser):
    """Refuses every element and attribute that our pages do not use, and every address that leads anywhere."""

    text = ""

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            if name == "href":
                assert value.startswith("#")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            if name == "style":
                assert set(value) <= set("abcdefghijklmnopqrstuvwxyz-:;.%0123456789"), value


def poisoned(folder, trick):
    for result in some_results(n_layers=2, n_tokens=4, model=trick, null=1e-3).values():
        result.metadata["null_where"] = trick
        result.metadata["settings"] = {trick: trick, "list": [trick]}
        result.metadata["versions"] = {trick: trick}
        result.metadata["data"]["name"] = trick
        for probe in result.metadata.get("probes", []):
            probe |= {"prompt": trick, "answer": trick, "tokens": [trick] * 4}
        result.save(folder / f"{result.analysis}.safetensors")


def test_pages_of_texts_that_would_be_markup(tmp_path, monkeypatch):
    """All tricks in one text, everywhere that text can come from outside."""
    monkeypatch.setitem(style._STYLE, "savefig.dpi", 30)
    poisoned(tmp_path / "<b>run&", " ".join(TRICKS))
    pages = [
        report(tmp_path / "<b>run&"),
        comparison([tmp_path / "<b>run&"] * 2, tmp_path / "both"),
    ]
    for page in pages:
        html = page.read_text(encoding="utf-8")
        strict = Strict()
        strict.feed(html)
        assert TRICKS[0] in strict.text
        assert html.count("<style>") == html.count("</style>") == html.count("<title>hookdepth") == 1
        assert "default-src 'none'" in html
        assert "javascript:alert" in html, "it is there, as text"
    for path in tmp_path.rglob("*.svg"):
        svg = path.read_text(encoding="utf-8")
        assert "<script" not in svg
        assert "javascript:" not in svg


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_files_only_where_they_belong(tmp_path):
    """A run, a report, a comparison and `info`, with home, cache and working directory where they can be listed."""
    home, cwd, model, temporary = (tmp_path / name for name in ("home", "cwd", "model", "tmp"))
    for folder in (home, cwd, temporary):
        folder.mkdir()
    bad_files.model_folder(model)
    (cwd / "prompts.txt").write_text(f"{bad_files.LINE}\n")
    before = listing(tmp_path)
    code = (
        "import sys; from hookdepth.cli import main\n"
        "run = ['run', '--model', sys.argv[1], '--dataset', 'prompts.txt', '--analyses', 'logit-lens']\n"
        "sys.exit(main([*run, '--out', 'out/a']) or main(['report', 'out/a']) or main(['info', 'out/a'])\n"
        "         or main(['compare', 'out/a', 'out/a', '--out', 'out/b']))"
    )
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "HF_", "MPL", "HOOKDEPTH"))}
    environment = {**keep, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    new = listing(tmp_path) - before
    # matplotlib keeps a list of the machine's fonts; the rest of the home folder is as it was.
    elsewhere = {path for path in new if not path.startswith("cwd/out") and "matplotlib" not in path}
    assert elsewhere <= {"home/.cache", "home/.config"}
    assert {"cwd/out/a/report.html", "cwd/out/b/compare.html"} <= new
