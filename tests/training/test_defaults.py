"""The monitor in a process whose defaults are not torch's own: the same numbers, or one line, and the training goes on.

Probes need the engine to bring its own state (`Decoder.evaluating`): default dtype and device, autocast, inference.
"""

from contextlib import contextmanager

import pytest
import torch
from training_runs import assert_close, assert_same, expected_stats, fresh_model, make_batches, seed_everything, train

from hookdepth.data import Probe
from hookdepth.training import DepthMonitor

IDS = list(range(3, 20))
PROBES = ["residual-stats", "logit-lens", "skip-current", "skip-future", "residual-erasure", "integrated-gradients"]


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


AMBIENT = pytest.mark.parametrize("ambient", [default_dtype, default_device, autocast, torch.inference_mode])


def watch(model, probes=PROBES):
    from hookdepth.analyses import Settings

    probe = Probe("a", "b", tuple(IDS[:6]), tuple("abcdef"), (4, 5))
    settings = Settings(ig_method="riemann", ig_steps=4)
    prompts = [probe, IDS] if probes else []
    return DepthMonitor(model, 1, probes=probes, prompts=prompts, settings=settings, strict=True)


def state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@AMBIENT
def test_probes_measure_the_same(ambient):
    model = fresh_model()
    plain, watched = watch(model), watch(model)
    plain.prepare(0)
    with ambient():
        before = state()
        watched.prepare(0)
        assert before == state()
    assert watched._error is None, repr(watched._error)
    assert plain._error is None
    assert watched._fresh.keys() == plain._fresh.keys() == set(PROBES)
    for name, result in plain._fresh.items():
        assert_close(watched._fresh[name], result.tensors)


@pytest.mark.parametrize("probes", [[], PROBES], ids=["statistics", "probes"])
@pytest.mark.parametrize("ambient", [default_dtype, autocast])  # with a default device torch itself does not train here
def test_a_training_does_not_notice(ambient, probes):
    batches = make_batches(2)
    exact = expected_stats(fresh_model(attention_dropout=0.0), batches[:1])

    def run(watched):
        seed_everything()
        model = fresh_model(attention_dropout=0.0)
        monitor = watch(model, probes) if watched else None
        with ambient():
            loop(model, batches, monitor)
        return [value.clone() for value in model.state_dict().values()], monitor

    statistics = None

    def loop(model, batches, monitor):
        nonlocal statistics
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for number, batch in enumerate(batches):
            if monitor is None:
                model(**batch).loss.backward()
                optimizer.step()
            else:
                with monitor.step():
                    model(**batch).loss.backward()
                    optimizer.step()
                if number == 0 and not probes:
                    statistics = monitor.results["residual-stats"]
            optimizer.zero_grad()

    without, _ = run(False)
    weights, monitor = run(True)
    assert_same(without, weights)
    assert set(monitor.results) == {"residual-stats", *probes}
    if statistics is not None:
        assert_close(statistics, exact, 0.05 if ambient is autocast else 2e-5)


def test_a_model_of_another_default_dtype():
    """As a whole bfloat16 training does it: the model is made under the default too."""
    with default_dtype():
        model = fresh_model(attention_dropout=0.0).to(torch.bfloat16)
        monitor = watch(model)
        train(model, make_batches(2), monitor)
    assert set(monitor.results) == set(PROBES)
    assert all(value.dtype == torch.float32 for value in monitor.results["residual-stats"].tensors.values())


def test_evaluation_in_inference_mode_within_a_step_does_not_count():
    model, batches = fresh_model(attention_dropout=0.0), make_batches(2)
    exact = expected_stats(model, batches[:1])
    monitor = watch(model, [])
    with monitor.step():
        with torch.inference_mode():
            model(**batches[1])
        model(**batches[0]).loss.backward()
        with torch.inference_mode():
            model(**batches[1])
    assert_close(monitor.results["residual-stats"], exact)
