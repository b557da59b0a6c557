"""The engine: what a branch gives is what one plain hooked forward pass gives, however passes are packed.

Where a test says bit for bit, it uses prompts of 20 or 24 tokens: on a CPU a float32 matrix product treats all rows
alike there. At one token a pass it does not, and the noise (5e-7) is what the null branch is for.
"""

import random
from collections import Counter
from dataclasses import dataclass

import naive
import pytest
import torch
from accelerate import dispatch_model
from hooks import hooks_of
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import (
    AddVector,
    Branch,
    Custom,
    HookdepthError,
    Identity,
    Intervention,
    LayerEffect,
    LayerMeasurement,
    LogitDifference,
    OutputEffect,
    Patch,
    Scale,
    Skip,
    Subtract,
    TargetProbability,
)
from hookdepth.engine import forward as launching
from hookdepth.engine import passes as branching
from hookdepth.engine.machines import PassCost
from hookdepth.engine.passes import measure, plan_for
from hookdepth.engine.reading import capture
from hookdepth.engine.tokens import positions
from hookdepth.model.sites import SITES

L, D, T = 5, 64, 20
EFFECTS = (LayerEffect(), OutputEffect())
FAMILIES = ("llama", "gemma2", "granite")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    hf = tiny_model(request.param)
    return hf, hookdepth.wrap(hf), prompts(1, T)[0]


@pytest.fixture(scope="module")
def llama():
    hf = tiny_model("llama")
    return hf, hookdepth.wrap(hf), prompts(1, T)[0]


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, ids, branches, measurements=EFFECTS, **limits):
    return measure(model, [ids] if isinstance(ids[0], int) else ids, branches, measurements, **limits)


def largest(results):
    return max(results.layer["effect"].max().item(), results.output["output"].max().item())


def agree(ours, reference, scale=1e-4):
    size = reference.abs().max().item()
    assert size > 0.01, "the reference shows no effect, so agreeing with it means nothing"
    assert (ours - reference).abs().max().item() <= scale * size


# The same, one plain forward pass a branch.


def edits_of(branch, clean, length):
    """The branch as edits of the naive reference; a skip reads the input that its layer has in that very pass."""
    seen, edits, notes = {}, [], []
    for i in branch.interventions:
        chosen = [p for p in positions(i.tokens, length) if branch.cut is None or p < branch.cut]
        order = list(positions(i.tokens, length))

        def edit(x, i=i, chosen=chosen, order=order):
            x = x.clone()
            for p in chosen:
                if isinstance(i, Skip):
                    x[0, p] = seen[i.layer][0, p] if i.part == "layer" else 0.0
                elif isinstance(i, Patch):
                    x[0, p] = i.value if i.value.ndim == 1 else i.value[order.index(p)]
                elif isinstance(i, AddVector):
                    x[0, p] += i.value if i.value.ndim == 1 else i.value[order.index(p)]
                elif isinstance(i, Scale):
                    x[0, p] *= i.factor
                elif isinstance(i, Subtract):
                    x[0, p] -= clean.contributions()[i.source][0, p]
            return x

        edits.append((i.site, i.layer, edit))
        notes.append(("resid_pre", i.layer, lambda x, layer=i.layer: seen.setdefault(layer, x)))
    return [*edits, *notes]


@torch.no_grad()
def one_pass(hf, ids, branch):
    clean = naive.run_with(hf, ids)
    changed = naive.run_with(hf, ids, edits_of(branch, clean, len(ids)))
    measured = branch.measured_positions(len(ids))
    pairs = zip(clean.contributions(), changed.contributions(), strict=True)
    effect = torch.stack([naive.relative_change(a, b, measured) for a, b in pairs])
    if branch.until is not None and branch.until < len(effect) - 1:
        effect[branch.until + 1 :] = 0
        return effect, torch.tensor(0.0)
    return effect, naive.output_change(clean.logits, changed.logits, measured)


CASES = {
    "patch the whole prompt": lambda: Branch((Patch("resid_post", 2, vectors(T, D)),)),
    "patch with one vector": lambda: Branch((Patch("resid_pre", 1, vectors(D)),)),
    "patch some tokens, from the end too": lambda: Branch((Patch("resid_pre", 3, vectors(3, D), [4, -1, 2]),)),
    "patch a tail": lambda: Branch((Patch("resid_post", 0, vectors(5, D), slice(-5, None)),)),
    "patch every other token": lambda: Branch((Patch("mlp_out", 2, vectors(10, D), slice(None, None, 2)),)),
    "patch attention": lambda: Branch((Patch("attn_out", 2, vectors(T, D)),)),
    "patch the embedding": lambda: Branch((Patch("resid_pre", 0, vectors(D), [7]),)),
    "patch the last residual": lambda: Branch((Patch("resid_post", L - 1, vectors(D), [7]),)),
    "patch the last MLP": lambda: Branch((Patch("mlp_out", L - 1, vectors(D), [7]),)),
    "patch the first attention": lambda: Branch((Patch("attn_out", 0, vectors(D), [7]),)),
    "patch in another dtype": lambda: Branch((Patch("resid_pre", 2, vectors(D).double()),)),
    "steer": lambda: Branch((AddVector("resid_post", 1, vectors(D), slice(3, None)),)),
    "steer each token its own way": lambda: Branch((AddVector("mlp_out", 1, vectors(2, D), [0, -1]),)),
    "scale attention": lambda: Branch((Scale("attn_out", 3, 0.5),)),
    "scale the stream": lambda: Branch((Scale("resid_pre", 2, 1.5, [3, 4, 5]),)),
    "turn an MLP round": lambda: Branch((Scale("mlp_out", 1, -1.0),)),
    "skip a layer": lambda: Branch((Skip(2),)),
    "skip the last layer": lambda: Branch((Skip(L - 1),)),
    "skip the first layer on all tokens": lambda: Branch((Skip(0, tokens=slice(None)),)),
    "skip attention": lambda: Branch((Skip(0, "attn"),)),
    "skip an MLP": lambda: Branch((Skip(L - 1, "mlp"),)),
    "subtract": lambda: Branch((Subtract(1, 3),)),
    "attention, then the MLP of the same layer": lambda: Branch((Skip(2, "attn"), Scale("mlp_out", 2, 2.0))),
    "the MLP and what comes after it": lambda: Branch((Skip(2, "mlp"), AddVector("resid_post", 2, vectors(D)))),
    "all sites of a layer": lambda: Branch(
        (
            AddVector("resid_post", 1, vectors(D, seed=3)),
            Scale("mlp_out", 1, 0.3),
            Patch("attn_out", 1, vectors(D, seed=2)),
            AddVector("resid_pre", 1, vectors(D, seed=1)),
        )
    ),
    "skip a layer whose input was changed": lambda: Branch((AddVector("resid_pre", 2, vectors(D)), Skip(2))),
    "two layers": lambda: Branch((Skip(1), Skip(3))),
    "three sites of three layers": lambda: Branch((Scale("mlp_out", 0, 0.0), Skip(2, "attn"), Subtract(1, 4))),
    "two at one site": lambda: Branch((Scale("mlp_out", 2, 2.0), AddVector("mlp_out", 2, vectors(D)))),
    "first to last": lambda: Branch(
        (AddVector("resid_pre", 0, vectors(D)), Patch("resid_post", L - 1, vectors(D), [2]))
    ),
    "until a layer": lambda: Branch((Skip(1),), until=3),
    "until its own layer": lambda: Branch((Patch("resid_pre", 2, vectors(D)),), until=2),
    "until the layer that is skipped": lambda: Branch((Skip(2),), until=2),
    "until the last layer": lambda: Branch((Scale("attn_out", 2, 2.0),), until=L - 1),
    "measured at some tokens": lambda: Branch((Skip(1),), measured=[3, -4]),
    "measured where nothing changed yet": lambda: Branch((Patch("resid_pre", 1, vectors(D), [12]),), measured=[2, 15]),
    "right of a cut": lambda: Branch((Skip(1),), cut=8),
    "an attention skip right of a cut": lambda: Branch((Skip(1, "attn"),), cut=8),
    "steering right of a cut": lambda: Branch((AddVector("resid_pre", 0, vectors(D)), Skip(3, "mlp")), cut=13),
    "right of a cut, at one token": lambda: Branch((Subtract(0, 2),), cut=5, measured=[-1]),
    "right of a cut, until a layer": lambda: Branch((Skip(0),), cut=12, until=3),
}


@pytest.fixture(scope="module")
def everything(family):
    """All cases in one call, and every one of them alone."""
    hf, model, ids = family
    branches = [make() for make in CASES.values()]
    return run(model, ids, branches), [one_pass(hf, ids, branch) for branch in branches]


@pytest.mark.parametrize("case", CASES)
def test_a_branch_is_one_plain_forward_pass(everything, case):
    together, alone = everything
    number = list(CASES).index(case)
    effect, output = alone[number]
    both = torch.cat([effect, output[None]])
    ours = torch.cat([together.layer["effect"][number], together.output["output"][number, None]])
    agree(ours, both)
    assert (both[ours == 0] < 1e-5).all()
    assert (ours[both == 0] < 1e-5).all(), "no effect where there can be none"


@pytest.mark.parametrize("limits", [{"max_rows": 3}, {"max_rows": 7}, {"max_row_tokens": 100}])
def test_packing_does_not_change_results(everything, family, limits):
    together, _ = everything
    _, model, ids = family
    branches = [make() for make in CASES.values()]
    order = random.Random(0).sample(range(len(branches)), len(branches))
    shuffled = run(model, ids, [branches[n] for n in order], **limits)
    assert shuffled.passes > together.passes
    back = [order.index(n) for n in range(len(order))]
    agree(shuffled.layer["effect"][back], together.layer["effect"], 1e-5)
    agree(shuffled.output["output"][back], together.output["output"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "granite-0.22"])
def test_an_identity_changes_no_bit(name, dtype):
    # 0.22 is Granite 3's multiplier: dividing by it and multiplying again is not exact in bfloat16.
    hf = tiny_model("granite", residual_multiplier=0.22) if name == "granite-0.22" else tiny_model(name)
    model = hookdepth.wrap(hf.to(dtype))
    branches = [Branch((Identity(site, layer),)) for layer in range(L) for site in SITES]
    # Branches that are alive already where the others are born, and edited there.
    branches += [
        Branch((Scale("resid_pre", 0, 1.0), Scale(b.interventions[0].site, layer, 1.0)))
        for layer in range(1, L)
        for b in branches[:4]
    ]
    branches += [Branch((Identity("resid_pre", 0),), cut=8), Branch((Identity("attn_out", 2),), cut=8)]
    results = run(model, prompts(1, 24)[0], branches)
    assert largest(results) == 0
    assert (results.null_effect, results.null_where) == (0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_nothing_happens_left_of_what_is_changed(name, dtype):
    model = hookdepth.wrap(tiny_model(name).to(dtype))
    ids = prompts(1, 24)[0]
    for first in (1, 8, 13):
        branches = [
            Branch(
                (Patch(site, layer, vectors(*model.shape_of(site, layer)), slice(first, None)),), measured=range(first)
            )
            for layer in range(L)
            for site in SITES
        ]
        # A branch that is measured everywhere keeps the pass as wide as the prompt.
        results = run(model, ids, [*branches, Branch((Identity("resid_pre", 0),))])
        assert largest(results) == 0
        # Alone, their passes are as narrow as possible, and only rounding may be seen.
        assert largest(run(model, ids, branches)) < 2e-6
        at = [Branch(b.interventions, measured=[first]) for b in branches]
        assert run(model, ids, at).output["output"].min() > 0.01, "at the token itself there is an effect"


def test_until_ends_a_branch(llama):
    _, model, ids = llama
    results = run(model, ids, [Branch((Skip(1),), until=3), Branch((Skip(1),))])
    short, full = results.layer["effect"]
    assert torch.equal(short[:4], full[:4])
    assert (short[4], full[4] > 0) == (0, True)
    assert results.output["output"][0] == 0 < results.output["output"][1]


def test_the_same_interventions_measured_elsewhere(llama):
    """One row may serve several cuts, but never branches that are read at other places or live longer."""
    _, model, ids = llama
    skip = Skip(1)
    branches = [
        Branch((skip,)),
        Branch((skip,), measured=[5]),
        Branch((skip,), measured=[-1]),
        Branch((skip,), until=2),
        Branch((skip,), cut=8),
        Branch((skip,), cut=8, measured=[9]),
        Branch((skip,), cut=8, until=3),
    ]
    together = run(model, ids, branches)
    for number, branch in enumerate(branches):
        alone = run(model, ids, [branch])
        agree(together.layer["effect"][number], alone.layer["effect"][0], 1e-5)
        assert together.output["output"][number].item() == pytest.approx(alone.output["output"].item(), abs=1e-5)


class Norm(LayerMeasurement):
    name, reduce = "norm", "mean"

    def values(self, view):
        return view.resid_post.float().norm(dim=-1)


def entropy(reduce):
    return Custom(f"entropy-{reduce}", lambda view: torch.special.entr(view.probabilities).sum(-1), reduce)


def test_measurements_that_are_no_changes_are_taken_at_every_measured_token(llama):
    """Also left of what a branch changes, before it is born and after it has ended: there it is its clean run."""
    hf, model, _ = llama
    ids = prompts(1, 40)[0]
    vector = vectors(D)
    branches = [
        Branch((Patch("resid_pre", layer, vector, [token]),), measured=sorted({1, 3, token % 7, 39}), until=until)
        for layer, until in ((0, None), (2, None), (4, None), (2, 3))
        for token in range(40)
    ]
    measurements = [Norm(), entropy("sum"), entropy("mean"), entropy("max"), TargetProbability(), LogitDifference(5, 7)]
    # This many branches are worth starting at their own tokens, where only changes are measured.
    assert plan_for(model, branches, [40]).n_passes > 2
    results = run(model, ids, branches, measurements)
    for number in range(0, len(branches), 7):
        branch = branches[number]
        with torch.no_grad():
            clean = naive.run_with(hf, ids)
            changed = naive.run_with(hf, ids, edits_of(branch, clean, 40))
        at = branch.measured_positions(40)
        alive = L if branch.until is None else branch.until + 1
        resid = [*changed.resid_post[:alive], *clean.resid_post[alive:]]
        norms = torch.stack([h[0, at].norm(dim=-1).mean() for h in resid])
        logits = (changed if branch.until is None else clean).logits[0]
        p = logits.softmax(-1)
        following = torch.tensor(ids[1:])
        before = at[:-1]  # no token follows the last, which all of them measure
        entropies = torch.special.entr(p).sum(-1)[at]
        torch.testing.assert_close(results.layer["norm"][number], norms, rtol=1e-4, atol=1e-4)
        for name, expected in (
            ("entropy-sum", entropies.sum()),
            ("entropy-mean", entropies.mean()),
            ("entropy-max", entropies.max()),
            ("target_probability", p[before, following[before]].sum()),
            ("logit_difference", (logits[at, 5] - logits[at, 7]).mean()),
        ):
            torch.testing.assert_close(results.output[name][number], expected, rtol=1e-4, atol=1e-4)


def test_the_clean_run_of_a_branch(llama):
    hf, model, ids = llama
    results = run(model, ids, [Branch((Skip(2),), measured=[4, -1])], [Norm(), LogitDifference(5, 7)])
    with torch.no_grad():
        clean = naive.run_with(hf, ids)
    norms = torch.stack([h[0, [4, -1]].norm(dim=-1).mean() for h in clean.resid_post])
    torch.testing.assert_close(results.clean_layer["norm"][0], norms)
    difference = (clean.logits[0, [4, -1], 5] - clean.logits[0, [4, -1], 7]).mean()
    torch.testing.assert_close(results.clean_output["logit_difference"][0], difference)


def test_activation_patching_from_another_prompt(llama):
    hf, model, ids = llama
    clean_ids = prompts(1, T, seed=5)[0]
    with torch.no_grad(), capture(model, "resid_post", "resid_pre") as clean:
        model.forward(torch.tensor([clean_ids]))
    score = LogitDifference(5, 7)
    branches = [Branch((Patch("resid_pre", 0, clean["resid_pre", 0][0]),), measured=[-1])]
    branches += [
        Branch((Patch("resid_post", layer, clean["resid_post", layer][0, t], [t]),), measured=[-1])
        for layer in range(L)
        for t in (3, T - 1)
    ]
    results = run(model, ids, branches, [score])
    with torch.no_grad():
        here, there = naive.run_with(hf, ids).logits[0, -1], naive.run_with(hf, clean_ids).logits[0, -1]
    assert abs((here[5] - here[7]) - (there[5] - there[7])) > 0.1, "the prompts differ"
    values = results.output["logit_difference"]
    torch.testing.assert_close(results.clean_output["logit_difference"][0], here[5] - here[7], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        values[0], there[5] - there[7], rtol=1e-4, atol=1e-4
    )  # the whole prompt is the other one
    torch.testing.assert_close(values[-1], there[5] - there[7], rtol=1e-4, atol=1e-4)  # so is the last residual
    torch.testing.assert_close(values[-2], here[5] - here[7], rtol=1e-4, atol=1e-4)  # that of another token is not read


def test_short_prompts_share_launches_and_give_the_same(family):
    _, model, _ = family
    many = prompts(12, (3, 14, 5, 9, 13, 4), seed=3)
    branches = [
        Branch((skip,), prompt=prompt, cut=cut)
        for prompt in range(12)
        for layer in range(L)
        for skip in [Skip(layer)]
        for cut in (None, len(many[prompt]) // 2)
    ]
    branches += [Branch((Patch("resid_pre", 2, vectors(D), [-1]),), prompt=prompt) for prompt in range(12)]
    measurements = [*EFFECTS, TargetProbability()]
    together = run(model, many, branches, measurements)
    assert together.passes < 12
    assert together.null_effect < 1e-5
    for prompt, ids in enumerate(many):
        mine = [n for n, branch in enumerate(branches) if branch.prompt == prompt]
        alone = run(model, ids, [Branch(branches[n].interventions, cut=branches[n].cut) for n in mine], measurements)
        agree(together.layer["effect"][mine], alone.layer["effect"], 1e-5)
        agree(together.output["output"][mine], alone.output["output"], 1e-5)
        p, expected = (r.output["target_probability"] for r in (together, alone))
        torch.testing.assert_close(p[mine], expected, rtol=1e-3, atol=0)


def test_one_token(llama):
    _, model, _ = llama
    results = run(model, [7], [Branch((Skip(2),)), Branch((Skip(2, tokens=slice(None)),))])
    assert results.output["output"][0] == 0, "the only token is the first, which is left alone"
    assert results.output["output"][1] > 0.01


def test_nothing_to_run(llama):
    """Every measurement is there, for no branch; nobody's clean run was measured, so it is not 0 either."""
    _, model, ids = llama
    results = run(model, [ids, ids], [])
    assert (results.passes, results.null_effect) == (0, 0)
    for layer, output in ((results.layer, results.output), (results.clean_layer, results.clean_output)):
        assert {name: tuple(value.shape) for name, value in layer.items()} == {"effect": (0, L)}
        assert {name: tuple(value.shape) for name, value in output.items()} == {"output": (0,)}


def test_without_output_measurements_nothing_is_unembedded(llama, monkeypatch):
    _, model, ids = llama
    monkeypatch.setattr(model, "unembed", lambda hidden: pytest.fail("unembedded"))
    assert run(model, ids, [Branch((Skip(2),))], [LayerEffect()]).layer["effect"][0, 3] > 0


# Cost.


def counting_forward(monkeypatch, model):
    calls = []
    plain = model.base.forward
    monkeypatch.setattr(model.base, "forward", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize(("n_layers", "passes"), [(1, 1), (4, 1), (9, 3)])
def test_all_skips_are_one_forward_call(monkeypatch, n_layers, passes):
    model = hookdepth.wrap(tiny_model("llama", num_hidden_layers=n_layers))
    calls = counting_forward(monkeypatch, model)
    skips = [Skip(layer) for layer in range(n_layers)]
    moved = []
    results = run(model, prompts(1, T)[0], [Branch((skip,)) for skip in skips], on_pass=lambda: moved.append(1))
    assert (len(calls), results.passes, len(moved)) == (1, 1, 1)
    branches = [Branch((skip,), cut=cut) for skip in skips for cut in (None, 8, 12)]
    results = run(model, prompts(1, T)[0], branches, on_pass=lambda: moved.append(1))
    # A pass for each cut, but where so few rows cost less beside each other.
    assert (len(calls), results.passes, len(moved)) == (1 + passes, passes, 1 + passes)


def test_forward_calls_are_those_of_the_plan(monkeypatch, llama):
    _, model, ids = llama
    calls = counting_forward(monkeypatch, model)
    branches = [make() for make in CASES.values()]
    results = run(model, ids, branches, max_rows=6)
    assert results.passes == len(calls) == results.plan.n_passes
    assert results.plan == plan_for(model, branches, [T], max_rows=6)


@pytest.mark.parametrize("cuts", [(), (8,)])
def test_logits_never_exist_at_once(monkeypatch, llama, cuts):
    _, model, ids = llama
    monkeypatch.setattr(branching, "cost_of", lambda model: PassCost(0))  # a pass for the cut
    vocab, held = model.config.vocab_size, []
    plain = model.unembed
    monkeypatch.setattr(model, "unembed", lambda hidden: (held.append(tuple(hidden.shape)), plain(hidden))[1])
    branches = [Branch((skip,), cut=cut) for skip in map(Skip, range(L)) for cut in (None, *cuts)]
    whole = run(model, ids, branches)
    assert [shape[1] for shape in held] == [T, *(T - cut for cut in cuts)]
    held.clear()
    most = 3 * (L + 2) * vocab

    def small(*args, **kwargs):
        return launching.run_pass(*args, **{**kwargs, "logit_elements": most})

    monkeypatch.setattr(branching, "run_pass", small)
    chunked = run(model, ids, branches)
    assert sum(shape[1] for shape in held) == T + sum(T - cut for cut in cuts), "every position once"
    assert all(rows * tokens * vocab <= most for rows, tokens, _ in held)
    agree(chunked.output["output"], whole.output["output"], 1e-5)
    held.clear()
    run(model, ids, [Branch((Skip(2),), measured=[4, -1])])
    assert [shape[1] for shape in held] == [2], "only where something is measured"


# Memory.


class Memory:
    """Refuses passes of more than `rows` rows; keeps those that went through."""

    def __init__(self, monkeypatch, rows, error=None):
        self.rows = rows
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.through, self.refused, self.went_first = [], 0, 0
        self.plain = launching.run_pass
        monkeypatch.setattr(branching, "run_pass", self)

    def __call__(self, model, token_ids, table, *args, **kwargs):
        if len(table.slot) > self.rows:
            self.refused += 1
            self.went_first = self.went_first or len(self.through)
            raise self.error
        result = self.plain(model, token_ids, table, *args, **kwargs)
        self.through.append(table.pass_)
        return result


def kinds(model):
    skips = [Skip(layer) for layer in range(L)]
    cut = [Branch((skip,), cut=cut) for skip in skips for cut in (None, 8, 12)]
    late = [Branch((Patch("resid_pre", la, vectors(D), [t]),), measured=[-1]) for la in range(L) for t in range(T)]
    short = [Branch((skip,), prompt=prompt) for prompt in (1, 2, 3) for skip in skips]
    return [*cut, *late, *short]


@pytest.mark.parametrize("rows", [3, 9, 20, 25])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_out_of_memory(monkeypatch, llama, rows, error):
    _, model, ids = llama
    many = [ids, *prompts(3, (9, 6, 11), seed=2)]
    branches = kinds(model)
    undisturbed = run(model, many, branches)
    memory = Memory(monkeypatch, rows, error)
    moved = []
    results = run(model, many, branches, on_pass=lambda: moved.append(1))
    assert memory.refused > 0
    assert (memory.went_first > 0) == (rows == 25), "some passes went through before one did not"
    measured = Counter(row for pass_ in memory.through for row in pass_.measured)
    assert measured == Counter(range(len(branches))), "every branch in one pass, no pass half used"
    assert results.passes == len(moved) == len(memory.through)
    agree(results.layer["effect"], undisturbed.layer["effect"], 1e-5)
    agree(results.output["output"], undisturbed.output["output"], 1e-5)
    assert memory.refused <= 12, "a size that did not fit is halved, not nibbled at"


def test_no_memory_at_all(monkeypatch, llama):
    _, model, ids = llama
    memory = Memory(monkeypatch, 0)
    with pytest.raises(HookdepthError, match="not even one branch beside its clean run fits") as caught:
        run(model, ids, [Branch((skip,)) for skip in map(Skip, range(L))])
    assert caught.value.exit_status == 1
    assert not memory.through


def test_other_errors_are_no_lack_of_memory(monkeypatch, llama):
    _, model, ids = llama
    memory = Memory(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(model, ids, [Branch((Skip(2),))])
    assert memory.refused == 1


# Refusals.


def test_values_that_are_not_finite_are_named():
    hf = tiny_model("llama")
    model = hookdepth.wrap(hf)
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(HookdepthError, match="non-finite values from layer 2 on") as caught:
        run(model, prompts(1, T)[0], [Branch((Skip(1),))])
    assert caught.value.exit_status == 1
    with pytest.raises(HookdepthError, match="non-finite values in the output"):
        run(model, prompts(1, T)[0], [Branch((Skip(1),))], [OutputEffect()])


@pytest.mark.parametrize(
    ("ids", "branch", "says"),
    [
        ([[]], Branch((Skip(0),)), "prompt 0 has no tokens"),
        ([[1] * 513], Branch((Skip(0),)), "prompt 0 has 513 tokens, the model's context 512"),
        ([[1, 2]], Branch((Skip(0),), prompt=1), "a branch of prompt 1 of 1"),
        ([[1, 2]], Branch((Skip(L),)), "layer 5 of a model of 5 layers"),
        ([[1, 2]], Branch((Patch("resid_pre", 0, torch.ones(D + 1)),)), r"a value of shape \[65\]"),
        ([[1, 2]], Branch((Skip(0),), cut=2), "a cut at 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch, llama, ids, branch, says):
    _, model, _ = llama
    calls = counting_forward(monkeypatch, model)
    with pytest.raises(HookdepthError, match=says):
        measure(model, ids, [branch], EFFECTS)
    assert not calls


# What a run leaves behind: nothing.


@pytest.fixture
def watched():
    """A model with a hook of its user's; what the hook saw."""
    hf = tiny_model("llama")
    model = hookdepth.wrap(hf)
    seen = []
    hf.model.layers[3].register_forward_hook(lambda *_: seen.append("layer"))
    hf.model.layers[1].mlp.register_forward_pre_hook(lambda *_, **__: seen.append("mlp"), with_kwargs=True)
    return hf, model, seen


ALL_KINDS = [
    Branch((Skip(2), Scale("attn_out", 1, 2.0), Patch("mlp_out", 3, torch.ones(D)))),
    Branch((Skip(1),), cut=8),
]


def test_hooks_are_gone_after_a_run_and_the_users_own_stay(watched):
    hf, model, seen = watched
    before = hooks_of(hf)
    results = run(model, prompts(1, T)[0], ALL_KINDS)
    assert hooks_of(hf) == before
    assert seen == ["mlp", "layer"] * results.passes
    with torch.no_grad():
        hf(torch.tensor([[1, 2]]))
    assert len(seen) == 2 * results.passes + 2


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("where", ["user's hook", "forward", "measurement"])
def test_hooks_are_gone_after_an_error(watched, monkeypatch, error, where):
    hf, model, _ = watched
    measurements = list(EFFECTS)

    def fail(*_args, **_kwargs):
        raise error

    if where == "user's hook":
        hf.model.layers[4].mlp.register_forward_hook(fail)
    elif where == "forward":
        monkeypatch.setattr(hf.model.norm, "forward", fail)
    else:
        measurements.append(Custom("broken", fail))
    hf.train()
    before = hooks_of(hf)
    with pytest.raises(type(error)):
        run(model, prompts(1, T)[0], ALL_KINDS, measurements)
    assert hooks_of(hf) == before
    assert all(module.training for module in hf.modules())
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was():
    hf = tiny_model("llama")
    model = hookdepth.wrap(hf)
    source = random.Random(1)
    for module in hf.modules():
        module.training = source.random() < 0.5
    for parameter in hf.parameters():
        parameter.requires_grad_(source.random() < 0.5)
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    modes = [module.training for module in hf.modules()]
    assert len(set(modes)) == 2
    flags = [parameter.requires_grad for parameter in hf.parameters()]
    weights = {name: value.clone() for name, value in hf.state_dict().items()}
    gradients = {id(p): p.grad for p in hf.parameters()}
    states = random.getstate(), torch.get_rng_state()
    run(model, prompts(1, T)[0], ALL_KINDS)
    assert [module.training for module in hf.modules()] == modes
    assert [parameter.requires_grad for parameter in hf.parameters()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in hf.state_dict().items())
    assert all(p.grad is gradients[id(p)] for p in hf.parameters())
    assert all((p.grad == 3.0).all() for p in hf.parameters() if p.grad is not None)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.is_grad_enabled()


def test_a_model_in_training_mode_is_measured_in_evaluation_mode():
    hf = tiny_model("llama", attention_dropout=0.9)
    model = hookdepth.wrap(hf)
    ids = prompts(1, T)[0]
    calm = run(model, ids, [Branch((Skip(2),))])
    hf.train()
    assert torch.equal(run(model, ids, [Branch((Skip(2),))]).layer["effect"], calm.layer["effect"])


def test_the_same_call_gives_the_same_bits(llama):
    _, model, ids = llama
    branches = [make() for make in CASES.values()]
    one, other = run(model, ids, branches), run(model, ids, branches)
    assert torch.equal(one.layer["effect"], other.layer["effect"])
    assert torch.equal(one.output["output"], other.output["output"])


def test_layers_on_disk(tmp_path):
    """What accelerate's device maps do to weights that are elsewhere, as far as one CPU can show it."""
    ids = prompts(1, T)[0]
    branches = [make() for make in CASES.values()]
    plain = run(hookdepth.wrap(tiny_model("llama-untied")), ids, branches)
    places = {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(L)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    hf = dispatch_model(tiny_model("llama-untied"), places, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert next(hf.model.layers[3].parameters()).device.type == "meta"
    results = run(hookdepth.wrap(hf), ids, branches)
    assert torch.equal(results.layer["effect"], plain.layer["effect"])


def test_the_last_mlp_runs_only_where_something_is_unembedded(monkeypatch, family):
    hf, model, ids = family
    last = model.n_layers - 1
    mlp = model.layers[last].mlp
    tokens = []

    def forward(hidden, plain=mlp.forward):
        tokens.append(hidden.shape[1])
        return plain(hidden)

    monkeypatch.setattr(mlp, "forward", forward)
    cases = [Skip(1), Skip(last), Skip(last, "mlp"), Skip(last, "attn"), Patch("resid_post", last, vectors(D), [T - 2])]
    cases += [Patch("resid_pre", layer, vectors(D), [3]) for layer in range(model.n_layers)]
    branches = [Branch((case,), measured=[T - 4, T - 2]) for case in cases]
    narrow = run(model, ids, branches, [OutputEffect()])
    assert set(tokens) == {2}
    tokens.clear()
    wide = run(model, ids, branches, EFFECTS)
    assert min(tokens) > 2
    agree(narrow.output["output"], wide.output["output"])
    agree(narrow.output["output"], torch.stack([one_pass(hf, ids, branch)[1] for branch in branches]))


@dataclass(frozen=True, eq=False)
class MeanOfAllTokens(Intervention):
    def apply(self, row, where, around):
        row[where.local] = row.mean(0)


def test_an_intervention_that_looks_at_other_tokens_finds_them(llama):
    _, model, ids = llama
    branch = Branch((MeanOfAllTokens("mlp_out", model.n_layers - 1, [T - 1]),), measured=[T - 1])
    alone = run(model, ids, [branch], [OutputEffect()]).output["output"]
    agree(alone, run(model, ids, [branch]).output["output"], 1e-6)
    assert not MeanOfAllTokens.tokenwise
