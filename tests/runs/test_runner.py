"""The runner: what was measured stays, whatever stops it, and is never mixed with anything else."""

import dataclasses
import json
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import Inputs, Settings, find, known
from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.results import LOG, Result, read_log
from hookdepth.runs import runner
from hookdepth.runs.runner import UNITS
from hookdepth.runs.sharing import Group

NAMES = tuple(name for name, kind in known().items() if kind.in_all)

PROMPTS = tuple(tuple(ids) for ids in prompts(3, (300, 310, 305)))  # too long to share a chunk
CUTS = ((64,), (128, 8), (16,))
PROBES = tuple(
    Probe("", "", tuple(ids), tuple(map(str, ids)), (len(ids) - 2, len(ids) - 1)) for ids in prompts(2, (9, 7), seed=4)
)
INPUTS = Inputs(PROMPTS, CUTS, PROMPTS[:2], PROBES)
SKIPS = ("skip-current", "skip-future")


class Run(runner.Run):
    """A run of analyses by their names."""

    def execute(self, names):
        return super().execute([find(name) for name in names])


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama"), name="tiny")


@pytest.fixture
def make(model, tmp_path):
    def make(folder="out", settings=None, inputs=INPUTS, seed=123, of=model, **more):
        settings = settings or Settings(ig_method="riemann", ig_steps=2)
        return Run(of, inputs, settings, {"name": "some", "prompts_sha256": "0"}, seed, tmp_path / folder, **more)

    return make


def tensor_bytes(path):
    """All of a result file."""
    Result.load(path)
    return path.read_bytes()


def chunks(run):
    return sorted(path.name for path in (run.out / UNITS).glob("*.safetensors"))


class Stop:
    """Lets `after` chunks of each task through, then raises; counts the chunks that ran."""

    def __init__(self, monkeypatch, after=10**6, error=KeyboardInterrupt):
        self.ran = []
        plain = Group.run

        def run(group, chunk, on_pass):
            if len([one for one in self.ran if one[0] == group.analyses]) >= after:
                raise error
            self.ran.append((group.analyses, chunk))
            return plain(group, chunk, on_pass)

        monkeypatch.setattr(Group, "run", run)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The bytes of runs that nothing stopped: of all analyses together, and of some alone."""
    found = {}
    for names in (NAMES, SKIPS, ("skip-current",), ("skip-future",)):
        out = tmp_path_factory.mktemp("whole")
        settings = Settings(ig_method="riemann", ig_steps=2)
        Run(model, INPUTS, settings, {"name": "some", "prompts_sha256": "0"}, 123, out).execute(names)
        found[names] = {name: tensor_bytes(out / f"{name}.safetensors") for name in names}
    return found


def test_all_analyses_leave_their_files_and_nothing_else(make):
    run = make()
    begin = time.perf_counter()
    results = run.execute(NAMES)
    elapsed, log = time.perf_counter() - begin, read_log(run.out)
    assert [result.analysis for result in results] == list(NAMES)
    assert sorted(path.name for path in run.out.iterdir()) == sorted([LOG, *(f"{name}.safetensors" for name in NAMES)])
    for result in results:
        metadata = Result.load(run.out / f"{result.analysis}.safetensors").metadata
        assert metadata == json.loads(json.dumps(result.metadata))
        assert metadata["analysis"] == result.analysis
        assert metadata["model"]["id"] == "tiny"
        assert metadata["data"]["name"] == "some"
        assert metadata["seed"] == 123
        assert log[result.analysis]["passes"] > 0
        assert 0 < log[result.analysis]["wall_time_s"] < elapsed
        assert not {"passes", "wall_time_s", "hosts"} & set(metadata), "what differs from run to run is in the log"
        assert set(metadata["versions"]) == {"hookdepth", "torch", "transformers", "python"}
        assert ("null_effect" in metadata) == (result.analysis not in ("residual-stats", "logit-lens"))
        probed = result.analysis in ("residual-erasure", "integrated-gradients")
        assert ("probes" in metadata) == probed
        assert metadata["data"]["n_prompts"] == {"residual-erasure": 2, "integrated-gradients": 0}.get(
            metadata["analysis"], 3
        )


def test_two_runs_give_the_same_bytes(make, whole):
    run = make()
    run.execute(NAMES)
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in NAMES} == whole[NAMES]


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (KeyboardInterrupt, 0),
        (KeyboardInterrupt, 1),
        (HookdepthError("failed", "try again", 1), 1),
        (OSError(28, "full"), 2),
    ],
)
def test_a_stopped_run_goes_on_where_it_stopped(make, whole, monkeypatch, after, error):
    run = make()
    with monkeypatch.context() as patched:
        stop = Stop(patched, after, error)
        with pytest.raises((KeyboardInterrupt, HookdepthError, OSError)) as caught:
            run.execute(SKIPS)
        assert caught.type is (error if isinstance(error, type) else type(error))
        assert [chunk for _, chunk in stop.ran] == list(range(after))
    assert len(chunks(run)) == after
    assert not list(run.out.glob("*.safetensors"))
    rest = Stop(monkeypatch)
    results = make().execute(SKIPS)
    assert [chunk for _, chunk in rest.ran] == list(range(after, 3)), "what was measured is not measured again"
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in SKIPS} == whole[SKIPS]
    assert not (run.out / UNITS).exists()
    undisturbed = make("other").execute(SKIPS)
    for one, other in zip(results, undisturbed, strict=True):
        for key in ("null_effect", "null_where"):
            assert one.metadata[key] == other.metadata[key]
        counted = [read_log(folder)[one.analysis]["passes"] for folder in (run.out, run.out.with_name("other"))]
        assert counted[0] == counted[1], "counted over all chunks, also those read back"


def test_a_finished_run_computes_nothing(make, monkeypatch):
    run = make()
    first = run.execute(NAMES)
    content = {path: path.read_bytes() for path in run.out.iterdir()}
    lines = []
    stop = Stop(monkeypatch, after=0)
    second = make(warn=lines.append).execute(NAMES)
    assert not stop.ran
    assert not lines
    assert {path: path.read_bytes() for path in run.out.iterdir()} == content
    assert [r.analysis for r in second] == [r.analysis for r in first]
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for a, b in zip(first, second, strict=True) for k in a.tensors)


# Analyses that share their passes.


@pytest.mark.parametrize("done", SKIPS)
def test_one_of_two_is_done_already(make, whole, monkeypatch, done):
    (other,) = set(SKIPS) - {done}
    run = make()
    run.execute([done])
    before = (run.out / f"{done}.safetensors").read_bytes()
    stop = Stop(monkeypatch)
    results = make().execute(SKIPS)
    assert stop.ran == [((other,), chunk) for chunk in range(3)]
    assert (run.out / f"{done}.safetensors").read_bytes() == before
    assert {result.analysis for result in results} == set(SKIPS)
    assert tensor_bytes(run.out / f"{other}.safetensors") == whole[other,][other]


@pytest.mark.parametrize(
    ("first", "then"), [(SKIPS, ("skip-future",)), (("skip-current",), SKIPS), (SKIPS[:1], SKIPS[1:])]
)
def test_stopped_with_some_analyses_and_continued_with_others(make, whole, monkeypatch, first, then):
    """Chunks of several analyses are not those of one: other tensors, from other passes."""
    run = make()
    with monkeypatch.context() as patched:
        Stop(patched, after=2)
        with pytest.raises(KeyboardInterrupt):
            run.execute(first)
    make().execute(then)
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in then} == whole[then]
    stop = Stop(monkeypatch)
    make().execute(first)
    assert len(stop.ran) <= 1, "what the first command measured was not thrown away"


def test_stopped_between_two_results_of_the_same_launches(make, whole, monkeypatch):
    run = make()
    with monkeypatch.context() as patched:
        save = Result.save

        def fail(result, path):
            if result.analysis == "skip-future":
                raise KeyboardInterrupt
            return save(result, path)

        patched.setattr(Result, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            run.execute(SKIPS)
    assert [path.name for path in run.out.glob("*.safetensors")] == ["skip-current.safetensors"]
    stop = Stop(monkeypatch)
    make().execute(SKIPS)
    assert not stop.ran, "all chunks were there"
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in SKIPS} == whole[SKIPS]
    assert not (run.out / UNITS).exists()


# Other settings.

CHANGES = {
    "keep_front": ({"settings": Settings(keep_front=2)}, "settings.keep_front = 1, this run has 2"),
    "max_rows": ({"settings": Settings(max_rows=9)}, "settings.max_rows = null, this run has 9"),
    "parts": ({"settings": Settings(parts=("mlp",))}, 'settings.parts = ["layer"], this run has ["mlp"]'),
    "seed": ({"seed": 124}, "seed = 123, this run has 124"),
    "prompts": ({"inputs": Inputs(PROMPTS[:2], CUTS[:2])}, "data.n_prompts = 3, this run has 2"),
    "model": ({"of": "other"}, "model.weights = "),
    "cuts": ({"inputs": Inputs(PROMPTS, ((64,), (128, 8), (24,)))}, "settings.cuts = [[64], [128, 8], [16]], this run"),
}


# What is compared is the same in a result and in the settings of chunks; where it lies is not.
@pytest.mark.parametrize(
    ("change", "stopped"), [*((change, False) for change in CHANGES), ("seed", True), ("model", True), ("cuts", True)]
)
def test_results_of_other_settings_are_refused(make, monkeypatch, change, stopped):
    different, says = CHANGES[change]
    if "of" in different:
        different = {"of": hookdepth.wrap(tiny_model("llama", seed=1), name="tiny")}
    run = make(settings=Settings())
    if stopped:
        with monkeypatch.context() as patched:
            Stop(patched, after=1)
            with pytest.raises(KeyboardInterrupt):
                run.execute(["skip-future"])
    else:
        run.execute(["skip-future"])
    content = {path: path.read_bytes() for path in run.out.rglob("*.safetensors")}
    stop = Stop(monkeypatch)
    with pytest.raises(HookdepthError) as caught:
        make(**{"settings": Settings(), **different}).execute(["skip-future"])
    message = str(caught.value)
    assert says in message
    assert message.endswith("give another --out folder, the same settings, or --overwrite")
    assert str(run.out / UNITS / "skip-future-settings.json" if stopped else next(iter(content))) in message
    assert caught.value.exit_status == 2
    assert not stop.ran
    assert {path: path.read_bytes() for path in run.out.rglob("*.safetensors")} == content
    make(**{"settings": Settings(), **different}, overwrite=True).execute(["skip-future"])
    assert {path.name for path in run.out.iterdir()} == {"skip-future.safetensors", LOG}
    assert (run.out / "skip-future.safetensors").read_bytes() not in content.values()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_same_weights_by_another_name_are_the_same_run(make, monkeypatch, stopped):
    if stopped:
        with monkeypatch.context() as patched:
            Stop(patched, after=1)
            with pytest.raises(KeyboardInterrupt):
                make(settings=Settings()).execute(["skip-future"])
    else:
        make(settings=Settings()).execute(["skip-future"])
    stop = Stop(monkeypatch)
    make(settings=Settings(), of=hookdepth.wrap(tiny_model("llama"), name="moved")).execute(["skip-future"])
    assert len(stop.ran) == (len(PROMPTS) - 1 if stopped else 0)


def test_settings_that_change_nothing_are_no_difference(make):
    make(settings=Settings()).execute(["logit-lens", "skip-current"])
    make(settings=Settings(max_rows=9)).execute(["logit-lens"])
    make(settings=Settings(), inputs=Inputs(PROMPTS, ((8,),) * 3)).execute(["skip-current"])
    make(settings=Settings(ig_steps=7)).execute(["skip-current"])
    make(settings=Settings(keep_front=1)).execute(["skip-current"])
    make(settings=Settings(keep_front=0)).execute(["logit-lens"])


def test_overwrite_leaves_other_analyses_alone(make):
    run = make(settings=Settings())
    run.execute(["logit-lens", "skip-current"])
    before = (run.out / "logit-lens.safetensors").read_bytes()
    make(settings=Settings(keep_front=2), overwrite=True).execute(["skip-current"])
    assert (run.out / "logit-lens.safetensors").read_bytes() == before


# Files that are not what they should be.


def stop(monkeypatch, run, names, after):
    with monkeypatch.context() as patched:
        Stop(patched, after=after)
        with pytest.raises(KeyboardInterrupt):
            run.execute(names)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)


def zero_a_page(path):
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def put_nan(path):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata=metadata)


SPOILT = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": flip,
    "a page of zeros": zero_a_page,
    "NaN": put_nan,
    "another chunk": lambda path: shutil.copy(path.with_name(path.name.replace("000001", "000000")), path),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_chunk_is_measured_again(make, whole, monkeypatch, how):
    run = make()
    stop(monkeypatch, run, SKIPS, after=2)
    path = run.out / UNITS / chunks(run)[1]
    SPOILT[how](path)
    lines = []
    rest = Stop(monkeypatch)
    make(warn=lines.append).execute(SKIPS)
    assert [chunk for _, chunk in rest.ran] == [1, 2]
    assert len(lines) == 1
    assert repr(str(path)) in lines[0]
    assert lines[0].endswith("; measured again")
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in SKIPS} == whole[SKIPS]
    assert not (run.out / UNITS).exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"skip-current": 3}', b"\xff\x00", b"[" * 200_000, None], ids=str
)
def test_spoilt_settings_of_chunks_cost_a_line(make, whole, monkeypatch, content):
    run = make()
    stop(monkeypatch, run, SKIPS, after=2)
    (path,) = (run.out / UNITS).glob("*settings.json")
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    lines = []
    rest = Stop(monkeypatch)
    make(warn=lines.append).execute(SKIPS)
    assert [chunk for _, chunk in rest.ran] == [2], "each chunk says for itself whose it is"
    assert lines == [f"{str(path)!r} is missing or damaged; written again"]
    assert {name: tensor_bytes(run.out / f"{name}.safetensors") for name in SKIPS} == whole[SKIPS]


@pytest.mark.parametrize("how", [name for name in SPOILT if name not in ("another chunk", "a folder")])
def test_a_spoilt_result_is_measured_again(make, whole, how):
    run, lines = make(), []
    run.execute(["skip-current"])
    path = run.out / "skip-current.safetensors"
    SPOILT[how](path)
    make(warn=lines.append).execute(["skip-current"])
    assert len(lines) == 1
    assert repr(str(path)) in lines[0]
    assert lines[0].endswith("; measured again")
    assert tensor_bytes(path) == whole["skip-current",]["skip-current"]


def test_another_result_under_this_name_is_refused(make):
    run = make()
    run.execute(["logit-lens", "residual-stats"])
    shutil.copy(run.out / "residual-stats.safetensors", run.out / "logit-lens.safetensors")
    lines = []
    with pytest.raises(HookdepthError, match="holds residual-stats; move it away, or use --overwrite"):
        make(warn=lines.append).execute(["logit-lens"])
    assert not lines


# Weights, threads and what else changes rounding.


def test_other_weights_are_another_run(make, monkeypatch):
    run = make()
    stop(monkeypatch, run, SKIPS, after=1)
    make("done").execute(SKIPS)
    hf = tiny_model("llama")
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight.view(-1)[77] *= -1
    for folder in ("out", "done"):
        with pytest.raises(HookdepthError, match=r"was computed with .*model\.weights = "):
            make(folder, of=hookdepth.wrap(hf, name="tiny")).execute(SKIPS)
    make(of=hookdepth.wrap(tiny_model("llama"), name="tiny")).execute(SKIPS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("done", [False, True])
def test_a_run_keeps_the_threads_that_it_was_begun_with(make, monkeypatch, threads, done):
    run, seen, plain = make(), [], Group.run

    def note(group, chunk, on_pass):
        seen.append(torch.get_num_threads())
        return plain(group, chunk, on_pass)

    threads(2)
    if done:
        run.execute(["skip-current"])
    else:
        stop(monkeypatch, run, ["skip-current"], after=2)
    threads(3)
    monkeypatch.setattr(Group, "run", note)
    (result,) = make().execute(["skip-current"])
    assert result.metadata["rounding"]["threads"] == 2
    assert seen == ([] if done else [2])
    assert torch.get_num_threads() == 3, "as it was before"
    make("other").execute(["skip-current"])
    assert seen[-3:] == [3, 3, 3]
    (again,) = make(overwrite=True).execute(["skip-current"])
    assert again.metadata["rounding"]["threads"] == 3


def test_a_setting_that_changes_rounding_is_a_difference(make):
    make().execute(["skip-current"])
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(HookdepthError, match=r"was computed with rounding\.mkldnn\.fp32_precision = "):
            make().execute(["skip-current"])
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_folder_that_could_not_be_read_back_from(make):
    with pytest.raises(HookdepthError, match="is not UTF-8"):
        make("out\udcff").execute(["skip-current"])


def test_a_folder_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HookdepthError, match="cannot write") as caught:
        make("file/out").execute(["logit-lens"])
    assert caught.value.exit_status == 1


# What is told.


def test_a_noise_floor_is_announced(make, monkeypatch):
    lines = []
    plain = Group.run

    def noisy(group, chunk, on_pass):
        found = plain(group, chunk, on_pass)
        return dataclasses.replace(found, null_effect=0.25 * chunk, null_where=f"layer {chunk}")

    monkeypatch.setattr(Group, "run", noisy)
    (result,) = make(warn=lines.append).execute(["skip-current"])
    assert (result.metadata["null_effect"], result.metadata["null_where"]) == (0.5, "layer 2")
    assert len(lines) == 1
    assert lines[0].startswith("skip-current: noise floor 0.5 (layer 2)")


def test_no_noise_is_not_announced(make):
    lines = []
    for result in make(warn=lines.append).execute(["skip-current", "logit-lens"]):
        assert not result.metadata.get("null_effect")
    assert not lines


def test_nothing_is_printed(make, capfd):
    make().execute(["skip-current", "logit-lens"])
    assert capfd.readouterr() == ("", "")


def test_a_run_that_measured_nothing_leaves_no_folder_of_its_own(tmp_path):
    model = hookdepth.wrap(tiny_model("llama"), tiny_tokenizer())
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (tmp_path / "new", mine):
        with pytest.raises(HookdepthError, match="too few for linear-maps"):
            hookdepth.analyse(model, "linear-maps", ["a b c"] * 3, out=out)
    assert list(tmp_path.iterdir()) == [mine], "a folder that was there stays"
