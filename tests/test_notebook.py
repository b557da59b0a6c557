"""`scripts/notebook.py`: the whole notebook, in few lines."""

import runpy
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "notebook.py"
PNG = b"\x89PNG"


def test_it_is_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.filterwarnings("ignore:.*noise floor:UserWarning")
def test_it_draws_every_figure_of_the_notebook(tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "model", tmp_path / "figures"
    # A tiny vocabulary needs many tokens for the demo data set.
    tiny_model("llama", num_hidden_layers=2, max_position_embeddings=4096).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), str(model)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    figures = sorted(path.name for path in out.glob("*.png"))
    # 2a, 2b, two each of 3a, 3b and 4, 6a, 6b.
    assert [name[:2] for name in figures] == ["2a", "2b", "3a", "3a", "3b", "3b", "4a", "4b", "6a", "6b"]
    assert all((out / name).read_bytes().startswith(PNG) for name in figures)
