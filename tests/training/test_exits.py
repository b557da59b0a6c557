"""No hook outlives a sampled step, whoever raises: counted at once, before anything else happens."""

import gc
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from test_callback import make_trainer
from training_runs import (
    assert_close,
    assert_same,
    expected_stats,
    fresh_model,
    make_batches,
    n_hooks,
    seed_everything,
    train,
)
from transformers import TrainerCallback

from hookdepth.errors import HookdepthError
from hookdepth.training import DepthCallback, DepthMonitor

STATS = "residual-stats"
RAISED = [ValueError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]


@pytest.fixture(autouse=True)
def seeded():
    seed_everything()


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def everything_clean(model):
    """No hook of ours anywhere, and the call of a compiled model is its own."""
    assert n_hooks(model) == 0
    assert not hasattr(getattr(model, "_compiled_call_impl", None), "done")


class Broken(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, _gradient):
        raise ctx.error


def break_layer(model, where, error, calls=1):
    """The last layer's MLP raises in its call number `calls`, or where its output goes backward."""
    mlp = model.model.layers[-1].mlp
    forward, left = mlp.forward, [calls]

    def broken(x):
        left[0] -= 1
        if left[0] == 0 and where == "forward":
            raise error
        return Broken.apply(forward(x), error) if left[0] == 0 and where == "backward" else forward(x)

    mlp.forward = broken


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("where", ["forward", "backward", "loop"])
def test_a_plain_loop(where, error):
    model, (batch,) = fresh_model(), make_batches(1)
    break_layer(model, where, error())
    monitor = DepthMonitor(model, 1, strict=True)

    def interrupted():
        with monitor.step():
            assert n_hooks(model) > 0
            model(**batch).loss.backward()
            raise error

    with pytest.raises((error, RuntimeError)):  # a StopIteration may leave as a RuntimeError
        interrupted()
    everything_clean(model)
    assert monitor.results == {}
    with monitor.step():
        model(**batch).loss.backward()
    assert monitor.results[STATS].metadata["settings"]["step"] == 1
    everything_clean(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_raised_before_the_block_is_entered(error, monkeypatch):
    model = fresh_model()
    monitor = DepthMonitor(model, 1, strict=True)
    on, calls = monitor.target.decoder.on, []

    def interrupted(site, *args):
        if site != "mlp_out":
            return on(site, *args)
        if calls:
            raise error
        calls.append(args)
        return on(site, *args)

    monkeypatch.setattr(monitor.target.decoder, "on", interrupted)
    with pytest.raises(error), monitor.step():
        pass
    assert calls
    everything_clean(model)


@pytest.mark.parametrize("way", ["break", "return", "dropped"])
def test_blocks_that_are_left_otherwise(way):
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, 1, strict=True)

    def one():
        for _ in range(2):
            with monitor.step():
                model(**batch).loss.backward()
                if way == "break":
                    break
                return

    if way == "dropped":
        step = monitor.step()
        step.__enter__()
        assert n_hooks(model) > 0
        del step
        gc.collect()
    else:
        one()
        assert monitor.results[STATS].metadata["settings"]["step"] == 0
    everything_clean(model)
    with monitor.step():
        model(**batch).loss.backward()
    assert monitor.results[STATS].metadata["settings"]["step"] == 1


@pytest.mark.parametrize("how", ["plain", "compiled in place"])
def test_begin_without_end(how, compiler):
    model, (batch,) = fresh_model(num_hidden_layers=2), make_batches(1, padding=(0, 0))
    if how != "plain":
        model.compile(backend="eager")
    model(**batch)

    def hooked():
        return n_hooks(model) + hasattr(model._compiled_call_impl, "done")

    monitor = DepthMonitor(model, every=2)
    monitor.begin(0)
    assert hooked()
    monitor.begin(1)
    everything_clean(model)
    monitor.begin(2)
    with monitor.step(3):
        assert not hooked()
    everything_clean(model)
    monitor.begin(4)
    assert hooked()
    del monitor
    gc.collect()
    everything_clean(model)


def test_a_failed_forward_pass_that_the_loop_survives_is_not_counted():
    model, (batch,) = fresh_model(attention_dropout=0.0), make_batches(1)
    exact = expected_stats(model, [batch])
    break_layer(model, "forward", torch.OutOfMemoryError("no memory"))
    monitor = DepthMonitor(model, 1, strict=True)
    with monitor.step():
        with pytest.raises(torch.OutOfMemoryError):
            model(**batch)
        model(**batch).loss.backward()
    assert_close(monitor.results[STATS], exact)


def test_a_step_within_itself_is_refused():
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, 1, strict=True)
    with pytest.raises(HookdepthError, match="within step"), monitor.step(), monitor.step():
        pass
    everything_clean(model)
    with monitor.step():
        model(**batch).loss.backward()
    assert monitor.results


@pytest.mark.parametrize("number", [1.0, -1, True, "3", None])
def test_numbers_of_steps(number):
    model, (batch,) = fresh_model(), make_batches(1)
    monitor = DepthMonitor(model, 1, strict=True)
    if number is not None:
        with pytest.raises(HookdepthError, match="number is "), monitor.step(number):
            pass
    with pytest.raises(HookdepthError, match="number is "):
        monitor.begin(number)
    everything_clean(model)
    with monitor.step():
        model(**batch).loss.backward()
    assert monitor.results[STATS].metadata["settings"]["step"] == 0


@pytest.mark.parametrize("how", ["plain", "compiled in place"])
@pytest.mark.parametrize("order", ["nested", "crossed"])
def test_two_monitors_of_one_model(how, order, compiler):
    model, (batch,) = fresh_model(attention_dropout=0.0, num_hidden_layers=2), make_batches(1, padding=(0, 0))
    exact = expected_stats(model, [batch])
    if how != "plain":
        model.compile(backend="eager")
    one, other = (DepthMonitor(model, 1, strict=True) for _ in range(2))
    if order == "nested":
        with one.step(), other.step():
            model(**batch).loss.backward()
    else:
        one.begin(0), other.begin(0)
        model(**batch).loss.backward()
        one.end(), other.end()
    everything_clean(model)
    assert_close(one.results[STATS], exact)
    assert_close(other.results[STATS], exact)


class Raising(TrainerCallback):
    """Raises in one event of the trainer."""

    def __init__(self, event, error):
        def fail(*_args, **_kwargs):
            raise error

        setattr(self, event, fail)


EVENTS = [
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_save",
]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", *EVENTS])
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "theirs first"])
def test_a_training_that_raises(tmp_path, where, error, first):
    callback = Raising(where, error()) if where in EVENTS else None
    trainer = make_trainer(tmp_path, callbacks=[callback] if callback and not first else [], save_strategy="steps")
    trainer.add_callback(DepthCallback(trainer, 1, strict=True))
    if callback and first:
        trainer.add_callback(callback)
    if callback is None:
        break_layer(trainer.model, where, error(), calls=4)
    raised = False
    try:
        trainer.train()
    except error:
        raised = True
        everything_clean(trainer.model)
    assert raised


def test_the_training_that_finds_its_batch_size(tmp_path):
    """Memory is short in a sampled step: the trainer begins anew, with smaller batches, and reading begins with it."""
    out_of_memory = RuntimeError("CUDA out of memory.")

    def found(watched):
        seed_everything()
        trainer = make_trainer(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=3)
        seen, forward = [], trainer.model.forward

        @wraps(forward)  # the trainer asks it for its arguments' names
        def short_of_memory(*args, **kwargs):
            seen.append((len(kwargs["input_ids"]), n_hooks(trainer.model)))
            output = forward(*args, **kwargs)
            if len(kwargs["input_ids"]) > 2:
                raise out_of_memory
            return output

        trainer.model.forward = short_of_memory
        depth = DepthCallback(trainer, 1, strict=True) if watched else None
        if depth:
            trainer.add_callback(depth)
        trainer.train()
        everything_clean(trainer.model)
        return seen, depth, [value.clone() for value in trainer.model.state_dict().values()]

    plain, _, without = found(False)
    seen, depth, weights = found(True)
    assert [size for size, _ in seen] == [size for size, _ in plain]
    assert seen[0][0] > 2
    assert seen[-1][0] <= 2
    assert_same(without, weights)
    hooks = [hooks for size, hooks in seen if size <= 2]
    assert hooks[1] == hooks[0], "of one reader, and not of those before it"
    assert depth.monitor.results[STATS].metadata["settings"]["step"] == 4


def test_training_twice(tmp_path):
    trainer = make_trainer(tmp_path)
    depth = DepthCallback(trainer, 2, strict=True)
    trainer.add_callback(depth)
    trainer.train()
    first = depth.monitor
    trainer.train()
    assert depth.monitor is not first
    assert depth.monitor.results[STATS].metadata["settings"]["step"] == 4
    everything_clean(trainer.model)


def test_a_callback_that_is_not_added_does_nothing(tmp_path):
    plain, watched = make_trainer(tmp_path), make_trainer(tmp_path)
    DepthCallback(watched, 1)
    for trainer in (plain, watched):
        seed_everything()
        trainer.train()
    assert_same(*([value.clone() for value in t.model.state_dict().values()] for t in (plain, watched)))


def test_a_plain_loop_with_two_monitors_does_not_notice():
    batches = make_batches(3)
    without = train(fresh_model(), batches)
    model = fresh_model()
    one, other = DepthMonitor(model, 1, strict=True), DepthMonitor(model, 2, strict=True)

    class Both:
        @contextmanager
        def step(self):
            with one.step(), other.step():
                yield

    assert_same(without, train(model, batches, Both()))
    assert one.results[STATS].metadata["settings"]["step"] == other.results[STATS].metadata["settings"]["step"] == 2
