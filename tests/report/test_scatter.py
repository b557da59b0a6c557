"""Effective depth over models: what is drawn, its regression lines, and what is refused."""

import numpy as np
import pytest
from synthetic_results import write_folder

from hookdepth.cli import main
from hookdepth.report.scatter import Points, scatter_pictures


def summary(n_layers, n_parameters, **indices):
    depths = {
        name: {
            "index": index,
            "ratio": None if index is None else (index + 1) / n_layers,
            "status": "none" if index is None else "found",
            "label": name,
        }
        for name, index in indices.items()
    }
    return {"model": {"n_layers": n_layers, "n_parameters": n_parameters}, "effective_depth": depths}


MODELS = {
    "small": summary(12, 10**8, kl=7, cosine=5),
    "middle": summary(24, 10**9, kl=13, cosine=None),
    "large": summary(48, 10**10, kl=25, cosine=23),
}


def test_lines_are_least_squares():
    x, y = [12.0, 24.0, 48.0, 60.0], [8.0, 14.0, 26.0, 20.0]
    for log in (False, True):
        places = np.log10(x) if log else np.array(x)
        slope, offset = np.polyfit(places, y, 1)
        r2 = np.corrcoef(places, y)[0, 1] ** 2
        assert Points("", ["a"] * 4, x, y).line(log) == pytest.approx((slope, offset, r2))
    assert Points("", ["a", "b"], [3.0, 3.0], [1.0, 2.0]).line() is None


def test_layers_over_layers_and_ratio_over_parameters():
    depth, ratio = scatter_pictures(MODELS)
    axes = depth.draw().axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Layers", "Effective depth (layers)")
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_marker() != "None"}
    assert points == {"kl": [[12, 8], [24, 14], [48, 26]], "cosine": [[12, 6], [48, 24]]}
    assert "kl: 3 runs, slope 0.5 over layers, R² 1.00" in depth.said
    axes = ratio.draw().axes[0]
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([8 / 12, 14 / 24, 26 / 48])
    assert depth.values[0].rows[0] == "small, kl"


def test_names_at_one_place_are_beside_each_other_and_axes_count_layers():
    models = {**MODELS, "other": summary(24, 10**9, kl=9)}
    axes = scatter_pictures(models)[0].draw().axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["large", "middle, other", "small"]
    for axis in (axes.xaxis, axes.yaxis):
        assert all(place == round(place) for place in axis.get_majorticklocs())


def by_level(**scores):
    return {**summary(12, 10**8), "analyses": {"depth-by-level": {"numbers": {"score_by_level": scores}}}}


def test_a_line_a_run_over_difficulty():
    runs = {"easy": by_level(**{"1": 0.5, "2": 0.6, "4": 0.8}), "hard": by_level(**{"1": 0.4, "3": 0.4})}
    (picture,) = scatter_pictures(runs)
    axes = picture.draw().axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Level", "Depth score / layers")
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_marker() != "None"}
    assert points == {"easy": [[1, 0.5], [2, 0.6], [4, 0.8]], "hard": [[1, 0.4], [3, 0.4]]}
    assert "easy: 3 levels, slope 0.1 over level, R² 1.00" in picture.said
    assert not axes.texts
    # Levels that are words lie nowhere on an axis; beside effective depths it is one picture more.
    assert len(scatter_pictures({**MODELS, "words": by_level(first=0.3, second=0.4), "easy": runs["easy"]})) == 2
    assert len(scatter_pictures({**MODELS, **runs})) == 3


def test_the_page_has_it_where_it_is_asked_for(tmp_path):
    names = ["logit-lens"]  # the figures of all others are test_page.py's
    folders = [str(write_folder(tmp_path / f"deep-{n}", names, n_layers=n, model=f"some/model-{n}")) for n in (6, 12)]
    out = tmp_path / "both"
    assert main(["compare", *folders, "--out", str(out)]) == 0
    assert not list(out.glob("*effective*"))
    assert main(["compare", *folders, "--out", str(out), "--scatter"]) == 0
    assert (out / "compare-effective-depth.png").is_file()
    assert "Effective depth over models" in (out / "compare.html").read_text(encoding="utf-8")


def test_one_model_is_no_scatter(tmp_path, capsys):
    folder = str(write_folder(tmp_path / "one", n_layers=6, n_tokens=5))
    assert main(["compare", folder, "--out", str(tmp_path / "out"), "--scatter"]) == 2
    assert "a scatter takes two or more" in capsys.readouterr().err
