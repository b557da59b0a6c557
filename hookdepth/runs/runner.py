"""From inputs to result files: chunks one by one, each kept as soon as it is there, then reduced.

    run = Run(model, inputs, settings, data={"name": "demo", …}, seed=123, out=Path("out"))
    run.execute(chosen("all"))      # writes a file an analysis into `out`

Every chunk's numbers are written to `out/.chunks` when they are measured, and read back from there when all
are: so a run in one piece, a run that was stopped, however it was stopped, and went on with the same command,
and a run of several processes end with the same bytes, and none holds more than one chunk at a time in
memory before the end. Chunks of other settings are refused, never mixed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import chosen
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.stored import declaration_of
from hookdepth.analyses.subject import Inputs, Partial, Subject, Tensors, noise_floor
from hookdepth.errors import DamagedError, HookdepthError, NotFiniteError
from hookdepth.model.decoder import Decoder
from hookdepth.model.identity import identity_of, versions
from hookdepth.model.rounding import rounding_of
from hookdepth.model.rounding import threads as so_many_threads
from hookdepth.results import SUFFIX, Result, add_to_log, check_folder_name, read_log, sweep
from hookdepth.runs.contract import check_contents, wrong_tensors
from hookdepth.runs.extending import beginning, items_of
from hookdepth.runs.saying import announce_floor, bar_over, blame
from hookdepth.runs.sharing import Group, groups_of
from hookdepth.runs.store import LOCK, VISIBLE_S, Chunks, appears, forget, locked, refuse_other
from hookdepth.runs.threads import threads_of
from hookdepth.runs.workers import Workers

UNITS = ".chunks"


@dataclass
class Run:
    """One model, its inputs and settings, and the folder that the results go to."""

    model: Decoder
    inputs: Inputs
    settings: Settings
    data: dict[str, Any]  # what results say about the data set: its `name` and `prompts_sha256`
    seed: int
    out: Path
    overwrite: bool = False  # start afresh where results of other settings lie in `out`
    warn: Callable[[str], None] = field(default=lambda line: None)
    workers: Workers = field(default_factory=Workers)  # that share the work; all must make the same `Run`
    # Analysis → a finished result of the first prompts, and what each of them gave.
    before: dict[str, tuple[Result, list[Tensors]]] = field(default_factory=dict)

    def execute(self, analyses: Sequence[str | Analysis]) -> list[Result]:
        """Compute, or complete, the named analyses and write their files; what is returned, the first process has.

        Raises:
            HookdepthError: the folder holds results of other settings, cannot be written or is in use by another
                run, or an analysis failed; what was computed before stays.
        """
        known = {analysis.name: analysis for analysis in chosen(list(analyses))}
        results: list[Result] = []
        with ExitStack() as held:
            threads = self.workers.of_first(lambda: self._open(known, held))
            identities = self._identities(known, threads)
            steps = self.workers.of_first(lambda: self._prepare(known, identities, results))
            self.workers.together(self._see_folder)
            self._compare(identities)
            for shared, wanted, begin in steps:
                (group,) = groups_of([known[name] for name in shared], self.subject)
                group.begin = begin
                chunks = self._chunks(shared, identities, begin)
                with so_many_threads(threads[shared[0]]):
                    self._measure(group, chunks)
                if self.workers.first:
                    results += self._reduce(group, chunks, wanted, identities)
            self.workers.wait()
        return results

    def _open(self, known: Mapping[str, Analysis], held: ExitStack) -> dict[str, int]:
        """Take the folder, and say with how many threads each analysis is computed, by all processes."""
        check_folder_name(self.out)
        made = not self.out.exists()
        held.enter_context(locked(self.out / UNITS))
        held.callback(self._tidy, made)
        groups = [group.analyses for group in groups_of(known.values(), self.subject)]
        return threads_of(groups, self.out, self.out / UNITS, fresh=self.overwrite)

    def _identities(self, known: Mapping[str, Analysis], threads: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        model = self.workers.together(lambda: identity_of(self.model))
        found = {}
        for name in threads:
            with so_many_threads(threads[name]):
                found[name] = self.identity(known[name], model)
        return found

    def _compare(self, identities: dict[str, dict[str, Any]]) -> None:
        """Refuse processes that would measure something else than the first: another checkpoint, other versions."""
        firsts = self.workers.of_first(lambda: identities)

        def compare() -> None:
            for name, identity in identities.items():
                refuse_other(self.out / f"{name}{SUFFIX}", firsts[name], identity)

        self.workers.together(compare)

    def _tidy(self, made: bool) -> None:
        """However a run ends: where no chunk is kept, neither is their folder, nor one around it that it has made."""
        if not list((self.out / UNITS).glob(f"*{SUFFIX}")):
            shutil.rmtree(self.out / UNITS, ignore_errors=True)
            if made and self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()

    def _chunks(self, analyses: Iterable[str], identities: dict[str, dict[str, Any]], begin: int) -> Chunks:
        patience = VISIBLE_S if self.workers.size > 1 else 0.0
        own = {name: {**one, "begin": begin} if begin else one for name, one in identities.items()}
        return Chunks(self.out / UNITS, analyses, own, self.warn, patience)

    def _prepare(
        self,
        known: Mapping[str, Analysis],
        identities: dict[str, dict[str, Any]],
        results: list[Result],
    ) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
        """What is left: (analyses that share passes, those of them that are wanted, prompts that they have). Adds what
        is there."""
        for folder in (self.out, self.out / UNITS):
            sweep(folder)
        if self.overwrite:
            for name in identities:
                (self.out / f"{name}{SUFFIX}").unlink(missing_ok=True)
            forget(self.out / UNITS, identities)
        done = self._finished(known, identities)
        results += done.values()
        steps = []
        for group in groups_of(known.values(), self.subject):
            left = [name for name in group.analyses if name not in done]
            begins = {name: len(self.before[name][1]) if name in self.before else 0 for name in left}
            for begin in sorted(set(begins.values())):
                missing = tuple(name for name in left if begins[name] == begin)
                # What was stopped between the results of shared passes goes on with these passes.
                shared = group.analyses if self._chunks(group.analyses, identities, begin).count() else missing
                self._chunks(shared, identities, begin).claim()
                steps.append((shared, missing, begin))
        return steps

    def _see_folder(self) -> None:
        if not appears(self.out / UNITS / LOCK, VISIBLE_S):
            what = f"the folder {str(self.out)!r} that the first process writes to is not there"
            raise HookdepthError(what, "give --out on a file system that all machines share, under the same path")

    @cached_property
    def subject(self) -> Subject:
        """What the analyses run on; what they share among items is computed once."""
        return Subject(self.model, self.inputs, self.settings)

    def identity(self, analysis: Analysis, model: Mapping[str, Any], subject: Subject | None = None) -> dict[str, Any]:
        """Everything that the numbers of an analysis depend on: goes into its metadata.

        `model` is what `identity_of` says of the model; `subject` what it runs on, if not on all prompts.
        """
        own = analysis.identity(subject or self.subject)
        identity = {
            **own,
            "data": {**self.data, **own["data"]},
            "model": model,
            "rounding": rounding_of(self.model.device),
            "seed": self.seed,
            "versions": versions(),
        }
        return dict(json.loads(json.dumps(identity)))  # as it reads back from a file: tuples are lists there

    def _finished(self, known: Mapping[str, Analysis], identities: dict[str, dict[str, Any]]) -> dict[str, Result]:
        """What is done; results of the first of this run's prompts are put into `before`."""
        done = {}
        for name, identity in identities.items():
            path = self.out / f"{name}{SUFFIX}"
            if not path.exists():
                continue
            try:
                result = Result.load(path)
                if result.analysis != name:
                    raise HookdepthError(f"{str(path)!r} holds {result.analysis}", "move it away, or use --overwrite")
                check_contents(result, path)
            except DamagedError as error:
                self.warn(f"{error.problem}; measured again")
            else:
                first = beginning(known[name], result, self.subject)
                if first is None:
                    refuse_other(path, result.metadata, identity)
                    done[name] = result
                    continue
                refuse_other(path, result.metadata, self.identity(known[name], identity["model"], first))
                if (items := items_of(known[name], first, result)) is not None:
                    self.before[name] = (result, items)
                else:
                    self.warn(f"{name} cannot go on from its first {len(first.inputs.prompts)} prompts; measured again")
        return done

    def _measure(self, group: Group, chunks: Chunks) -> None:
        with bar_over(group, self.workers.first) as bar:

            def move(passes: int = 1) -> None:
                if self.workers.size > 1:  # one bar, for all
                    passes = self.workers.count(f"passes {chunks.prefix}", passes) - int(bar.n)
                bar.update(passes)

            for chunk in self.workers.claims(chunks.prefix, group.n_chunks):
                if (there := chunks.passes(chunk)) is not None:
                    move(there)
                    continue
                begin = time.perf_counter()
                partial = self._run(group, chunk, move)
                chunks.save(chunk, partial, time.perf_counter() - begin)
            self.workers.wait(lambda: move(0))

    def _reduce(
        self, group: Group, chunks: Chunks, wanted: Sequence[str], identities: Mapping[str, dict[str, Any]]
    ) -> list[Result]:
        loaded = [chunks.load(chunk) for chunk in range(group.n_chunks)]
        partials = [partial for partial, _ in loaded]
        facts: dict[str, Any] = {
            "wall_time_s": round(sum(how["seconds"] for _, how in loaded), 3),
            "passes": sum(partial.passes for partial in partials),
            "hosts": sorted({how["host"] for _, how in loaded}),
            "processes": self.workers.size,
        }
        earlier = read_log(self.out) if group.begin else {}
        results, known = [], {member.name: member for member in group.members}
        before = {name: self.before[name] for name in known if group.begin and name in self.before}
        finished = group.finish(partials, {name: items for name, (_, items) in before.items()})
        for name in wanted:
            so_far = earlier.get(name, {})
            more = {key: facts[key] + so_far.get(key, 0) for key in ("wall_time_s", "passes")}
            add_to_log(self.out, {name: {**facts, **more}})
            floors = [before[name][0].metadata] if name in before else []
            first = [Partial({}, 0, one.get("null_effect"), one.get("null_where")) for one in floors]
            metadata = {**identities[name], **noise_floor([*first, *partials])}
            wrong = wrong_tensors(known[name].tensors, finished[name], self.model.n_layers, True)
            if wrong:
                raise HookdepthError(f"{name} gives what it does not declare: {wrong}", "mend its `tensors`", 1)
            metadata |= declaration_of(known[name]) | known[name].metadata(self.subject, finished[name])
            announce_floor(name, metadata, finished[name], self.warn)
            path = Result(name, finished[name], metadata).save(self.out / f"{name}{SUFFIX}")
            results.append(Result.load(path))  # what lies on the disk is what is returned
        chunks.clear()
        return results

    def _run(self, group: Group, chunk: int, move: Callable[..., None]) -> Partial:
        try:
            partial = group.run(chunk, move)
        except NotFiniteError:
            blame(group.name, self.model, self.inputs)
            raise
        # What branches give was seen to be finite when it was measured; a prompt that cannot be cut is NaN on purpose.
        if not group.branching and not all(torch.isfinite(value).all() for value in partial.tensors.values()):
            blame(group.name, self.model, self.inputs)
            self.warn(f"{group.name}: some values are not finite; they are grey in the figures")
        return partial
