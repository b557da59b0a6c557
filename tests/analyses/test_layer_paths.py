"""layer-paths and layer-pruning: their tensors are what layers called by hand give."""

import json
import math
from dataclasses import replace

import naive
import pytest
import torch
from tiny_families import tiny
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import HookdepthError
from hookdepth.analyses import Inputs, Settings, Subject, find
from hookdepth.analyses.layer_paths import PAIRS, SPANS
from hookdepth.analyses.spans import rearranged
from hookdepth.metrics import rank_correlation
from hookdepth.report.figures import pictures_of
from hookdepth.report.notebook import columns
from hookdepth.results import Result
from hookdepth.runs.sharing import groups_of

L = 5
IDS = tuple(map(tuple, prompts(2, (20, 13))))


@pytest.fixture(scope="module")
def subject():
    model = hookdepth.wrap(tiny_model("llama"))
    return Subject(model, Inputs(prompts=IDS), Settings(paths=["0-2,1-4", "0,2+3,4"], keep=2))


def results(subject, name):
    (group,) = groups_of([find(name)], subject)
    partials = [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)]
    assert max(partial.null_effect for partial in partials) < 1e-6
    return group.finish(partials)[name]


@pytest.fixture(scope="module")
def paths(subject):
    return results(subject, "layer-paths")


@pytest.fixture(scope="module")
def pruning(subject):
    return results(subject, "layer-pruning")


def by_hand(hf, path, front=0):
    """(loss, kl, agreement) of each prompt, and how many tokens each is a mean of."""
    found = []
    for ids in IDS:
        clean, own = (
            naive.visit(hf, ids, [stage if isinstance(stage, tuple) else (stage,) for stage in stages])[-1][0]
            for stages in (range(L), path)
        )
        logs, clean_logs = own.log_softmax(-1), clean.log_softmax(-1)
        loss = -logs[:-1].gather(-1, torch.tensor(ids)[1:, None])[front:].mean()
        kl = (clean_logs.exp() * (clean_logs - logs)).sum(-1)[front:].mean()
        found.append([loss.item(), kl.item(), (own.argmax(-1) == clean.argmax(-1))[front:].float().mean().item()])
    return torch.tensor(found)


def over_prompts(found):
    tokens = torch.tensor([[len(ids) - 1, len(ids), len(ids)] for ids in IDS])
    return (found * tokens).sum(0) / tokens.sum(0)


def test_every_path_is_layers_called_by_hand(subject, paths):
    places = [(kind, (a, b), rearranged(kind, a, b, L)) for kind in SPANS for a in range(L) for b in range(a, L)]
    places += [(kind, a, rearranged(kind, a, a + 1, L)) for kind in PAIRS for a in range(L - 1)]
    places += [("paths", 0, [0, 1, 2, 1, 2, 3, 4]), ("paths", 1, [0, (2, 3), 4])]
    for kind, place, path in places:
        each = by_hand(subject.model.hf, path)
        for value, mean, own in zip(("loss", "kl", "agreement"), over_prompts(each), each.T, strict=True):
            assert paths[f"{kind}.{value}"][place].item() == pytest.approx(mean.item(), rel=1e-4, abs=1e-5)
            per_prompt = paths[f"per_prompt.{kind}.{value}"][(slice(None), *torch.atleast_1d(torch.tensor(place)))]
            torch.testing.assert_close(per_prompt, own, rtol=1e-4, atol=1e-5)
    clean = over_prompts(by_hand(subject.model.hf, range(L)))[0].item()
    assert paths["clean_loss"].item() == pytest.approx(clean, rel=1e-5)
    for kind in SPANS:
        assert paths[f"{kind}.loss"].tril(-1).isnan().sum() == L * (L - 1) / 2
        assert not paths[f"{kind}.loss"].triu().isnan().any()


def test_the_first_tokens_are_neither_changed_nor_measured(subject):
    found = results(replace(subject, settings=Settings(keep_front=4, paths=("0-2,1-4",))), "layer-paths")
    clean = by_hand(subject.model.hf, range(L), front=4)
    tokens = torch.tensor([len(ids) - 5 for ids in IDS])
    expected = ((clean[:, 0] * tokens).sum() / tokens.sum()).item()
    assert found["clean_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert found["reverse.kl"].diagonal().abs().max() == 0 < found["skip.kl"].nan_to_num(1).min()


def test_magnitudes_are_those_of_the_clean_run(subject, paths):
    streams = [naive.run_with(subject.model.hf, ids).stream() for ids in IDS]
    cosine = torch.nn.functional.cosine_similarity
    for layer in range(L):
        each = torch.cat([1 - cosine(own[layer][0], own[layer + 1][0], dim=-1) for own in streams])
        assert paths["block_influence"][layer].item() == pytest.approx(each.mean().item(), abs=1e-5)
    ends = [[point[0, -1].double() for point in own] for own in streams]
    angles = [math.acos(cosine(own[1], own[4], dim=0).item()) / math.pi for own in ends]
    assert paths["angular_distance"][1, 3].item() == pytest.approx(sum(angles) / 2, abs=1e-6)


def test_greedy_takes_the_cheapest_layer_again_and_again(subject, pruning):
    left, losses = [*range(L)], [over_prompts(by_hand(subject.model.hf, range(L)))[0].item()]
    order = []
    for _ in range(L - 2):
        cost = {n: over_prompts(by_hand(subject.model.hf, [m for m in left if m != n]))[0].item() for n in left}
        best = min(cost, key=cost.get)
        left.remove(best)
        order.append(best)
        losses.append(cost[best])
    assert pruning["order"].tolist() == order
    assert pruning["greedy.loss"].tolist() == pytest.approx(losses, rel=1e-5)


def test_the_other_rules(subject, paths, pruning):
    skip, gone = paths["skip.loss"], paths["block_influence"].argsort().tolist()
    clean = paths["clean_loss"].item()
    spans = [clean, *(skip.diagonal(more).min().item() for more in range(L - 2))]
    assert pruning["span.loss"].tolist() == pytest.approx(spans, rel=1e-5)
    left = [[n for n in range(L) if n not in gone[:step]] for step in range(L - 1)]
    expected = [over_prompts(by_hand(subject.model.hf, path))[0].item() for path in left]
    assert pruning["influence.loss"].tolist() == pytest.approx(expected, rel=1e-5)
    assert pruning["random.loss"][0].item() == pytest.approx(clean, rel=1e-5)
    angles = paths["angular_distance"]
    spans = [clean, *(skip.diagonal(more)[angles.diagonal(more).argmin()].item() for more in range(L - 2))]
    assert pruning["distance.loss"].tolist() == pytest.approx(spans, rel=1e-5)
    for rule in ("greedy", "influence", "span", "distance", "random"):
        each, tokens = pruning[f"per_prompt.{rule}.loss"], torch.tensor([len(ids) - 1.0 for ids in IDS])
        torch.testing.assert_close(tokens @ each / tokens.sum(), pruning[f"{rule}.loss"], rtol=1e-5, atol=1e-5)


def test_numbers_notes_and_figures(paths, pruning):
    for name, tensors in (("layer-paths", paths), ("layer-pruning", pruning)):
        analysis, result = find(name), Result(name, tensors, {"null_effect": 0.0, "data": {"n_prompts": 2}})
        numbers = analysis.numbers(result)
        assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
        assert all(isinstance(line, str) for line in analysis.notes(result))
        for _, pictures in pictures_of(result, analysis):
            for picture in pictures:
                assert picture.draw().axes
    numbers = find("layer-paths").numbers(Result("layer-paths", paths, {}))
    settings = {"paths": ["0-2,1-4", "0,2+3,4"]}
    given = find("layer-paths").numbers(Result("layer-paths", paths, {"settings": settings}))["paths"]
    assert [one["path"] for one in given] == settings["paths"]
    assert [one["loss"] for one in given] == paths["paths.loss"].tolist()
    best = numbers["cheapest_omissions"][0]
    assert best["loss"] == paths["skip.loss"].nan_to_num(99).min() == paths["skip.loss"][best["first"], best["last"]]


def test_a_table_holds_the_number_of_no_axis_too(paths):
    rows = columns(Result("layer-paths", paths, {}), find("layer-paths"), ["clean_loss", "swap.loss"])
    assert rows["tensor"] == ["clean_loss", *["swap.loss"] * (L - 1)]
    assert rows["value"][0] == paths["clean_loss"].item()


def test_two_triangles_make_one_map(paths):
    (kind,) = [one for one in find("layer-paths").figures if one.name == "spans"]
    ((_, (picture, *_)), *_) = pictures_of(Result("layer-paths", paths, {}), find("layer-paths"))
    matrix, clean = picture.values[0].matrix, paths["clean_loss"]
    assert matrix.shape == (L, L + 1)
    assert not matrix.isnan().any()
    assert kind.minus == "clean_loss"
    for a in range(L):
        for b in range(a, L):
            assert matrix[a, b + 1] == paths["repeat.loss"][a, b] - clean
            assert matrix[b, a] == paths["skip.loss"][a, b] - clean


def test_pairs_are_drawn_from_the_loss_of_the_model_on(paths):
    (kind,) = [one for one in find("layer-paths").figures if one.name == "pairs"]
    (picture,) = kind.pictures(Result("layer-paths", paths, {}), find("layer-paths"))
    drawn = dict(zip(picture.values[0].columns, picture.values[0].matrix.T, strict=True))
    each = paths["per_prompt.swap.loss"] - paths["per_prompt.clean_loss"][:, None]
    torch.testing.assert_close(drawn["exchanged"], paths["swap.loss"] - paths["clean_loss"])
    assert ((drawn["exchanged, 95 % from"] - each.min(0).values) > -1e-6).all()
    (line,) = [one for one in picture.draw().axes[0].lines if one.get_label() == "exchanged"]
    assert line.get_ydata().tolist() == pytest.approx(drawn["exchanged"].tolist())


def test_rank_correlation():
    ranks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(ranks, ranks**3) == pytest.approx(1)
    assert rank_correlation(ranks, -ranks) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(0.75**0.5)
    assert rank_correlation(ranks, torch.ones(4)) is None


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("layer-paths", {"paths": ["0-5"]}, "layer 5 of a model of 5"),
        ("layer-pruning", {"keep": 5}, "none to take out"),
    ],
)
def test_what_is_refused(subject, name, settings, says):
    with pytest.raises(HookdepthError, match=says):
        groups_of([find(name)], replace(subject, settings=Settings(**settings)))


def test_a_model_without_attention():
    model = hookdepth.wrap(tiny("mamba"), name="tiny")
    found, turned = results(Subject(model, Inputs(prompts=IDS), Settings()), "layer-paths"), []

    def look(_layer, given, gave):
        turned.append(1 - torch.cosine_similarity(given[0].double(), gave.double(), dim=-1).flatten())

    model.layers[0].register_forward_hook(look)
    with torch.no_grad():
        for ids in IDS:
            model.hf(torch.tensor([ids]))
    assert found["block_influence"][0].item() == pytest.approx(torch.cat(turned).mean().item(), abs=1e-5)


@pytest.mark.parametrize(("name", "front"), [("layer-paths", 0), ("layer-paths", 12), ("layer-pruning", 0)])
def test_a_prompt_without_a_next_token_is_refused_before_anything_runs(subject, name, front):
    inputs = Inputs(prompts=(IDS[0], IDS[1] if front else IDS[1][:1]))
    settings = Settings(keep_front=front or None)
    with pytest.raises(HookdepthError, match=r"prompt 1 has .* no next token"):
        groups_of([find(name)], Subject(subject.model, inputs, settings))


@pytest.mark.parametrize("given", ["0-", 5, [3], [["0-1"]]])
def test_paths_that_are_none(given):
    with pytest.raises(HookdepthError):
        Settings(paths=given)
