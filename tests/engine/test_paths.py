"""Paths through depth: what a path gives is what calling the layers by hand, in its order, gives."""

import gc
import random
from contextlib import ExitStack

import naive
import pytest
import torch
from tiny_families import tiny as tiny_family
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import (
    Branch,
    Custom,
    HookdepthError,
    LayerEffect,
    LayerPath,
    OutputEffect,
    Patch,
    Scale,
    Skip,
    TargetProbability,
)
from hookdepth.engine.passes import measure
from hookdepth.engine.planner import make_plan
from hookdepth.engine.stages import parsed, path_text

L, T = 5, 20
FAMILIES = ("llama", "gemma2", "granite", "smollm3", "phi3")
LOGIT = [Custom(f"logit {token}", lambda view, token=token: view.logits[..., token], "mean") for token in (7, 99)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    hf = tiny_model(request.param)
    return hf, hookdepth.wrap(hf)


@pytest.fixture(scope="module")
def llama():
    hf = tiny_model("llama")
    return hf, hookdepth.wrap(hf)


def random_stages(source, n_layers=L):
    """Random walks, and shuffled, repeated and parallel pieces of the model's own order."""
    kind = source.randrange(4)
    if kind == 0:
        return [(source.randrange(n_layers),) for _ in range(source.randrange(1, 2 * n_layers))]
    stages = [(layer,) for layer in range(n_layers)]
    a, b = sorted(source.sample(range(n_layers + 1), 2))
    if kind == 1:
        return [*stages[:b], *stages[a:]]
    if kind == 2:
        return [*stages[:a], tuple(range(a, b)), *stages[b:]]
    middle = stages[a:b]
    source.shuffle(middle)
    return [*stages[:a], *middle, *stages[b:]]


def paths(n, seed=0):
    source = random.Random(seed)
    return [(random_stages(source), source.random() < 0.3) for _ in range(n)]


def run(model, given, measurements, ids, **limits):
    branches = [Branch((LayerPath(stages, mean),)) for stages, mean in given]
    return measure(model, [ids], branches, measurements, **limits)


def test_random_paths_are_layers_called_by_hand(family):
    hf, model = family
    ids, given = prompts(1, T)[0], paths(40)
    found = run(model, given, [OutputEffect(), *LOGIT, LayerEffect()], ids)
    assert found.null_effect == 0
    assert found.passes > 3
    clean = naive.visit(hf, ids, [(layer,) for layer in range(L)])
    for n, (stages, mean) in enumerate(given):
        *added, logits = naive.visit(hf, ids, stages, mean)
        expected = naive.output_change(clean[-1], logits, slice(None))
        assert found.output["output"][n].item() == pytest.approx(expected.item(), abs=1e-5)
        for measurement, token in zip(LOGIT, (7, 99), strict=True):
            expected = logits[0, :, token].mean().item()
            assert found.output[measurement.name][n].item() == pytest.approx(expected, abs=1e-5, rel=1e-5)
        last = {layer: added[k] for k, layer in enumerate(layer for stage in stages for layer in stage)}
        for layer in range(L):
            effect = found.layer["effect"][n, layer]
            if layer in last:
                expected = naive.relative_change(clean[layer], last[layer], slice(None)).item()
                assert effect.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
            else:
                assert effect.isnan()


def visited(model, ids, stages):
    """Logits of the layers called by hand, whatever the family calls its modules."""
    given = {}
    with ExitStack() as stack:
        for i, layer in enumerate(model.layers):

            def note(_module, args, kwargs, i=i):
                given[i] = args, dict(kwargs)

            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        model.forward(torch.tensor([ids]))
    hidden = given[0][0][0] if given[0][0] else given[0][1]["hidden_states"]
    for stage in stages:
        outputs = []
        for i in stage:
            args, kwargs = given[i]
            call = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
            output = model.layers[i](*call[0], **call[1])
            outputs.append(output[0] if isinstance(output, tuple) else output)
        hidden = outputs[0] if len(stage) == 1 else hidden + sum(output - hidden for output in outputs)
    return model.unembed(model.norm(hidden))[0]


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon-alibi", "llama4", "mamba2", "lfm2", "gemma4-embeddings"])
@torch.no_grad()
def test_families_of_other_kinds(name):
    model, ids = hookdepth.wrap(tiny_family(name).eval()), prompts(1, T)[0]
    given = [[(0,), (1,), (2,), (1,), (2,), (3,)], [(0,), (3,)], [(0,), (1, 2), (3,)], [(3,), (2,), (1,), (1,), (0,)]]
    found = run(model, [(stages, False) for stages in given], LOGIT, ids)
    for n, stages in enumerate(given):
        logits = visited(model, ids, stages)
        for measurement, token in zip(LOGIT, (7, 99), strict=True):
            expected = logits[:, token].mean().item()
            assert found.output[measurement.name][n].item() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_the_identity_is_the_clean_run_to_the_bit(family):
    _, model = family
    ids = prompts(1, T)[0]
    branches = [Branch((LayerPath(f"0-{L - 1}"),)), Branch((LayerPath(range(L), mean=True),)), Branch((Skip(2),))]
    found = measure(model, [ids], branches, [*LOGIT, LayerEffect(), OutputEffect()])
    for measurement in LOGIT:
        assert found.output[measurement.name][:2].equal(found.clean_output[measurement.name][:2])
    assert found.layer["effect"][:2].count_nonzero() == 0 == found.output["output"][:2].count_nonzero()
    assert found.output["output"][2] > 0


def test_packing_changes_nothing(llama):
    _, model = llama
    several, given = prompts(3, (20, 13, 24)), paths(12, seed=1)
    branches = [Branch((LayerPath(stages),), prompt=p) for stages, _ in given for p in range(3)]
    branches += [Branch((Skip(layer),), prompt=1) for layer in range(L)]
    measurements = [LayerEffect(), OutputEffect(), *LOGIT]
    together = measure(model, several, branches, measurements)
    small = measure(model, several, branches, measurements, max_rows=9)
    assert small.passes > 2 * together.passes
    one = [measure(model, [several[b.prompt]], [Branch(b.interventions)], measurements) for b in branches]
    for name in together.output:
        alone = torch.stack([found.output[name][0] for found in one])
        torch.testing.assert_close(together.output[name], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(small.output[name], alone, rtol=1e-5, atol=1e-5)
    alone = torch.stack([found.layer["effect"][0] for found in one])
    torch.testing.assert_close(together.layer["effect"], alone, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(small.layer["effect"], alone, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("reduce", ["max", None])
def test_sweeps_may_be_of_the_shorter_prompts_alone(llama, reduce):
    """The longer prompt's path is at its end after one sweep, the shorter one's after two."""
    model, (long, short) = llama[1], prompts(2, lengths=(T, T - 8))
    paths = [Branch((LayerPath("0-4,2-4"),), prompt=1), Branch((LayerPath("0,2-4"),), prompt=0)]
    measurements = [LayerEffect(), OutputEffect()]
    for one in measurements:
        one.reduce = reduce
    together = measure(model, [long, short], paths, measurements)
    alone = measure(model, [short], [Branch(paths[0].interventions)], measurements)
    for kind, name in (("layer", "effect"), ("output", "output")):
        own = getattr(together, kind)[name][0]
        other = getattr(alone, kind)[name][0]
        if reduce is None:
            assert own[..., T - 8 :].isnan().all()
            own = own[..., : T - 8]
        torch.testing.assert_close(own, other, equal_nan=True)


def test_later_tokens_change_nothing_before_them(llama):
    _, model = llama
    first, second = prompts(2, T)
    second = [*first[:10], *second[10:]]
    branches = [Branch((LayerPath(stages),), measured=slice(0, 10)) for stages, _ in paths(30, seed=2)]
    found = [measure(model, [ids], branches, LOGIT) for ids in (first, second)]
    for measurement in LOGIT:
        torch.testing.assert_close(*(one.output[measurement.name] for one in found), rtol=1e-5, atol=1e-6)


def test_a_layer_left_out_is_a_skipped_layer(llama):
    _, model = llama
    ids = prompts(1, T)[0]
    for front in (0, 3):
        others = [[n for n in range(L) if n != layer] for layer in range(L)]
        branches = [Branch((LayerPath(path, keep_front=front),)) for path in others]
        branches += [Branch((Skip(layer, tokens=slice(front, None)),)) for layer in range(L)]
        output = measure(model, [ids], branches, [OutputEffect()]).output["output"]
        torch.testing.assert_close(output[:L], output[L:], rtol=1e-5, atol=1e-6)
        assert output.min() > 0.01


def test_the_first_tokens_stay_clean(llama):
    _hf, model = llama
    ids = prompts(1, T)[0]
    branches = [Branch((LayerPath(stages, keep_front=4),), measured=range(4)) for stages, _ in paths(40, seed=3)]
    found = measure(model, [ids], branches, [OutputEffect(), LayerEffect()])
    assert found.output["output"].max() < 1e-5
    assert found.layer["effect"].nan_to_num().max() < 1e-4
    free = [Branch(branch.interventions, measured=slice(4, None)) for branch in branches]
    assert measure(model, [ids], free, [OutputEffect()]).output["output"].max() > 0.1


def test_interventions_act_at_every_visit(llama):
    hf, model = llama
    ids = prompts(1, T)[0]
    path = LayerPath("0-2,1-4")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    changes = {
        "skip": (Skip(2, tokens=slice(None)), "0-1,1,3-4"),
        "halved": (Scale("mlp_out", 1, 0.0), None),
        "patched": (Patch("resid_post", 4, vector, [3]), None),
    }
    branches = [Branch((path,)), *(Branch((path, one)) for one, _ in changes.values())]
    branches.append(Branch((LayerPath("0-1,1,3-4"),)))
    output = measure(model, [ids], branches, [OutputEffect()]).output["output"]
    assert output[1].item() == pytest.approx(output[4].item(), abs=1e-6)
    for n, site, layer, edit in (
        (2, "mlp_out", 1, torch.zeros_like),
        (3, "resid_post", 4, naive.overwrite(3, vector)),
    ):
        module = hf.model.layers[layer].mlp if site == "mlp_out" else hf.model.layers[layer]
        clean = naive.run_with(hf, ids).logits
        stages = [(one,) for one in (0, 1, 2, 1, 2, 3, 4)]
        handle = module.register_forward_hook(
            lambda _m, _a, out, edit=edit: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        )
        logits = naive.visit(hf, ids, stages)[-1]
        handle.remove()
        expected = naive.output_change(clean, logits, slice(None)).item()
        assert output[n].item() == pytest.approx(expected, abs=1e-5)


def test_a_change_at_the_input_of_one_of_several_parallel_layers(llama):
    """It is a change of what that layer adds to the input of them all, whichever it is."""
    hf, model = llama
    ids = prompts(1, T)[0]
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    stages = [(0,), (1, 2, 3), (4,)]
    branches = [
        Branch((LayerPath(stages, mean), Patch("resid_pre", n, vector))) for n in (1, 2, 3) for mean in (False, True)
    ]
    output = measure(model, [ids], branches, [OutputEffect()]).output["output"].view(3, 2)
    clean = naive.run_with(hf, ids).logits
    for n in (1, 2, 3):
        for mean in (False, True):
            handle = hf.model.layers[n].register_forward_pre_hook(
                lambda _m, args: (vector.expand(1, T, 64), *args[1:]) if args else None
            )
            logits = naive.visit(hf, ids, stages, mean)[-1]
            handle.remove()
            expected = naive.output_change(clean, logits, slice(None)).item()
            assert output[n - 1, int(mean)].item() == pytest.approx(expected, abs=1e-5)


def test_other_measurements_and_the_last_token(llama):
    hf, model = llama
    ids = prompts(1, T)[0]
    branch = Branch((LayerPath("0-3,2-4"),), measured=slice(5, None))
    found = measure(model, [ids], [branch], [TargetProbability()]).output["target_probability"]
    logits = naive.visit(hf, ids, [(one,) for one in (0, 1, 2, 3, 2, 3, 4)])[-1]
    expected = logits[0, 5:-1].softmax(-1).gather(-1, torch.tensor(ids)[6:, None]).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_work_is_near_the_least_and_paths_that_begin_alike_share_rows():
    spans = [(a, b) for a in range(30) for b in range(a, 30)]
    omitted = [Branch((LayerPath([*range(a), *range(b + 1, 30)]),)) for a, b in spans]
    repeated = [Branch((LayerPath([*range(b + 1), *range(a, 30)]),)) for a, b in spans]
    plan = make_plan(omitted, [180], 30, max_row_tokens=1 << 20)
    assert plan.n_passes == 1
    assert plan.least == 180 * (30 + sum(29 - b for _, b in spans))
    assert plan.work == plan.least + 180 * 30
    plan = make_plan(repeated, [180], 30, max_row_tokens=1 << 20)
    assert plan.n_passes == 2
    assert plan.work < 1.02 * plan.least
    assert make_plan(omitted + repeated, [180], 30).work < 1.1 * make_plan(omitted + repeated, [180], 30).least
    shared = [Branch((LayerPath(f"0-9,4-9,{n}-29"),)) for n in range(10, 20)]
    assert make_plan(shared, [1], 30).least == 30 + 6 + sum(30 - n for n in range(10, 20))
    assert gc.isenabled()  # plans of paths do without collections, and switch them on again


def test_no_pass_has_more_rows_than_it_may():
    spans = [(a, b) for a in range(12) for b in range(a, 12)]
    turned = [Branch((LayerPath([*range(a), *range(b, a - 1, -1), *range(b + 1, 12)]),)) for a, b in spans]
    for most in (5, 9, 17):
        plan = make_plan(turned, [20], 12, max_rows=most)
        assert max(plan.rows_of(pass_) for pass_ in plan.walk()) <= most
        assert sorted(i for pass_ in plan.walk() for i in pass_.measured) == list(range(len(turned)))


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("0-2,1", (0, 1, 2, 1)),
        ("3", (3,)),
        ("2-0", (2, 1, 0)),
        (" 0 , 1+2", (0, (1, 2))),
        ("0-1,3+2,0+1+2", (0, 1, (2, 3), (0, 1, 2))),
    ],
)
def test_what_a_text_means(text, stages):
    found = parsed(text)
    assert found == tuple(one if isinstance(one, tuple) else (one,) for one in stages)
    assert parsed(path_text(found)) == found == LayerPath(list(stages)).stages


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "names no layers"),
        ("0-", "names no layers"),
        ("-1", "names no layers"),
        ("0-3-5", "names no layers"),
        ("0-3+4", "names no layers"),
        ("0,,1", "names no layers"),
        ("a", "names no layers"),
        ("0-999999", "more than"),
        (5, "LayerPath got 5"),
        ([0, 1.5], "is 1.5"),
        ([0, -1], "-1"),
        ([0, True], "True"),
        ([0, "1-2"], "'1-2'"),
        ([0, ()], "one stage"),
        ([[1, 1]], "one stage"),
        ("1+1", "one stage"),
        (torch.tensor([0.5]), "0.5"),
        (None, "None"),
        (b"01", "b'01'"),
    ],
)
def test_what_is_no_path(given, says):
    with pytest.raises(HookdepthError) as error:
        LayerPath(given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_go_together(llama):
    _, model = llama
    ids = prompts(1, T)[0]
    path = LayerPath("0-2,1-4")
    for branch, says in (
        (Branch((path,), cut=4), "has cut=4"),
        (Branch((path,), until=4), "has until=4"),
        (
            Branch(
                (path, LayerPath("0")),
            ),
            "another path",
        ),
        (Branch((LayerPath("0-2,4"), Skip(3))), "never visits"),
        (Branch((LayerPath("0-5"),)), "visits layer 5 of a model of 5"),
        (Branch((LayerPath("0", keep_front=T),)), "changes nothing"),
        (Branch((LayerPath("0-2,1-4", keep_front=2), Skip(2))), "Skip changes one of the first tokens"),
    ):
        with pytest.raises(HookdepthError, match=says.replace("(", r"\(")):
            measure(model, [ids], [branch], [OutputEffect()])
    with pytest.raises(HookdepthError, match="mean is 1"):
        LayerPath("0", mean=1)


def test_no_layer_at_all(llama):
    hf, model = llama
    ids = prompts(1, T)[0]
    found = measure(model, [ids], [Branch((LayerPath([]),))], LOGIT)
    logits = naive.unembed(hf, hf.model.embed_tokens(torch.tensor([ids])))
    assert found.output["logit 7"][0].item() == pytest.approx(logits[0, :, 7].mean().item(), abs=1e-5)
