"""What a training loop does to its model: checkpointing, torch.compile, PEFT, accelerate."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_runs import assert_close, assert_same, expected_stats, fresh_model, make_batches, n_hooks, train

from hookdepth.analyses.lens import lens_sums
from hookdepth.model.decoder import Decoder
from hookdepth.training import DepthMonitor
from hookdepth.training.wrapping import unwrap

IDS = list(range(3, 20))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def compiler():
    """Compiled code of one test is not another's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_checkpointing_counts_no_token_twice(reentrant, accumulate):
    batches = make_batches(accumulate)

    def checkpointed():
        model = fresh_model(attention_dropout=0.0)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    model = checkpointed()
    exact = expected_stats(model, batches)
    monitor = DepthMonitor(model, 1, probes=["logit-lens"], prompts=[IDS], strict=True)
    assert_same(
        train(checkpointed(), batches, accumulate=accumulate), train(model, batches, monitor, accumulate=accumulate)
    )
    assert_close(monitor.results["residual-stats"], exact)
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert monitor.results["residual-stats"].metadata["data"]["n_tokens"] == n_tokens
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_whole_model_that_is_computed_again_counts_once():
    model = fresh_model(attention_dropout=0.0)
    (batch,) = make_batches(1)
    exact = expected_stats(model, [batch])
    monitor = DepthMonitor(model, 1, strict=True)
    with monitor.step(), torch.utils.checkpoint.set_checkpoint_early_stop(False):
        torch.utils.checkpoint.checkpoint(lambda: model(**batch).loss, use_reentrant=False).backward()
    assert_close(monitor.results["residual-stats"], exact)
    assert monitor.results["residual-stats"].metadata["data"]["n_tokens"] == int(batch["attention_mask"].sum())


def said(caplog):
    """The one line that was logged."""
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hookdepth.training"]
    return line


def compiled_by(model, how, backend="eager"):
    """What the loop calls."""
    if how == "function":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "layers":
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer, backend=backend)
    elif how == "layers in place":
        for layer in model.model.layers:
            layer.compile(backend=backend)
    return model


@pytest.mark.parametrize("warm", [False, True], ids=["compiled on a sampled step", "compiled before"])
@pytest.mark.parametrize("how", ["function", "in place", "layers", "layers in place"])
def test_compiled_models_are_read_and_not_disturbed(how, warm, compiler, caplog):
    batches = make_batches(3, padding=(0, 0))
    dropout = 0.1 if how == "function" else 0.0

    def prepare(model):
        call = compiled_by(model, how)
        if warm:
            call(**batches[0])
        return call

    plain = fresh_model(attention_dropout=dropout, num_hidden_layers=2)
    without = train(plain, batches, call=prepare(plain))
    torch._dynamo.reset()
    model = fresh_model(attention_dropout=dropout, num_hidden_layers=2)
    call = prepare(model)
    monitor = DepthMonitor(call, 2, probes=["logit-lens", "skip-current"], prompts=[IDS], strict=True)
    assert "one more forward pass" in said(caplog)
    assert_same(without, train(model, batches, monitor, call=call))
    assert monitor.results["residual-stats"].metadata["settings"] == {"step": 2, "compiled": True}
    if dropout:
        return  # the numbers are those of other dropped units, each time
    # The last sampled step's weights, now moved on by one step: read afresh, and compare with an uncompiled twin.
    twin = fresh_model(attention_dropout=0.0, num_hidden_layers=2)
    twin.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    with monitor.step(4):
        call(**batches[0]).loss.backward()
    assert_close(monitor.results["residual-stats"], expected_stats(twin, batches[:1]))
    exact = lens_sums(Decoder(twin), IDS)["kl"] / len(IDS)
    assert torch.allclose(monitor.results["logit-lens"].tensors["kl"], exact, atol=1e-5)


def test_a_compiled_model_that_is_not_given_is_noticed(compiler, caplog):
    model, batches = fresh_model(num_hidden_layers=2), make_batches(3, padding=(0, 0))
    monitor = DepthMonitor(model, every=1)
    train(model, batches, monitor, call=torch.compile(model, backend="eager"))
    assert "compiled" in said(caplog)
    assert n_hooks(model) == 0


def test_a_compiled_step_is_noticed(compiler, caplog):
    model, (batch,) = fresh_model(num_hidden_layers=2), make_batches(1, padding=(0, 0))
    monitor = DepthMonitor(model, every=1)
    loss = torch.compile(lambda: model(**batch).loss, backend="eager")
    with monitor.step():
        loss().backward()
    assert "compiled" in said(caplog)


@pytest.mark.parametrize("around", ["within autocast", "one autocast for all"])
def test_autocast_and_a_compiled_layer(around, compiler):
    """The forward pass that is made once more must not leave weights in autocast's cache."""
    batches = make_batches(2, padding=(0, 0))

    def run(watch):
        torch.manual_seed(0)
        model = compiled_by(fresh_model(num_hidden_layers=2), "layers in place")
        monitor = DepthMonitor(model, 1, strict=True) if watch else None
        if around == "within autocast":
            return train(model, batches, monitor, autocast=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train(model, batches, monitor)

    without = run(False)
    torch._dynamo.reset()
    assert_same(without, run(True))


def test_wrappers_are_taken_off_in_any_order(compiler):
    model = fresh_model(num_hidden_layers=2)
    target = unwrap(torch.compile(model))
    assert (target.core, target.decoder.hf, target.compiled) == (model, model, True)
    assert unwrap(model).compiled is False


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    batches = make_batches(3)

    def wrapped():
        torch.manual_seed(0)
        if kind == "lora":
            config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        else:
            config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(fresh_model(), config).train()

    model = wrapped()
    without = train(wrapped(), batches)
    monitor = DepthMonitor(model, 1, probes=["logit-lens", "skip-current"], prompts=[IDS], strict=True)
    assert_same(without, train(model, batches, monitor))
    virtual = 2 * 3 if kind == "prompt" else 0
    n_tokens = int(batches[-1]["attention_mask"].sum()) + virtual
    assert monitor.results["residual-stats"].metadata["data"]["n_tokens"] == n_tokens
    if kind == "lora":
        base = model.get_base_model()
        exact = lens_sums(Decoder(base), IDS)["kl"] / len(IDS)
        with monitor.step():
            pass_through = model(**batches[0]).loss
            pass_through.backward()
        assert torch.allclose(monitor.results["logit-lens"].tensors["kl"], exact, atol=1e-5)


@pytest.fixture
def no_accelerator():
    """accelerate keeps one state a process, and a Trainer of another test may have made it."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("no_accelerator")
def test_accelerate():
    def run(watch):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = fresh_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        monitor = DepthMonitor(prepared, 1, probes=["logit-lens"], prompts=[IDS], strict=True) if watch else None
        batches = make_batches(4)
        for start in (0, 2):
            if monitor:
                monitor.begin(start // 2)
            for batch in batches[start : start + 2]:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            if monitor:
                assert monitor.end()
        if monitor:
            n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[2:])
            assert monitor.results["residual-stats"].metadata["data"]["n_tokens"] == n_tokens
        return [value.clone() for value in model.state_dict().values()], torch.get_rng_state()

    assert_same(run(False), run(True))
