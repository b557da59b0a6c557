"""Result files: what is written is what is read, and nobody ever meets half of one."""

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hookdepth import results
from hookdepth.errors import HookdepthError
from hookdepth.results import Result, read_metadata, write_atomic, write_json
from hookdepth.runs.contract import load_folder
from hookdepth.training.history import load_history


def example(**metadata):
    return Result("logit-lens", {"kl": torch.arange(6.0), "deep": torch.randn(2, 3, 4)}, {"seed": 123, **metadata})


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3), max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(shapes=TENSORS, metadata=st.dictionaries(st.text(max_size=8), JSON, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path, shapes, metadata, seed):
    metadata = {key: value for key, value in metadata.items() if key not in ("schema", "analysis", "digest")}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = Result("skip-current", tensors, metadata).save(tmp_path / "skip-current.safetensors")
    back = Result.load(path)
    assert back.analysis == "skip-current"
    assert set(back.tensors) == set(tensors)
    assert all(torch.equal(back.tensors[name], tensors[name]) for name in tensors)
    assert {
        key: value for key, value in back.metadata.items() if key not in ("schema", "analysis", "digest")
    } == metadata
    assert back.metadata == read_metadata(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file stays"


def test_tensors_are_stored_as_contiguous_float32(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "bfloat16": base.bfloat16(),
        "float64": base.double(),
        "integer": torch.arange(3),
        "transposed": base.T,
        "row": base[1],
        "same": base,
        "gradient": torch.ones(2, requires_grad=True),
    }
    stored = load_file(Result("x", tensors).save(tmp_path / "x.safetensors"))
    assert all(value.dtype == torch.float32 for value in stored.values())
    for name, value in tensors.items():
        assert torch.equal(stored[name], value.detach().float()), name
    assert tensors["bfloat16"].dtype == torch.bfloat16, "what was given is left as it was"


def test_the_same_result_is_the_same_bytes(tmp_path):
    one = Result("x", {"a": torch.ones(2), "b": torch.zeros(3)}, {"p": 1, "q": 2})
    other = Result("x", {"b": torch.zeros(3), "a": torch.ones(2)}, {"q": 2, "p": 1})
    assert one.save(tmp_path / "one").read_bytes() == other.save(tmp_path / "other").read_bytes()


def test_metadata_is_readable_without_tensors(tmp_path):
    path = example(model={"id": "tiny"}).save(tmp_path / "deep" / "er" / "logit-lens.safetensors")
    metadata = read_metadata(path)
    assert (metadata["schema"], metadata["analysis"], metadata["seed"]) == (2, "logit-lens", 123)
    assert metadata["model"] == {"id": "tiny"}


def test_a_result_is_as_readable_as_any_file(tmp_path):
    (tmp_path / "other").write_text("")
    path = example().save(tmp_path / "logit-lens.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("step", ["fdopen", "fsync", "replace", "chmod"])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.*give a folder you can write to"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step, error, says):
    path = example().save(tmp_path / "logit-lens.safetensors")
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(results.os, step, fail)
        if says is None:
            with pytest.raises(KeyboardInterrupt):
                example(seed=7).save(path)
        else:
            with pytest.raises(HookdepthError, match=says) as caught:
                example(seed=7).save(path)
            assert caught.value.exit_status == 1
            assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_the_file_appears_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "x"
    seen = []
    monkeypatch.setattr(results.os, "fsync", lambda _: seen.append(("fsync", path.exists())))
    replace = os.replace

    def note(source, target):
        seen.append(("replace", path.exists(), Path(source).read_bytes(), Path(source).parent == path.parent))
        replace(source, target)

    monkeypatch.setattr(results.os, "replace", note)
    write_atomic(path, b"content")
    assert seen == [("fsync", False), ("replace", False, b"content", True)]
    assert path.read_bytes() == b"content"


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(HookdepthError, match="cannot write") as caught:
        example().save(tmp_path / "out" / "logit-lens.safetensors")
    assert caught.value.exit_status == 1


def foreign(path, metadata):
    save_file({"a": torch.ones(2)}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "no result file"),
        (lambda path: (path.unlink(), path.mkdir()), "no result file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\x00" * 100), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\x00"), "not a readable safetensors file"),
        (lambda path: foreign(path, None), "not one of hookdepth's"),
        (lambda path: foreign(path, {"format": "pt"}), "not one of hookdepth's"),
        (lambda path: foreign(path, {"hookdepth": "{"}), "is not JSON"),
        (lambda path: foreign(path, {"hookdepth": "[1]"}), "names no analysis"),
        (lambda path: foreign(path, {"hookdepth": '{"schema": 2}'}), "names no analysis"),
        (lambda path: foreign(path, {"hookdepth": '{"schema": 2, "analysis": 3}'}), "names no analysis"),
        (lambda path: foreign(path, {"hookdepth": '{"schema": 99, "analysis": "x"}'}), "has schema 99.*reads 2"),
        (lambda path: foreign(path, {"hookdepth": '{"analysis": "x"}'}), "has schema None"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, spoil, says):
    path = example().save(tmp_path / "logit-lens.safetensors")
    spoil(path)
    for read in (Result.load, read_metadata):
        with pytest.raises(HookdepthError, match=says) as caught:
            read(path)
        assert caught.value.exit_status == 2
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [3, None, [], b"x"])
def test_what_is_no_name_of_a_file_is_refused(name):
    calls = (example().save, Result.load, read_metadata, load_folder, load_history)
    for call in calls:
        with pytest.raises(HookdepthError, match="no name of a file or a folder; give a text or a Path"):
            call(name)


@given(content=st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused(tmp_path, content):
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(HookdepthError):
        Result.load(path)


@given(where=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_refused_or_read(tmp_path, where, value):
    path = Result("x", {"a": torch.ones(3)}, {"seed": 1}).save(tmp_path / "x.safetensors")
    content = bytearray(path.read_bytes())
    content[where % len(content)] = value
    path.write_bytes(content)
    with suppress(HookdepthError):
        Result.load(path)


def test_load_folder(tmp_path):
    with pytest.raises(HookdepthError, match="no folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(HookdepthError, match="no result files"):
        load_folder(tmp_path)
    lens = {"kl": torch.zeros(4), "topk_overlap": torch.ones(4)}
    Result("logit-lens", lens).save(tmp_path / "logit-lens.safetensors")
    Result("skip-current", {"layer.effect": torch.eye(3)}).save(tmp_path / "skip-current.safetensors")
    (tmp_path / "report.html").write_text("")
    (tmp_path / ".skip-current.safetensors.abc.tmp").write_bytes(b"half of one")
    loaded = load_folder(tmp_path)
    assert set(loaded) == {"logit-lens", "skip-current"}
    assert torch.equal(loaded["skip-current"].tensors["layer.effect"], torch.eye(3))
    (tmp_path / "other.safetensors").write_bytes(b"garbage")
    with pytest.raises(HookdepthError, match=r"other\.safetensors"):
        load_folder(tmp_path)


def test_write_json(tmp_path):
    path = write_json(tmp_path / "summary.json", {"b": [1, None], "a": 0.5})
    assert json.loads(path.read_text()) == {"b": [1, None], "a": 0.5}
    assert list(json.loads(path.read_text())) == ["b", "a"]
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == 0.5, "the old file stays"
