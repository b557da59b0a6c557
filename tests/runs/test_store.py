"""What a run keeps while it works: never half of anything, never another run's, whatever ends it."""

import errno
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import FORKS
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import results
from hookdepth.analyses import Inputs, Partial, Settings, find
from hookdepth.errors import HookdepthError
from hookdepth.results import LOG, Result
from hookdepth.runs import runner
from hookdepth.runs.runner import UNITS
from hookdepth.runs.store import LOCK, Chunks, forget, locked

NAMES = ("residual-stats", "logit-lens", "skip-current", "skip-future")
LENGTHS = (300, 310, 305, 40, 290)  # but for one too long to share a chunk
N_FILES = 3 * len(LENGTHS)


class Run(runner.Run):
    """A run of analyses by their names."""

    def execute(self, names):
        return super().execute([find(name) for name in names])


def make(out, **more):
    torch.set_num_threads(1)
    model = hookdepth.wrap(tiny_model("llama"), name="tiny")
    inputs = Inputs(tuple(tuple(ids) for ids in prompts(len(LENGTHS), LENGTHS)), ((64,), (128, 8), (16,), (8,), (8,)))
    return Run(model, inputs, Settings(), {"name": "some", "prompts_sha256": "0"}, 123, Path(out), **more)


def work(out):
    make(out).execute(NAMES)


def tensor_bytes(out):
    return {
        (path.name, name): value.numpy().tobytes()
        for path in sorted(Path(out).glob("*.safetensors"))
        for name, value in Result.load(path).tensors.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    work(out)
    return tensor_bytes(out)


def files(out):
    return [*out.glob("*.safetensors"), *(out / UNITS).glob("*.safetensors")]


def run_and_kill(out, dice, least):
    """Start a run in a process of its own and kill it once it has left `least` files, at any moment after."""
    process = FORKS.Process(target=work, args=(out,))
    process.start()
    while len(files(out)) < least and process.is_alive():
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.05))
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    return process.exitcode


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_at_random_and_resumed(tmp_path, whole):
    dice = random.Random(0)
    for least in sorted(dice.sample(range(1, N_FILES // 2), 2)):
        assert run_and_kill(tmp_path, dice, least) == -signal.SIGKILL
        there = files(tmp_path)
        assert there
        for path in there:
            assert Result.load(path).tensors, "a file that has its name is whole"
    work(tmp_path)
    assert tensor_bytes(tmp_path) == whole
    assert all(path.suffix == ".safetensors" or path.name == LOG for path in tmp_path.iterdir()), (
        "nor does a killed write stay"
    )


def test_what_a_killed_write_leaves_is_swept(tmp_path, whole):
    (tmp_path / UNITS).mkdir()
    for folder in (tmp_path, tmp_path / UNITS):
        (folder / ".skip-current.safetensors.abc.tmp").write_bytes(b"half of")
    work(tmp_path)
    assert tensor_bytes(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LOG, *(f"{name}.safetensors" for name in NAMES)])


# No room.


def work_with_little_room(out, answers):
    import resource

    reduce = Run._reduce

    def with_little_room(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return reduce(*arguments)

    Run._reduce = with_little_room
    try:
        work(out)
    except HookdepthError as error:
        answers.put((str(error), error.exit_status))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_file_that_the_system_refuses(tmp_path, whole):
    """A real refusal by the kernel, in the middle of a write."""
    answers = FORKS.Queue()
    process = FORKS.Process(target=work_with_little_room, args=(tmp_path, answers))
    process.start()
    message, status = answers.get(timeout=120)
    process.join(30)
    path = tmp_path / "residual-stats.safetensors"
    assert message == f"cannot write {str(path)!r} (File too large); free some space, then run again"
    assert status == 1
    assert len(files(tmp_path)) == len(LENGTHS), "its chunks"
    assert not list(tmp_path.rglob("*.tmp"))
    work(tmp_path)
    assert tensor_bytes(tmp_path) == whole


@pytest.mark.parametrize(
    ("code", "written"), [(errno.ENOSPC, 0), (errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.ENOSPC, 8)]
)
def test_a_full_disk(tmp_path, whole, monkeypatch, code, written):
    flush, room = os.fsync, [written]

    def fsync(handle):
        if not room[0]:
            raise OSError(code, os.strerror(code))
        room[0] -= 1
        flush(handle)

    with monkeypatch.context() as patched:
        patched.setattr(results.os, "fsync", fsync)
        with pytest.raises(HookdepthError, match="free some space, then run again") as caught:
            work(tmp_path)
    assert caught.value.exit_status == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(Result.load(path).tensors for path in files(tmp_path))
    work(tmp_path)
    assert tensor_bytes(tmp_path) == whole


# One run a folder.


def hold(folder, held, release):
    with locked(Path(folder)):
        held.set()
        release.wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    held, release = FORKS.Event(), FORKS.Event()
    process = FORKS.Process(target=hold, args=(tmp_path / UNITS, held, release))
    process.start()
    assert held.wait(60)
    with pytest.raises(HookdepthError, match="another run is at work in") as caught:
        work(tmp_path)
    assert str(tmp_path) in str(caught.value)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    make(tmp_path).execute(["residual-stats"])  # the lock went with it


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HookdepthError, match="cannot write the folder") as caught, locked(tmp_path / "file" / "out"):
        pass
    assert caught.value.exit_status == 1


# Whose they are.


def chunks_of(folder, analyses=("a", "b"), setting=1, **more):
    identity = {"settings": {"x": setting, "list": list(range(setting, setting + 20))}}
    return Chunks(folder, analyses, dict.fromkeys(analyses, identity), **more)


PARTIAL = Partial({"value": torch.arange(3.0)}, 2, 0.5, "layer 1")


def test_units_come_back_as_they_were(tmp_path):
    chunks = chunks_of(tmp_path)
    chunks.claim()
    assert (chunks.count(), chunks.passes(0)) == (0, None)
    chunks.save(0, PARTIAL, 1.5)
    assert (chunks.count(), chunks.passes(0)) == (1, 2)
    partial, how = chunks_of(tmp_path).load(0)
    assert torch.equal(partial.tensors["value"], PARTIAL.tensors["value"])
    assert (partial.passes, partial.null_effect, partial.null_where, how["seconds"]) == (2, 0.5, "layer 1", 1.5)
    chunks.clear()
    assert not list(tmp_path.iterdir())


def test_units_of_other_settings_are_refused(tmp_path):
    chunks_of(tmp_path).claim()
    chunks_of(tmp_path, setting=2).claim()  # nothing was measured yet
    chunks_of(tmp_path, setting=2).save(0, PARTIAL, 0.0)
    with pytest.raises(HookdepthError, match=r"a\.settings\.x = 2, this run has 1; give another --out folder"):
        chunks_of(tmp_path).claim()
    with pytest.raises(HookdepthError, match="is of a run with other settings"):
        chunks_of(tmp_path).passes(0)
    with pytest.raises(HookdepthError, match="is of a run with other settings"):
        chunks_of(tmp_path).load(0)


def test_a_difference_deep_in_a_long_list_can_be_told(tmp_path):
    same, other = {"cuts": [[8]] * 1000}, {"cuts": [[8]] * 999 + [[16]]}
    chunks = Chunks(tmp_path, ("a",), {"a": same})
    chunks.claim()
    chunks.save(0, PARTIAL, 0.0)
    with pytest.raises(HookdepthError, match=r"a\.cuts\[999\] = \[8\], this run has \[16\]"):
        Chunks(tmp_path, ("a",), {"a": other}).claim()


def test_what_is_kept_once_does_not_grow_with_every_unit(tmp_path):
    chunks = Chunks(tmp_path, ("a",), {"a": {"lengths": list(range(5000))}})
    chunks.claim()
    chunks.save(0, PARTIAL, 0.0)
    assert chunks.path(0).stat().st_size < 1000


def test_forgetting_takes_only_what_is_named(tmp_path):
    for analyses in (("a",), ("a", "b"), ("c",), ("a-c",)):
        chunks_of(tmp_path, analyses).claim()
        chunks_of(tmp_path, analyses).save(0, PARTIAL, 0.0)
    (tmp_path / LOCK).touch()
    forget(tmp_path, ["a"])
    assert {path.name.partition("-0")[0].partition("-settings")[0] for path in tmp_path.iterdir()} == {"c", "a-c", LOCK}
    assert json.loads((tmp_path / "c-settings.json").read_text())["c"]["settings"]["x"] == 1


# Two hundred prompts.


def test_memory_does_not_grow_with_the_prompts(tmp_path, monkeypatch):
    model = hookdepth.wrap(tiny_model("llama", num_hidden_layers=2), name="tiny")
    inputs = Inputs(tuple(tuple(ids) for ids in prompts(200, (6, 9, 4))), ((),) * 200)
    run = Run(model, inputs, Settings(), {"name": "some", "prompts_sha256": "0"}, 123, tmp_path)
    monkeypatch.setattr(results.os, "fsync", lambda handle: None)
    alive, save = [], Chunks.save

    def count(chunks, chunk, partial, seconds):
        save(chunks, chunk, partial, seconds)
        if chunk in (20, 180):
            gc.collect()
            alive.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))

    monkeypatch.setattr(Chunks, "save", count)
    run.execute(["residual-stats"])
    assert len(alive) == 2
    assert alive[1] <= alive[0] + 20, "a chunk's tensors go with it"


def test_a_unit_that_vanished_is_missed_at_once_or_awaited(tmp_path, monkeypatch):
    alone = Chunks(tmp_path, ["logit-lens"], {"logit-lens": {}})
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("nobody else could bring it"))
        with pytest.raises(HookdepthError, match="which was measured, is not there; give --out"):
            alone.load(0)
    chunks = Chunks(tmp_path, ["logit-lens"], {"logit-lens": {}}, patience=60)
    late = threading.Timer(0.1, lambda: chunks.save(0, Partial({"kl": torch.ones(2)}, 1), 1.5))
    late.start()
    partial, how = chunks.load(0)
    late.join()
    assert (partial.tensors["kl"].tolist(), partial.passes, how["seconds"]) == ([1.0, 1.0], 1, 1.5)
