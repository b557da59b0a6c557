"""Docstrings: every public name has one that begins with a snippet, and the snippets run and give what they say.

Snippets run on a tiny model, in the namespace of their module, of the package's names and of the words that all of
them use (`model`, `ids`, `result`, …). A comment behind an expression is checked: a literal must be equal, a shape
such as `[branch, L]` must have as many axes. Those of `hookdepth.training` have a training loop's words besides;
`model` is there one of transformers. What cannot run here is in NOT_RUN, with the reason.
"""

import ast
import builtins
import inspect
import logging
import re
import runpy
import shutil
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from synthetic_results import synthetic_results
from tiny_models import prompts, tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
import hookdepth.training
from hookdepth import analyses
from hookdepth.analyses import Inputs, Subject, chosen, depth
from hookdepth.analyses.registry import checked, find, known
from hookdepth.analyses.registry import declared as lookup
from hookdepth.analyses.subject import Measured
from hookdepth.cli.arguments import parse
from hookdepth.data import Probe, load_examples
from hookdepth.engine.passes import measure, plan_for
from hookdepth.engine.planner import make_plan
from hookdepth.report.figures import Bars, Heatmap, Lines, TokenMap, pictures_of
from hookdepth.results import Result
from hookdepth.runs.outline import load_outline
from hookdepth.runs.sharing import groups_of
from hookdepth.runs.workers import Workers
from hookdepth.training.reading import Reader
from hookdepth.training.wrapping import gather, unwrap

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "build_docs.py"))
snippets, fenced, modules = SCRIPT["snippets"], SCRIPT["fenced"], SCRIPT["modules"]


def snippets_of_page(name):
    text = (Path(__file__).resolve().parents[1] / "scripts" / "pages" / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def owned():
    """(qualified name, object, module) of every public function, class and method of the package."""
    for module in modules():
        yield module.__name__, module, module
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
                yield f"{module.__name__}.{name}", value, module
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    inner = getattr(member, "fget", None) or getattr(member, "func", None) or member
                    inner = getattr(inner, "__func__", inner)
                    if not key.startswith("_") and inspect.isfunction(inner) and inner.__name__ != "<lambda>":
                        yield f"{module.__name__}.{name}.{key}", inner, module


CLASSES = [name for name in hookdepth.__all__ if inspect.isclass(getattr(hookdepth, name))]
SITES = ("resid_pre", "attn_out", "mlp_out")
MODULES = {"hookdepth": hookdepth, "torch": torch, "np": np, "Path": Path}
OWNED = {name: (value, module) for name, value, module in owned()}


@pytest.mark.parametrize("name", OWNED)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(OWNED[name][0])


OFFERED = {name: getattr(package, name) for package in (hookdepth, hookdepth.training) for name in package.__all__}
NO_SNIPPET = ("__version__",)  # a string


@pytest.mark.parametrize("name", [name for name in OFFERED if name not in NO_SNIPPET])
def test_what_the_package_offers_begins_with_a_snippet(name):
    text = fenced(inspect.getdoc(OFFERED[name]))
    assert "```python" in text
    summary = text.partition("```python")[0]
    assert summary.count("\n\n") <= 2, "a snippet comes after the summary"


RUNNABLE = [(name, number) for name, (value, _) in OWNED.items() for number in range(len(snippets(value.__doc__)))]
# What is not run, and why not: the arguments are a module's own, made from one another; or a snippet needs a network,
# a GPU or a launcher of several processes. A module stands for what is in it.
NOT_RUN = {
    "hookdepth.engine.results.on_host": "a pass's result, which only the engine makes: tests/engine/test_gradients.py",
    "hookdepth.engine.interventions.patched_rows": "the engine's own arguments: tests/engine/test_interventions.py",
    "hookdepth.kernels": "needs a GPU: tests/kernels/test_fused.py",
    "hookdepth.engine.forward": "the engine's own arguments: tests/engine/test_passes.py",
    "hookdepth.engine.pass_result": "the engine's own arguments: tests/engine/test_passes.py",
    "hookdepth.engine.sweeping": "the engine's own arguments: tests/engine/test_paths.py",
    "hookdepth.engine.choosing": "the engine's own arguments: tests/engine/test_decoding.py",
    "hookdepth.engine.output": "the engine's own arguments: tests/engine/test_passes.py",
    "hookdepth.engine.writing": "the engine's own arguments: tests/engine/test_decoding.py",
    "hookdepth.engine.measured": "the engine's own arguments: tests/engine/test_measured.py",
    "hookdepth.data.hub": "asks the hub: tests/data/test_levels.py",
    "hookdepth.analyses.jacobian": "a model's prompts: tests/analyses/test_lenses.py",
    "hookdepth.analyses.lenses": "dozens of prompts: tests/analyses/test_lenses.py",
    "hookdepth.analyses.maps": "dozens of prompts: tests/analyses/test_linear_maps.py",
    "hookdepth.analyses.alignment": "two models and their states: tests/analyses/test_linear_maps.py",
    "hookdepth.analyses.map_errors": "two models and their states: tests/analyses/test_linear_maps.py",
    "hookdepth.analyses.ridge": "two models and their states: tests/analyses/test_linear_maps.py",
    "hookdepth.engine.travel": "the engine's own arguments: tests/engine/test_paths.py",
    "hookdepth.model.sites": "a family's own modules: tests/model/test_families.py",
}
READS_HISTORY = ["report.drawing.over_training", "training.history"]
HALF_MLP = next(code for code in snippets_of_page("analyses") if "class HalfMlp" in code)
READS_RESULTS = [
    "runs.contract",
    "runs.reporting",
    "cli",
    "report.compare",
    "report.curves",
    "report.patterns",
    "report.figures",
    "report.hover",
    "report.kind",
    "report.drawing.layers",
    "report.page",
    "report.scale",
    "report.scatter",
    "report.drawing.style",
    "report.summary",
    "report.tables",
    "report.drawing.tokens",
    "results",
]


def is_run(name):
    return not any(f"{name}.".startswith(f"{other}.") for other in NOT_RUN)


def test_all_that_is_not_run_is_there():
    runnable = [name for name, _ in RUNNABLE]
    assert all(any(f"{name}.".startswith(f"{other}.") for name in runnable) for other in NOT_RUN)


@pytest.mark.parametrize(("name", "number"), [one for one in RUNNABLE if is_run(one[0])])
@pytest.mark.filterwarnings("ignore:.*noise floor:UserWarning")
def test_snippets_run(name, number, words, folder, tmp_path, monkeypatch, caplog, request):
    value, module = OWNED[name]
    where = module.__name__.removeprefix("hookdepth.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probes.jsonl").write_text('{"prompt": "2 + 2 =", "answer": " 4"}\n')
    if where in READS_RESULTS:
        shutil.copytree(folder, tmp_path / "out")
    if where in READS_HISTORY:
        shutil.copytree(request.getfixturevalue("history"), tmp_path / "depth")
    tiny_config("llama").save_pretrained(tmp_path / "folder" / "with" / "config")
    monkeypatch.setattr("hookdepth.runs.outline.demo_folder", lambda: tmp_path / "folder" / "with" / "config")
    for place in ("hookdepth.load", "hookdepth.api.load", "hookdepth.runs.start.load"):
        monkeypatch.setattr(place, lambda name="demo", **options: words["model"])
    tiny = {name: words[name] for name in ("Settings", "load", "demo_folder")}
    if where.startswith("training") or where in READS_HISTORY:
        tiny |= request.getfixturevalue("training")
    if where.startswith("analyses") or where in ("runs.asking", "runs.sharing"):
        tiny["measured"] = words["measured_of_branches"]
        for file in ("half-skip.py", "my_analyses.py"):
            (tmp_path / file).write_text(HALF_MLP.replace("HalfMlp", "HalfSkip").replace("half-mlp", "half-skip"))
    if where in ("metrics", "training.reading"):
        tiny["resid_pre"] = words["resid_pre"][0]
    if where in ("report.compare", "report.folder", "report.page"):  # all figures take long: tests/report/test_page.py
        tiny["results"] = tiny["others"] = {"logit-lens": words["results"]["logit-lens"]}
    if name == "hookdepth.engine.passes":
        tiny["token_ids"] = words["ids"]
    code = snippets(value.__doc__)[number]
    if "raise HookdepthError" in code or "# HookdepthError:" in code:
        with pytest.raises(hookdepth.HookdepthError):
            run_checked(code, {**words, **vars(module), **tiny}, module)
    else:
        run_checked(code, {**words, **vars(module), **tiny}, module)
    # A diagnostic of a training that fails says so there, and the training goes on.
    ours = [record for record in caplog.records if record.name.startswith("hookdepth")]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def run_checked(code, namespace, module):
    for statement in ast.parse(code).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "snippet", "exec"), namespace)
            continue
        value = eval(compile(ast.Expression(statement.value), "snippet", "eval"), namespace)
        line = code.splitlines()[statement.end_lineno - 1]
        comment = line.encode()[statement.end_col_offset :].decode().strip().removeprefix("#").strip()
        # What depends on a model or on results is the demo model's, not the tiny one's: only its shape is checked.
        used = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
        own = all(name in vars(module) or name in vars(builtins) or name in ("torch", *CLASSES) for name in used)
        assert_says(value, comment, own)


def assert_says(value, comment, own):
    array = isinstance(value, torch.Tensor | np.ndarray)
    try:
        expected = ast.literal_eval(re.split(r"[;:] ", comment)[0])
    except (SyntaxError, ValueError):
        shape = re.match(r"\[([^\]]*)\]", comment)
        if shape and array:
            assert value.ndim == len([axis for axis in shape[1].split(",") if axis.strip()]), comment
        return
    if own and array:
        np.testing.assert_allclose(np.asarray(value), expected)
    elif own:
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results in `out`, and of one analysis in some folders in it."""
    folder = tmp_path_factory.mktemp("results") / "out"
    for name in (".", "demo", "other", "small", "large"):
        for analysis, result in synthetic_results(n_layers=4, n_tokens=5).items():
            if name == "." or analysis == "logit-lens":
                result.save(folder / name / f"{analysis}.safetensors")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What the snippets take for granted, by name."""
    hf_model = tiny_model("llama", num_hidden_layers=13, max_position_embeddings=4096)
    tokenizer, config, folder = tiny_tokenizer(), tiny_config("granite"), "demo"
    model = hookdepth.wrap(hf_model, tokenizer, name="tiny")
    AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda folder: hf_model)
    load, demo_folder = (lambda name="demo", **options: model), (lambda: "demo")
    options = parse(["run", "--limit", "1", "--dataset", "probes.jsonl", "--out", "made"])
    n_layers, width, device = model.n_layers, model.d_model, model.layer_device

    first_ten_prompts = [tuple(ids) for ids in prompts(2, 48)]
    ids = list(first_ten_prompts[0])
    token_ids = input_ids = torch.tensor([ids])
    probe = Probe("", "", tuple(ids[:9]), tuple(map(str, range(9))), (7, 8))
    inputs = Inputs(tuple(first_ten_prompts), ((8, 16), (24,)), tuple(first_ten_prompts), (probe,))
    settings, Settings = analyses.Settings(), partial(analyses.Settings, ig_method="riemann", ig_steps=2)
    (task,) = groups_of(chosen(["skip-current"]), Subject(model, inputs, settings))
    partials = [task.run(0, lambda: None)]
    branches = [hookdepth.Branch((hookdepth.Skip(layer, part),)) for layer in (3, 5) for part in ("attn", "layer")]
    plan = make_plan(branches, [len(ids)], n_layers)
    pass_, spans, id, run_one_pass = plan.passes[0], plan.spans, 0, lambda: None

    shape = tmp_path_factory.mktemp("config")
    hf_model.config.save_pretrained(shape)
    outline, names, workers = load_outline(str(shape), device="cpu"), ["logit-lens"], Workers()
    identities = {name: {"seed": 123} for name in ("first", "second")}

    with hookdepth.capture(model, "resid_pre", "attn_out", "mlp_out", "resid_post") as acts, model.evaluating():
        logits = lens = final = lens_logits = final_logits = model.unembed(model.forward(token_ids))
    resid_pre, attn_out, mlp_out = acts.stack("resid_pre"), acts["attn_out", 0], acts["mlp_out", 0]
    resid_post, layers = acts["resid_post", 0], [[acts[site, n] for site in SITES] for n in range(n_layers)]
    other_resid = clean_resid = resid_pre[:, 0]
    mean_resid = other_resid.mean(1)
    clean_contribution, branch_contribution = mlp_out, torch.cat([mlp_out, attn_out])
    c, steer, baseline = branch_contribution, torch.ones(width), torch.zeros(n_layers + 1, width)
    direction, effect, measured = steer, torch.ones(3, 4), torch.ones(3, 4) > 0
    paris_id, rome_id, kl, overlap = 5, 6, torch.ones(14), torch.ones(14)
    f, gradient = (lambda x: x**2), (lambda x: torch.tensor([2 * x]))

    results = synthetic_results(n_layers=n_layers, n_tokens=9, parts=("layer", "attn", "mlp"))
    tensors = {key: value for one in results.values() for key, value in one.tensors.items()}
    result = Result("logit-lens", tensors, results["logit-lens"].metadata)
    runs, values, others = {"one": results, "two": results}, kl, results
    path, name = "out/logit-lens.safetensors", "logit-lens"
    figure, page = hookdepth.plot(results["logit-lens"])["logit-lens-kl"], "page"
    stats, effects = results["residual-stats"].tensors, results["skip-current"].tensors
    declaration = known()["logit-lens"]()
    picture = pictures_of(results["logit-lens"], declaration)[0][1][0]
    given = {name: value for name, value in locals().items() if name != "tensors"}
    given |= own_analysis(model, ids)
    given["partial"] = partials[0]
    declaring = {"lookup": lookup, "Heatmap": Heatmap, "Bars": Bars, "Lines": Lines, "TokenMap": TokenMap}
    declaring["first_below_share"] = depth.first_below_share
    declaring |= {"chosen": chosen, "small": model, "hidden": acts["resid_post", 0], "load_examples": load_examples}
    declaring |= {"plan_for": plan_for, "find": find, "measure": measure}
    return {**{name: getattr(hookdepth, name) for name in hookdepth.__all__}, **MODULES, **declaring, **given}


def own_analysis(model, ids):
    """What the snippets about analyses take for granted: the class of the page, and what the engine gives it."""
    namespace = {"__name__": "own_analysis"}
    exec(HALF_MLP, namespace)
    analysis = checked(namespace["HalfMlp"]())
    subject = Subject(model, Inputs((tuple(ids),), ((8, 16),)), analyses.Settings())
    branches = analysis.branches(subject, 0)
    found = measure(model, [ids], branches, [hookdepth.LayerEffect(), hookdepth.OutputEffect()])
    return {
        "HalfMlp": namespace["HalfMlp"],
        "SkipCurrent": known()["skip-current"],
        "SkipFuture": known()["skip-future"],
        "find": find,
        "analysis": analysis,
        "subject": subject,
        "item": 0,
        "items": [{"kl": torch.ones(14), "topk_overlap": torch.ones(14)}],
        "kl_sums": torch.ones(14),
        "other_sums": torch.ones(14),
        "measured_of_branches": Measured(branches, found.layer, found.output),
    }


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """What the snippets of `hookdepth.training` take for granted besides: a loop's own words."""
    model, tokenizer = tiny_model("llama", num_hidden_layers=4), tiny_tokenizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.tensor(prompts(2, 12))
    batch, pad_token_id = {"input_ids": ids, "labels": ids}, 0
    batches = micro_batches = [batch, batch]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")), max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)

    target = unwrap(model)
    reader = Reader(target)
    reader.attach()
    model(**batch).loss.backward()
    reader.detach()
    monitor = hookdepth.training.DepthMonitor(model, every=50)
    with monitor.step():
        model(**batch).loss.backward()
    own = {name: getattr(hookdepth.training, name) for name in hookdepth.training.__all__}
    return {**own, "unwrap": unwrap, "gather": gather, **locals()}


@pytest.fixture(scope="module")
def history(training, tmp_path_factory):
    """The `out` folder of a monitor after its steps 0 and 50."""
    out, model = tmp_path_factory.mktemp("depth"), training["model"]
    probes = {"probes": ["logit-lens"], "prompts": ["2 + 2 = 4"], "tokenizer": training["tokenizer"]}
    monitor = hookdepth.training.DepthMonitor(model, every=50, out=out, strict=True, **probes)
    for number in (0, 50):
        with monitor.step(number):
            model(**training["batch"]).loss.backward()
    return out
