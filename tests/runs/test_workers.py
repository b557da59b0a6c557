"""Several processes at one run: each chunk goes to one of them, and none waits for the dead."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import forks
import pytest
import torch
from forks import FORKS
from tiny_models import tiny_model
from tiny_tokenizer import CORPUS, tiny_tokenizer

from hookdepth.cli import main
from hookdepth.errors import HookdepthError
from hookdepth.model.loading import own_gpu
from hookdepth.results import read_log
from hookdepth.runs import workers as processes
from hookdepth.runs.contract import load_folder
from hookdepth.runs.workers import Workers, joined


def test_a_team_of_one_needs_nobody():
    workers = Workers()
    assert workers.first
    assert list(workers.claims("a", 3)) == [0, 1, 2]
    assert list(workers.claims("b", 2)) == [0, 1]
    assert (workers.count("c"), workers.count("c", 4)) == (1, 5)
    assert workers.together(lambda: "here") == workers.of_first(lambda: "here") == "here"
    workers.wait()


def test_without_a_launcher_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as workers:
        assert (workers.rank, workers.size) == (0, 1)


def test_a_launcher_that_says_too_little(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(HookdepthError, match="the processes of this run do not find each other"), joined():
        pass


@pytest.mark.parametrize("value", ["abc", "-1", "0", "1.5", "²", "9" * 30, " 2 x"])
def test_a_launcher_that_makes_no_sense(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(HookdepthError, match=f"in the environment, WORLD_SIZE='{value}'; a launcher sets it"), joined():
        pass


@pytest.mark.parametrize(("name", "value"), [("RANK", "abc"), ("MASTER_PORT", "abc"), ("RANK", "-3")])
def test_a_launcher_that_numbers_badly(monkeypatch, name, value):
    known = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, own in {**known, name: value}.items():
        monkeypatch.setenv(key, own)
    monkeypatch.setattr(processes, "_START", timedelta(seconds=1))
    with pytest.raises(HookdepthError, match="the processes of this run do not find each other"), joined():
        pass


@pytest.mark.parametrize(
    ("size", "rank", "says"),
    [
        ("x", "0", "LOCAL_WORLD_SIZE='x'"),
        ("2", "y", "LOCAL_RANK='y'"),
        ("2", "2", "'2'"),
        ("2", None, "LOCAL_RANK is not set"),
    ],
)
def test_places_on_this_machine_that_make_no_sense(monkeypatch, size, rank, says):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(HookdepthError, match=says):
        own_gpu()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def member(rank, size, port, work, answers):
    here = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in here.items()})
    try:
        with joined() as workers:
            answers.put((rank, work(workers)))
    except HookdepthError as error:
        answers.put((rank, (str(error), error.told)))


def team_of(size, work):
    """What each process of a workers made of `work`, by rank; a process that dies gives nothing."""
    port, answers = free_port(), FORKS.Queue()
    members = [FORKS.Process(target=member, args=(rank, size, port, work, answers)) for rank in range(size)]
    for one in members:
        one.start()
    for one in members:
        one.join(60)
        assert one.exitcode is not None, "it hangs"
    dead = sum(one.exitcode != 0 for one in members)
    return dict(answers.get(timeout=10) for _ in range(size - dead))


def claim_all(workers):
    taken = []
    for chunk in workers.claims("chunks", 40):
        taken.append(chunk)
        time.sleep(0.002)
    workers.wait()
    again = list(workers.claims("others", 3))
    return taken, again, workers.count("done", 2)


def test_each_unit_goes_to_one_process():
    found = team_of(3, claim_all)
    assert sorted(chunk for taken, _, _ in found.values() for chunk in taken) == list(range(40))
    assert sum(bool(taken) for taken, _, _ in found.values()) > 1, "more than one of them works"
    assert sorted(chunk for _, again, _ in found.values() for chunk in again) == [0, 1, 2]
    assert max(count for _, _, count in found.values()) == 6
    assert all(taken == sorted(taken) for taken, _, _ in found.values())


def hear_the_first(workers):
    return workers.of_first(lambda: {"from": workers.rank})


def test_all_hear_the_first():
    assert team_of(2, hear_the_first) == {0: {"from": 0}, 1: {"from": 0}}


def fail_on_the_last(workers):
    def load():
        if workers.rank == workers.size - 1:
            raise HookdepthError("no room", "make some", 1)
        return "loaded"

    return workers.together(load)


def test_what_fails_for_one_fails_for_all_and_is_said_once():
    says = "process 1 of 2: no room; make some"
    assert team_of(2, fail_on_the_last) == {0: (says, False), 1: (says, True)}


def die_alone(workers):
    if workers.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    workers.wait()


def test_nobody_waits_for_the_dead():
    begin = time.monotonic()
    ((text, told),) = team_of(2, die_alone).values()
    assert time.monotonic() - begin < 50, "far from any timeout"
    assert "process 0 of 2: another process of this run has ended" in text
    assert not told


@pytest.mark.parametrize(("here", "gpus", "expected"), [("1", 0, None), ("2", 2, 1), ("2", 1, "2 processes on this")])
def test_each_process_has_its_gpu(monkeypatch, here, gpus, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(expected, str):
        with pytest.raises(HookdepthError, match=expected):
            own_gpu()
    else:
        assert own_gpu() == expected


# The command under a launcher, as a user gives it.


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(text.splitlines()[0] * 6 for text in CORPUS * 2))
    names = "skip-current,skip-future,residual-erasure"
    common = ["run", "--model", str(folder / "model"), "--dataset", str(folder / "prompts.txt"), "--analyses", names]
    return [*common, "--probe", "Anna has 12 apples", " and eats 3", "--probe", "Imagine all", " the people"]


def wait_for_a_chunk(out, processes):
    deadline = time.monotonic() + 120
    while not list(out.glob(".chunks/*.safetensors")):
        assert all(one.is_alive() for one in processes), "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CPU processes of a launcher")
def test_two_processes_one_of_which_dies(command, tmp_path, capfd, monkeypatch):
    """The other ends promptly; a launcher starts two that go on, and their files are those of one process alone."""
    out, port, team = tmp_path / "workers", str(free_port()), []
    for rank in "01":
        (tmp_path / rank).mkdir()
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        team.append(forks.command([*command, "--out", out], tmp_path / rank, **place))
    wait_for_a_chunk(out, team)
    team[1].kill()
    team[0].join(60)
    assert team[0].exitcode == 1, "promptly"
    assert "another process of this run has ended" in (tmp_path / "0" / "stderr").read_text()
    kept = {path.name: path.read_bytes() for path in out.glob(".chunks/*.safetensors")}
    assert kept
    assert not list(out.glob("*.html"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "hookdepth"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command, "--out", out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("report: ") == 1, "one of the two talks"
    assert not (out / ".chunks").exists()
    monkeypatch.setattr("hookdepth.runs.reporting.report", lambda folder: Path(folder) / "report.html")
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    alone, workers = load_folder(tmp_path / "alone"), load_folder(out)
    assert set(workers) == set(alone)
    for name in alone:
        assert (out / f"{name}.safetensors").read_bytes() == (tmp_path / "alone" / f"{name}.safetensors").read_bytes()
        logs = [read_log(folder)[name] for folder in (out, tmp_path / "alone")]
        assert logs[0]["passes"] == logs[1]["passes"]
        assert [log["processes"] for log in logs] == [2, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("times", "pause"), [(1, 0.0), (2, 0.02), (5, 0.0), (5, 0.02)])
def test_interrupted_once_or_in_a_fury(command, tmp_path, times, pause):
    """However often and whenever Ctrl-C is pressed: one line, status 130, and the same command goes on."""
    out = tmp_path / "out"
    process = forks.command([*command, "--out", out], tmp_path)
    wait_for_a_chunk(out, [process])
    for _ in range(times):
        with suppress(ProcessLookupError):  # it may have ended
            os.kill(process.pid, signal.SIGINT)
        time.sleep(pause)
    status, out, complained = forks.said(process, tmp_path)
    assert status == 130, complained
    assert out == ""
    assert complained.strip().splitlines()[-1] == "hookdepth: interrupted; the same command goes on where it stopped"
    assert complained.count("interrupted") == 1
    assert "Traceback" not in complained
