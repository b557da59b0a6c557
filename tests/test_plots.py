"""Figures have the limits, order, labels and bytes that they should, at any depth and with any tokens."""

import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from synthetic_results import STRANGE, synthetic_results

from hookdepth.report import compare as plots_compare
from hookdepth.report import layers as plots_layers
from hookdepth.report import style as plots_base
from hookdepth.report import tokens as plots_tokens
from hookdepth.report.figures import compare_figures, figures_for, render
from hookdepth.results import Result


def all_figures(**options):
    return {name: figure for r in synthetic_results(**options).values() for name, figure in figures_for(r).items()}


def heat_map(figure):
    return figure.axes[0].images[0]


def test_every_analysis_has_its_figures():
    names = set(all_figures(n_layers=4, n_tokens=6, parts=("layer", "mlp")))
    assert {"residual-stats-contribution", "residual-stats-cosine", "residual-stats-norms"} <= names
    assert {"logit-lens-kl", "logit-lens-overlap", "skip-current-mlp-effect", "skip-future-mlp-output"} <= names
    assert {"local-current-layer-effect", "residual-erasure-1", "integrated-gradients-mlp-0"} <= names
    assert "local-current-mlp-effect" not in names
    assert figures_for(Result("of-another-version", {})) == {}


@pytest.mark.parametrize(("n_layers", "n_tokens"), [(1, 1), (1, 2), (2, 3), (4, 20), (126, 60)])
def test_any_size_draws_without_a_warning(n_layers, n_tokens):
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning, matplotlib.MatplotlibDeprecationWarning):
            warnings.simplefilter("error", kind)
        warnings.filterwarnings(
            "ignore", "'.*(deprecated - use|argument is deprecated)"
        )  # old matplotlib, new pyparsing
        figures = all_figures(n_layers=n_layers, n_tokens=n_tokens, strange=True)
        for figure in figures.values():
            assert render(figure, "png").startswith(b"\x89PNG")


def test_nothing_spills_out_of_its_figure():
    for name, figure in all_figures(n_layers=30, n_tokens=40, huge=16, strange=True).items():
        with plots_base.style():
            figure.draw_without_rendering()
            box, page = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 >= page.x0 - 0.01, name
        assert box.y0 >= page.y0 - 0.01, name
        assert box.x1 <= page.x1 + 0.01, name
        assert box.y1 <= page.y1 + 0.01, name


@pytest.mark.parametrize("n_layers", [4, 30, 126])
def test_ticks_do_not_overlap(n_layers):
    for name, figure in all_figures(n_layers=n_layers, n_tokens=20).items():
        with plots_base.style():
            figure.draw_without_rendering()
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            labels = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [label.get_window_extent() for label in labels if label.get_text() and not label.get_rotation()]
            gaps = [after.x0 - before.x1 for before, after in pairwise(boxes)]
            assert all(gap > 1 for gap in gaps), name


def test_same_result_same_bytes_and_no_date():
    for kind in ("png", "svg"):
        first, second = (
            {name: render(figure, kind) for name, figure in all_figures(n_layers=4, n_tokens=6).items()}
            for _ in range(2)
        )
        assert first == second
        assert not any(b"<dc:date>" in content for content in first.values())


def test_users_settings_neither_count_nor_change():
    plain = render(all_figures(n_layers=4, n_tokens=6)["logit-lens-kl"], "png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20, "image.cmap": "jet"}):
        before = dict(matplotlib.rcParams)
        assert render(all_figures(n_layers=4, n_tokens=6)["logit-lens-kl"], "png") == plain
        assert dict(matplotlib.rcParams) == before


def test_smaller_bars_are_in_front():
    stats = synthetic_results(n_layers=30)["residual-stats"].tensors
    for figure in (plots_layers.contribution_figure(stats), plots_layers.cosine_figure(stats)):
        groups = figure.axes[0].containers
        assert len(groups) == 3
        for bars in zip(*groups, strict=True):
            by_front = sorted(bars, key=lambda bar: -bar.get_zorder())
            heights = [abs(bar.get_height()) for bar in by_front]
            assert heights == sorted(heights)
            assert len({bar.get_zorder() for bar in bars}) == 3


@pytest.mark.parametrize(("top", "limit", "clipped"), [(0.4, 1.5, False), (2.0, 2.1, False), (16.9, 1.5, True)])
def test_contribution_axis(top, limit, clipped):
    values = torch.tensor([0.3, top, 0.2])
    figure = plots_layers.contribution_figure(
        {f"relative_contribution.{part}": values for part in plots_base.PART_LABELS}
    )
    axes = figure.axes[0]
    assert axes.get_ylim() == pytest.approx((0, limit))
    texts = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert ("beyond the axis: layer 1: 16.9" in texts) == clipped


def test_part_colours_are_the_same_everywhere():
    figures = all_figures(n_layers=4, parts=("layer", "attn", "mlp"))
    groups = figures["residual-stats-contribution"].axes[0].containers
    for part, label in plots_base.PART_LABELS.items():
        (group,) = (group for group in groups if group.get_label() == label)
        output = figures[f"skip-future-{part}-output"].axes[0].containers[0]
        assert output[0].get_facecolor() == group[0].get_facecolor()


def test_lens_figures_mark_the_effective_depth():
    lens = {"kl": torch.tensor([4.0, 3.0, 1.0, 0.0]), "topk_overlap": torch.tensor([0.1, 0.2, 0.2, 1.0])}
    kl, overlap = plots_layers.kl_figure(lens).axes[0], plots_layers.overlap_figure(lens).axes[0]
    assert any(list(line.get_xdata()) == [2, 2] and line.get_linestyle() == "--" for line in kl.lines)
    assert "effective depth: layer 2 of 3" in [text.get_text() for text in kl.get_legend().get_texts()]
    assert "effective depth: none" in [text.get_text() for text in overlap.get_legend().get_texts()]


@pytest.mark.parametrize("largest", [0.5, 1.0, 118.0])
def test_effect_maps_run_from_0_to_1_and_say_what_they_clip(largest):
    effect = torch.zeros(5, 5)
    effect[1, 3] = largest
    figure = plots_layers.effect_figure(effect, "Layer skipped", "Effect @ layer")
    image = heat_map(figure)
    assert image.get_clim() == (0, 1)
    assert image.colorbar.extend == ("max" if largest > 1 else "neither")
    assert ("118" in figure.axes[1].get_ylabel()) == (largest > 1)
    axes = figure.axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("Layer skipped", "Effect @ layer")
    assert axes.yaxis_inverted()  # layer 0 at the top, as in the paper


def test_what_is_not_finite_is_masked():
    image = heat_map(plots_layers.effect_figure(torch.tensor([[float("nan"), 0.5], [float("inf"), 0.1]]), "a", "b"))
    assert image.get_array().mask.tolist() == [[True, False], [True, False]]


def test_erasure_map_goes_upward_without_the_last_token():
    result = synthetic_results(n_layers=4, n_tokens=6)["residual-erasure"]
    figure = figures_for(result)["residual-erasure-0"]
    axes = figure.axes[0]
    assert heat_map(figure).get_array().shape == (5, 5)
    assert not axes.yaxis_inverted()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["BOS", "5", "_+", "_7", "_+"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {45}
    assert [label.get_fontweight() for label in axes.get_xticklabels()] == ["normal"] * 4 + ["bold"]
    assert figure.axes[1].get_ylabel() == "Probability Difference Norm"


def gradients(**changes):
    values = {
        "attribution": torch.tensor([[9.0, 0.2, -0.5, 0.0], [0.1, 0.1, 0.1, 0.0]]),
        "completeness_error": torch.tensor([0.001, 0.25]),
        "f_input": torch.tensor(0.75),
        "f_baseline": torch.tensor([0.25, 0.25]),
        "converged": torch.tensor([1.0, 0.0]),
    }
    return values | changes


def test_gradient_map_is_symmetric_without_the_first_token():
    figure = plots_tokens.gradient_figure(gradients(), {"tokens": ["a", "b", "c", "d"]}, 0.01)
    image = heat_map(figure)
    assert image.get_clim() == pytest.approx((-0.5, 0.5))
    assert image.get_array().shape == (2, 3)
    assert image.colorbar.extend == "both"
    assert plots_tokens.symmetric_limit(torch.zeros(2, 3)) == 1.0
    assert plots_tokens.symmetric_limit(torch.ones(2, 1)) == 1.0


def test_convergence_strip_marks_what_did_not_converge():
    strip = plots_tokens.gradient_figure(gradients(), {}, 0.01).axes[1]
    tolerance, good, bad = strip.lines
    assert list(tolerance.get_xdata()) == [0.01, 0.01]
    assert (list(good.get_xdata()), list(good.get_ydata())) == (pytest.approx([0.002]), [0])
    assert (list(bad.get_xdata()), list(bad.get_ydata())) == (pytest.approx([0.5]), [1])
    assert "not" in strip.get_title()


def test_relative_error_has_the_floor_of_the_convergence_test():
    same = gradients(f_baseline=torch.tensor([0.75, 0.74999]))
    assert plots_tokens.relative_error(same).tolist() == pytest.approx([0.1, 25.0])
    assert plots_tokens.relative_error({"attribution": torch.zeros(2, 2)}) is None


def test_gradients_of_all_parts_and_of_a_file_with_attributions_only():
    result = synthetic_results(n_layers=4, n_tokens=6, parts=("layer", "attn"))["integrated-gradients"]
    assert [(part, n) for part, n, _ in plots_tokens.gradients_of(result.tensors)] == [
        ("layer", 0), ("layer", 1), ("attn", 0), ("attn", 1),
    ]  # fmt: skip
    bare = Result("integrated-gradients", {"attribution.0": torch.ones(3, 4)})
    (figure,) = figures_for(bare).values()
    assert len(figure.axes) == 2  # map and colour bar


def test_many_probes_are_not_all_drawn():
    many = Result("residual-erasure", {f"effect.{n}": torch.ones(3, 4) for n in range(30)})
    assert len(figures_for(many)) == plots_tokens.MOST_PROBES


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("Ġword", "_word"), ("▁word", "_word"), (" word", "_word"), ("Ċ", "↵"), ("\t", "⇥"),
        ("<|begin_of_text|>", "BOS"), ("日本", "□□"),
        ("\x1b[31m", "□[31m"), ("a" * 30, "a" * 13 + "…"), ("$x$", "$x$"), ("é", "é"),
    ],
)  # fmt: skip
def test_token_labels(token, label):
    assert plots_tokens.token_label(token) == label


def test_dollars_in_tokens_start_no_formula():
    figure = plots_tokens.erasure_figure(torch.rand(3, len(STRANGE)), {"tokens": STRANGE})
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())
    render(plots_tokens.erasure_figure(torch.rand(3, 4), {"tokens": ["$\\frac{$", "$\\x$", "$", "a"]}), "png")


def test_compare_overlays_runs_of_one_depth_over_layers():
    runs = {"$a$": synthetic_results(n_layers=6), "_b": synthetic_results(n_layers=6, seed=1)}
    figures = compare_figures(runs)
    axes = figures["logit-lens-kl"].axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [list(range(7))] * 2
    assert axes.get_xlabel() == "Layer"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["$a$", "_b"]
    for figure in figures.values():
        render(figure, "png")


def test_compare_of_different_depths_is_over_relative_depth():
    runs = {"small": synthetic_results(n_layers=2), "large": synthetic_results(n_layers=4)}
    figures = compare_figures(runs)
    layers = [line.get_xdata() for line in figures["skip-current-layer-output"].axes[0].lines]
    assert np.allclose(layers[0], [0.25, 0.75])
    assert np.allclose(layers[1], [0.125, 0.375, 0.625, 0.875])
    points = [line.get_xdata() for line in figures["logit-lens-overlap"].axes[0].lines]
    assert np.allclose(points[0], [0, 0.5, 1])
    assert figures["logit-lens-overlap"].axes[0].get_xlabel() == "Relative depth"
    assert plots_compare.relative_depth(1, points=True).tolist() == [0]


def test_compare_puts_maps_on_one_scale_and_leaves_out_what_only_one_run_has():
    runs = {f"run{n}": synthetic_results(n_layers=3 + n, n_tokens=6, seed=n) for n in range(4)}
    runs["run0"]["skip-current"].tensors["attn.effect"] = torch.ones(3, 3)
    figures = compare_figures(runs)
    maps = figures["skip-current-layer-effect"].axes
    shown = [axes for axes in maps if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(runs)
    assert {axes.images[0].get_clim() for axes in shown} == {(0, 1)}
    attributions = [axes.images[0].get_clim() for axes in figures["integrated-gradients-layer-0"].axes if axes.images]
    assert len(attributions) == 4
    assert len(set(attributions)) == 1
    assert "skip-current-attn-effect" not in figures


def test_compare_matches_probes_by_prompt():
    one, other = synthetic_results(n_layers=3, n_tokens=6), synthetic_results(n_layers=3, n_tokens=6)
    for result in (other["residual-erasure"], other["integrated-gradients"]):
        result.metadata["probes"] = [
            {**result.metadata["probes"][0], "prompt": "another"},
            result.metadata["probes"][1],
        ]
    figures = compare_figures({"one": one, "other": other})
    assert "residual-erasure-0" not in figures
    assert "residual-erasure-1" in figures
