"""`hookdepth info` as text."""

import pytest
import torch
from synthetic_results import write_folder

from hookdepth.errors import HookdepthError
from hookdepth.report.tables import describe, flatten, shorten, statistics
from hookdepth.results import Result


def test_a_file_shows_metadata_and_tensors(tmp_path):
    values = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
    meta = {"model": {"id": "demo", "revision": None}, "data": {"lengths": list(range(200))}}
    path = Result("logit-lens", {"kl": values}, meta).save(tmp_path / "logit-lens.safetensors")
    lines = describe(path).splitlines()
    assert lines[0] == str(path)
    rows = {line.split()[0]: line.split() for line in lines[1:] if line.strip()}
    assert rows["model.id"] == ["model.id", "demo"]
    assert rows["model.revision"] == ["model.revision", "null"]
    assert rows["kl"] == ["kl", "[2,", "2]", "0", "1", "2", "1"]
    assert rows["data.lengths"][-1] == "(200)"
    assert max(map(len, lines)) < 140


def test_a_folder_shows_every_result(tmp_path):
    text = describe(write_folder(tmp_path, n_layers=2, n_tokens=3))
    for name in ("skip-current", "integrated-gradients", "residual-stats"):
        assert f"{name}.safetensors" in text
    assert text.count("non-finite") == 8


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(HookdepthError, match="no result files"):
        describe(tmp_path)
    with pytest.raises(HookdepthError, match="no result file"):
        describe(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(HookdepthError, match="not a readable safetensors file"):
        describe(tmp_path)


def test_statistics_of_nothing_and_of_nothing_finite():
    assert statistics(torch.zeros(0)) == ("—", "—", "—", "0")
    assert statistics(torch.tensor([float("inf")])) == ("—", "—", "—", "1")
    assert statistics(torch.tensor(0.25)) == ("0.25", "0.25", "0.25", "0")


def test_values_stay_on_one_line():
    assert shorten("a\nb\x1b[31m") == '"a\\nb\\u001b[31m"'
    assert shorten("日本") == "日本"
    assert shorten(["日本", 1]) == '["日本", 1] (2)'
    assert len(shorten("x" * 500, 20)) == 20
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "d": [1]}
