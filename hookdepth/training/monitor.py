"""DepthMonitor: residual statistics and probes on sampled steps of any PyTorch training loop.

    monitor = DepthMonitor(model, every=50, probes=["logit-lens"], prompts=["…"], tokenizer=tokenizer, out="depth")
    for batch in batches:
        with monitor.step():
            model(**batch).loss.backward()     # forward, backward, optimiser
            optimizer.step()
    monitor.metrics["depth/cosine.layer"]      # of the last sampled step

What is measured goes to `out/step-000050/<analysis>.safetensors`, which `hookdepth report` and `hookdepth compare`
read, and stays in `monitor.results` until the next sampled step; nothing else is kept. Of several processes all take
part, rank 0 writes.

An error in the diagnostic is logged once and ends it, on all ranks; the training goes on. With `strict=True` it is
raised at the end of its step.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookdepth._version import __version__
from hookdepth.analyses import Settings
from hookdepth.analyses.depth import depth_score
from hookdepth.errors import HookdepthError
from hookdepth.report.declared import lookup
from hookdepth.report.summary import depth_scores, effective_depth
from hookdepth.results import SUFFIX, Result
from hookdepth.training.history import STEP
from hookdepth.training.probing import Probes, Prompt
from hookdepth.training.reading import Mask, Reader, padding_mask
from hookdepth.training.statistics import PARTS, unpack
from hookdepth.training.wrapping import gather, in_group, is_writer, unwrap

_STATS = "residual-stats"
logger = logging.getLogger("hookdepth.training")


class DepthMonitor:
    """Depth diagnostics of a training loop.

        monitor = DepthMonitor(model, every=50)
        with monitor.step():
            model(**batch).loss.backward()
            optimizer.step()

    Args:
        model: as the loop calls it: wrapped in DDP, torch.compile, PEFT, sharded by FSDP2, prepared by accelerate.
        every: step s is sampled where s % every == 0; s counts the steps before it, from 0.
        probes: names of analyses to run on `prompts`, before steps s with s % probe_every == 0.
        prompts: texts, token ids, pairs of prompt and answer: see `probing.Probes`.
        probe_every: default as `every`.
        settings: of the probes' analyses.
        tokenizer: for prompts that are texts.
        out: folder for a folder a step; None writes nothing.
        mask: which tokens count: see `reading.padding_mask`, the default.
        strict: raise what goes wrong in the diagnostic, at the end of its step.

    Attributes:
        results: analysis → Result, of the last step at which there were any.
        metrics: the same as named numbers, for a logger: see `metrics_of`.

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
        self.every, self.probe_every = _positive("every", every), _positive("probe_every", probe_every or every)
        self.target = unwrap(model, tokenizer)
        self.probes = Probes(probes, prompts, tokenizer, settings)
        self.out = None if out is None else Path(out)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise HookdepthError(f"out={str(out)!r} is a file", "give a folder")
        self.mask, self.strict = mask, strict
        self.results: dict[str, Result] = {}
        self.metrics: dict[str, float] = {}
        self._number = self._next = 0
        self._reader: Reader | None = None
        self._fresh: dict[str, Result] = {}
        self._about: dict[str, Any] = {}
        self._began = 0.0
        self._error: Exception | None = None
        self._verified = self._reported = self._off = False
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

        Args:
            number: how many steps came before it; default counts on from the last one.
        """
        self.begin(self._next if number is None else number)
        try:
            yield self
        except BaseException:
            self._stop_reading()
            raise
        self.end()

    def begin(self, number: int) -> None:
        """Before step `number`: run probes and register hooks, where this step has any."""
        self._stop_reading()
        self._number, self._next, self._fresh = number, number + 1, {}
        if self._off:
            return
        if self.probes.names and number % self.probe_every == 0 and self._error is None:
            try:
                self._run_probes()
            except Exception as error:  # noqa: BLE001 (whatever it is, the training goes on)
                self._error = error
        self._began = time.perf_counter()
        if number % self.every == 0:
            self._reader = Reader(self.target, self.mask, verify=not self._verified)
            if self._error is None:
                self._reader.attach()

    def end(self) -> bool:
        """After the step: reduce over ranks, write, and say whether there is anything new in `results`.

        Raises:
            HookdepthError, or what else went wrong: with `strict` alone.
        """
        reader = self._reader
        self._stop_reading()
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

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.detach()
        self._reader = None

    def _run_probes(self) -> None:
        begin = time.perf_counter()
        for name, found in self.probes.run(self.target).items():
            self._fresh[name] = self._result(name, found.pop("tensors"), begin, **found)

    def _finish(self, reader: Reader) -> None:
        """All ranks come here on a sampled step, also those on which something failed: the others would wait."""
        reader.error = reader.error or self._error
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
        self._fresh.setdefault(_STATS, self._result(_STATS, tensors, self._began, data=data))

    def _result(self, name: str, tensors: dict[str, Any], begin: float, **facts: Any) -> Result:
        if not self._about:
            versions = {"hookdepth": __version__, "torch": torch.__version__, "transformers": version("transformers")}
            versions["python"] = platform.python_version()
            self._about = {"model": self.target.decoder.describe(), "versions": versions, "seed": None}
        settings = {"step": self._number, "compiled": self.target.compiled, **facts.pop("settings", {})}
        seconds = round(time.perf_counter() - begin, 3)
        return Result(name, tensors, {**self._about, "settings": settings, "wall_time_s": seconds, **facts})

    def _write(self) -> None:
        if self.out is not None and is_writer():
            for name, result in self._fresh.items():
                result.save(self.out / f"{STEP}{self._number:06d}" / f"{name}{SUFFIX}")

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


def metrics_of(results: Mapping[str, Result], per_layer: bool = False) -> dict[str, float]:
    """Results as named numbers, as a logger wants them.

        metrics_of(monitor.results)["depth/relative_contribution.layer"]

    Of residual-stats: the mean over layers of every relative contribution and cosine, and `contribution_depth`, the
    mean layer weighted by its relative contribution (0 to L − 1). Of probes: effective depths (ratios) and depth
    scores, where they exist: see `hookdepth.report.summary`.

    Args:
        per_layer: also relative contribution and cosine of every layer, and the norm of its input.
    """
    metrics: dict[str, float] = {}
    if _STATS in results:
        tensors = results[_STATS].tensors
        means = [f"{kind}.{part}" for kind in ("relative_contribution", "cosine") for part in PARTS]
        metrics |= {name: tensors[name].mean().item() for name in means}
        _add(metrics, "contribution_depth", depth_score(tensors["relative_contribution.layer"]))
        if per_layer:
            for name in (*means, "norm.resid"):
                metrics |= {f"{name}/{layer:03d}": value for layer, value in enumerate(tensors[name].tolist())}
    for name, depth in effective_depth(results, lookup).items():
        _add(metrics, f"effective_depth.{name}", depth["ratio"])
    for analysis, parts in depth_scores(results, lookup).items():
        for part, kinds in parts.items():
            for kind, score in kinds.items():
                _add(metrics, f"depth_score.{analysis}.{part}.{kind}", score)
    return {f"depth/{name}": value for name, value in metrics.items()}


def _add(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = value


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HookdepthError(f"{name}={value!r}", "give a whole number of at least 1")
    return value
