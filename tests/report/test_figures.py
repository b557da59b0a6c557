"""Figures have the limits, order, labels and bytes that they should, at any depth and with any tokens."""

import os
import re
import subprocess
import sys
import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from synthetic_results import EVERY_KIND, STRANGE, some_results, synthetic_results

from hookdepth.analyses.gradients import relative_error
from hookdepth.analyses.registry import declared as lookup
from hookdepth.analyses.registry import known
from hookdepth.errors import HookdepthError
from hookdepth.report.drawing import layers, style, tokens
from hookdepth.report.drawing.over_training import training_figure
from hookdepth.report.drawing.style import render
from hookdepth.report.figures import Bars, Heatmap, Intervals, Lines, TokenMap, compared, figures_for, pictures_of
from hookdepth.report.patterns import MOST_PROBES, SERIES_NAMES
from hookdepth.report.scale import Scale
from hookdepth.results import Result


def drawn(result):
    """The figures of a result of one of the eight analyses, by name."""
    return figures_for(result, lookup(result))


def compare_figures(runs, lookup):
    """Several runs in one figure each."""
    pictures = (picture for _, kinds in compared(runs, lookup) for _, some in kinds for picture in some)
    return {picture.name: picture.draw() for picture in pictures}


def of_all(results):
    """Pictures of all figures of these results, by name, with their kind; none is drawn yet."""
    known = (pictures_of(result, lookup(result)) for result in results.values())
    return {picture.name: (kind, picture) for own in known for kind, some in own for picture in some}


@pytest.fixture(scope="module")
def small():
    """The figures of all analyses of a small model with their kinds and pictures, by name, to be looked at only."""
    results = synthetic_results(n_layers=4, n_tokens=6, null=2e-6, n_probes=1)
    return {name: (kind, picture, picture.draw()) for name, (kind, picture) in of_all(results).items()}


def heat_map(figure):
    return figure.axes[0].images[0]


def test_every_analysis_has_its_figures():
    names = set(of_all(synthetic_results(n_layers=4, n_tokens=6, parts=("layer", "mlp"))))
    assert {"residual-stats-contribution", "residual-stats-cosine", "residual-stats-norms"} <= names
    assert {"logit-lens-kl", "logit-lens-overlap", "skip-current-mlp-effect", "skip-future-mlp-output"} <= names
    assert {"local-current-layer-effect", "residual-erasure-1", "integrated-gradients-mlp-0"} <= names
    assert "local-current-mlp-effect" not in names
    assert drawn(Result("of-another-version", {})) == {}


@pytest.mark.parametrize(
    ("n_layers", "n_tokens", "analyses"),
    [(1, 1, EVERY_KIND), (2, 2, EVERY_KIND), (4, 20, None), (30, 40, EVERY_KIND), (126, 60, EVERY_KIND)],
)
def test_any_size_draws_within_its_page_and_without_a_warning(n_layers, n_tokens, analyses, monkeypatch):
    """Nothing warns, nothing spills out of the figure, and no tick label touches the next."""
    monkeypatch.setitem(style._STYLE, "savefig.dpi", 30)  # nobody looks at it
    results = synthetic_results(n_layers=n_layers, n_tokens=n_tokens, n_probes=1, huge=16, strange=True)
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning, matplotlib.MatplotlibDeprecationWarning):
            warnings.simplefilter("error", kind)
        warnings.filterwarnings(
            "ignore", "'.*(deprecated - use|argument is deprecated)"
        )  # old matplotlib, new pyparsing
        for name, (_, picture) in of_all({name: results[name] for name in analyses or results}).items():
            figure = picture.draw()
            assert render(figure, "png")[0].startswith(b"\x89PNG")
            with style.style():
                within_its_page(figure, name)
            apart(figure, name)


def within_its_page(figure, name):
    box, page = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= page.x0 - 0.01, name
    assert box.y0 >= page.y0 - 0.01, name
    assert box.x1 <= page.x1 + 0.01, name
    assert box.y1 <= page.y1 + 0.01, name


def apart(figure, name):
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        labels = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent() for label in labels if label.get_text() and not label.get_rotation()]
        gaps = [after.x0 - before.x1 for before, after in pairwise(boxes)]
        assert all(gap > 1 for gap in gaps), name


def test_same_result_same_bytes_and_no_date(small):
    for name, (_, picture, figure) in small.items():
        if not name.startswith(EVERY_KIND):
            continue
        first, second = (render(one, "png", "svg") for one in (figure, picture.draw()))
        assert first == second, name
        assert b"<dc:date>" not in first[1]


def test_users_settings_neither_count_nor_change():
    _, picture = of_all(some_results(["logit-lens"], n_layers=4))["logit-lens-kl"]
    plain = render(picture.draw(), "png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20, "image.cmap": "jet"}):
        before = dict(matplotlib.rcParams)
        assert render(picture.draw(), "png") == plain
        assert dict(matplotlib.rcParams) == before


def test_smaller_bars_are_in_front():
    figures = drawn(synthetic_results(n_layers=30)["residual-stats"])
    for figure in (figures["residual-stats-contribution"], figures["residual-stats-cosine"]):
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
    stats = {f"relative_contribution.{part}": values for part in style.PART_COLOURS}
    figure = drawn(Result("residual-stats", stats))["residual-stats-contribution"]
    axes = figure.axes[0]
    assert axes.get_ylim() == pytest.approx((0, limit))
    texts = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert ("beyond the axis: layer 1: 16.9" in texts) == clipped


def test_part_colours_are_the_same_everywhere():
    results = some_results(["residual-stats", "skip-future"], n_layers=4, parts=("layer", "attn", "mlp"))
    figures = {name: picture.draw for name, (_, picture) in of_all(results).items()}
    groups = figures["residual-stats-contribution"]().axes[0].containers
    for part in style.PART_COLOURS:
        (group,) = (group for group in groups if group.get_label() == SERIES_NAMES[part])
        output = figures[f"skip-future-{part}-output"]().axes[0].containers[0]
        assert output[0].get_facecolor() == group[0].get_facecolor()


def test_lens_figures_mark_the_effective_depth():
    lens = {"kl": torch.tensor([4.0, 3.0, 1.0, 0.0]), "topk_overlap": torch.tensor([0.1, 0.2, 0.2, 1.0])}
    kl, overlap = (figure.axes[0] for figure in drawn(Result("logit-lens", lens)).values())
    assert any(list(line.get_xdata()) == [2, 2] and line.get_linestyle() == "--" for line in kl.lines)
    assert "effective depth: layer 2 of 3" in [text.get_text() for text in kl.get_legend().get_texts()]
    assert "effective depth: none" in [text.get_text() for text in overlap.get_legend().get_texts()]


@pytest.mark.parametrize("largest", [0.5, 1.0, 118.0])
def test_effect_maps_run_from_0_to_1_and_say_what_they_clip(largest):
    effect = torch.zeros(5, 5)
    effect[1, 3] = largest
    figure = drawn(Result("skip-current", {"layer.effect": effect}))["skip-current-layer-effect"]
    image = heat_map(figure)
    assert image.get_clim() == (0, 1)
    assert image.colorbar.extend == ("max" if largest > 1 else "neither")
    assert ("118" in figure.axes[1].get_ylabel()) == (largest > 1)
    axes = figure.axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("Layer skipped", "Effect @ layer")
    assert axes.yaxis_inverted()  # layer 0 at the top, as in the paper


def test_what_is_not_finite_is_masked():
    effect = torch.tensor([[float("nan"), 0.5], [float("inf"), 0.1]])
    image = heat_map(layers.maps_figure({"": effect}, Scale(0.0, 1.0), "a", "b"))
    assert image.get_array().mask.tolist() == [[True, False], [True, False]]


def test_erasure_map_goes_upward_without_the_last_token():
    result = synthetic_results(n_layers=4, n_tokens=6)["residual-erasure"]
    figure = drawn(result)["residual-erasure-0"]
    axes = figure.axes[0]
    assert heat_map(figure).get_array().shape == (5, 5)
    assert not axes.yaxis_inverted()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["BOS", "5", "_+", "_7", "_+"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {45}
    assert [label.get_fontweight() for label in axes.get_xticklabels()] == ["normal"] * 4 + ["bold"]
    assert figure.axes[1].get_ylabel().split() == ["Probability", "Difference", "Norm"]


def gradient_figure(values, probe, tolerance=None):
    """The figure of integrated gradients with these tensors, for a probe of which this is known."""
    metadata = {"probes": [probe], "settings": {"ig_tolerance": tolerance}}
    tensors = {f"{name}.0": value for name, value in values.items()}
    return drawn(Result("integrated-gradients", tensors, metadata))["integrated-gradients-layer-0"]


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
    figure = gradient_figure(gradients(), {"tokens": ["a", "b", "c", "d"]}, 0.01)
    image = heat_map(figure)
    assert image.get_clim() == pytest.approx((-0.5, 0.5))
    assert image.get_array().shape == (2, 3)
    assert image.colorbar.extend == "both"
    for without in (torch.zeros(2, 3), torch.ones(2, 1)):
        scale = Scale.of(without[:, 1:], signed=True)
        assert (scale.low, scale.high) == (-1.0, 1.0)


def test_convergence_strip_marks_what_did_not_converge():
    strip = gradient_figure(gradients(), {}).axes[1]
    tolerance, good, bad = strip.lines
    assert list(tolerance.get_xdata()) == [0.01, 0.01]
    assert (list(good.get_xdata()), list(good.get_ydata())) == (pytest.approx([0.002]), [0])
    assert (list(bad.get_xdata()), list(bad.get_ydata())) == (pytest.approx([0.5]), [1])
    assert "not" in strip.get_title()


def test_relative_error_has_the_floor_of_the_convergence_test():
    same = gradients(f_baseline=torch.tensor([0.75, 0.74999]))
    assert relative_error(same).tolist() == pytest.approx([0.1, 25.0])
    assert relative_error({"attribution": torch.zeros(2, 2)}) is None


def test_gradients_of_all_parts_and_of_a_file_with_attributions_only():
    result = synthetic_results(n_layers=4, n_tokens=6, parts=("layer", "attn"))["integrated-gradients"]
    pictures = {
        name.removeprefix("integrated-gradients-"): picture for name, (_, picture) in of_all({"": result}).items()
    }
    assert list(pictures) == ["layer-0", "layer-1", "attn-0", "attn-1"]
    for name in ("layer-1", "attn-0"):
        assert len(pictures[name].draw().axes) == 3  # map, strip and colour bar
    bare = Result("integrated-gradients", {"attribution.0": torch.ones(3, 4)})
    (figure,) = drawn(bare).values()
    assert len(figure.axes) == 2  # map and colour bar


def test_many_probes_are_not_all_drawn():
    many = Result("residual-erasure", {f"effect.{n}": torch.ones(3, 4) for n in range(30)})
    assert len(of_all({"": many})) == MOST_PROBES


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("Ġword", "_word"), ("▁word", "_word"), (" word", "_word"), ("Ċ", "↵"), ("\t", "⇥"),
        ("<|begin_of_text|>", "BOS"), ("日本", "□□"),
        ("\x1b[31m", "□[31m"), ("a" * 30, "a" * 13 + "…"), ("$x$", "$x$"), ("é", "é"),
    ],
)  # fmt: skip
def test_token_labels(token, label):
    assert tokens.token_label(token) == label


def test_dollars_in_tokens_start_no_formula():
    figure = tokens.token_figure(torch.rand(3, len(STRANGE)), {"tokens": STRANGE}, Scale(0.0, 1.0))
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())
    probe = {"tokens": ["$\\frac{$", "$\\x$", "$", "a"]}
    render(tokens.token_figure(torch.rand(3, 4), probe, Scale(0.0, 1.0)), "png")


def test_compare_overlays_runs_of_one_depth_over_layers(monkeypatch):
    monkeypatch.setitem(style._STYLE, "savefig.dpi", 30)
    runs = {
        name: some_results(EVERY_KIND, n_layers=6, n_tokens=6, seed=seed) for seed, name in enumerate(["$a$", "_b"])
    }
    figures = compare_figures(runs, lookup)
    axes = figures["logit-lens-kl"].axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [list(range(7))] * 2
    assert axes.get_xlabel() == "Layer"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["$a$", "_b"]
    for figure in figures.values():
        render(figure, "png")


@pytest.mark.parametrize("length", [5, 30, 90])
def test_a_legend_of_several_runs_leaves_the_axes_their_width(length):
    """Four series of 30 letters came out as three columns, of which the first holds two of them."""
    kind = Intervals("score.*", "…", interval="ends.*", places="{level}.effect", axis="Level")
    tensors = {
        "score.a": torch.ones(2),
        "score.b": torch.zeros(2),
        "ends.a": torch.ones(2, 2),
        "ends.b": torch.ones(2, 2),
    }
    result = Result("mine", {**tensors, "1.effect": torch.ones(2), "2.effect": torch.ones(2)})
    runs = {name: {"mine": result} for name in ("_" + "x" * length, "$" * length)}
    figure = compare_figures(runs, lambda _: Mine([kind]))["mine-score"]
    axes = figure.axes[0]
    assert axes.get_position().width > 0.6
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(texts) == 4
    assert all(text.endswith(("x, a", "x, b", "$, a", "$, b")) for text in texts)
    render(figure, "png")


def test_compare_of_different_depths_is_over_relative_depth():
    curves = ("logit-lens", "skip-current")
    runs = {"small": some_results(curves, n_layers=2), "large": some_results(curves, n_layers=4)}
    figures = compare_figures(runs, lookup)
    places = [line.get_xdata() for line in figures["skip-current-layer-output"].axes[0].lines]
    assert np.allclose(places[0], [0.25, 0.75])
    assert np.allclose(places[1], [0.125, 0.375, 0.625, 0.875])
    points = [line.get_xdata() for line in figures["logit-lens-overlap"].axes[0].lines]
    assert np.allclose(points[0], [0, 0.5, 1])
    assert figures["logit-lens-overlap"].axes[0].get_xlabel() == "Relative depth"
    assert layers.relative_depth(1, points=True).tolist() == [0]


def test_compare_puts_maps_on_one_scale_and_leaves_out_what_only_one_run_has():
    maps = ("skip-current", "integrated-gradients")
    runs = {f"run{n}": some_results(maps, n_layers=3 + n, n_tokens=6, seed=n) for n in range(4)}
    runs["run0"]["skip-current"].tensors["attn.effect"] = torch.ones(3, 3)
    figures = compare_figures(runs, lookup)
    maps = figures["skip-current-layer-effect"].axes
    shown = [axes for axes in maps if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(runs)
    assert len({axes.images[0].get_clim() for axes in shown}) == 1
    attributions = [axes.images[0].get_clim() for axes in figures["integrated-gradients-layer-0"].axes if axes.images]
    assert len(attributions) == 4
    assert len(set(attributions)) == 1
    assert "skip-current-attn-effect" not in figures


def test_compare_matches_probes_by_prompt():
    one, other = ({"residual-erasure": synthetic_results(n_layers=3, n_tokens=6)["residual-erasure"]} for _ in range(2))
    for result in other.values():
        result.metadata["probes"] = [
            {**result.metadata["probes"][0], "prompt": "another"},
            result.metadata["probes"][1],
        ]
    figures = compare_figures({"one": one, "other": other}, lookup)
    assert "residual-erasure-0" not in figures
    assert "residual-erasure-1" in figures


class Mine:
    """An analysis of a user's own, as far as a report asks."""

    name, heading, question, paper, order = "mine", "Mine", "", "", 9.0

    def __init__(self, figures, tensors=None):
        self.figures, self.tensors, self.labels = figures, tensors or {}, {}

    def numbers(self, result):
        return {}

    def notes(self, result):
        return []


def test_a_map_of_a_users_own_needs_a_tensor_and_a_reading():
    result = Result("mine", {"effect": torch.tensor([[0.0, 2.0], [-1.0, 0.5]])})
    ((_, (picture,)),) = pictures_of(result, Mine([Heatmap("effect", "How to read it.")]))
    assert (picture.name, picture.caption) == ("mine-effect", "Effect")
    image = heat_map(picture.draw())
    assert image.get_clim() == (-2.0, 2.0)  # with values below zero, zero is in the middle
    assert picture.values[0].matrix.shape == (2, 2)
    wide = Result("mine", {"effect": torch.rand(2, 30)})
    assert heat_map(figures_for(wide, Mine([Heatmap("effect", "…")]))["mine-effect"]).get_clim()[0] == 0.0


def test_placeholders_of_any_name_are_a_figure_each_and_a_star_is_a_curve():
    tensors = {f"{how}.{level}.cost": torch.rand(4) for how in ("skip", "repeat") for level in ("one", "two")}
    result = Result("mine", {**tensors, "per_prompt.skip.one.cost": torch.rand(3, 4)})
    each = figures_for(result, Mine([Bars("{how}.{level}.cost", "…")]))
    assert list(each) == ["mine-repeat-one-cost", "mine-repeat-two-cost", "mine-skip-one-cost", "mine-skip-two-cost"]
    lines = figures_for(result, Mine([Lines("{how}.*.cost", "…", label="Cost", labels={"one": "level 1"})]))
    assert list(lines) == ["mine-repeat-cost", "mine-skip-cost"]
    legend = [text.get_text() for text in lines["mine-skip-cost"].axes[0].get_legend().get_texts()]
    assert legend == ["level 1", "two"]
    both = Mine([Lines(("skip.one.cost", "skip.two.cost"), "…", name="both")])
    assert len(figures_for(result, both)["mine-both"].axes[0].get_legend().get_texts()) == 2


def test_a_name_with_a_folder_in_it_is_no_figure():
    result = Result("mine", {"../../x.effect": torch.rand(2, 2)})
    assert figures_for(result, Mine([Heatmap("{part}.effect", "…")])) == {}


def test_figures_that_do_not_fit_are_refused():
    result = Result("mine", {"effect": torch.rand(2, 2), "curve": torch.rand(2)})
    for kinds, says in (
        ([Heatmap("curve", "…")], "a Heatmap shows two axes"),
        ([TokenMap("curve", "…")], "a TokenMap shows two axes"),
        ([Bars("effect", "…")], "Bars show one axis"),
        ([Heatmap("effect", "…"), TokenMap("effect", "…")], "two figures of mine"),
    ):
        with pytest.raises(HookdepthError, match=says):
            figures_for(result, Mine(kinds))


def test_points_are_what_the_axes_say():
    kind = Bars("kl", "…", label="KL")
    runs = {str(n): {"mine": Result("mine", {"kl": torch.rand(n)})} for n in (3, 5)}
    for axes, expected in (("point", [0, 0.5, 1]), ("layer", [1 / 6, 0.5, 5 / 6])):
        own = Mine([kind], {"kl": axes})
        figure = compare_figures(runs, lambda result, own=own: own)["mine-kl"]
        assert figure.axes[0].lines[0].get_xdata().tolist() == pytest.approx(expected)


def test_every_figure_says_what_it_is_made_of(small):
    for name, (kind, _, figure) in small.items():
        text = figure._supxlabel.get_text().replace("\n", " ")
        assert ("one prompt" if "{i}" in kind.tensor else "3 prompts") in text.lower()
        assert kind.reduction.lower() in text.lower()
        assert ("Noise floor 2e-06" in text) == (not name.startswith(("residual-stats", "logit-lens")))
    effect = torch.zeros(5, 5)
    effect[1, 3], effect[2, 2] = 118.0, float("nan")
    ((_, (picture,)),) = pictures_of(Result("skip-current", {"layer.effect": effect}), known()["skip-current"]())
    assert "1 of 15 values beyond the colours, which end at 1: up to 118; 1 value is not finite" in picture.said


def test_over_training_curves_are_panels_and_gaps_stay_empty():
    steps = {step: synthetic_results(n_layers=3, seed=step) for step in (0, 10)}
    history = {name: {step: own[name] for step, own in steps.items()} for name in ("logit-lens", "skip-current")}
    del history["skip-current"][10].tensors["layer.output"]
    figure = training_figure(history, lookup)
    kl, output = figure.axes[:2]
    assert kl.get_ylabel() == "Before layer"
    assert output.get_ylabel() == "Layer skipped"
    shown = output.collections[0].get_array()
    assert np.ma.getmaskarray(shown)[:, 1].all()
    assert not np.ma.getmaskarray(shown)[:, 0].any()
    with pytest.raises(HookdepthError, match="no curve over layers"):
        training_figure({"local-current": {0: steps[0]["local-current"]}}, lookup)


def test_a_map_of_tokens_is_its_mean_size_over_training():
    steps = {step: synthetic_results(n_layers=3, n_tokens=6, seed=step) for step in (0, 10)}
    names = ("residual-erasure", "integrated-gradients")
    history = {name: {step: own[name] for step, own in steps.items()} for name in names}
    erased, attributed = training_figure(history, lookup).axes[:2]
    assert (erased.get_ylabel(), attributed.get_ylabel()) == ("Before layer", "Layer")
    for axes, name, tensor, first in ((erased, names[0], "effect.0", 0), (attributed, names[1], "attribution.0", 1)):
        expected = torch.stack([history[name][step][tensor][:, first:-1].abs().mean(1) for step in (0, 10)], 1)
        assert axes.collections[0].get_array().ravel().tolist() == pytest.approx(expected.flatten().tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one process imports torch for all")
def test_figures_wait_for_matplotlib_and_need_no_backend():
    """Declaring them imports no matplotlib, and drawing them does, whatever the environment says of windows."""
    code = """if True:
        import os, sys
        import hookdepth.report.figures
        print("matplotlib" in sys.modules)
        for backend in ("nonsense", "", "svg"):
            os.environ["MPLBACKEND"] = backend
            sys.stdout.flush()
            if child := os.fork():
                os.waitpid(child, 0)
                continue
            import hookdepth.report.page
            import matplotlib.figure
            from hookdepth.report.drawing.style import new_figure, render
            drawn = render(new_figure(1, 1), "png")[0]
            print(matplotlib.get_backend(), len(drawn) > 100, repr(os.environ["MPLBACKEND"]), flush=True)
            os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\nagg True 'nonsense'\nagg True ''\nsvg True 'svg'\n"
    assert done.stderr == ""


def test_a_saturated_map_gets_logarithmic_colours_and_says_so():
    kind = Heatmap("effect", "", label="Relative change", limits=(0.0, 1.0), causal=True)
    effect = torch.rand(6, 6).triu() + 0.5
    effect[0, 1:] = 40.0
    assert (
        kind.drawing(Result("x", {"effect": effect}), known()["skip-current"](), {})
        .clipped[0]
        .startswith("logarithmic")
    )
    figure = kind.drawing(Result("x", {"effect": effect}), known()["skip-current"](), {}).draw()
    colours, blank = figure.axes[0].images
    assert type(colours.norm).__name__ == "LogNorm"
    assert torch.equal(torch.tensor(blank.get_array()[..., 3]), torch.ones(6, 6).tril(-1).double()), "nothing is there"
    limited = kind.limited(None, 0.0, 1.0).drawing(Result("x", {"effect": effect}), known()["skip-current"](), {})
    assert "beyond the colours, which end at 1" in limited.clipped[0]
    assert limited.draw().axes[0].images[0].get_clim() == (0.0, 1.0)


def test_many_values_beyond_signed_colours_make_them_logarithmic():
    values = torch.tensor([[-0.05, 0.0, 0.1, 50.0]])
    scale = Scale.of(values, limits=(-2.0, 2.0))
    assert (scale.low, scale.high, scale.log, scale.signed, scale.linear) == (-50.0, 50.0, True, True, 0.1)
    assert "logarithmic" in scale.clipped([values])
    norm = heat_map(layers.maps_figure({"": values}, scale, "a", "b")).norm
    assert norm(torch.tensor(0.0).item()) == pytest.approx(0.5)
    assert norm(0.1) - norm(0.0) == pytest.approx(norm(0.0) - norm(-0.1))
    assert not Scale.of(values, limits=(-2.0, 2.0), clip=True).log
    assert scale.widest(Scale(-2.0, 2.0, signed=True)).high == 50.0


@pytest.mark.parametrize(
    ("analysis", "tensor"),
    [("residual-stats", "cosine.layer"), ("residual-stats", "norm.resid"), ("logit-lens", "kl"),
     ("skip-current", "layer.effect"), ("skip-current", "layer.output"), ("residual-erasure", "effect.0")],
)  # fmt: skip
def test_nothing_is_cut_off_at_the_width_of_a_column(analysis, tensor):
    """Every text lies within 3.3 inches, and the axes keep most of them."""
    results = synthetic_results(n_layers=30, huge=9.0)
    figure = results[analysis].plot(tensor, figsize=(3.3, 2.6))
    drawn, page = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= -0.02
    assert drawn.x1 <= page[0] + 0.02
    assert drawn.y1 <= page[1] + 0.02
    assert figure.axes[0].get_position().width > 0.4


def test_looks_of_bars_that_hide_each_other():
    stats = synthetic_results(n_layers=6)["residual-stats"]
    places = {}
    for look in ("paper", "groups", "lines"):
        axes = stats.plot("relative_contribution.attn", look=look).axes[0]
        places[look] = [round(bar.get_x() + bar.get_width() / 2, 3) for bar in axes.patches]
    assert len(set(places["paper"])) == 6  # on each other
    assert len(set(places["groups"])) == 18
    assert places["lines"] == []
    with pytest.raises(HookdepthError, match="unknown look 'stacked'"):
        stats.plot("relative_contribution.attn", look="stacked")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"figsize": 3}, "figsize is 3"), ({"figsize": (3.3, -1)}, "figsize"), ({"norm": "lin"}, "did you mean linear"),
     ({"vmin": "a"}, "vmin is 'a'"), ({"vmax": float("nan")}, "vmax is nan"), ({"cmap": "x"}, "cmap is 'x'")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(HookdepthError, match=re.escape(says)):
        synthetic_results(n_layers=3)["skip-current"].plot("layer.effect", **options)
