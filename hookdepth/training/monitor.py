"""DepthMonitor: residual statistics and probes on sampled steps of any PyTorch training loop.

What is measured goes to `out/step-000050/<analysis>.safetensors`, which `hookdepth report` and `hookdepth compare`
read, and stays in `monitor.results` until the next sampled step; how long it took is in `log.json` beside it. Of
several processes all take part, rank 0 writes.

An error in the diagnostic is logged once and ends it, on all ranks; the training goes on. With `strict=True` it is
raised at the end of its step.

Hooks are on the model while `step()` or `reading()` is entered, and at no other time: whatever is raised there takes
them off as it passes. Only `begin()` relies on somebody to call `end()`.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hookdepth.analyses.settings import Settings
from hookdepth.analyses.stats import ResidualStats
from hookdepth.errors import HookdepthError, as_path, whole_number
from hookdepth.model.identity import versions
from hookdepth.results import SUFFIX, Result, add_to_log
from hookdepth.training.history import STEP
from hookdepth.training.metrics import metrics_of
from hookdepth.training.probing import Probes, Prompt
from hookdepth.training.reading import Mask, Reader, padding_mask, unpack
from hookdepth.training.wrapping import gather, in_group, is_writer, unwrap

logger = logging.getLogger("hookdepth.training")


class DepthMonitor:
    """Depth diagnostics of a training loop.

        monitor = DepthMonitor(model, every=50)
        with monitor.step():
            model(**batch).loss.backward()
            optimizer.step()
        monitor.metrics["depth/cosine.layer"]      # of the last sampled step

    Args:
        model: as the loop calls it: wrapped in DDP, torch.compile, PEFT, sharded by FSDP2, prepared by accelerate.
        every: step s is sampled where s % every == 0; s counts the steps before it, from 0.
        probes: analyses to run on `prompts`, before steps s with s % probe_every == 0.
        prompts: texts, token ids, pairs of prompt and answer: see `probing.Probes`.
        probe_every: default as `every`.
        settings: of the probes' analyses.
        tokenizer: for prompts that are texts.
        out: folder for a folder a step; None writes nothing.
        mask: which tokens count: see `reading.padding_mask`, the default.
        strict: raise what goes wrong in the diagnostic, at the end of its step.

    Attributes:
        results: analysis → Result, of the last step at which there were any.
        metrics: the same as named numbers, for a logger: see `metrics.metrics_of`.

    Raises:
        HookdepthError: no model of a supported kind, unusable settings or prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        probes: Sequence[str] = (),
        prompts: Sequence[Prompt] = (),
        probe_every: int | None = None,
        settings: Settings | None = None,
        tokenizer: Any = None,
        out: str | Path | None = None,
        mask: Mask = padding_mask,
        strict: bool = False,
    ) -> None:
        self.every = whole_number("every", every, 1)
        self.probe_every = self.every if probe_every is None else whole_number("probe_every", probe_every, 1)
        if not callable(mask):
            raise HookdepthError(f"mask={mask!r} is no function", "give one of the model's inputs, as padding_mask is")
        self.target = unwrap(model, tokenizer)
        self.probes = Probes(probes, prompts, tokenizer, settings)
        self.probes.check(self.target.decoder)
        self.out = None if out is None else as_path(out)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise HookdepthError(f"out={str(out)!r} is a file", "give a folder")
        self.mask, self.strict = mask, strict
        self.results: dict[str, Result] = {}
        self.metrics: dict[str, float] = {}
        self._number = self._next = 0
        self._reader: Reader | None = None
        self._fresh: dict[str, Result] = {}
        self._costs: dict[str, dict[str, Any]] = {}
        self._began = 0.0
        self._error: Exception | None = None
        self._verified = self._reported = self._off = self._entered = False
        self._remove_hooks: Callable[[], object] = lambda: None
        if self.target.compiled:
            logger.warning(
                "the model is compiled, and hooks in it would not run: sampled steps make one more forward pass, "
                "uncompiled and without gradients, and statistics are read from that"
            )

    @contextmanager
    def step(self, number: int | None = None) -> Iterator[DepthMonitor]:
        """Around one step of the optimiser, all of its micro-batches included.

            with monitor.step():
                for part in micro_batches:
                    model(**part).loss.backward()
                optimizer.step()

        `number` is how many steps came before it; by default it counts on from the last one.
        """
        if self._entered:
            raise HookdepthError("step() within step() of the same monitor", "enter it once around the whole step")
        self._entered = True
        try:
            self.prepare(self._next if number is None else number)
            with self.reading():
                yield self
        finally:
            self._entered = False
        self.end()

    def begin(self, number: int) -> None:
        """Before step `number`, where a `with` block does not fit: as `step` does, until `end`.

        Where an error may come between the two, take `step`: without `end`, the hooks of a sampled step stay until
        the next `begin`, or until nobody holds the monitor any more.
        """
        self.prepare(number)
        if self._reader is not None:
            self._remove_hooks = weakref.finalize(self, self._reader.detach)
            self._reader.attach()

    def prepare(self, number: int) -> None:
        """Before step `number`, for a loop that enters `reading` itself: run probes, where this step has any."""
        number = whole_number("number", number, 0)
        self._remove_hooks()
        self._number, self._next, self._fresh, self._costs, self._reader = number, number + 1, {}, {}, None
        if self._off:
            return
        if self.probes.analyses and number % self.probe_every == 0 and self._error is None:
            try:
                self._run_probes()
            except Exception as error:  # noqa: BLE001 (whatever it is, the training goes on)
                self._error = error
        self._began = time.perf_counter()
        if number % self.every == 0:
            self._reader = Reader(self.target, self.mask, verify=not self._verified)
            self._reader.error = self._error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hooks on the model within the block, if the step that was prepared is a sampled one.

        monitor.prepare(0)
        with monitor.reading():
            model(**batch).loss.backward()
        monitor.end()
        """
        reader = self._reader
        if reader is None:
            yield
            return
        try:
            reader.attach()
            yield
        finally:
            reader.detach()

    def end(self) -> bool:
        """After the step: reduce over ranks, write, and say whether there is anything new in `results`.

        Raises:
            HookdepthError, or what else went wrong: with `strict` alone.
        """
        reader, self._reader = self._reader, None
        self._remove_hooks()
        try:
            if reader is not None:
                self._finish(reader)
            if self._fresh and self._error is None:
                self.results, self.metrics = self._fresh, metrics_of(self._fresh)
                self._write()
        except Exception as error:  # noqa: BLE001 (whatever it is, the training goes on)
            self._error = error
        self._report()
        return bool(self._fresh) and self._error is None

    def fail(self, error: Exception) -> None:
        """End the diagnostic for what went wrong around it, perhaps in a logger, as for an error of its own."""
        self._error = self._error or error
        self._report()

    def _run_probes(self) -> None:
        begin = time.perf_counter()
        for name, found in self.probes.run(self.target).items():
            self._fresh[name] = self._result(name, found.pop("tensors"), begin, **found)

    def _finish(self, reader: Reader) -> None:
        """All ranks come here on a sampled step, also those on which something failed: the others would wait."""
        failed, tokens, tensors = unpack(gather(reader.packed()), self.target.decoder.n_layers)
        if failed:
            self._off = True
            raise reader.error or HookdepthError("they failed on another rank", "see its log", 1)
        reader.verdict()
        if not tokens:
            raise HookdepthError(
                f"step {self._number} ran no forward pass with gradients, or none whose tokens count",
                "give DepthMonitor the model that the loop calls (a compiled function hides it), or a mask=",
            )
        self._verified = True
        data = {"name": "training", "n_tokens": tokens}
        # On probes' prompts, the same analysis says more.
        name = ResidualStats.name
        self._fresh.setdefault(name, self._result(name, tensors, self._began, data=data))

    def _result(self, name: str, tensors: dict[str, Any], begin: float, **facts: Any) -> Result:
        settings = {"step": self._number, "compiled": self.target.compiled, **facts.pop("settings", {})}
        cost = {"wall_time_s": round(time.perf_counter() - begin, 3), "passes": facts.pop("passes", 0)}
        self._costs.setdefault(name, cost)
        return Result(name, tensors, {**self._about, "settings": settings, **facts})

    @cached_property
    def _about(self) -> dict[str, Any]:
        return {"model": self.target.decoder.describe(), "versions": versions(), "seed": None}

    def _write(self) -> None:
        if self.out is not None and is_writer():
            folder = self.out / f"{STEP}{self._number:06d}"
            for name, result in self._fresh.items():
                result.save(folder / f"{name}{SUFFIX}")
            add_to_log(folder, self._costs)

    def _report(self) -> None:
        if self._error is None or self._reported:
            return
        self._reported = True
        # Other processes learn of it at the next sampled step, and wait for this one there.
        self._off = self._off or not in_group()
        if self.strict:
            raise self._error
        why = " ".join(str(self._error).split()) or type(self._error).__name__
        logger.warning("depth diagnostics end at step %d, the training goes on: %s", self._number, why)
