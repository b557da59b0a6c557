"""What --dry-run says: the very work of a run, and times that follow from it."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import prompts, tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import hookdepth
from hookdepth.analyses import Inputs, Settings, Subject, chosen, known
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.subject import Partial
from hookdepth.cli import main
from hookdepth.data import Probe
from hookdepth.engine import passes
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Skip
from hookdepth.engine.measurements import OutputEffect
from hookdepth.engine.plan import pass_work
from hookdepth.engine.reading import capture
from hookdepth.model.sites import ORDER
from hookdepth.runs import start
from hookdepth.runs.config import Config
from hookdepth.runs.dry_run import LAYERS, describe, estimate, work_of
from hookdepth.runs.outline import Words, load_outline, miniature, with_vocabulary
from hookdepth.runs.sharing import groups_of

NAMES = tuple(name for name, kind in known().items() if kind.in_all)

PROMPTS = tuple(tuple(ids) for ids in prompts(3, (30, 90, 21)))
PROBES = tuple(
    Probe("", "", tuple(ids), tuple(map(str, ids)), (len(ids) - 2, len(ids) - 1)) for ids in prompts(2, (9, 12))
)
INPUTS = Inputs(PROMPTS, ((16, 8), (8, 40, 64), ()), PROMPTS[:2], PROBES)
BRANCHING = ("skip-current", "skip-future", "local-current", "local-future", "residual-erasure")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_config("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outline(folder):
    return load_outline(str(folder))


SETTINGS = [
    Settings(ig_method="riemann", ig_steps=20),
    Settings(parts=("attn", "mlp"), max_rows=9, ig_method="gauss-legendre", ig_steps=5),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "other"])
def test_the_work_is_that_of_the_run(outline, monkeypatch, settings):
    """Counted where it is done: token-layers of every pass, tokens that the last MLP gets, and positions of rows that
    are unembedded."""
    model = hookdepth.wrap(tiny_model("llama"))
    done = dict.fromkeys(("work", "positions", "mlp", "late"), 0)
    plain_run, plain_table, plain_unembed = passes.run_pass, passes.RowTable, type(model).unembed
    spans = [()]

    def table(pass_, branches, own, *arguments):
        spans[0] = own
        return plain_table(pass_, branches, own, *arguments)

    def count_pass(model, token_ids, table, branches, *arguments, **options):
        pass_ = table.pass_
        done["work"] += pass_work(pass_, spans[0], model.n_layers)
        if pass_.prefix == "own":  # what is changed in an attention joins at the layer's output, right of the cut
            late = sum(0 < spans[0][row].joins[1] < ORDER.index("neurons") for row in pass_.rows)
            done["late"] += late * (pass_.stop - pass_.start)
        return plain_run(model, token_ids, table, branches, *arguments, **options)

    def count_unembed(self, hidden):
        done["positions"] += hidden[..., 0].numel()
        return plain_unembed(self, hidden)

    def count_mlp(module, arguments, output):
        done["mlp"] += output[..., 0].numel()

    monkeypatch.setattr(passes, "RowTable", table)
    monkeypatch.setattr(passes, "run_pass", count_pass)
    monkeypatch.setattr(type(model), "unembed", count_unembed)
    # The product itself, which no hook of the engine narrows or widens.
    for layer in model.layers:
        layer.mlp.down_proj.register_forward_hook(count_mlp)
    for one in estimate(outline, analyses_of(*BRANCHING, "integrated-gradients"), INPUTS, settings, measure=False):
        (group,) = groups_of(analyses_of(*one.group.analyses), Subject(model, INPUTS, settings))
        done.update(work=0, positions=0, mlp=0, late=0)
        calls = sum(group.run(chunk, lambda: None).passes for chunk in range(group.n_chunks))
        plain = {
            "residual-erasure": sum(map(len, INPUTS.baseline)),
            "integrated-gradients": len(settings.parts) * sum(len(probe.token_ids) for probe in PROBES),
        }
        assert one.work.passes == calls
        assert one.work.token_layers == done["work"] + model.n_layers * plain.get(group.name, 0)
        assert one.work.positions == done["positions"]
        assert one.work.token_layers - one.work.unread == done["mlp"] + done["late"]
        assert one.seconds == 0


def analyses_of(*names):
    return chosen(list(names))


def estimates(outline, inputs, settings, names=NAMES, **options):
    return {one.group.name: one for one in estimate(outline, analyses_of(*names), inputs, settings, **options)}


def test_plain_analyses_and_gradients(outline):
    found = estimates(outline, INPUTS, Settings(ig_method="riemann"), measure=False)
    assert len(found) == 6
    tokens = sum(map(len, PROMPTS))
    assert found["logit-lens"].work.token_layers == found["residual-stats"].work.token_layers == 5 * tokens
    assert found["logit-lens"].work.positions == 6 * tokens
    gradients = found["integrated-gradients"].work
    # 128 nodes fill a pass: two a layer, each with its clean run and control; and each path's ends are found once.
    assert gradients.passes == 2 * 5 * 2
    assert gradients.token_layers == 256 * (4 + 3 + 2 + 1) * (8 + 11) + 2 * 5 * 2 * 5 * (8 + 11) + 5 * (9 + 12)
    assert gradients.positions == (256 + 2 * 2) * 5 * (2 + 2)
    # What comes before a node's layer is clean, and nothing flows back through it.
    assert gradients.backward == 256 * (4 + 3 + 2 + 1) * (8 + 11) + 2 * 2 * (4 + 3 + 2 + 1) * (8 + 11)
    assert all(one.flops > 0 and one.work.bytes > 0 for one in found.values())


def test_many_units_are_taken_to_be_like_some(outline):
    def work(n):
        inputs = Inputs(PROMPTS[1:2] * n, ((),) * n)
        (one,) = estimates(outline, inputs, Settings(), ["skip-current"], measure=False).values()
        return one.group.n_chunks, one.work.token_layers

    (_, few), (chunks, many) = work(40), work(400)
    assert chunks > 40
    assert many == pytest.approx(10 * few, rel=0.05)


def test_time_follows_from_what_is_measured(outline):
    """With a clock that ticks once a look, every call takes one tick, whatever the machine."""
    ticks = itertools.count()
    settings = Settings(ig_method="riemann", ig_steps=8)
    found = estimates(outline, INPUTS, settings, clock=lambda: float(next(ticks)))
    assert all(one.seconds > 0 for one in found.values())
    stats, lens = found["residual-stats"], found["logit-lens"]
    assert stats.seconds == pytest.approx(stats.work.token_layers / (stats.work.width * LAYERS))
    assert lens.seconds == pytest.approx(stats.seconds), "calls that take equally long leave nothing for unembedding"


def flops_of(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["residual-stats", "logit-lens", *BRANCHING[::2], "integrated-gradients"])
def test_estimates_are_right_where_the_clock_counts_products(tmp_path_factory, name):
    """In FLOPs there is no noise: what the miniature says of the model's shape against what the model does."""
    shape = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 300}
    folder = tmp_path_factory.mktemp("deep")
    tiny_config("llama", **shape).save_pretrained(folder)
    settings = Settings(ig_method="riemann", ig_steps=8)
    with FlopCounterMode(display=False) as counter:
        (estimated,) = estimates(
            load_outline(str(folder)), INPUTS, settings, [name], clock=lambda: float(counter.get_total_flops())
        ).values()
    model = hookdepth.wrap(tiny_model("llama", **shape))
    (group,) = groups_of(analyses_of(name), Subject(model, INPUTS, settings))
    real = flops_of(lambda: [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)])
    assert 0.9 < estimated.seconds / real < 1.1


def test_the_command(folder, tmp_path, capsys):
    (folder / "prompts.txt").write_text("Anna has 12 apples and eats 3 of them, so she has 9 apples.\n" * 3)
    command = ["run", "--model", str(folder), "--dataset", str(folder / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in ("skip-current and skip-future", "passes", "TFLOP", "GiB of weights", "time: about"):
        assert words in printed.out
    assert "adaptive integrated gradients take as many nodes as they need" in printed.out
    assert not (tmp_path / "out").exists()


def test_a_target_is_planned_by_its_own_shape(folder, tmp_path, capsys):
    wide = tmp_path / "wide"
    tiny_config("qwen2", hidden_size=128, num_hidden_layers=7).save_pretrained(wide)
    assert not any("token" in path.name for path in wide.iterdir())  # words stand in for its tokens
    (tmp_path / "lines.txt").write_text(("plain words, again and again, until it is enough. " * 8 + "\n") * 9)
    command = [
        "run",
        "--dry-run",
        "--model",
        str(folder),
        "--dataset",
        str(tmp_path / "lines.txt"),
        "--target",
        str(wide),
    ]
    assert main([*command, "--analyses", "linear-maps", "--out", str(tmp_path / "out")]) == 0
    assert f"{wide}, the target, has 0.0 GiB of weights" in capsys.readouterr().out
    inputs = Inputs(tuple(map(tuple, prompts(9, (300,) * 9))))
    works = {}
    for target in (None, load_outline(str(wide))):
        outline = load_outline(str(folder))
        (group,) = groups_of(chosen("linear-maps"), Subject(outline, inputs, Settings(target=target)))
        works[target is None] = work_of(group)
    assert works[False].passes == 18 == 2 * works[True].passes
    assert works[False].algebra > (8 / 6) * 2 * works[True].algebra
    assert works[False].bytes > works[True].bytes + 9 * 299 * 8 * 128 * 4


def test_a_config_alone_has_no_tokens(tmp_path):
    tiny_config("qwen2").save_pretrained(tmp_path)
    assert isinstance(load_outline(str(tmp_path)).tokenizer, Words)


def test_a_table_without_measuring(outline):
    text = describe(
        outline, estimate(outline, analyses_of("logit-lens"), INPUTS, Settings(), measure=False), ["a note"]
    )
    assert text.endswith("a note")
    assert "time: about" not in text


class OneSkip(Analysis):
    """Of a user's own, and at a layer that no miniature has."""

    name = "one-skip"
    measurements = (OutputEffect(),)
    tensors = {"output": "branch"}

    def __init__(self, layer=1):
        self.layer = layer

    def branches(self, subject, item):
        return [Branch((Skip(self.layer),))]

    def collect(self, subject, item, measured):
        return {"output": measured.output["output"]}


class Means(Analysis):
    """Of a user's own, without branches, and without a word on what it does."""

    name = "means"
    tensors = {"mean": "layer"}

    def measure(self, subject, item, on_pass):
        with subject.model.evaluating(), capture(subject.model, "resid_pre") as acts:
            subject.model.forward(torch.tensor([subject.inputs.prompts[item]]))
        return Partial({"mean": torch.stack([acts["resid_pre", n].mean() for n in range(subject.model.n_layers)])}, 1)


def test_an_analysis_of_ones_own(outline):
    inputs = Inputs(PROMPTS)
    for one in estimate(outline, [OneSkip(), Means()], inputs, Settings()):
        assert one.seconds > 0
        assert one.work.token_layers >= 5 * sum(map(len, PROMPTS))
        assert bool(one.work.notes) == (one.group.name == "means")
    (note,) = one.work.notes
    assert "means does not say what it does; one forward pass of each of its prompts is counted" in note


def test_what_a_miniature_cannot_run_has_no_time_and_a_note_says_so(outline):
    found = estimate(outline, [OneSkip(4), Means()], Inputs(PROMPTS), Settings())
    text = describe(outline, found)
    assert [one.seconds > 0 for one in found] == [False, True]
    assert found[0].work.token_layers > 0
    assert "no time for one-skip, which did not run on 3 layers of" in text
    assert "Skip" in text or "layer 4" in text


def test_a_smaller_vocabulary_for_a_while(outline):
    small = miniature(outline, 2)
    hidden = torch.randn(1, 3, small.d_model)
    with torch.no_grad():
        whole = small.unembed(hidden)
        with with_vocabulary(small, 7):
            torch.testing.assert_close(small.unembed(hidden), whole[..., :7])
            assert small.config.vocab_size == 7
        assert torch.equal(small.unembed(hidden), whole)
    assert small.config.vocab_size == 300


@pytest.mark.parametrize("analyses", ["all", "skip-current,skip-future", "integrated-gradients"])
def test_long_samples_are_shortened(outline, analyses, monkeypatch):
    """To a budget, if prompts can be cut so short: one prompt and its cuts, or the end of a probe, never its answer."""
    import hookdepth.runs.dry_run as dry_run

    sizes = {}
    for budget in (1e6, 1e12):
        monkeypatch.setattr(dry_run, "_FLOPS", {"cpu": budget})
        inputs = Inputs((tuple(range(200)),), ((16, 8, 150),), (tuple(range(40)),), PROBES)
        small = miniature(outline, LAYERS)
        for group in groups_of(chosen(analyses), Subject(outline, inputs, Settings())):
            sample = dry_run._sample(group, small)
            sizes.setdefault(group.name, []).append(sum(work_of(sample).flops(small)))
            own = sample.subject.inputs
            assert all(0 < cut < len(own.prompts[0]) for cuts in own.cuts for cut in cuts)
            assert all(len(probe.answer_positions) == 2 for probe in own.probes)
            assert all(len(probe.tokens) == len(probe.token_ids) for probe in own.probes)
    assert all(short <= long for short, long in sizes.values())
    if analyses != "integrated-gradients":
        assert sizes["skip"][0] < sizes["skip"][1] / 4


def test_the_plan_of_a_config(folder):
    (folder / "prompts.txt").write_text("Anna has 12 apples and eats 3 of them, so she has 9 apples.\n" * 3)
    config = Config(model=str(folder), dataset=str(folder / "prompts.txt"), device_map="auto")
    printed = start.describe_plan(config, chosen("all"))
    for words in ("skip-current and skip-future", "passes", "TFLOP", "GiB of weights", "time: about"):
        assert words in printed
    assert "here 88 a layer are assumed; with --ig-max-evaluations 1024 it may be up to 12 times as many" in printed
    assert printed.endswith("--device-map spreads the weights, and moving them takes time")
    without = start.describe_plan(replace(config, analyses="logit-lens"), chosen("logit-lens"))
    assert "nodes" not in without
