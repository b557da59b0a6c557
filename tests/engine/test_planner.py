"""Plans: every branch measured once, within the limits, hardly more work than must be. No models, no forward calls."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from problems import problems

from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Identity, Patch, Skip, Subtract
from hookdepth.engine.machines import PassCost
from hookdepth.engine.plan import kept_tokens, pass_work, peak_rows, span_of
from hookdepth.engine.planner import make_plan
from hookdepth.model.sites import ORDER, PARTS

L = 30
CUTS = {20: (8, 12), 180: (160, 8, 104, 56)}
VECTOR = torch.zeros(4)
END = ORDER.index("resid_post")


def skips(cuts=(), parts=("layer",), current=True, n_layers=L):
    return [
        Branch((skip,), cut=cut)
        for part in parts
        for layer in range(n_layers)
        for skip in [Skip(layer, part)]
        for cut in [*([None] if current else []), *cuts]
    ]


def direct(cuts=(), n_layers=L):
    return [
        Branch((subtract,), cut=cut, until=layer)
        for layer in range(1, n_layers)
        for source in range(layer)
        for subtract in [Subtract(source, layer)]
        for cut in [None, *cuts]
    ]


def erasures(length, measured, n_layers=L):
    return [
        Branch((Patch("resid_pre", layer, VECTOR, [token]),), measured=measured)
        for layer in range(n_layers)
        for token in range(max(measured) + 1)
    ]


def times_measured(plan):
    return Counter(row for pass_ in plan.walk() for row in pass_.measured)


def layers_of(branch, n_layers):
    """The layers that a branch's row runs through, from what the branch says of itself."""
    layer, order = min((i.layer, ORDER.index(i.site)) for i in branch.interventions)
    first = layer + (ORDER[order] in ("neurons", "mlp_out", "extra_out", "resid_post"))
    return range(first, n_layers if branch.until is None else branch.until + 1)


def recount(plan, branches, n_layers):
    """Work, counted a layer, a row and a token at a time."""
    work = 0
    for pass_ in plan.walk():
        for layer in range(n_layers):
            rows = 2 * len(pass_.prompts) + sum(layer in layers_of(branches[row], n_layers) for row in pass_.rows)
            work += rows * len(range(pass_.start, pass_.stop))
    return work


@pytest.mark.parametrize("length", [13, 20, 180])
def test_skip_current_is_one_launch(length):
    plan = make_plan(skips(), [length], L)
    (pass_,) = plan.walk()
    assert (pass_.start, pass_.stop, pass_.prefix) == (0, length, "none")
    assert pass_.measured == frozenset(range(L))
    assert plan.peak_row_tokens == (L + 2) * length


@pytest.mark.parametrize("current", [True, False])
def test_every_cut_is_one_suffix_of_the_uncut_skips(current):
    cuts = CUTS[180]
    branches = skips(cuts, current=current)
    plan = make_plan(branches, [180], L)
    (top,) = plan.passes
    assert len(top.rows) == L
    assert top.record
    assert top.stop == (180 if current else max(cuts)), "nothing right of the last cut is needed"
    assert len(top.measured) == (L if current else 0)
    assert [s.start for s in top.suffixes] == sorted(cuts)
    for suffix in top.suffixes:
        assert (suffix.prefix, suffix.stop, suffix.record) == ("own", 180, False)
        assert suffix.measured == frozenset(n for n, b in enumerate(branches) if b.cut == suffix.start)


@pytest.mark.parametrize("length", [20, 180])
@pytest.mark.parametrize(
    "kind", ["current", "current+future", "all parts", "future", "local", "erasure", "erasure of a late answer"]
)
@pytest.mark.parametrize("limits", [{}, {"cost": PassCost(8, full=2048)}])
def test_work_is_close_to_the_least_possible(length, kind, limits):
    cuts = CUTS[length]
    branches = {
        "current": lambda: skips(),
        "current+future": lambda: skips(cuts),
        "all parts": lambda: skips(cuts, PARTS),
        "future": lambda: skips(cuts, current=False),
        "local": lambda: direct(cuts),
        "erasure": lambda: erasures(length, [length - 3, length - 2]),
        "erasure of a late answer": lambda: erasures(length, [length // 2, length - 2]),
    }[kind]()
    plan = make_plan(branches, [length], L, **limits)
    assert plan.least <= plan.work <= 1.15 * plan.least
    assert plan.work == recount(plan, branches, L)
    assert set(times_measured(plan)) == set(range(len(branches)))


def test_least_of_skips_by_hand():
    # Each clean run once, and the skip of layer s on tokens 1..19 of the layers after it.
    assert make_plan(skips(), [20], L).least == L * 20 + sum(range(L)) * 19
    # A cut adds its tokens; what is left of it is the uncut branch's.
    assert make_plan(skips((8,)), [20], L).least == L * 20 + sum(range(L)) * (19 + 12)
    assert make_plan(skips((8,), current=False), [20], L).least == L * 20 + sum(range(L)) * (7 + 12)


def test_local_branches_live_for_one_layer():
    branches = direct()
    plan = make_plan(branches, [180], L)
    assert all(span.layers == 1 for span in plan.spans)
    assert peak_rows(plan.spans) == L - 1  # those of the last layer, not all L(L−1)/2
    (pass_,) = plan.walk()
    assert plan.rows_of(pass_) == L + 1


def test_peak_rows_counts_what_lives_together():
    def span(layer, until):
        return span_of(Branch((Identity("resid_pre", layer),), until=until), 4, 10)

    assert peak_rows([]) == 0
    assert peak_rows([span(n, n) for n in range(10)]) == 1
    assert peak_rows([span(0, 4), span(4, 9), span(5, None), span(9, 9)]) == 3
    # Those that join at the last layer's output are there beside those that ran through it.
    assert peak_rows(span_of(branch, 4, 10) for branch in skips(n_layers=10)) == 10


@pytest.mark.parametrize(
    ("branch", "joins", "layers", "tokens"),
    [
        (Branch((Skip(3),)), (3, END), range(4, L), (1, 20)),
        (Branch((Skip(3, "mlp"),)), (3, ORDER.index("mlp_out")), range(4, L), (1, 20)),
        (Branch((Skip(3, "attn"),)), (3, ORDER.index("attn_out")), range(3, L), (1, 20)),
        (Branch((Patch("resid_pre", 3, VECTOR, [5]),), until=3), (3, 0), range(3, 4), (5, 20)),
        (Branch((Patch("resid_post", L - 1, VECTOR, [5]),), measured=[-2]), (L - 1, END), range(0), (5, 19)),
        (Branch((Skip(9), Identity("resid_pre", 2, [7, -18])), cut=8), (2, 0), range(2, L), (1, 20)),
    ],
)
def test_extents(branch, joins, layers, tokens):
    span = span_of(branch, 20, L)
    assert span.joins == joins
    assert range(span.first, span.last + 1) == layers
    assert span.layers == len(layers)
    assert (span.token, span.stop) == tokens


def test_what_is_not_a_change_is_computed_wherever_it_is_measured():
    branch = Branch((Patch("resid_pre", 3, VECTOR, [15]),), measured=[2, 17])
    assert span_of(branch, 20, L).token == 15
    assert span_of(branch, 20, L, changes_only=False).token == 2
    branches = erasures(100, [3, 98])
    starts = [pass_.start for pass_ in make_plan(branches, [100], L, changes_only=False).walk()]
    assert max(starts) <= 3
    assert max(pass_.start for pass_ in make_plan(branches, [100], L).walk()) > 50


def test_erasure_groups_first_tokens():
    branches = erasures(40, [37, 38])
    plan = make_plan(branches, [40], L, cost=PassCost(32))
    (top,) = plan.passes
    assert top.prefix == "none"
    assert {plan.spans[row].token for row in top.rows} == set(range(top.suffixes[0].start)), "the first group itself"
    assert 5 < len(top.suffixes) < 39, "several tokens a pass, several passes"
    assert all(suffix.prefix == "clean" for suffix in top.suffixes)
    for pass_ in top.walk():
        assert pass_.stop == 39
        assert pass_.measured == set(pass_.rows)
        assert pass_.rows == tuple(sorted(pass_.rows, key=lambda i: (plan.spans[i].joins, i)))
    # A pass that costs nothing holds one token's branches; a dear one holds all.
    assert len(make_plan(branches, [40], L, cost=PassCost(0)).passes[0].suffixes) > len(top.suffixes)
    assert make_plan(branches, [40], L, cost=PassCost(10_000), max_row_tokens=1 << 20).n_passes == 1


@pytest.mark.parametrize("pass_cost", [0, 1, 3])
@pytest.mark.parametrize(("n_layers", "max_row_tokens"), [(4, 150), (4, 300), (4, 1 << 20), (8, 115)])
def test_erasure_groups_are_the_best(pass_cost, n_layers, max_row_tokens):
    """Against all 2¹¹ ways to divide twelve first tokens into runs; the last limit splits one token's branches."""
    length = 12
    branches = erasures(length, [length - 1], n_layers)
    plan = make_plan(branches, [length], n_layers, cost=PassCost(pass_cost), max_row_tokens=max_row_tokens)
    assert plan.passes[0].suffixes, "there is something to divide"
    layers = sum(len(layers_of(b, n_layers)) for b in branches) // length  # of the branches of one token

    def cost(start, stop):
        width, rows = length - start, n_layers * (stop - start)
        most = max(1, max_row_tokens // width - 2)
        if stop - start > 1 and rows > most:
            return float("inf")
        passes = -(-rows // most)
        own = width * (layers * (stop - start) + passes * 2 * n_layers)
        return own + passes * pass_cost * n_layers

    best = min(
        sum(cost(a, b) for a, b in zip((0, *inner), (*inner, length), strict=True))
        for n in range(length)
        for inner in combinations(range(1, length), n)
    )
    assert plan.work + plan.n_passes * pass_cost * n_layers == best
    assert plan.cost == best


def test_clean_runs_are_alone_where_that_costs_less():
    """The first group starts at token 0 where its tokens left of what changes cost less than a pass of clean runs."""
    for first, alone in ((1, False), (30, True)):
        branches = [branch for branch in erasures(40, [38]) if branch.interventions[0].tokens[0] >= first]
        (top,) = make_plan(branches, [40], L, cost=PassCost(32)).passes
        assert (top.rows == ()) is alone
        assert top.start == 0
        assert top.stop == (max(suffix.start for suffix in top.suffixes) if alone else 39)


def test_trunk_prefix_only_where_it_saves():
    # All branches change token 0: starting anywhere else is impossible.
    everywhere = [Branch((Patch("resid_pre", layer, VECTOR),), measured=[-1]) for layer in range(L)]
    assert [pass_.prefix for pass_ in make_plan(everywhere, [50], L).walk()] == ["none"]
    # All change the last ten tokens only: the rest is the clean run's, computed once.
    late = [Branch((Patch("resid_pre", layer, VECTOR, slice(40, None)),)) for layer in range(L)]
    assert [pass_.prefix for pass_ in make_plan(late, [50], L).walk()] == ["none", "clean"]


def test_short_prompts_share_launches():
    lengths = [12, 5, 9, 12, 7, 11]
    branches = [
        Branch((skip,), prompt=prompt, cut=cut)
        for prompt in range(6)
        for layer in range(L)
        for skip in [Skip(layer)]
        for cut in (None, 4)
    ]
    together = make_plan(branches, lengths, L, cost=PassCost(200))
    assert len(together.passes) == 1
    assert together.passes[0].prompts == tuple(range(6))
    assert together.passes[0].stop == 12
    assert [s.prompts for s in together.passes[0].suffixes] == [tuple(range(6))]
    alone = make_plan(branches, lengths, L, cost=PassCost(32, full=1))
    assert [pass_.prompts for pass_ in alone.passes] == [(1,), (4,), (2,), (5,), (0,), (3,)]
    assert [pass_.stop for pass_ in alone.passes] == [5, 7, 9, 11, 12, 12]
    some = make_plan(branches, lengths, L, cost=PassCost(60, full=64 * 12))
    assert all(len(pass_.prompts) <= 2 for pass_ in some.passes)
    assert len(some.passes) == 3
    assert all(plan.rows_of(la) * la.stop <= 64 * 12 for plan in [some] for la in some.passes)


def test_where_a_pass_is_dear_there_are_fewer_of_them():
    """Weights that take long to read are read less often, though more tokens are computed: prompts, tokens and cuts."""
    lengths = [10, 14, 18, 22]
    cases = {
        "prompts": ([Branch((Skip(n),), prompt=p) for p in range(4) for n in range(0, L, 10)], lengths),
        "tokens": (erasures(60, [58]), [60]),
        "cuts": (skips((8, 30, 50)), [60]),
    }
    room = {"max_row_tokens": 1 << 20}
    for name, (branches, own) in cases.items():
        cheap, dear = (make_plan(branches, own, L, cost=PassCost(start, full=1 << 20), **room) for start in (1, 10_000))
        assert (dear.n_passes, cheap.n_passes > 3) == (1, True), name
        assert dear.work > cheap.work, name
        assert times_measured(dear) == times_measured(cheap) == Counter(range(len(branches))), name


def test_where_the_device_waits_for_the_host_tokens_are_free():
    """Up to `least` tokens a layer a pass costs the same, so that what fits beneath it runs together."""
    branches = skips((8, 30, 50))
    apart = make_plan(branches, [60], L, cost=PassCost(0))
    assert apart.n_passes == 4
    assert apart.cost == apart.work
    waiting = PassCost(0, least=10_000)
    together = make_plan(branches, [60], L, cost=waiting)
    assert together.n_passes == 1
    assert together.work > 1.4 * apart.work
    assert together.cost == 10_000 * L
    # Of a twentieth of that every pass has its fill.
    assert make_plan(branches, [60], L, cost=PassCost(0, least=500)).n_passes == 4


def test_a_prompt_joins_others_only_where_padding_costs_less_than_a_pass():
    branches = [Branch((Skip(3),), prompt=prompt) for prompt in range(3)]
    assert [top.prompts for top in make_plan(branches, [5, 150, 6], L, cost=PassCost(10)).passes] == [(0, 2), (1,)]
    assert [top.prompts for top in make_plan(branches, [5, 150, 6], L, cost=PassCost(1000)).passes] == [(0, 1, 2)]


def test_a_plan_costs_what_its_passes_do():
    for cost in (PassCost(7), PassCost(7, least=2000)):
        plan = make_plan(skips((8,)), [20], L, cost=cost)
        works = [pass_work(one, plan.spans, L) for one in plan.walk()]
        assert plan.cost == sum(max(cost.least * L, work + 7 * L) for work in works)


def test_equal_branches_are_all_measured():
    skip = Skip(3)
    branches = [Branch((skip,)), Branch((skip,), measured=[5]), Branch((skip,), until=6), Branch((skip,), cut=8)]
    branches += [Branch((skip,), cut=8, measured=[-1]), Branch((skip,), cut=8, until=9)]
    plan = make_plan(branches, [20], L)
    assert times_measured(plan) == Counter(range(6))
    assert plan.work == recount(plan, branches, L)


def test_limits_hold_for_the_suffixes_of_short_prefixes():
    # Eight tokens left of the cut, 172 right of it.
    plan = make_plan(skips((8,), current=False), [180], L, max_row_tokens=1000)
    assert plan.peak_row_tokens <= 1000
    assert set(times_measured(plan)) == set(range(L))


def test_limits_hold_where_long_and_short_lives_mix():
    branches = [Branch((Skip(layer),), until=None if layer % 2 == 0 else layer + 1) for layer in range(12)]
    plan = make_plan(branches, [20], L, max_rows=6)
    assert max(plan.rows_of(pass_) for pass_ in plan.walk()) <= 6


def test_launches_of_other_kinds_do_not_mix():
    branches = [*skips((8,)), *erasures(60, [58])]
    plan = make_plan(branches, [60], L)
    assert {pass_.prefix for pass_ in plan.walk()} == {"none", "own", "clean"}
    assert times_measured(plan) == Counter(range(len(branches)))


def test_table_has_a_line_for_each_launch_and_the_totals():
    plan = make_plan(skips(CUTS[180]), [180], L)
    heading, *lines, total = plan.table().splitlines()
    assert heading.split() == ["pass", "prompts", "prefix", "tokens", "rows", "token-layers"]
    assert [line.split()[2:5] for line in lines] == [
        ["none", "0..179", "32"],
        *(["own", f"{cut}..179", "32"] for cut in sorted(CUTS[180])),
    ]
    work = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(work) == plan.work
    assert f"{plan.work:,}" in total
    assert f"{plan.least:,}" in total
    assert f"{plan.work / plan.least:.2f}" in total


def test_nothing_to_plan():
    plan = make_plan([], [20], L)
    assert (plan.n_passes, plan.work, plan.least, plan.peak_row_tokens) == (0, 0, 0, 0)
    assert plan.table().splitlines()[-1].startswith("work 0")


@given(problems())
@settings(max_examples=400)
def test_any_plan(problem):
    branches, lengths, n_layers, limits, only = problem
    plan = make_plan(branches, lengths, n_layers, only=only, **limits)
    assert times_measured(plan) == Counter(range(len(branches)) if only is None else sorted(only))
    assert plan.work == recount(plan, branches, n_layers)
    assert plan.least <= plan.work
    for top in plan.passes:
        assert top.prefix == "none"
        assert top.start == 0
        for pass_ in top.walk():
            check_launch(pass_, top, branches, lengths, n_layers, limits["changes_only"])
            check_limits(plan, pass_, limits)


def check_launch(pass_, top, branches, lengths, n_layers, changes_only):
    assert 0 <= pass_.start < pass_.stop <= max(lengths[prompt] for prompt in pass_.prompts)
    assert pass_.measured <= set(pass_.rows)
    assert pass_.record == bool(pass_.suffixes)
    assert set(pass_.prompts) >= {branches[row].prompt for row in pass_.rows}
    if pass_ is not top:
        assert top.stop >= pass_.start, "keys and values left of it are recorded"
        assert set(top.prompts) >= set(pass_.prompts)
    joining = [span_of(branches[row], lengths[branches[row].prompt], n_layers).joins for row in pass_.rows]
    assert joining == sorted(joining), "rows in the order in which they join"
    for row in pass_.rows:
        branch = branches[row]
        length = lengths[branch.prompt]
        changed = span_of(branch, length, n_layers).token
        if pass_.prefix == "own":
            assert branch.cut == pass_.start
            # Its keys left of the cut are those of a row with the same interventions that lives as long.
            lenders = [branches[other] for other in top.rows]
            assert any(
                (b.prompt, b.until) == (branch.prompt, branch.until)
                and all(one is other for one, other in zip(b.interventions, branch.interventions, strict=False))
                and len(b.interventions) == len(branch.interventions)
                for b in lenders
            )
        elif row in pass_.measured:
            assert branch.cut is None or (pass_ is top and not pass_.suffixes), "it has a row of its own"
        if pass_.prefix == "clean":
            measured = branch.measured_positions(length)
            assert changed >= pass_.start or changed > max(measured), "left of it the branch is its clean run"
        if row in pass_.measured:
            measured = branch.measured_positions(length)
            assert max(measured) < pass_.stop
            if not changes_only:
                assert min(measured) >= pass_.start
        else:
            assert branch.cut is not None
            assert pass_.stop >= branch.cut


def check_limits(plan, pass_, limits):
    alone = len(pass_.prompts) == 1 and peak_rows(plan.spans[row] for row in pass_.rows) <= 1
    if not alone:
        assert plan.rows_of(pass_) <= (limits["max_rows"] or 1 << 30)
        assert plan.rows_of(pass_) * (pass_.stop - pass_.start) <= limits["max_row_tokens"]
    if limits["max_kept_tokens"] is not None:
        assert pass_.prefix != "clean", "keys and values that are handed on would hold on to their graph"
        if len(pass_.rows) > 1:
            assert kept_tokens(pass_, plan.spans) <= limits["max_kept_tokens"]
