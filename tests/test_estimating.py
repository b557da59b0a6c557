"""What --dry-run says: the very work of a run, and times that follow from it."""

import itertools

import pytest
from tiny_models import prompts, tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import hookdepth
from hookdepth.analyses import Inputs, Settings, Subject, chosen, groups_of, known
from hookdepth.cli import main
from hookdepth.data import Probe
from hookdepth.engine import forward as launching
from hookdepth.engine.plan import pass_work
from hookdepth.runs.dry_run import describe, estimate
from hookdepth.runs.outline import load_outline
from hookdepth.runs.rates import LAYERS

NAMES = tuple(known())

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


@pytest.mark.parametrize("settings", [Settings(), Settings(parts=("attn", "mlp"), max_rows=9)])
def test_the_work_is_that_of_the_run(outline, monkeypatch, settings):
    """Counted where it is done: token-layers of every pass, and positions of rows that are unembedded."""
    model = hookdepth.wrap(tiny_model("llama"))
    done = {"work": 0, "positions": 0}
    plain_launch, plain_unembed = launching.run_pass, type(model).unembed

    def count_launch(model, token_ids, table, branches, *arguments, **options):
        spans = [launching_extents[0][row] for row in range(len(branches))]
        done["work"] += pass_work(table.pass_, spans, model.n_layers)
        return plain_launch(model, token_ids, table, branches, *arguments, **options)

    def count_unembed(self, hidden):
        done["positions"] += hidden[..., 0].numel()
        return plain_unembed(self, hidden)

    import hookdepth.engine.passes as branching

    launching_extents = [()]
    plain_table = branching.RowTable

    def table(pass_, branches, spans, *arguments):
        launching_extents[0] = spans
        return plain_table(pass_, branches, spans, *arguments)

    monkeypatch.setattr(branching, "RowTable", table)
    monkeypatch.setattr(branching, "run_pass", count_launch)
    monkeypatch.setattr(type(model), "unembed", count_unembed)
    for one in estimate(outline, BRANCHING, INPUTS, settings, measure=False):
        (task,) = groups_of(chosen(one.task.analyses), Subject(model, INPUTS, settings))
        done.update(work=0, positions=0)
        passes = sum(task.run(chunk, lambda: None).passes for chunk in range(task.n_chunks))
        baseline = model.n_layers * sum(map(len, INPUTS.baseline)) if task.name == "residual-erasure" else 0
        assert one.work.passes == passes
        assert one.work.token_layers == done["work"] + baseline
        assert one.work.positions == done["positions"]
        assert one.seconds == 0


def test_plain_analyses_and_gradients(outline):
    found = {
        one.task.name: one for one in estimate(outline, NAMES, INPUTS, Settings(ig_method="riemann"), measure=False)
    }
    assert len(found) == 6
    tokens = sum(map(len, PROMPTS))
    assert found["logit-lens"].work.token_layers == found["residual-stats"].work.token_layers == 5 * tokens
    assert found["logit-lens"].work.positions == 6 * tokens
    gradients = found["integrated-gradients"].work
    assert gradients.token_layers == 256 * (4 + 3 + 2 + 1) * (8 + 11)
    assert gradients.positions == 256 * 5 * (2 + 2)
    assert all(one.flops > 0 and one.work.bytes > 0 for one in found.values())


def test_many_units_are_taken_to_be_like_some(outline):
    def work(n):
        (one,) = estimate(outline, ["skip-current"], Inputs(PROMPTS[1:2] * n, ((),) * n), Settings(), measure=False)
        return one.task.n_chunks, one.work.token_layers

    (_, few), (chunks, many) = work(40), work(400)
    assert chunks > 40
    assert many == pytest.approx(10 * few, rel=0.05)


def test_time_follows_from_what_is_measured(outline):
    """With a clock that ticks once a look, every call takes one tick, whatever the machine."""
    ticks = itertools.count()
    settings = Settings(ig_method="riemann", ig_steps=8)
    found = estimate(outline, NAMES, INPUTS, settings, clock=lambda: float(next(ticks)))
    assert all(one.seconds > 0 for one in found)
    stats, lens = found[:2]
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
        (estimated,) = estimate(
            load_outline(str(folder)), [name], INPUTS, settings, clock=lambda: float(counter.get_total_flops())
        )
    model = hookdepth.wrap(tiny_model("llama", **shape))
    (task,) = groups_of(chosen([name]), Subject(model, INPUTS, settings))
    real = flops_of(lambda: [task.run(chunk, lambda: None) for chunk in range(task.n_chunks)])
    assert 0.8 < estimated.seconds / real < 1.25


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


def test_a_table_without_measuring(outline):
    text = describe(outline, estimate(outline, ["logit-lens"], INPUTS, Settings(), measure=False), ["a note"])
    assert text.endswith("a note")
    assert "time: about" not in text
