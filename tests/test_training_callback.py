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


def run(tmp_path, depth=None, **arguments):
    """Five steps of two micro-batches each; with an evaluation in between."""
    seed_everything()
    model = fresh_model()
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
    seen = Seen()
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path / "trainer"), **options),
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        callbacks=[seen],
    )
    callback = None
    if depth is not None:
        callback = DepthCallback(trainer, **depth)
        trainer.add_callback(callback)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if not any(key.startswith("depth/") for key in entry)]
    timeless = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second", "flos"))} for entry in losses
    ]
    return fingerprint(model, trainer.optimizer, timeless), seen.logs, callback


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
