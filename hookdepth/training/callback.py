"""DepthCallback: the DepthMonitor for the Trainer of transformers.

from hookdepth.training import DepthCallback

trainer = Trainer(model, arguments, train_dataset=data)
trainer.add_callback(DepthCallback(trainer, every=50, out="depth"))
trainer.train()                                    # at the end: depth/depth.png, layers × steps
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hookdepth.training.history import save_picture
from hookdepth.training.monitor import DepthMonitor, metrics_of
from hookdepth.training.wrapping import is_writer

PICTURE = "depth.png"
logger = logging.getLogger("hookdepth.training")


class DepthCallback(TrainerCallback):
    """Depth diagnostics of a Trainer's run, through the trainer's own logging.

        trainer.add_callback(DepthCallback(trainer, every=50, probes=["logit-lens"], prompts=["…"], out="depth"))

    Metrics go to `trainer.log`, and so to TensorBoard, W&B and whatever else the trainer reports to.

    Args:
        trainer: the one that the callback is added to: its log, its model as it is wrapped for training, and its
            tokenizer are needed.
        every, options: as `DepthMonitor`; the tokenizer's default is the trainer's.
        per_layer: log every layer, and not only means over layers and depths.

    Attributes:
        monitor: the run's DepthMonitor; None before training begins.

    Raises:
        HookdepthError: what DepthMonitor raises for unusable settings, when the training begins.
    """

    def __init__(self, trainer: Trainer, every: int = 50, *, per_layer: bool = True, **options: Any) -> None:
        self.trainer, self.every, self.per_layer, self.options = trainer, every, per_layer, options
        self.monitor: DepthMonitor | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Only now is the model wrapped as it will be called."""
        options = {"tokenizer": self.trainer.processing_class, **self.options}
        self.monitor = DepthMonitor(self.trainer.model_wrapped, self.every, **options)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Probes and hooks, on sampled steps."""
        if self.monitor is not None:
            self.monitor.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Results and metrics, after sampled steps."""
        if self.monitor is not None and self.monitor.end():
            self.trainer.log(metrics_of(self.monitor.results, self.per_layer))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The picture over training time."""
        monitor = self.monitor
        if monitor is None or monitor.out is None or not is_writer():
            return
        try:
            save_picture(monitor.out, Path(monitor.out) / PICTURE)
        except Exception as error:
            if monitor.strict:
                raise
            logger.warning("no picture of the training's depth: %s", " ".join(str(error).split()))
