"""Where branches are measured: every reduction, of values of both signs, against one plain pass a branch."""

import math
import random

import naive
import pytest
import torch
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import (
    AddVector,
    Branch,
    Custom,
    HookdepthError,
    Identity,
    LayerMeasurement,
    LogitDifference,
    OutputMeasurement,
    Patch,
    Scale,
    Skip,
    TargetProbability,
)
from hookdepth.engine.machines import PassCost
from hookdepth.engine.passes import measure, plan_for, run_top
from hookdepth.metrics import REDUCTIONS

L, D, T = 5, 64, 24
REDUCE = {"max": max, "min": min, "sum": math.fsum, "mean": lambda values: math.fsum(values) / len(values)}


class First(LayerMeasurement):
    """The first coordinate of the residual: of both signs, and no change."""

    def __init__(self, reduce):
        self.name, self.reduce = f"first-{reduce}", reduce

    def values(self, view):
        return view.resid_post[..., 0].float()


class FirstChange(First):
    """Its change: 0 where a branch is its clean run, of both signs elsewhere."""

    change = True

    def values(self, view):
        return (view.resid_post[..., 0] - view.clean(view.resid_post)[..., 0]).float()


class LogitChange(OutputMeasurement):
    change = True

    def __init__(self, reduce):
        self.name, self.reduce = f"logit-{reduce}", reduce

    def values(self, view):
        return (view.logits[..., 5] - view.logits[:1, :, 5]).float()


class LossChange(OutputMeasurement):
    """A change of the loss: no value at the last token, 0 at those that a pass leaves out."""

    change = needs_target = True

    def __init__(self, reduce):
        self.name, self.reduce = f"loss-{reduce}", reduce

    def values(self, view):
        index = view.next_tokens[None, :, None].expand(len(view.logits), -1, 1)
        loss = -view.logits.float().log_softmax(-1).gather(-1, index)[..., 0]
        return loss - loss[:1]


def vector(seed):
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def some_branches(n, seed):
    """Branches of every kind; most of them change late tokens only, so that their passes begin there."""
    source = random.Random(seed)
    branches = []
    for number in range(n):
        layer, kind = source.randrange(L), number % 6
        if kind < 3:
            first = source.randrange(12, T)
            measured = [None, slice(2, None, 3), [first - 3, first - 9, T - 2]][kind]
            patch = Patch("resid_pre", layer, 0.3 * vector(number), [first])
            branches.append(Branch((patch,), measured=measured, until=source.choice([None, layer, L - 1])))
        elif kind == 3:
            branches.append(Branch((AddVector("mlp_out", layer, -vector(number)),), cut=source.randrange(1, T - 1)))
        elif kind == 4:
            branches.append(Branch((Skip(layer),), cut=9, measured=slice(None, -1)))
        else:
            branches.append(Branch((Scale("attn_out", layer, 0.5, slice(15, None)),), measured=range(3, T - 1)))
    return branches


def edits_of(branch):
    (one,) = branch.interventions
    at = [p for p in range(T)[one.tokens] if p < (branch.cut or T)] if isinstance(one.tokens, slice) else one.tokens
    inputs = {}

    def edit(x):
        x = x.clone()
        if isinstance(one, Patch):
            x[0, at] = one.value
        elif isinstance(one, AddVector):
            x[0, at] += one.value
        elif isinstance(one, Scale):
            x[0, at] *= one.factor
        else:
            x[0, at] = inputs["pre"][0, at]
        return x

    return [("resid_pre", one.layer, lambda x: inputs.setdefault("pre", x))] * isinstance(one, Skip) + [
        (one.site, one.layer, edit)
    ]


@torch.no_grad()
def reference(hf, ids, branches):
    """name → [branch, (L)] of the branches and of their clean runs, by one plain pass each and Python's own sums."""
    clean = naive.run_with(hf, ids)
    rows = []
    for branch in branches:
        run = naive.run_with(hf, ids, edits_of(branch))
        alive = L if branch.until is None else branch.until + 1
        logits = run.logits[0] if branch.until in (None, L - 1) else clean.logits[0]
        streams = [*run.resid_post[:alive], *clean.resid_post[alive:]]
        at = branch.measured_positions(T)
        before = [p for p in at if p < T - 1]

        def loss(logits, before=before):
            return -logits.log_softmax(-1)[before, [ids[p + 1] for p in before]]

        def rows_of(logits, streams, at=at, loss=loss):
            return {
                "first": [h[0, at, 0].tolist() for h in streams],
                "change": [
                    (h[0, at, 0] - c[0, at, 0]).tolist() for h, c in zip(streams, clean.resid_post, strict=True)
                ],
                "logit": (logits[at, 5] - clean.logits[0, at, 5]).tolist(),
                "loss": (loss(logits) - loss(clean.logits[0])).tolist(),
                "difference": (logits[at, 5] - logits[at, 7]).tolist(),
            }

        rows.append((rows_of(logits, streams), rows_of(clean.logits[0], clean.resid_post)))
    return rows


def expected(rows, which, name, how):
    values = [row[which][name] for row in rows]
    deep = isinstance(values[0][0], list)
    return torch.tensor([[REDUCE[how](v) for v in row] if deep else REDUCE[how](row) for row in values])


@pytest.fixture(scope="module")
def llama():
    hf = tiny_model("llama")
    ids = prompts(1, T, seed=2)[0]
    branches = some_branches(48, seed=1)
    return hf, hookdepth.wrap(hf), ids, branches, reference(hf, ids, branches)


def close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=2e-4)


def changes():
    made = [kind(how) for how in REDUCTIONS for kind in (FirstChange, LogitChange, LossChange)]
    for measurement in made:
        if isinstance(measurement, FirstChange):
            measurement.name = f"change-{measurement.reduce}"
    return made


@pytest.mark.parametrize("limits", [{}, {"max_rows": 9}, {"max_row_tokens": 150}])
def test_changes_of_both_signs_in_passes_that_begin_late(llama, limits, monkeypatch):
    _, model, ids, branches, rows = llama
    monkeypatch.setattr("hookdepth.engine.passes.cost_of", lambda model: PassCost(0))
    results = measure(model, [ids], branches, changes(), **limits)
    late = [pass_ for pass_ in results.plan.walk() if pass_.prefix == "clean" and pass_.start > 2]
    assert late, "otherwise no token is left out, and this shows nothing"
    below = 0
    for how in REDUCTIONS:
        for name in ("change", "logit", "loss"):
            ours = (results.layer if name == "change" else results.output)[f"{name}-{how}"]
            close(ours, expected(rows, 0, name, how))
            below += (ours < -1e-3).sum().item()
            clean = (results.clean_layer if name == "change" else results.clean_output)[f"{name}-{how}"]
            assert clean.abs().max() == 0
    assert below > 100, "values below 0 survive"
    assert results.null_effect < 1e-4


def test_values_of_both_signs_alone_and_in_company(llama):
    _, model, ids, branches, rows = llama
    measurements = [First(how) for how in REDUCTIONS]
    measurements += [LogitDifference(5, 7, f"difference-{how}", how) for how in REDUCTIONS]
    together = measure(model, [ids], branches, measurements)
    mixed = measure(model, [ids], branches, [*measurements, *changes()])
    for how in REDUCTIONS:
        for results in (together, mixed):
            close(results.layer[f"first-{how}"], expected(rows, 0, "first", how))
            close(results.output[f"difference-{how}"], expected(rows, 0, "difference", how))
            close(results.clean_layer[f"first-{how}"], expected(rows, 1, "first", how))
            close(results.clean_output[f"difference-{how}"], expected(rows, 1, "difference", how))
        assert (expected(rows, 0, "first", how) < 0).any()
    for number in range(0, len(branches), 5):
        alone = measure(model, [ids], [branches[number]], measurements)
        for name, values in (alone.layer | alone.output).items():
            close(values[0], (together.layer | together.output)[name][number])


def test_the_clean_run_of_several_prompts_is_measured_where_each_branch_is(llama):
    """The prompts lie in one pass, padded, and differ in what is measured."""
    hf, model, _, _, _ = llama
    many = prompts(4, (7, 11, 5, 9), seed=8)
    branches = [Branch((Skip(1),), prompt=p, measured=[m]) for p in (0, 1, 3) for m in (0, 2, -1)]
    branches += [Branch((Skip(2),), prompt=1, measured=[2])]
    results = measure(model, many, branches, [First("max"), LogitDifference(5, 7)])
    assert results.passes == 1
    with torch.no_grad():
        clean = [naive.run_with(hf, ids) for ids in many]
    for number, branch in enumerate(branches):
        run, (at,) = clean[branch.prompt], branch.measured_positions(len(many[branch.prompt]))
        close(results.clean_layer["first-max"][number], torch.stack([h[0, at, 0] for h in run.resid_post]))
        close(results.clean_output["logit_difference"][number], run.logits[0, at, 5] - run.logits[0, at, 7])


def test_a_pass_that_holds_too_little_for_a_measurement_is_refused(llama, monkeypatch):
    """A plan made for changes leaves tokens out at which others have values."""
    _, model, ids, branches, _ = llama
    monkeypatch.setattr("hookdepth.engine.passes.cost_of", lambda model: PassCost(0))
    plan = plan_for(model, branches, [T])

    def run_all():
        for top in plan.passes:
            list(run_top(model, [ids], branches, plan, top, [First("max")]))

    with model.evaluating(), pytest.raises(HookdepthError, match="holds only some of the tokens"):
        run_all()


# What follows a token.


def test_the_last_token_is_not_its_own_target(llama):
    """In whatever company, also of longer prompts, whose padding repeats the last token."""
    hf, model, _, _, _ = llama
    many = prompts(2, (6, 9), seed=4)
    seen = []

    def loss(view):
        seen.append((view.prompt, list(view.positions), view.next_tokens.tolist()))
        index = view.next_tokens[None, :, None].expand(len(view.logits), -1, 1)
        return -view.logits.float().log_softmax(-1).gather(-1, index)[..., 0]

    branches = [Branch((Identity("resid_pre", 0),), prompt=p) for p in (0, 1)]
    measurements = [TargetProbability(), Custom("loss", loss, "mean", needs_target=True), First("max")]
    whole = Custom("positions", lambda view: torch.ones(view.logits.shape[:2]), "sum")
    for asked in (measurements, [*measurements, whole]):
        results = measure(model, many, branches, asked)
        for prompt, ids in enumerate(many):
            with torch.no_grad():
                logits = hf(torch.tensor([ids])).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
            p = logits.softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).sum()
            close(results.output["loss"][prompt], nll)
            close(results.output["target_probability"][prompt], p)
    assert results.output["positions"].tolist() == [6, 9], "others have the last token as ever"
    assert all(
        many[p][position + 1] == token for p, at, next_ in seen for position, token in zip(at, next_, strict=True)
    )


def test_nothing_with_a_target_is_refused(llama):
    _, model, ids, _, _ = llama
    branch = Branch((Skip(1),), measured=[-1])
    with pytest.raises(HookdepthError, match=r"'target_probability' of a branch .* last token alone"):
        measure(model, [ids], [branch], [TargetProbability()])
    assert measure(model, [ids], [branch], [LogitDifference(5, 7)]).output["logit_difference"].isfinite()


def test_targets_are_given_to_those_who_ask(llama):
    _, model, ids, _, _ = llama
    with pytest.raises(HookdepthError, match="set needs_target = True"):
        measure(model, [ids], [Branch((Skip(1),))], [Custom("mine", lambda view: view.next_tokens)])


def test_a_change_that_the_clean_run_has_too_is_none(llama):
    """Because of that promise tokens are left out."""
    _, model, ids, _, _ = llama

    class Wrong(First):
        change = True

    with pytest.raises(HookdepthError, match=r"'first-max' has change = True and gives .* on the clean run"):
        measure(model, [ids], [Branch((Skip(1),))], [Wrong("max")])
