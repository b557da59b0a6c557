"""DepthCallback: the DepthMonitor for the Trainer of transformers."""

from __future__ import annotations

import logging
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hookdepth.errors import HookdepthError
from hookdepth.training.history import save_picture
from hookdepth.training.metrics import metrics_of
from hookdepth.training.monitor import DepthMonitor
from hookdepth.training.wrapping import is_writer

PICTURE = "depth.png"
logger = logging.getLogger("hookdepth.training")


class DepthCallback(TrainerCallback):
    """Depth diagnostics of a Trainer's run, through the trainer's own logging.

        options = {"probes": names, "prompts": ["2 + 2 = 4"], "tokenizer": tokenizer}
        trainer.add_callback(DepthCallback(trainer, every=50, **options))

    Metrics go where `Trainer.log` sends them, to TensorBoard, W&B and whatever else the trainer reports to, as
    entries of their own, when a sampled step is done. The trainer's entries are what they are without.

    The hooks of a sampled step are on the model within `trainer.training_step` alone, around which the callback puts
    itself: whatever is raised in there, they are gone before anybody else sees it.

    Args:
        trainer: the one that the callback is added to: its reporters, its model as it is wrapped for training,
            and its tokenizer are needed.
        every, options: as `DepthMonitor`; the tokenizer's default is the trainer's.
        per_layer: log every layer, and not only means over layers and depths. All of it also stands in the
            `log_history` of every checkpoint.

    Attributes:
        monitor: the run's DepthMonitor.

    Raises:
        HookdepthError: what DepthMonitor raises for a model, settings or prompts that cannot be used.
    """

    def __init__(self, trainer: Trainer, every: int = 50, *, per_layer: bool = True, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            what = f"DepthCallback was given {type(trainer).__name__} for the trainer"
            raise HookdepthError(what, "make the Trainer first, then trainer.add_callback(DepthCallback(trainer))")
        self.trainer, self.every, self.per_layer, self.options = trainer, every, per_layer, options
        self.monitor = self._new_monitor()
        self._unused = True
        training_step = trainer.training_step

        @wraps(training_step)
        def read(*args: Any, **kwargs: Any) -> Any:
            with self.monitor.reading():
                return training_step(*args, **kwargs)

        trainer.training_step = read  # type: ignore[method-assign]

    def _new_monitor(self) -> DepthMonitor:
        options = {"tokenizer": self.trainer.processing_class, **self.options}
        return DepthMonitor(self.trainer.model_wrapped, self.every, **options)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A monitor for each training, also for each that `auto_find_batch_size` begins anew."""
        # Only now is the model wrapped as it will be called.
        if not self._unused or self.monitor.target.outer is not self.trainer.model_wrapped:
            self.monitor = self._new_monitor()
        self._unused = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.monitor.prepare(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.monitor.end():
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        # Any entry takes back that the trainer's own one is due, which comes after this. And a subclass's log may
        # put its pending averages into whatever entry comes next (TRL's trainers do), so it is not called.
        due = control.should_log
        try:
            Trainer.log(self.trainer, metrics_of(self.monitor.results, self.per_layer))
        except Exception as error:  # noqa: BLE001 (a reporter's, for an entry that is not there without us)
            why = f"the trainer's log raised {type(error).__name__} for the metrics: {error}"
            failure = HookdepthError(why, "see what the trainer reports to", 1)
            failure.__cause__ = error
            self.monitor.fail(failure)
        finally:
            control.should_log = due

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        monitor = self.monitor
        if monitor.out is None or not is_writer():
            return
        try:
            save_picture(monitor.out, Path(monitor.out) / PICTURE)
        except Exception as error:
            if monitor.strict:
                raise
            logger.warning("no picture of the training's depth: %s", " ".join(str(error).split()))
