"""How the layers are used while a model trains, without changing the training.

    from hookdepth.training import DepthCallback, DepthMonitor

    monitor = DepthMonitor(model, every=50, out="depth")
    for batch in batches:
        with monitor.step():                   # forward, backward and the optimiser's step, all micro-batches
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    trainer.add_callback(DepthCallback(trainer, every=50, out="depth"))      # the Trainer of transformers

Step s is the one that s steps came before. Those with s % every == 0 are sampled: what is measured belongs to the
weights before that step. On all other steps no hook exists.
"""

from typing import TYPE_CHECKING, Any

from hookdepth.training.history import load_history, save_picture
from hookdepth.training.monitor import DepthMonitor
from hookdepth.training.reading import padding_mask

if TYPE_CHECKING:
    from hookdepth.training.callback import DepthCallback


def __getattr__(name: str) -> Any:
    if name != "DepthCallback":
        raise AttributeError(f"module 'hookdepth.training' has no attribute {name!r}")
    from hookdepth.training.callback import DepthCallback  # imports transformers' Trainer, which takes seconds

    return DepthCallback


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["DepthCallback", "DepthMonitor", "load_history", "padding_mask", "save_picture"]
