"""Integrated gradients against the naive reference, and what holds for any path."""

import naive
import pytest
import torch
from tiny_models import FAMILIES, prompts, tiny_model

import hookdepth
from hookdepth import HookdepthError
from hookdepth.analyses import Inputs, Settings, Subject, chosen, integrals
from hookdepth.analyses.integrals import Path, attribute, check_gradients
from hookdepth.data import DEFAULT_PROBES, Probe, make_probe
from hookdepth.engine import gradients
from hookdepth.engine.gradients import differentiate
from hookdepth.runs.sharing import groups_of

PARTS = ("layer", "attn", "mlp")


def probe_of(ids, answer_positions):
    return Probe("", "", tuple(ids), tuple(map(str, ids)), tuple(answer_positions))


def likely_ids(hf, length, answer=3):
    """A random prompt whose last tokens are the model's own choice, so that their probability is not tiny."""
    (ids,) = prompts(1, (length - answer,))
    with torch.no_grad():
        for _ in range(answer):
            ids = [*ids, int(hf(torch.tensor([list(ids)])).logits[0, -1].argmax())]
    return list(ids)


def agree(ours, reference, scale):
    largest = reference.abs().max().item()
    assert largest > 1e-5, "nothing is attributed, so agreeing means nothing"
    assert (ours - reference).abs().max().item() <= scale * largest


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    hf = tiny_model(request.param)
    return hf, hookdepth.wrap(hf), probe_of(likely_ids(hf, 14), [11, 12, 13])


@pytest.mark.parametrize("part", PARTS)
def test_riemann_equals_the_naive_sum(family, part):
    hf, model, probe = family
    settings = Settings(parts=(part,), ig_method="riemann", ig_steps=8)
    ours = attribute(Path(model, probe, part), settings)
    for layer in range(model.n_layers):
        reference, f_x, f_baseline = naive.integrated_gradients(
            hf, list(probe.token_ids), list(probe.answer_positions), layer, part, steps=8
        )
        assert ours["f_input"].item() == pytest.approx(f_x, rel=1e-4)
        assert ours["f_baseline"][layer].item() == pytest.approx(f_baseline, rel=1e-4)
        agree(ours["attribution"][layer], reference, 1e-4)
    assert ours["attribution"][:, -1].abs().max() == 0, "no position that predicts the answer sees the last token"


@pytest.mark.parametrize("part", PARTS)
def test_adaptive_is_complete_and_close_to_a_fine_sum(part):
    hf = tiny_model("llama-gqa")
    ids = likely_ids(hf, 14)
    model, probe = hookdepth.wrap(hf), probe_of(ids, [12, 13])
    ours = attribute(Path(model, probe, part), Settings(ig_tolerance=0.001))
    assert ours["converged"].min() == 1
    change = ours["f_input"] - ours["f_baseline"]
    assert ((ours["attribution"].sum(-1) - change).abs() <= 0.001 * change.abs().clamp(min=0.01)).all()
    for layer in (0, 3):
        fine, *_ = naive.integrated_gradients(hf, ids, [12, 13], layer, part, steps=2048, method="midpoint", block=128)
        agree(ours["attribution"][layer], fine, 0.005)


def test_gauss_legendre_agrees_with_adaptive():
    hf = tiny_model("llama")
    ids = likely_ids(hf, 14)
    path = Path(hookdepth.wrap(hf), probe_of(ids, [12, 13]), "layer")
    gauss = attribute(path, Settings(ig_method="gauss-legendre", ig_steps=64))
    adaptive = attribute(path, Settings(ig_tolerance=0.0005))
    agree(gauss["attribution"], adaptive["attribution"], 0.01)
    assert path.null_effect == pytest.approx(0, abs=1e-6)


def test_what_did_not_converge_is_said():
    hf = tiny_model("llama")
    ids = likely_ids(hf, 14)
    path = Path(hookdepth.wrap(hf), probe_of(ids, [12, 13]), "layer")
    ours = attribute(path, Settings(ig_tolerance=1e-6, ig_max_evaluations=12))
    assert ours["evaluations"].max() <= 12
    assert ours["converged"][:-1].min() == 0
    limit = 1e-6 * (ours["f_input"] - ours["f_baseline"]).abs().clamp(min=0.01)
    assert torch.equal(ours["converged"] == 1, ours["completeness_error"] <= limit)


def test_packing_does_not_change_the_sums():
    hf = tiny_model("llama-gqa")
    ids = likely_ids(hf, 14)
    model, probe = hookdepth.wrap(hf), probe_of(ids, [12, 13])
    settings = Settings(ig_method="riemann", ig_steps=16)
    wide = attribute(Path(model, probe, "layer"), settings)
    narrow = attribute(Path(model, probe, "layer", max_rows=5), settings)
    agree(narrow["attribution"], wide["attribution"], 1e-5)


def test_out_of_memory_halves_and_gives_the_same(monkeypatch):
    hf = tiny_model("llama")
    ids = likely_ids(hf, 14)
    model, probe = hookdepth.wrap(hf), probe_of(ids, [12, 13])
    settings = Settings(ig_method="riemann", ig_steps=16)
    whole = attribute(Path(model, probe, "layer"), settings)
    original, sizes = gradients.run_top, []

    def short_of_memory(model, prompts, branches, plan, top, measurements):
        sizes.append(len(top.rows))
        if len(top.rows) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, prompts, branches, plan, top, measurements)

    monkeypatch.setattr(gradients, "run_top", short_of_memory)
    limit = 10
    path = Path(model, probe, "layer")
    halved = attribute(path, settings)
    assert max(sizes) > limit, "nothing ran out of memory"
    agree(halved["attribution"], whole["attribution"], 1e-5)
    sizes.clear()
    attribute(path, settings)
    assert 1 < max(sizes) <= limit, "a path remembers what fits"
    limit = 0
    with pytest.raises(HookdepthError, match=r"not even one branch .* fits into memory with its gradients"):
        attribute(Path(model, probe, "layer"), settings)


def test_what_two_passes_give_for_the_same_input_is_noise(monkeypatch):
    hf = tiny_model("llama")
    model, probe = hookdepth.wrap(hf), probe_of(likely_ids(hf, 14), [12, 13])
    drift = iter(range(100))

    def drifting(*args, **kwargs):
        for part in differentiate(*args, **kwargs):
            part.clean += 0.25 * next(drift)
            yield part

    monkeypatch.setattr(integrals, "differentiate", drifting)
    path = Path(model, probe, "layer", max_rows=5)
    attribute(path, Settings(ig_method="riemann", ig_steps=4))
    assert path.null_effect == pytest.approx(0.25 * (path.passes - 1))
    assert path.null_where == "between passes"


def test_weights_get_no_gradient_and_flags_come_back():
    hf = tiny_model("llama")
    ids = likely_ids(hf, 14)
    flags = {name: n % 2 == 0 for n, (name, _) in enumerate(hf.named_parameters())}
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(flags[name])
    attribute(Path(hookdepth.wrap(hf), probe_of(ids, [12, 13]), "layer"), Settings(ig_method="riemann", ig_steps=4))
    assert all(parameter.grad is None for parameter in hf.parameters())
    assert {name: parameter.requires_grad for name, parameter in hf.named_parameters()} == flags


def test_gradients_that_are_wrong_are_refused():
    hf = tiny_model("llama")
    ids = likely_ids(hf, 14)
    model, probe = hookdepth.wrap(hf), probe_of(ids, [12, 13])
    check_gradients(Path(model, probe, "layer"))  # right ones pass
    projection = hf.model.layers[4].mlp.down_proj
    handle = projection.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * -3,))
    try:
        with pytest.raises(HookdepthError, match="promises a slope"):
            check_gradients(Path(model, probe, "layer"))
    finally:
        handle.remove()


def test_results_have_the_contract_s_names():
    hf, ids = tiny_model("llama"), prompts(2, (14, 10))
    inputs = Inputs((), (), (), (probe_of(ids[0], [12, 13]), probe_of(ids[1], [9])))
    settings = Settings(parts=("layer", "mlp"), ig_method="riemann", ig_steps=4)
    (task,) = groups_of(chosen("integrated-gradients"), Subject(hookdepth.wrap(hf), inputs, settings))
    tensors = task.finish([task.run(chunk, lambda: None) for chunk in range(task.n_chunks)])["integrated-gradients"]
    n_layers = len(hf.model.layers)
    assert tensors["attribution.0"].shape == (n_layers, 14)
    assert tensors["mlp.attribution.1"].shape == (n_layers, 10)
    for name in ("completeness_error.1", "evaluations.1", "f_baseline.0", "converged.0", "mlp.converged.0"):
        assert tensors[name].shape == (n_layers,)
    assert tensors["f_input.0"].shape == ()


@pytest.mark.demo
def test_two_layers_of_the_demo_model(demo_model):
    hf, tokenizer = demo_model
    model = hookdepth.wrap(hf, tokenizer)
    probe = make_probe(tokenizer, *DEFAULT_PROBES[0])
    layers = (12, 29)
    ours = attribute(Path(model, probe, "layer"), Settings(ig_method="riemann", ig_steps=8), layers)
    adaptive = attribute(Path(model, probe, "layer"), Settings(), (24,))
    assert adaptive["converged"].min() == 1
    for n, layer in enumerate(layers):
        reference, *_ = naive.integrated_gradients(
            hf, list(probe.token_ids), list(probe.answer_positions), layer, steps=8
        )
        agree(ours["attribution"][n], reference, 1e-4)
