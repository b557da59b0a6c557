"""Analyses beside the notebook's (test_runner.py) go on where they were stopped, and end with the same bytes."""

import json

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import known
from hookdepth.results import read_log
from hookdepth.runs import sharing

AT_ONCE = {"linear-maps", "lenses"}
"""Sums over all prompts, which take more room than the results: they begin again."""
NAMES = [name for name, kind in known().items() if not kind.in_all and name not in AT_ONCE]


@pytest.fixture
def texts(tmp_path):
    rows = [{"prompt": f"Anna has {n} apples. She has", "answer": f" {n}", "level": n % 2} for n in range(4)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*noise floor:UserWarning")
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(name, texts, tmp_path, monkeypatch):
    model = hookdepth.wrap(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(sharing, "_consecutive", lambda lengths, rows: [range(n, n + 1) for n in range(len(lengths))])
    plain = sharing.Group.run

    def run(out, most=10**6):
        ran = []

        def counted(self, chunk, on_pass):
            if len(ran) >= most:
                raise KeyboardInterrupt
            ran.append(chunk)
            return plain(self, chunk, on_pass)

        monkeypatch.setattr(sharing.Group, "run", counted)
        try:
            hookdepth.analyse(model, name, dataset=str(texts), limit=2, out=tmp_path / out)
        except KeyboardInterrupt:
            assert len(ran) == most
        return ran

    every = run("whole")
    assert len(every) > 1
    assert run("out", most=1) == every[:1]
    assert not (tmp_path / "out" / f"{name}.safetensors").exists()
    assert run("out") == every[1:], "what was measured is not measured again"
    one, other = (tmp_path / out / f"{name}.safetensors" for out in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert read_log(one.parent)[name]["passes"] == read_log(other.parent)[name]["passes"]
