"""From inputs to result files: units one by one, each kept as soon as it is there, then reduced.

    run = Run(model, inputs, settings, data={"name": "demo", …}, seed=123, out=Path("out"))
    run.execute(["logit-lens", "skip-current"])      # writes out/logit-lens.safetensors, …

Every unit's numbers are written to `out/.units` when they are measured; a run that was stopped, however it
was stopped, goes on from there when the same command is given again, and ends with the same bytes. Units of
other settings are refused, never mixed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hookdepth._version import __version__
from hookdepth.analyses import Inputs, Partial, Settings, Task, tasks_for
from hookdepth.branching import plan_for
from hookdepth.capturing import first_not_finite
from hookdepth.errors import HookdepthError, NotFiniteError
from hookdepth.models import Decoder
from hookdepth.results import SCHEMA, SUFFIX, Result, check_contents

UNITS = ".units"


@dataclass
class Run:
    """One model, its inputs and settings, and the folder that the results go to.

        Run(model, inputs, Settings(), {"name": "demo"}, 123, Path("out")).execute(["logit-lens"])

    Attributes:
        data: what results say about the data set: its `name` and `prompts_sha256`.
        overwrite: start afresh where results of other settings lie in `out`.
        warn: called with one line where something deserves attention.
    """

    model: Decoder
    inputs: Inputs
    settings: Settings
    data: dict[str, Any]
    seed: int
    out: Path
    overwrite: bool = False
    warn: Callable[[str], None] = field(default=lambda line: None)

    def execute(self, names: Iterable[str]) -> list[Result]:
        """Compute, or complete, the named analyses and write their files.

        Raises:
            HookdepthError: the folder holds results of other settings, cannot be written, or an analysis failed;
                what was computed before stays.
        """
        tasks = tasks_for(names, self.model, self.inputs, self.settings)
        identities = {name: self.identity(name) for task in tasks for name in task.analyses}
        if self.overwrite:
            self._forget(identities)
        done = self._finished(identities)
        results = list(done.values())
        for task in tasks:
            missing = tuple(name for name in task.analyses if name not in done)
            if missing:
                # What was stopped between the results of shared launches goes on with these launches.
                if missing != task.analyses and not self._units(task):
                    (task,) = tasks_for(missing, self.model, self.inputs, self.settings)
                results += self._complete(task, identities, missing)
        if not list((self.out / UNITS).glob("*")):
            shutil.rmtree(self.out / UNITS, ignore_errors=True)
        return results

    def identity(self, name: str) -> dict[str, Any]:
        """Everything that the numbers of an analysis depend on: goes into its metadata."""
        over_prompts = name not in ("residual-erasure", "integrated-gradients")
        settings: dict[str, Any] = {"keep_front": self.settings.keep_front, "max_rows": self.settings.max_rows}
        if name.startswith("skip"):
            settings["parts"] = list(self.settings.parts)
        if name in ("skip-future", "local-future"):
            settings["cuts"] = [list(cuts) for cuts in self.inputs.cuts]
        if name in ("residual-stats", "logit-lens"):
            settings = {}
        if name == "integrated-gradients":
            own = {key: value for key, value in asdict(self.settings).items() if key.startswith("ig_")}
            settings = {**own, "parts": list(self.settings.parts), "max_rows": self.settings.max_rows}
        identity = {
            "settings": settings,
            "model": self.model.describe(),
            "seed": self.seed,
            "versions": {
                "hookdepth": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
            },
        }
        prompts = self.inputs.prompts if over_prompts else self.inputs.baseline
        identity["data"] = {
            **self.data,
            "n_prompts": len(prompts),
            "lengths": [len(prompt) for prompt in prompts],
            "tokens_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }
        if not over_prompts:
            identity["probes"] = [asdict(probe) for probe in self.inputs.probes]
        # As it reads back from a file: tuples are lists there.
        return dict(json.loads(json.dumps(identity)))

    def _finished(self, identities: dict[str, dict[str, Any]]) -> dict[str, Result]:
        done = {}
        for name, identity in identities.items():
            path = self.out / f"{name}{SUFFIX}"
            if path.exists():
                result = Result.load(path)
                check_contents(result, path)
                if result.analysis != name:
                    raise HookdepthError(f"{str(path)!r} holds {result.analysis}", "move it away, or use --overwrite")
                _refuse_other(path, result.metadata, identity)
                done[name] = result
        return done

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            (self.out / f"{name}{SUFFIX}").unlink(missing_ok=True)
        shutil.rmtree(self.out / UNITS, ignore_errors=True)

    def _units(self, task: Task) -> list[Path]:
        return sorted((self.out / UNITS).glob(f"{_prefix(task)}*{SUFFIX}"))

    def _complete(self, task: Task, identities: dict[str, dict[str, Any]], wanted: Sequence[str]) -> list[Result]:
        identity = {name: identities[name] for name in task.analyses}
        partials: list[Partial] = []
        seconds = 0.0
        with _bar(task, self.model, self.settings) as bar:
            for unit in range(task.n_units):
                path = self.out / UNITS / f"{_prefix(task)}{unit:06d}{SUFFIX}"
                partial, took = self._unit(task, unit, path, identity, bar)
                partials.append(partial)
                seconds += took
        results = []
        finished = task.finish(partials)
        for name in wanted:
            metadata = {
                **identities[name],
                "wall_time_s": round(seconds, 3),
                "launches": sum(partial.launches for partial in partials),
                **_floor(partials),
            }
            _announce_floor(name, metadata, finished[name], self.warn)
            result = Result(name, finished[name], {"schema": SCHEMA, "analysis": name, **metadata})
            result.save(self.out / f"{name}{SUFFIX}")
            results.append(result)
        for path in self._units(task):
            path.unlink()
        return results

    def _blame(self, task: Task) -> None:
        """Raise, naming prompt and layer, where the clean run gives values that are not finite."""
        inputs = {"prompt": self.inputs.prompts, "baseline prompt": self.inputs.baseline}
        inputs["probe"] = tuple(probe.token_ids for probe in self.inputs.probes)
        for what, prompts in inputs.items():
            for number, prompt in enumerate(prompts):
                layer = first_not_finite(self.model, prompt)
                if layer is not None:
                    place = f"from layer {layer} onward" if layer < self.model.n_layers else "in the logits"
                    raise HookdepthError(
                        f"{task.name}: {self.model.name!r} on {what} {number}: non-finite values {place}",
                        "check the checkpoint's weights, load it with another --dtype, or leave that text out",
                        1,
                    )

    def _unit(
        self, task: Task, unit: int, path: Path, identity: dict[str, Any], bar: tqdm[Any]
    ) -> tuple[Partial, float]:
        if path.exists():
            stored = Result.load(path)
            _refuse_other(path, stored.metadata.get("identity"), identity)
            floor, where = stored.metadata["null_effect"], stored.metadata["null_where"]
            bar.update(stored.metadata["launches"])
            partial = Partial(stored.tensors, stored.metadata["launches"], floor, where)
            return partial, stored.metadata["wall_time_s"]
        begin = time.perf_counter()
        try:
            partial = task.run(unit, bar.update)
        except NotFiniteError:
            self._blame(task)
            raise
        if not all(torch.isfinite(value).all() for value in partial.tensors.values()):
            self._blame(task)
            self.warn(f"{task.name}: some values are not finite; they are grey in the figures")
        seconds = time.perf_counter() - begin
        metadata = {
            "identity": identity,
            "launches": partial.launches,
            "null_effect": partial.null_effect,
            "null_where": partial.null_where,
            "wall_time_s": seconds,
        }
        Result(task.name, partial.tensors, metadata).save(path)
        return partial, seconds


def _prefix(task: Task) -> str:
    """Of its units' files. Units of several analyses hold other tensors, from other launches, than those of one."""
    return "+".join(task.analyses) + "-"


def _bar(task: Task, model: Decoder, settings: Settings) -> tqdm[Any]:
    """A bar over launches; it shows itself only where stderr is a terminal."""
    total = task.n_units
    if task.branches is not None:
        total = 0
        for unit in range(task.n_units):
            branches, lengths = task.branches(unit)
            total += plan_for(model, branches, lengths, max_rows=settings.max_rows).n_launches if branches else 0
    return tqdm(total=total, desc=task.name, unit="launch", disable=None, leave=False, dynamic_ncols=True)


def _floor(partials: Sequence[Partial]) -> dict[str, Any]:
    measured = [partial for partial in partials if partial.null_effect is not None]
    if not measured:
        return {}
    worst = max(measured, key=lambda partial: partial.null_effect or 0.0)
    return {"null_effect": worst.null_effect, "null_where": worst.null_where}


def _announce_floor(name: str, metadata: dict[str, Any], tensors: dict[str, Any], warn: Callable[[str], None]) -> None:
    floor = metadata.get("null_effect")
    if floor:
        effects = [value.abs().max().item() for key, value in tensors.items() if "baseline" not in key]
        warn(
            f"{name}: noise floor {floor:.2g} ({metadata['null_where']}), "
            f"{floor / max(*effects, 1e-30):.1g} of the largest effect {max(effects):.3g}"
        )


def _refuse_other(path: Path, stored: Any, wanted: dict[str, Any]) -> None:
    """Raise, naming the first setting that differs, where a file belongs to another run."""
    known = stored if isinstance(stored, dict) else {}
    difference = _first_difference({key: known.get(key) for key in wanted}, wanted)
    if difference:
        where, old, new = difference
        raise HookdepthError(
            f"{str(path)!r} was computed with {where} = {_short(old)}, this run has {_short(new)}",
            "give another --out folder, the same settings, or --overwrite",
        )


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else (where, old, new)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
