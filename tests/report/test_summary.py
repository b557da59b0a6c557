"""Derived numbers against values worked out by hand, and the edges of each definition."""

import json
import math

import pytest
import torch
from synthetic_results import synthetic_results

from hookdepth.analyses import depth as depths_of
from hookdepth.analyses.registry import declared as lookup
from hookdepth.analyses.registry import known
from hookdepth.report import summary
from hookdepth.report.figures import Heatmap
from hookdepth.results import Result


def stats_of(mean):
    """`stats_of([-1, 1])`: three cosine curves whose mean is the given one."""
    curve = torch.tensor(mean, dtype=torch.float32)
    return {"cosine.attn": curve - 0.5, "cosine.mlp": curve + 0.75, "cosine.layer": curve - 0.25}


def test_mean_cosine_is_the_mean_of_the_three():
    assert depths_of.mean_cosine(stats_of([0.25, -0.5])).tolist() == [0.25, -0.5]


@pytest.mark.parametrize(
    ("curve", "layer"),
    [
        ([-0.1, -0.2, 0.3, 0.4], 2),
        ([-0.1, 0.2, -0.1, 0.3, 0.4], 3),
        ([-0.1, 0.0], 1),
        ([0.1, 0.2], None),
        ([0.1, -0.2, 0.1], 2),
        ([-0.1, -0.2], None),
        ([-0.1], None),
        ([0.1], None),
        ([0.0, -0.1], None),
    ],
)
def test_last_crossing(curve, layer):
    assert depths_of.last_crossing(torch.tensor(curve)) == layer


@pytest.mark.parametrize(
    ("kl", "layer"),
    [
        ([4.0, 3.0, 2.0, 1.0, 0.0], 3),  # 2.0 is half, not below
        ([4.0, 3.0, 0.0], None),  # entry L is 0 by construction and no layer
        ([0.0, 0.0], None),
        ([1.0, 8.0, 5.0, 0.0], 0),
        ([3.0, 0.0], None),
    ],
)
def test_first_below_half_of_the_largest_kl(kl, layer):
    assert depths_of.first_below_share(torch.tensor(kl)) == layer


@pytest.mark.parametrize(
    ("overlap", "layer"),
    [([0.1, 0.31, 0.2, 1.0], 1), ([0.1, 0.2, 1.0], None), ([0.1, 0.3000001, 1.0], 1), ([0.29, 1.0], None)],
)
def test_first_overlap_above_the_threshold(overlap, layer):
    assert depths_of.first_above(torch.tensor(overlap)) == layer


def test_later_effect_and_depth_score_by_hand():
    effect = torch.tensor([[1.0, 0.5, 0.3], [0.0, 1.0, 0.6], [0.0, 0.0, 1.0]])
    per_layer = [1.8 / 2, 1.6 / 1, 1.0 / 1]
    assert depths_of.later_effect(effect).tolist() == pytest.approx(per_layer)
    assert depths_of.depth_score(depths_of.later_effect(effect)) == pytest.approx((1.6 + 2.0) / (0.9 + 1.6 + 1.0))


def test_depth_score_at_its_ends():
    assert depths_of.depth_score(torch.zeros(5)) is None
    assert depths_of.depth_score(torch.tensor([2.0])) == 0.0
    assert depths_of.depth_score(torch.tensor([0.0, 0.0, 3.0])) == 2.0
    assert depths_of.depth_score(torch.tensor([math.nan, 1.0])) is None


def test_effective_depth_says_what_was_not_measured():
    lens = Result("logit-lens", {"kl": torch.tensor([4.0, 3.0, 0.0]), "topk_overlap": torch.tensor([0.1, 0.5, 1.0])})
    depths = summary.effective_depth({"logit-lens": lens}, lookup, [kind() for kind in known().values() if kind.in_all])
    assert {name: (depth["status"], depth["index"], depth["ratio"]) for name, depth in depths.items()} == {
        "cosine": ("not measured", None, None),
        "kl": ("none", None, None),
        "topk_overlap": ("found", 1, 1.0),
    }


def test_effective_depth_of_the_cosine_curves():
    result = Result("residual-stats", stats_of([-0.5, 0.5, -0.5, 0.5]))
    depth = summary.effective_depth({"residual-stats": result}, lookup)["cosine"]
    assert (depth["index"], depth["ratio"]) == (3, 1.0)


def test_effective_depths_at_other_thresholds():
    kl = torch.tensor([10.0, 5.5, 4.5, 3.0, 0.0])
    own = summary.effective_depth({"logit-lens": Result("logit-lens", {"kl": kl})}, lookup)["kl"]
    assert (own["index"], own["otherwise"]) == (2, {"-20 %": 3, "+20 %": 1})
    curve = torch.tensor([-1.0, -0.1, 0.1, 0.5])
    stats = {f"cosine.{part}": curve for part in ("attn", "mlp", "layer")}
    own = summary.effective_depth({"residual-stats": Result("residual-stats", stats)}, lookup)["cosine"]
    assert (own["index"], own["otherwise"]) == (2, {"-20 %": 1, "+20 %": 3})


def test_intervals_over_prompts():
    each = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    tensors = {"kl": each.mean(0), "per_prompt.kl": each}
    whole = summary.summarise({"logit-lens": Result("logit-lens", tensors)}, lookup)
    interval = whole["analyses"]["logit-lens"]["intervals"]["kl"]
    assert interval["mean"] == pytest.approx(each.double().mean(0).tolist())
    for low, mean, high in zip(interval["from"], interval["mean"], interval["to"], strict=True):
        assert low < mean < high


def test_depth_scores_by_part_and_kind():
    results = synthetic_results(n_layers=6, parts=("layer", "attn"))
    scores = summary.depth_scores(results, lookup)
    assert set(scores) == {"skip-current", "skip-future", "local-current", "local-future"}
    assert set(scores["skip-current"]) == {"layer", "attn"}
    assert set(scores["skip-current"]["attn"]) == {"effect", "output"}
    assert set(scores["local-future"]["layer"]) == {"effect"}
    output = results["skip-future"].tensors["attn.output"].double()
    expected = (torch.arange(6) * output).sum() / output.sum()
    assert scores["skip-future"]["attn"]["output"] == pytest.approx(expected.item())


def test_largest_effect_looks_at_effects_only():
    tensors = {"layer.effect": torch.tensor([[0.5, 2.0]]), "layer.output": torch.tensor([1.0])}
    tensors["per_prompt.layer.effect"] = torch.tensor([9.0])
    assert summary.largest_effect(Result("skip-current", tensors), lookup) == 2.0
    assert summary.largest_effect(Result("logit-lens", {"kl": torch.tensor([3.0])}), lookup) is None
    erasure = {"effect.0": torch.tensor([0.25]), "baseline": torch.tensor([50.0])}
    assert summary.largest_effect(Result("residual-erasure", erasure), lookup) == 0.25
    gradients = {"attn.f_input.0": torch.tensor(0.75), "attn.f_baseline.0": torch.tensor([0.5, 1.25])}
    assert summary.largest_effect(Result("integrated-gradients", gradients), lookup) == 0.5


@pytest.mark.parametrize("n_layers", [1, 2, 30])
def test_summary_is_json_and_complete(n_layers):
    results = synthetic_results(n_layers=n_layers, null=2e-6)
    log = {"skip-current": {"wall_time_s": 12.345, "passes": 7}}
    whole = summary.summarise(dict(reversed(results.items())), lookup, log=log)
    again = json.loads(json.dumps(whole, allow_nan=False))
    assert again == whole
    assert list(whole["analyses"]) == [name for name, kind in known().items() if kind.in_all]
    skip = whole["analyses"]["skip-current"]
    assert skip["file"] == "skip-current.safetensors"
    assert (skip["null_effect"], skip["passes"], skip["wall_time_s"]) == (2e-6, 7, 12.345)
    assert (skip["n_prompts"], skip["n_tokens"]) == (3, 321)
    assert whole["model"]["n_layers"] == n_layers
    assert whole["mixed"] == []


def test_summary_without_numbers_or_metadata():
    nan = Result("skip-current", {"layer.effect": torch.full((2, 2), math.nan)}, {"null_effect": math.nan})
    whole = summary.summarise({"skip-current": nan}, lookup)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["model"] is None
    assert whole["analyses"]["skip-current"]["null_effect"] is None
    assert whole["depth_scores"]["skip-current"]["layer"]["effect"] is None


def test_summary_names_what_differs_between_results():
    results = synthetic_results(n_layers=4)
    results["logit-lens"].metadata["model"] = {**results["logit-lens"].metadata["model"], "dtype": "bfloat16"}
    assert summary.summarise(results, lookup)["mixed"] == ["model"]


class Mine:
    """An analysis of a user's own that says numbers of its own."""

    name, heading, question, paper, order, tensors = "mine", "Mine", "", "", 0.5, {}
    figures = (Heatmap("effect", "How to read it."),)

    def numbers(self, result):
        return {"effective_depth": {"half": depths_of.depth("Half", 1, 4, "half of it")}, "mean": {"effect": math.nan}}

    def notes(self, result):
        return []


def test_numbers_of_a_users_own_analysis():
    own = Mine()
    result = Result("mine", {"effect": torch.tensor([[0.5, -2.0]])}, {"null_effect": 0.0})
    whole = summary.summarise(
        {"logit-lens": synthetic_results(n_layers=3)["logit-lens"], "mine": result},
        lambda result: own if result.analysis == "mine" else lookup(result),
    )
    assert list(whole["analyses"]) == ["mine", "logit-lens"]
    assert whole["effective_depth"]["half"]["ratio"] == 0.5
    assert whole["analyses"]["mine"]["numbers"] == {"mean": {"effect": None}}
    assert whole["analyses"]["mine"]["largest_effect"] == 2.0, "of its figures, where it says nothing"
    assert "numbers" not in whole["analyses"]["logit-lens"]


def test_what_a_run_took_comes_from_its_log_where_there_is_one():
    results = {"skip-current": synthetic_results(n_layers=3)["skip-current"]}
    own = summary.summarise(results, lookup, log={"skip-current": {"wall_time_s": 1.5, "passes": 2}})
    assert [own["analyses"]["skip-current"][key] for key in ("wall_time_s", "passes")] == [1.5, 2]
