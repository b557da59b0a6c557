"""DepthCallback in a real Trainer: logged, written, drawn, and bit for bit without effect on the training."""

import pytest
import torch
from training_runs import assert_same, fingerprint, fresh_model, make_batches, n_hooks, seed_everything
from transformers import Trainer, TrainerCallback, TrainingArguments

from hookdepth.cli import main
from hookdepth.errors import HookdepthError
from hookdepth.training import DepthCallback, load_history

IDS = list(range(3, 20))
STEPS = 5


class Seen(TrainerCallback):
    """Stands before the reporters, as TensorBoard's callback does, and keeps what they are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def rows():
    return [{name: value[row] for name, value in batch.items()} for batch in make_batches(8) for row in range(2)]


def make_trainer(tmp_path, callbacks=(), kind=Trainer, **arguments):
    """Five steps of two micro-batches each; with an evaluation in between."""
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return kind(
        fresh_model(),
        TrainingArguments(output_dir=str(tmp_path / "trainer"), **options),
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        callbacks=list(callbacks),
    )


def timeless(entry):
    return {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second", "flos"))}


def is_ours(entry):
    return any(key.startswith("depth/") for key in entry)


def run(tmp_path, depth=None, **arguments):
    seed_everything()
    seen = Seen()
    trainer = make_trainer(tmp_path, [seen], **arguments)
    callback = None
    if depth is not None:
        callback = DepthCallback(trainer, **depth)
        trainer.add_callback(callback)
    trainer.train()
    losses = [timeless(entry) for entry in trainer.state.log_history if not is_ours(entry)]
    return fingerprint(trainer.model, trainer.optimizer, losses), seen.logs, callback


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=["plain", "bf16, checkpointing"]
)
def test_the_trainer_does_not_notice(tmp_path, arguments, capsys):
    without, _, _ = run(tmp_path, **arguments)
    out = tmp_path / "depth"
    depth = {"every": 2, "probes": ["logit-lens", "skip-current"], "prompts": [IDS], "out": out, "strict": True}
    watched, logs, callback = run(tmp_path, depth, **arguments)
    assert_same(without, watched)
    sampled = [(step, log) for step, log in logs if any(key.startswith("depth/") for key in log)]
    assert [step for step, _ in sampled] == [1, 3, 5], "steps 0, 2 and 4, logged when they are done"
    assert {"depth/cosine.layer", "depth/cosine.layer/002", "depth/effective_depth.kl"} <= set(sampled[0][1])
    assert list(load_history(out)["residual-stats"]) == [0, 2, 4]
    assert callback.monitor.results["residual-stats"].metadata["settings"]["step"] == 4
    assert (out / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_a_compiled_trainer(tmp_path):
    torch._dynamo.reset()
    arguments = {"torch_compile": True, "torch_compile_backend": "eager", "eval_strategy": "no"}
    without, _, _ = run(tmp_path, **arguments)
    torch._dynamo.reset()
    watched, _, callback = run(tmp_path, {"every": 2, "strict": True}, **arguments)
    assert_same(without, watched)
    assert callback.monitor.results["residual-stats"].metadata["settings"] == {"step": 4, "compiled": True}
    torch._dynamo.reset()


def test_an_error_does_not_stop_the_trainer(tmp_path, caplog):
    def broken(inputs):
        raise RuntimeError("no mask")

    without, _, _ = run(tmp_path)
    watched, logs, callback = run(tmp_path, {"every": 1, "mask": broken, "out": tmp_path / "depth"})
    assert_same(without, watched)
    said = [record.getMessage() for record in caplog.records if record.name == "hookdepth.training"]
    assert said[0] == "depth diagnostics end at step 0, the training goes on: no mask"
    assert "no picture" in said[1]
    assert len(said) == 2
    assert n_hooks(callback.monitor.target.outer) == 0
    assert not any(key.startswith("depth/") for _, log in logs for key in log)
    with pytest.raises(RuntimeError, match="no mask"):
        run(tmp_path, {"every": 1, "mask": broken, "strict": True})


def test_unusable_settings_stop_it_before_the_first_step(tmp_path):
    with pytest.raises(HookdepthError, match="did you mean logit-lens"):
        run(tmp_path, {"probes": ["logit-lenz"], "prompts": [IDS]})


def test_steps_can_be_compared(tmp_path):
    out = tmp_path / "depth"
    run(tmp_path, {"every": 4, "out": out, "per_layer": False})
    assert main(["compare", str(out / "step-000000"), str(out / "step-000004"), "--out", str(tmp_path / "c")]) == 0


class Flow(TrainerCallback):
    """Keeps what the trainer is about to do after each step, and what its callbacks were told."""

    def __init__(self):
        self.flow, self.told = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.flow.append((state.global_step, *sorted(vars(control).items())))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, timeless(logs)))

    def on_save(self, args, state, control, **kwargs):
        self.told.append((state.global_step, "saved"))


class Averaging(Trainer):
    """As TRL's trainers do: the next entry takes all averages since the last one."""

    pending = 0

    def training_step(self, *args, **kwargs):
        self.pending += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log({**logs, "batches": self.pending}, start_time)
        self.pending = 0


@pytest.mark.parametrize(
    ("every", "arguments"),
    [
        (1, {"logging_steps": 1}),
        (2, {"logging_steps": 3}),
        (1, {"logging_steps": 2, "logging_first_step": True, "eval_steps": 1}),
        (1, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
        (1, {"logging_strategy": "no"}),
        (1, {"logging_steps": 1, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}),
        (1, {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}),
        (1, {"logging_steps": 1, "kind": Averaging}),
    ],
    ids=["1", "3 and 2", "first", "epoch", "no", "saving", "best", "averaging"],
)
def test_the_log_is_the_one_without_and_ours(tmp_path, every, arguments):
    def histories(watched):
        seed_everything()
        before, after = Flow(), Flow()
        trainer = make_trainer(tmp_path / str(watched), [before], **arguments)
        if watched:
            trainer.add_callback(DepthCallback(trainer, every, strict=True))
        trainer.callback_handler.callbacks.append(after)
        trainer.train()
        return trainer.state, before, after

    plain, plain_before, plain_after = histories(False)
    state, before, after = histories(True)
    entries = [(number, timeless(entry)) for number, entry in enumerate(state.log_history)]
    ours = [(number, entry) for number, entry in entries if is_ours(entry)]
    assert [entry for _, entry in entries if not is_ours(entry)] == list(map(timeless, plain.log_history))
    assert [entry["step"] for _, entry in ours] == list(range(1, STEPS + 1, every))
    assert before.flow == plain_before.flow
    assert after.flow == plain_after.flow
    for reporter, without in ((before, plain_before), (after, plain_after)):
        assert [told for told in reporter.told if not is_ours(told[1])] == without.told
        assert [step for step, told in reporter.told if is_ours(told)] == [entry["step"] for _, entry in ours]
    assert state.best_metric == plain.best_metric
    assert state.best_global_step == plain.best_global_step


class Picky(TrainerCallback):
    """A reporter that knows losses only."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if any("depth/" in name for name in logs):
            raise KeyError("loss")


def test_a_reporter_that_fails_for_our_metrics_does_not_end_the_training(tmp_path, caplog):
    def history(depth):
        seed_everything()
        trainer = make_trainer(tmp_path, [Picky()], logging_steps=1)
        if depth is not None:
            trainer.add_callback(DepthCallback(trainer, 1, **depth))
        trainer.train()
        return [timeless(entry) for entry in trainer.state.log_history if not is_ours(entry)]

    assert history({}) == history(None)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hookdepth.training"]
    assert line.startswith("depth diagnostics end at step 0, the training goes on: the trainer's log raised KeyError")
    with pytest.raises(HookdepthError, match="raised KeyError"):
        history({"strict": True})
