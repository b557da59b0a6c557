"""What is said on hover lies where it is drawn, and the tables say what the figures show."""

import pytest
import torch
from synthetic_results import EVERY_KIND, some_results, synthetic_results

from hookdepth.analyses.registry import declared as lookup
from hookdepth.report.drawing import style
from hookdepth.report.drawing.style import render
from hookdepth.report.figures import compared, pictures_of
from hookdepth.report.hover import MOST_CELLS, effect_map, overlays

RESULTS = synthetic_results(n_layers=6, n_tokens=9, parts=("layer", "attn"))
PICTURES = {
    picture.name: picture
    for result in RESULTS.values()
    for _, pictures in pictures_of(result, lookup(result))
    for picture in pictures
}
# Figures of another part, probe or skip are drawn and pointed at in the same way.
DRAWN = [name for name in PICTURES if name.startswith(EVERY_KIND) and "attn" not in name and not name.endswith("-1")]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """What is drawn here is not looked at."""
    monkeypatch.setitem(style._STYLE, "savefig.dpi", 30)


def compared_pictures(runs):
    return {
        picture.name: picture for _, kinds in compared(runs, lookup) for _, pictures in kinds for picture in pictures
    }


def layers_of(figure, values):
    """For each overlaid axes: its place (left, top, width, height in shares of the picture), view and cells."""
    for over in overlays(figure, values):
        shares = {key: float(value[:-1]) / 100 for key, value in (item.split(":") for item in over.place.split(";"))}
        cells = [(*map(float, path[1:].removesuffix("h1v1h-1z").split()), text) for path, text in over.cells]
        yield shares, [float(x) for x in over.view.split()], cells


def on_picture(share, view, x, y):
    """Where the middle of a cell lies in the picture, as shares from its left and top."""
    across = share["left"] + share["width"] * (x + 0.5 - view[0]) / view[2]
    down = share["top"] + share["height"] * (y + 0.5 - view[1]) / view[3]
    return across, down


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_has_its_values(name):
    figure, values = PICTURES[name].draw(), PICTURES[name].values
    render(figure, "png")
    width, height = figure.get_size_inches() * figure.dpi
    overlaid = list(layers_of(figure, values))
    assert len(overlaid) == len(values)
    for axes, shown, (share, view, cells) in zip(figure.axes, values, overlaid, strict=False):
        rows, columns = shown.matrix.shape
        assert len(cells) == (rows * (columns - shown.hidden) if shown.is_map else rows)
        for number, (x, y, text) in enumerate(cells):
            across, down = on_picture(share, view, x, y)
            if shown.is_map:
                row, column = divmod(number, columns - shown.hidden)
                there = axes.transData.transform((column, row))
                assert text == f"{row}, {shown.columns[column]}: {shown.matrix[row, column]:.3g}"
                assert across == pytest.approx(there[0] / width, abs=2e-3)
                assert down == pytest.approx(1 - there[1] / height, abs=2e-3)
            elif axes.get_xscale() == "log":
                assert down == pytest.approx(1 - axes.transData.transform((1, number))[1] / height, abs=2e-3)
            else:
                there = axes.transData.transform((number, axes.get_ylim()[0]))
                assert across == pytest.approx(there[0] / width, abs=2e-3)
                assert text.startswith(f"{shown.corner} {number}: ")


def test_tables_hold_every_number():
    for picture in PICTURES.values():
        for shown in picture.values:
            finite = shown.matrix[torch.isfinite(shown.matrix)]
            cells = {cell for row in shown.table.rows for cell in row[1:]}
            assert {f"{value:.4g}" for value in finite.tolist()} <= cells


def test_a_large_map_has_a_table_only():
    n_layers = int(MOST_CELLS**0.5) + 1
    result = synthetic_results(n_layers=n_layers)["local-current"]
    ((_, (picture,)),) = pictures_of(result, lookup(result))
    assert overlays(picture.draw(), [effect_map(result.tensors["layer.effect"])]) == []


def test_runs_side_by_side():
    """Axes and values are of the same runs in the same order, also where a run has other probes or parts."""
    other, third = (some_results(n_layers=6, n_tokens=9, n_probes=2, seed=seed) for seed in (1, 2))
    other["residual-erasure"].metadata["probes"][1] = {"prompt": "another"}
    runs = {"one": RESULTS, "two": other, "three": third}
    found = compared_pictures(runs)
    for key, picture in found.items():
        figure, values = picture.draw(), picture.values
        titled = [axes.get_title() for axes in figure.axes if axes.get_title()]
        if values[0].is_map:
            assert [shown.title for shown in values] == titled, key
        else:
            assert len(values) == 1
            assert len(values[0].columns) == len(figure.axes[0].get_legend().get_texts())
    assert [shown.title for shown in found["residual-erasure-1"].values] == ["one", "three"]


def test_curves_of_other_depths_have_a_table_only():
    runs = {"small": RESULTS, "large": synthetic_results(n_layers=9)}
    (values,) = compared_pictures(runs)["logit-lens-kl"].values
    assert values.matrix.shape == (10, 2)
    assert not values.hover
    assert any("—" in row for row in values.table.rows)
