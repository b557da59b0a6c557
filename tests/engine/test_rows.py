"""The rows of a pass, against a plain account of which branch lives where."""

import pytest
import torch
from hypothesis import given, settings
from problems import problems
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.analyses import Settings
from hookdepth.analyses.integrals import Path, attribute
from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Identity, Patch, Skip, Subtract
from hookdepth.engine.machines import PassCost
from hookdepth.engine.measurements import LayerEffect, OutputEffect, TargetProbability
from hookdepth.engine.passes import measure
from hookdepth.engine.plan import CLEAN, CONTROL, family_of
from hookdepth.engine.planner import make_plan
from hookdepth.engine.rows import RowTable
from hookdepth.model.sites import ORDER

LAST = len(ORDER) - 1
CPU = torch.device("cpu")
GRADIENTS = Settings(ig_method="riemann", ig_steps=8)


def table_of(pass_, branches, plan):
    return RowTable(pass_, branches, plan.spans, plan.n_layers, lambda layer: CPU)


def born(branch, prefix):
    """(layer, place of the site) where a branch's row joins."""
    layer, order = min((i.layer, ORDER.index(i.site)) for i in branch.interventions)
    # Right of a cut nothing is changed: what differs there are keys, the first of them in the next layer.
    return (layer, LAST) if prefix == "own" and order else (layer, order)


@given(problems())
@settings(max_examples=150)
def test_rows_join_and_leave_where_their_branches_say(problem):
    branches, lengths, n_layers, limits, only = problem
    plan = make_plan(branches, lengths, n_layers, only=only, **limits)
    for top in plan.passes:
        parent = table_of(top, branches, plan)
        for pass_ in top.walk():
            table = table_of(pass_, branches, plan)
            n_clean = len(pass_.prompts)
            of = {2 * n_clean + n: branches[row] for n, row in enumerate(pass_.rows)}  # row id → branch
            assert [pass_.prompts[slot] for slot in table.slot] == [
                *pass_.prompts,
                *pass_.prompts,
                *(branch.prompt for branch in of.values()),
            ]
            for layer, rows in enumerate(table.layers):
                always = set(range(2 * n_clean))
                until = {n: n_layers if b.until is None else b.until for n, b in of.items()}
                alive = {n for n, b in of.items() if born(b, pass_.prefix) < (layer, 0) and layer <= until[n]}
                joining = [{n for n, b in of.items() if born(b, pass_.prefix) == (layer, s)} for s in range(LAST + 1)]
                nulls = set(range(n_clean, 2 * n_clean)) if layer == 0 else set()
                assert set(rows.born["resid_pre"]) == joining[0] | nulls
                assert [set(rows.born[site]) for site in ORDER[1:]] == joining[1:]
                assert set(rows.inside) == always.union(alive, *joining[:LAST])
                late = set().union(*joining[ORDER.index("z") : LAST])
                assert rows.attending == [id_ for id_ in rows.inside if id_ not in late]
                assert rows.outside == rows.inside + rows.born["resid_post"]
                assert len(set(rows.outside)) == len(rows.outside)
                last = layer == n_layers - 1
                going_on = [id_ for id_ in rows.outside if id_ in always or until[id_] > layer or last]
                assert rows.staying == going_on
                assert rows.places.tolist() == places_of(table, rows.outside)
                kept = rows.outside if rows.keep is None else [rows.outside[n] for n in rows.keep.tolist()]
                assert kept == going_on
                assert rows.outside[:n_clean] == list(range(n_clean)), "clean runs come first"
                if n_clean > 1:
                    assert rows.slots.tolist() == [table.slot[id_] for id_ in rows.outside]
                else:
                    assert rows.slots is None
                assert rows.outside[rows.clean] == list(table.clean_ids)
                assert rows.before("neurons") <= plan.rows_of(pass_), "the others run through no more than a sum"
                if pass_.prefix == "own":
                    check_own_prefix(pass_, table, parent, branches, layer)
                if pass_.prefix == "clean":
                    recorded = [
                        parent.keys[parent.layers[layer].attending[n]] for n in table.prefix_rows(layer, parent)
                    ]
                    assert recorded == [(pass_.prompts[table.slot[id_]], CLEAN) for id_ in rows.attending]
            assert set(table.final) == always | {n for n, b in of.items() if b.until in (None, n_layers - 1)}


def places_of(table, outside):
    """Where each row of the pass is found at a layer's output, and where its clean run is."""
    clean = [outside.index(table.clean_ids[slot]) for slot in table.slot]
    return [[outside.index(id_) if id_ in outside else own for id_, own in enumerate(clean)], clean]


def check_own_prefix(pass_, table, parent, branches, layer):
    wanted = [
        (pass_.prompts[table.slot[id_]], (CLEAN, CONTROL)[id_ // len(pass_.prompts)])
        if id_ < 2 * len(pass_.prompts)
        else family_of(branches[pass_.rows[id_ - 2 * len(pass_.prompts)]])
        for id_ in table.layers[layer].attending
    ]
    assert [parent.keys[parent.layers[layer].attending[n]] for n in table.prefix_rows(layer, parent)] == wanted


def test_edits_are_listed_where_they_happen():
    first, second, third = Identity("resid_pre", 1), Skip(1, "attn"), Identity("attn_out", 1)
    branches = [Branch((first, second)), Branch((third, second))]
    plan = make_plan(branches, [8], 3)
    table = table_of(plan.passes[0], branches, plan)
    assert table.edits == {(1, "resid_pre"): {2: [first]}, (1, "attn_out"): {2: [second], 3: [third, second]}}


def test_nothing_is_changed_right_of_a_cut():
    branches = [Branch((Skip(1),), cut=4)]
    plan = make_plan(branches, [8], 3, cost=PassCost(0))
    (top,) = plan.passes
    assert table_of(top, branches, plan).edits
    assert not table_of(top.suffixes[0], branches, plan).edits


@pytest.mark.parametrize("site", ORDER)
def test_a_row_joins_at_its_site(site):
    branches = [Branch((Patch(site, 1, torch.zeros(2)),))]
    plan = make_plan(branches, [8], 3)
    rows = table_of(plan.passes[0], branches, plan).layers[1]
    assert rows.born[site] == [2]
    assert rows.outside == [0, 1, 2]
    for place, other in enumerate(ORDER[:-1]):
        assert rows.before(other) == (3 if ORDER.index(site) < place else 2)


def shuffled(n_prompts, n_branches):
    branches, controls = range(n_branches), range(n_branches, n_branches + n_prompts)
    return range(controls.stop, controls.stop + n_prompts), controls, branches


def everything(model, ids):
    """All kinds of passes: two prompts in one, cuts, rows that leave early, contributions, targets."""
    branches = [Branch((Skip(s, part),), prompt=p) for p in range(2) for s in range(4) for part in ("layer", "attn")]
    branches += [Branch((Skip(s, "mlp"), Identity("resid_post", 4)), until=4) for s in range(4)]
    shared = [Skip(s) for s in range(3)]
    branches += [Branch((skip,), prompt=1, cut=cut) for skip in shared for cut in (3, 7)]
    branches += [Branch((Subtract(1, 3),), prompt=p) for p in range(2)]
    branches += [Branch((Patch("resid_pre", 2, torch.ones(64), [9]),), measured=[-2, -1])]
    return measure(model, ids, branches, [LayerEffect(), OutputEffect(), TargetProbability()])


def test_the_table_alone_knows_the_order_of_its_rows(monkeypatch):
    """With other ids for clean runs, controls and branches, nothing else in the package notices."""
    model, ids = hookdepth.wrap(tiny_model("llama-gqa")), prompts(2, (14, 11))
    plain = everything(model, ids)
    path = Path(model, Probe("", "", tuple(ids[0]), tuple(map(str, ids[0])), (11, 12)), "layer")
    attribution = attribute(path, GRADIENTS)["attribution"]
    monkeypatch.setattr(RowTable, "_layout", staticmethod(shuffled))
    moved = everything(model, ids)
    for name in ("layer", "output", "clean_layer", "clean_output"):
        before, after = getattr(plain, name), getattr(moved, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert moved.null_effect == plain.null_effect
    path = Path(model, Probe("", "", tuple(ids[0]), tuple(map(str, ids[0])), (11, 12)), "layer")
    assert torch.equal(attribute(path, GRADIENTS)["attribution"], attribution)
