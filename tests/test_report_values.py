"""What is said on hover lies where it is drawn, and the tables say what the figures show."""

import re
from html import unescape

import pytest
import torch
from synthetic_results import synthetic_results

from hookdepth.report import figures as plots
from hookdepth.report.hover import MOST_CELLS, compared, effect_map, overlay, tables, values_of

RESULTS = synthetic_results(n_layers=6, n_tokens=9, parts=("layer", "attn"))
DRAWN = [(name, key) for name, result in RESULTS.items() for key in plots.figures_for(result)]


def layers_of(figure, values):
    """For each overlaid axes: its place (left, top, width, height in shares of the picture), view and cells."""
    html = overlay(figure, values)
    for place, view, cells in re.findall(r'<svg class="over" style="([^"]*)" viewBox="([^"]*)".*?>(.*?)</svg>', html):
        shares = {key: float(value[:-1]) / 100 for key, value in (item.split(":") for item in place.split(";"))}
        found = re.findall(r'<path d="M([\d.e-]+) ([\d.e-]+)h1v1h-1z"><title>(.*?)</title>', cells)
        yield shares, [float(x) for x in view.split()], [(float(x), float(y), unescape(text)) for x, y, text in found]


def on_picture(share, view, x, y):
    """Where the middle of a cell lies in the picture, as shares from its left and top."""
    across = share["left"] + share["width"] * (x + 0.5 - view[0]) / view[2]
    down = share["top"] + share["height"] * (y + 0.5 - view[1]) / view[3]
    return across, down


@pytest.mark.parametrize(("analysis", "key"), DRAWN, ids=lambda name: name)
def test_every_figure_has_its_values(analysis, key):
    figure = plots.figures_for(RESULTS[analysis])[key]
    plots.render(figure, "png")
    values = values_of(RESULTS[analysis], key)
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
    for analysis, key in DRAWN:
        values = values_of(RESULTS[analysis], key)
        text = tables(values)
        for shown in values:
            finite = shown.matrix[torch.isfinite(shown.matrix)]
            assert all(f"<td>{value:.4g}</td>" in text for value in finite.tolist())


def test_a_large_map_has_a_table_only():
    n_layers = int(MOST_CELLS**0.5) + 1
    result = synthetic_results(n_layers=n_layers)["local-current"]
    figure = plots.figures_for(result)["local-current-layer-effect"]
    assert overlay(figure, [effect_map(result.tensors["layer.effect"])]) == ""


def test_runs_side_by_side():
    """Axes and values are of the same runs in the same order, also where a run has other probes or parts."""
    other = synthetic_results(n_layers=6, n_tokens=9, seed=1)
    other["residual-erasure"].metadata["probes"][1] = {"prompt": "another"}
    runs = {"one": RESULTS, "two": other, "three": synthetic_results(n_layers=6, n_tokens=9, seed=2)}
    for key, figure in plots.compare_figures(runs).items():
        values = compared(runs, key)
        titled = [axes.get_title() for axes in figure.axes if axes.get_title()]
        if values[0].is_map:
            assert [shown.title for shown in values] == titled, key
        else:
            assert len(values) == 1
            assert len(values[0].columns) == len(figure.axes[0].get_legend().get_texts())
    assert [shown.title for shown in compared(runs, "residual-erasure-1")] == ["one", "three"]


def test_curves_of_other_depths_have_a_table_only():
    runs = {"small": RESULTS, "large": synthetic_results(n_layers=9)}
    (values,) = compared(runs, "logit-lens-kl")
    assert values.matrix.shape == (10, 2)
    assert not values.hover
    assert "<td>—</td>" in tables([values])
