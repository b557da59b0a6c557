"""What surrounds a call must not change a number: packing, ambient state, other threads, careless measurements."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import prompts, tiny_model

from hookdepth import AddVector, Branch, LayerEffect, OutputEffect, Patch, Scale, Skip, wrap
from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.data import Probe, sample_cuts
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import Identity, Subtract
from hookdepth.engine.measurement import LayerMeasurement
from hookdepth.engine.measurements import Custom
from hookdepth.engine.passes import measure
from hookdepth.engine.reading import capture
from hookdepth.errors import HookdepthError
from hookdepth.model.checking import check
from hookdepth.runs.sharing import groups_of

LENGTHS = (20, 33)


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Seeded, and indexed by the position in the prompt: it may promise to be tokenwise."""

    tokenwise: ClassVar[bool] = True
    seed: int = 0

    def apply(self, row, where, around):
        noise = torch.randn(where.length, row.shape[1], generator=torch.Generator().manual_seed(self.seed))
        row[where.local] += noise[where.positions]


class Careless(Intervention):
    """Draws for the row that it is given."""

    def apply(self, row, where, around):
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(0))
        row[where.local] += noise[where.local]


class Centred(Intervention):
    """Looks at all tokens of the prompt."""

    def apply(self, row, where, around):
        row[where.local] -= row.mean(0)


class Mixed(Intervention):
    """Looks at all tokens of its surroundings."""

    def apply(self, row, where, around):
        row[where.local] += around.resid_pre().mean(0) + around.contribution(0).mean(0)

    def sources(self):
        return (0,)


VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(1))
MAKERS = {
    "noise": lambda tokens: Noise("resid_pre", 2, tokens),
    "careless": lambda tokens: Careless("mlp_out", 2, tokens),
    "centred": lambda tokens: Centred("resid_post", 1, tokens),
    "mixed": lambda tokens: Mixed("attn_out", 2, tokens),
    "identity": lambda tokens: Identity("resid_pre", 2, tokens),
    "skip": lambda tokens: Skip(1, tokens=tokens),
    "patch": lambda tokens: Patch("resid_pre", 2, VECTOR, tokens),
    "add": lambda tokens: AddVector("attn_out", 2, VECTOR, tokens),
    "scale": lambda tokens: Scale("mlp_out", 2, 0.5, tokens),
    "subtract": lambda tokens: Subtract(0, 2, tokens),
}


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_model("llama"))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_number_depends_on_how_branches_are_packed(model, make):
    """Many late branches start passes at late tokens; alone, a branch runs in a whole pass or in another suffix."""
    texts = prompts(2, LENGTHS)
    branches = [
        Branch((make([token, token + 1]),), prompt=n, cut=cut, measured=slice(-4, -1))
        for n in range(2)
        for token in (3, 12, 14, 15)
        for cut in (None, 16)
    ]
    measured = [LayerEffect(), OutputEffect()]
    together = measure(model, texts, branches, measured)
    for limits in ({"max_rows": 6}, {"max_row_tokens": 150}):
        other = measure(model, texts, branches, measured, **limits)
        assert torch.allclose(other.layer["effect"], together.layer["effect"], atol=1e-5)
        assert torch.allclose(other.output["output"], together.output["output"], atol=1e-5)
    for n, branch in enumerate(branches):
        alone = measure(model, texts, [branch], measured)
        assert torch.allclose(alone.layer["effect"][0], together.layer["effect"][n], atol=1e-5)
        assert torch.allclose(alone.output["output"][0], together.output["output"][n], atol=1e-5)


def test_plans_of_the_packing_test_do_begin_late(model):
    texts = prompts(2, LENGTHS)
    branches = [
        Branch((Noise("resid_pre", 2, [t]),), measured=slice(-4, -1)) for t in (15, 16, 17, 18) for _ in range(9)
    ]
    found = measure(model, texts, branches, [OutputEffect()])
    assert any(pass_.start for pass_ in found.plan.walk())


# ---- ambient state


def ambient(name):
    if name == "autocast":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if name == "inference":
        return torch.inference_mode()
    if name == "gradients":
        return torch.enable_grad()
    return torch.device("meta")


AMBIENT = ("autocast", "inference", "gradients", "meta device")


@pytest.fixture(params=[*AMBIENT, "default dtype", "default device"])
def surrounded(request):
    """A context that sets one piece of ambient state, and sees that it is what it was after the block."""
    if request.param == "default dtype":
        torch.set_default_dtype(torch.float16)
        try:
            yield
            assert torch.get_default_dtype() == torch.float16
        finally:
            torch.set_default_dtype(torch.float32)
    elif request.param == "default device":
        torch.set_default_device("meta")
        try:
            yield
            assert torch.empty(1).is_meta
        finally:
            torch.set_default_device(None)
    else:
        with ambient(request.param):
            state = (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
            yield
            now = (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
            assert now == state


TEXTS = [tuple(text) for text in prompts(2, LENGTHS)]
BRANCHES = [Branch((Skip(1),), prompt=n) for n in range(2)]
ANALYSES = (
    "residual-stats",
    "logit-lens",
    "skip-current",
    "skip-future",
    "local-current",
    "local-future",
    "residual-erasure",
    "integrated-gradients",
)


def analysed(model):
    probe = Probe("", "", TEXTS[0], ("",) * len(TEXTS[0]), (18, 19))
    inputs = Inputs(tuple(TEXTS), tuple(sample_cuts(list(LENGTHS), 3)), tuple(TEXTS), (probe,))
    results = {}
    for task in groups_of(chosen(ANALYSES), Subject(model, inputs, Settings(ig_method="riemann", ig_steps=3))):
        results |= task.finish([task.run(n, lambda: None) for n in range(task.n_chunks)])
    return {(name, tensor): value for name, tensors in results.items() for tensor, value in tensors.items()}


@pytest.fixture(scope="module")
def expected(model):
    branches = measure(model, TEXTS, BRANCHES, [LayerEffect(), OutputEffect()])
    return branches, analysed(model)


def test_branches_in_any_state(model, expected, surrounded):
    found = measure(model, TEXTS, BRANCHES, [LayerEffect(), OutputEffect()])
    assert torch.equal(found.layer["effect"], expected[0].layer["effect"])
    assert torch.equal(found.output["output"], expected[0].output["output"])


def test_analyses_in_any_state(model, expected, surrounded):
    found = analysed(model)
    assert found.keys() == expected[1].keys()
    for key, value in found.items():
        assert torch.equal(value, expected[1][key]), key


def test_the_self_check_in_any_state(model, surrounded):
    check(model)


@pytest.mark.parametrize("name", AMBIENT)
def test_capture_reads_the_users_own_pass(model, name):
    ids = torch.tensor([TEXTS[0]])
    with ambient(name), capture(model, "resid_post") as acts:
        model.forward(ids)
    assert acts["resid_post", 4].shape == (1, LENGTHS[0], 64)
    assert acts["resid_post", 4].device.type == "cpu"


def test_weights_of_inference_mode_have_no_gradients():
    with torch.inference_mode():
        inside = wrap(tiny_model("llama"))
    with pytest.raises(HookdepthError, match="inference mode"), inside.evaluating(grad=True):
        pass
    measure(inside, TEXTS, BRANCHES, [OutputEffect()])  # without gradients it serves


# ---- measurements and interventions that write


class Writes(LayerMeasurement):
    name = "writes"

    def __init__(self, what):
        self.what = what

    def values(self, view):
        getattr(view, self.what).mul_(0.5)
        return view.resid_post.norm(dim=-1)


@pytest.mark.parametrize("what", ["resid_pre", "resid_post", "contribution"])
def test_a_measurement_that_writes_is_refused(model, what):
    with pytest.raises(HookdepthError, match=f"the measurement 'writes' writes into {what}"):
        measure(model, TEXTS, BRANCHES, [Writes(what)])


@pytest.mark.parametrize("what", ["logits", "probabilities"])
def test_an_output_measurement_that_writes_is_refused(model, what):
    halved = Custom("halved", lambda view: getattr(view, what).mul_(0.5).amax(-1))
    with pytest.raises(HookdepthError, match=f"the measurement 'halved' writes into {what}"):
        measure(model, TEXTS, BRANCHES, [halved])


def test_an_intervention_that_writes_into_its_surroundings_is_refused(model):
    class Greedy(Intervention):
        def apply(self, row, where, around):
            around.resid_pre().zero_()

    with pytest.raises(HookdepthError, match="the intervention Greedy writes into resid_pre"):
        measure(model, TEXTS, [Branch((Greedy("resid_post", 2),))], [OutputEffect()])


# ---- threads


def in_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    return thread, found


def test_a_plain_pass_of_another_thread_sees_the_plain_model(model):
    """It is made in the middle of a pass of ours, while our hooks are on the model and its rows have grown."""
    ids = torch.tensor([TEXTS[1]])
    with torch.no_grad():
        plain = model.hf(input_ids=ids, use_cache=False).logits
    seen = []

    def elsewhere():
        with torch.no_grad():
            return model.hf(input_ids=ids, use_cache=False).logits

    class Meanwhile(LayerMeasurement):
        name = "meanwhile"

        def values(self, view):
            if view.layer == 2:
                thread, found = in_thread(elsewhere)
                thread.join(60)
                seen.extend(found)
            return view.resid_post.float().norm(dim=-1)

    found = measure(model, TEXTS, BRANCHES, [Meanwhile(), LayerEffect()])
    assert seen
    assert all(torch.equal(logits, plain) for logits in seen)
    alone = measure(model, TEXTS, BRANCHES, [LayerEffect()])
    assert torch.equal(found.layer["effect"], alone.layer["effect"])


def test_capture_keeps_what_its_own_thread_runs(model):
    with capture(model, "resid_post", layers=[2]) as acts:
        model.forward(torch.tensor([TEXTS[0]]))
        thread, _ = in_thread(lambda: model.hf(input_ids=torch.tensor([TEXTS[1]])))
        thread.join(60)
    assert acts["resid_post", 2].shape[1] == LENGTHS[0]


def test_threads_take_turns(model, expected):
    """A second thread begins while the first is in a pass: it must wait, and both get the right numbers."""
    inside, order = threading.Event(), []

    class Slow(LayerMeasurement):
        name = "slow"

        def values(self, view):
            if view.layer == 0 and not inside.is_set():
                inside.set()
                waiting.join(0.3)  # it cannot end: the model is ours
                order.append("first")
            return view.resid_post.float().norm(dim=-1)

    def second():
        assert inside.wait(60)
        found = measure(model, TEXTS, BRANCHES, [LayerEffect()])
        order.append("second")
        return found

    waiting, results = None, []
    waiting = threading.Thread(target=lambda: results.append(second()))
    waiting.start()
    first = measure(model, TEXTS, BRANCHES, [LayerEffect(), Slow()])
    waiting.join(60)
    assert order == ["first", "second"]
    for found in (first, results[0]):
        assert torch.equal(found.layer["effect"], expected[0].layer["effect"])
