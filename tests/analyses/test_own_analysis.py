"""An analysis of a user's own, in a file of the user's own, is as good as ours.

The class is the one that scripts/pages/analyses.md shows, read from there.
"""

import re
import sys
import textwrap
import warnings
from importlib import metadata
from pathlib import Path

import forks
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import Branch, OutputEffect, Scale, cli
from hookdepth.analyses import registry
from hookdepth.data import encode
from hookdepth.engine import forward
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError
from hookdepth.runs import sharing
from hookdepth.training import DepthMonitor

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "scripts" / "pages" / "analyses.md").read_text(encoding="utf-8")
SOURCE = next(code for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "class HalfMlp" in code)
TEXTS = ["Anna has 12 apples and eats 3 of them.", "The basket is full."]
LAYERS = 3


@pytest.fixture(autouse=True)
def nobody_has_met_it(monkeypatch):
    """Every test is a process that has not seen the class yet."""
    monkeypatch.setattr(registry, "_SEEN", {})


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama", num_hidden_layers=LAYERS), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def command(folder, tmp_path):
    """`command("half.py:HalfMlp")`: what a user types, on the tiny model; its exit status."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")

    def run(analyses, *more, out="out"):
        arguments = ["run", "--model", str(folder), "--dataset", str(texts), "--limit", "1", "--analyses", analyses]
        return cli.main([*arguments, "--out", str(tmp_path / out), *more])

    return run


@pytest.fixture
def half(tmp_path):
    """`half.py`, as the page has it."""
    file = tmp_path / "half.py"
    file.write_text(SOURCE, encoding="utf-8")
    return file


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes the engine makes."""
    made, plain = [], forward.run_pass

    def counted(*args, **kwargs):
        made.append(1)
        return plain(*args, **kwargs)

    for module in list(sys.modules.values()):
        if getattr(module, "run_pass", None) is plain and module.__name__.startswith("hookdepth."):
            monkeypatch.setattr(module, "run_pass", counted)
    return made


def changed(half, old, new):
    text = half.read_text(encoding="utf-8")
    assert old in text
    half.write_text(text.replace(old, new), encoding="utf-8")


def analysed(model, analysis, texts=TEXTS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tiny model's noise floor may not be 0
        return hookdepth.analyse(model, analysis, texts, **options)


def elsewhere(folder, *arguments):
    """A command in a process that knows nothing of the class; what it prints."""
    status, out, err = forks.said(forks.command(arguments, folder, cwd=folder), folder)
    assert status == 0, err
    return out


@pytest.fixture
def no_pages(monkeypatch):
    """What a run draws at its end is left out: its results are what matters."""
    monkeypatch.setattr("hookdepth.runs.reporting.report", lambda folder: Path(folder) / "report.html")


def test_the_page_keeps_its_promise_of_forty_lines():
    assert len(SOURCE.splitlines()) <= 40


def test_from_python_it_gives_what_its_branches_give(model, half, tmp_path):
    result = analysed(model, registry.find(f"{half}:HalfMlp"), out=tmp_path / "out")
    own = []
    for text in TEXTS:
        ids = list(encode(model.tokenizer, text))
        halves = [Branch((Scale("mlp_out", layer, 0.5),)) for layer in range(LAYERS)]
        own.append(measure(model, [ids], halves, [OutputEffect()]).output["output"])
    torch.testing.assert_close(result["per_prompt.output"], torch.stack(own), rtol=1e-4, atol=1e-6)
    assert torch.equal(result["output"], result["per_prompt.output"].amax(0))
    assert (result["output"] > 0).all()
    assert "null_effect" in result.metadata
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["half-mlp.safetensors", "log.json"]


def test_on_the_command_line_it_stands_beside_ours(command, half, tmp_path, capsys, model):
    assert command(f"{half}:HalfMlp,logit-lens") == 0
    assert re.search(r"^half-mlp +\d+\.\d s, 1 passes, noise floor", capsys.readouterr().out, re.M)
    results = hookdepth.load_folder(tmp_path / "out")
    assert list(results) == ["half-mlp", "logit-lens"]
    python = analysed(model, registry.find(f"{half}:HalfMlp"), TEXTS[:1])
    assert torch.equal(python["output"], results["half-mlp"]["output"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Half of an MLP" in page
    assert "A bar a layer: how far the prediction moves when its MLP adds half." in page


@pytest.mark.usefixtures("no_pages")
def test_the_second_time_nothing_is_measured(command, half, tmp_path, passes):
    assert command(f"{half}:HalfMlp") == 0
    before = (tmp_path / "out" / "half-mlp.safetensors").read_bytes()
    assert len(passes) == 1
    assert command(f"{half}:HalfMlp") == 0
    assert len(passes) == 1
    assert (tmp_path / "out" / "half-mlp.safetensors").read_bytes() == before


def test_a_run_that_was_stopped_goes_on(model, half, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(sharing, "_consecutive", lambda lengths, rows: [range(n, n + 1) for n in range(len(lengths))])
    whole = analysed(model, registry.find(f"{half}:HalfMlp"))
    assert len(passes) == 2, "a prompt a chunk"
    plain = sharing.Group.run

    def stopped(self, chunk, on_pass):
        if chunk == 1:
            raise KeyboardInterrupt
        return plain(self, chunk, on_pass)

    with monkeypatch.context() as patched:
        patched.setattr(sharing.Group, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            analysed(model, registry.find(f"{half}:HalfMlp"), out=tmp_path / "out")
    assert len(passes) == 3
    result = analysed(model, registry.find(f"{half}:HalfMlp"), out=tmp_path / "out")
    assert len(passes) == 4
    assert torch.equal(result["per_prompt.output"], whole["per_prompt.output"])


@pytest.mark.usefixtures("no_pages")
def test_who_does_not_know_the_class_reads_its_declaration_in_the_file(command, half, tmp_path):
    for out in ("one", "two"):
        assert command(f"{half}:HalfMlp", out=out) == 0
    half.unlink()
    shown = elsewhere(tmp_path, "info", "one/half-mlp.safetensors")
    elsewhere(tmp_path, "report", "one")
    elsewhere(tmp_path, "compare", "one", "two", "--out", "both")
    assert re.search(r"^ *output ", shown, re.M)
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "Half of an MLP" in page
    assert "A bar a layer: how far the prediction moves" in page
    assert (tmp_path / "one" / "half-mlp-output.png").is_file()
    assert "Half of an MLP" in (tmp_path / "both" / "compare.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('measured.output["output"]}', 'measured.output["output"][:2]}', r"output has shape \[1, 2\]"),
        ('{"output": measured', '{"outptu": measured', "output is missing"),
        ('{"output": measured.output["output"]}', 'measured.output["output"]', "no dict of tensors"),
        ('{"output": measured.output["output"]}', '{"output": 0.5}', "no dict of tensors"),
        ('{"output": measured.output["output"]}', "None", "no dict of tensors"),
        ('measured.output["output"]}', 'measured.output["effect"]}', r"KeyError.* at line \d+ of .*half\.py"),
        ("layer, 0.5", "layr, 0.5", r"NameError.* at line \d+ of .*half\.py"),
        ("layer, 0.5", "layer + 1, 0.5", "layer 3"),
        ("return [Branch", "return [] and [Branch", r"output has shape \[1, 0\]"),
    ],
)
def test_what_it_gives_is_held_against_what_it_declares(command, half, capsys, old, new, said):
    changed(half, old, new)
    assert command(f"{half}:HalfMlp") in (1, 2)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "noise floor" not in line]
    assert len(lines) == 1, error
    assert lines[0].startswith("hookdepth: ")
    assert re.search(said, lines[0]), error
    # Nothing of it is in the way when the file is mended.
    half.write_text(SOURCE, encoding="utf-8")
    assert command(f"{half}:HalfMlp") == 0, capsys.readouterr().err


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layer, 0.5", "layer, 0.25"),
        ('tensors = {"output": "layer"}', 'tensors = {"output": "layer", "half": "layer"}'),
        ("from hookdepth.report.figures import Bars", "from hookdepth.report.figures import Bars\n\nFACTOR = 0.25"),
    ],
)
def test_a_changed_file_is_another_run(command, half, tmp_path, capsys, old, new):
    assert command(f"{half}:HalfMlp") == 0
    before = (tmp_path / "out" / "half-mlp.safetensors").read_bytes()
    changed(half, old, new)
    assert command(f"{half}:HalfMlp") == 2
    assert "source_sha256" in capsys.readouterr().err
    assert (tmp_path / "out" / "half-mlp.safetensors").read_bytes() == before


def test_a_base_class_in_another_file_counts(model, half, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    base = "class HalfMlp(Analysis):"
    (tmp_path / "own_base.py").write_text(SOURCE, encoding="utf-8")
    assert base in SOURCE
    half.write_text('from own_base import HalfMlp\n\n\nclass Other(HalfMlp):\n    name = "other"\n', encoding="utf-8")
    analysed(model, registry.find(f"{half}:Other"), out=tmp_path / "out")
    analysed(model, registry.find(f"{half}:Other"), out=tmp_path / "out")
    changed(tmp_path / "own_base.py", "layer, 0.5", "layer, 0.25")
    monkeypatch.delitem(sys.modules, "own_base")
    with pytest.raises(HookdepthError, match="source_sha256"):
        analysed(model, registry.find(f"{half}:Other"), out=tmp_path / "out")


def test_an_edited_file_whose_class_is_still_the_old_one(model, half, tmp_path):
    analysis = registry.find(f"{half}:HalfMlp")
    changed(half, "layer, 0.5", "layer, 0.25")
    analysed(model, analysis, out=tmp_path / "out")  # the old code, beside the new text
    with pytest.raises(HookdepthError, match="source_sha256"):
        analysed(model, registry.find(f"{half}:HalfMlp"), out=tmp_path / "out")


def test_two_files_of_one_name_are_two(model, half, tmp_path):
    first = registry.find(f"{half}:HalfMlp")
    other = tmp_path / "elsewhere" / "half.py"
    other.parent.mkdir()
    other.write_text(SOURCE.replace('"half-mlp"', '"quarter-mlp"').replace("0.5", "0.25"), encoding="utf-8")
    second = registry.find(f"{other}:HalfMlp")
    results = analysed(model, [first, second])
    sources = [result.metadata["settings"]["source_sha256"] for result in results.values()]
    assert list(results) == ["half-mlp", "quarter-mlp"]
    assert sources[0] != sources[1]
    alone = analysed(model, first)
    assert alone.metadata["settings"]["source_sha256"] == results["half-mlp"].metadata["settings"]["source_sha256"]


TYPED = """
import hookdepth
{source}
import warnings
warnings.simplefilter("ignore")
model = hookdepth.load({folder!r})
def run():
    result = hookdepth.analyse(model, HalfMlp(), ["The basket is full."], out={out!r})
    print(result.metadata["settings"]["source_sha256"])
run()
"""


def test_a_class_typed_at_a_prompt_goes_on_in_another_process(folder, tmp_path):
    code = TYPED.format(source=SOURCE, folder=str(folder), out=str(tmp_path / "out"))
    other = SOURCE.replace("layer, 0.5", "layer, 0.25")
    changed = f"{code}{other}\ntry:\n    run()\nexcept hookdepth.HookdepthError as error:\n    print(error)\n"
    first, second = (forks.said(forks.typed(one, tmp_path), tmp_path) for one in (code, changed))
    assert first[0] == second[0] == 0, first[2] + second[2]
    same, refused = second[1].splitlines()
    assert first[1].strip() == same
    assert "source_sha256" in refused, "typed anew and differently in the same process"


NO_NAME = SOURCE.replace('    name = "half-mlp"\n', "")


@pytest.mark.parametrize(
    ("source", "wanted", "said"),
    [
        (NO_NAME, "half.py:HalfMlp", "HalfMlp has no name"),
        (SOURCE.replace('"half-mlp"', '"Half MLP"'), "half.py:HalfMlp", "has the name 'Half MLP'"),
        (SOURCE.replace('"half-mlp"', '"logit-lens"'), "half.py:HalfMlp", "as one of hookdepth's own analyses is"),
        ("class HalfMlp:\n    pass\n", "half.py:HalfMlp", "is no Analysis"),
        ("HalfMlp = 3\n", "half.py:HalfMlp", "no class in half.py|unknown class in half.py"),
        ("1 / 0\n", "half.py:HalfMlp", r"does not run at line 1 .* \(ZeroDivisionError"),
        ("import nowhere_to_be_found\n", "half.py:HalfMlp", r"does not run at line 1 .* \(ModuleNotFoundError"),
        ("class HalfMlp(:\n", "half.py:HalfMlp", r"does not run at line 1 .* \(SyntaxError"),
        ("import sys\nsys.exit(0)\n", "half.py:HalfMlp", r"does not run at line 2 .* \(SystemExit"),
        (SOURCE, "half.py:HalfMpl", "did you mean HalfMlp"),
        (SOURCE, "hafl.py:HalfMlp", "no file .*hafl.py"),
        (SOURCE, "half.py", "half.py' names no class"),
        (SOURCE, "half.py:", "no class|names no class"),
        (SOURCE, "half:HalfMlp", "unknown analysis"),
        (SOURCE.replace('"output": "layer"', '"output": 3'), "half.py:HalfMlp", "tensors"),
        (SOURCE.replace('tensors = {"output": "layer"}', "tensors = {}"), "half.py:HalfMlp", "declares no tensors"),
        (SOURCE.replace("(OutputEffect(),)", "(OutputEffect,)"), "half.py:HalfMlp", "OutputEffect"),
        (SOURCE.replace("(OutputEffect(),)", "OutputEffect()"), "half.py:HalfMlp", "measurements"),
        (SOURCE.replace('half."),)', 'half."))'), "half.py:HalfMlp", "figures"),
        (SOURCE.replace('Bars("output"', 'Bars("outptu"'), "half.py:HalfMlp", "outptu"),
        (SOURCE.replace('"half-mlp"', '"half-mlp"\n    needs = "texts"'), "half.py:HalfMlp", "need of HalfMlp"),
        (SOURCE.replace('"half-mlp"', '"half-mlp"\n    options = ("part",)'), "half.py:HalfMlp", "did you mean parts"),
        (f"{SOURCE}\n    def __init__(self, factor):\n        self.factor = factor\n", "half.py:HalfMlp", "without"),
    ],
)
def test_what_cannot_be_used_is_one_line(command, half, capsys, source, wanted, said):
    half.write_text(source, encoding="utf-8")
    assert command(str(half.parent / wanted)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(said, error), error


def test_a_class_instead_of_one_of_it(model, half):
    with pytest.raises(HookdepthError, match="the class HalfMlp is no analysis"):
        hookdepth.analyse(model, type(registry.find(f"{half}:HalfMlp")), TEXTS)


def test_a_training_probes_it(half, tmp_path):
    hf = tiny_model("llama", num_hidden_layers=LAYERS)
    monitor = DepthMonitor(
        hf, every=1, probes=[registry.find(f"{half}:HalfMlp")], prompts=[[5, 7, 9, 11]], out=tmp_path / "depth"
    )
    with monitor.step():
        ids = torch.tensor([[3, 4, 5, 6]])
        hf(input_ids=ids, labels=ids).loss.backward()
    (file,) = (tmp_path / "depth").rglob("half-mlp.safetensors")
    halves = [Branch((Scale("mlp_out", layer, 0.5),)) for layer in range(LAYERS)]
    plain = measure(hookdepth.wrap(hf), [[5, 7, 9, 11]], halves, [OutputEffect()]).output["output"]
    torch.testing.assert_close(hookdepth.Result.load(file)["output"], plain, rtol=1e-4, atol=1e-6)
    registry._SEEN.clear()  # as in a process that knows nothing of the class
    assert cli.main(["report", str(file.parent)]) == 0
    assert "Half of an MLP" in (file.parent / "report.html").read_text(encoding="utf-8")


def test_a_dry_run_counts_it(command, half, capsys, passes, tmp_path):
    assert command(f"{half}:HalfMlp", "--dry-run") == 0
    assert re.search(r"^half-mlp .*\b1\b", capsys.readouterr().out, re.M)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package("a:B")`: an installed package that offers half-mlp at the entry point, as its metadata say."""

    def install(point):
        site = tmp_path / "site"
        info = site / "own_halves-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "own_halves.py").write_text(SOURCE, encoding="utf-8")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-halves\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[hookdepth.analyses]\nhalf-mlp = {point}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "own_halves", raising=False)
        assert [found.name for found in metadata.entry_points(group=registry.ENTRY_POINTS)] == ["half-mlp"]

    return install


@pytest.mark.usefixtures("no_pages")
def test_an_installed_package_offers_it(command, package, tmp_path):
    package("own_halves:HalfMlp")
    assert command("half-mlp,logit-lens") == 0
    assert list(hookdepth.load_folder(tmp_path / "out")) == ["half-mlp", "logit-lens"]


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("own_halves:Nothing", "does not load .*Nothing"),
        ("own_nowhere:HalfMlp", "does not load .*own_nowhere"),
        ("own_halves:SOURCE", "does not load"),
        ("own_halves:Bars", "is no Analysis"),
    ],
)
def test_an_installed_package_that_offers_nonsense(command, package, capsys, point, said):
    package(point)
    assert command("half-mlp") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(said, error), error


def test_the_name_of_a_package_is_that_of_its_analysis(command, package, capsys, tmp_path):
    package("own_halves:HalfMlp")
    text = textwrap.dedent(SOURCE).replace('"half-mlp"', '"another-name"')
    (tmp_path / "site" / "own_halves.py").write_text(text, encoding="utf-8")
    assert command("half-mlp") == 2
    assert "another-name" in capsys.readouterr().err
