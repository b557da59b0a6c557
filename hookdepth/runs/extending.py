"""Results of some prompts as the beginning of results of more: a larger `--limit`, and runs that are merged.

A result is reduced from what each prompt gave, which stands in its file as `per_prompt.…`. So the file is enough to go
on, for every analysis whose `reduce` gives the same bytes from it again: that is tried, and not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import declared
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import Inputs, Partial, Subject, Tensors, noise_floor
from hookdepth.errors import HookdepthError, as_path
from hookdepth.model.decoder import Decoder
from hookdepth.results import SUFFIX, Result, check_folder_name
from hookdepth.runs.contract import load_folder
from hookdepth.runs.store import refuse_other

_OF_PROMPTS = ("prompts", "cuts")


def items_of(analysis: Analysis, subject: Subject, result: Result) -> list[Tensors] | None:
    """What each prompt of a result gave; None where its tensors are not what these reduce to."""
    items = analysis.each(result.tensors)
    if len(items) != len(subject.inputs.prompts):
        return None
    try:
        again = analysis.reduce(subject, items)
    except KeyError:  # it reduces something else than what stands in the file
        return None
    alike = again.keys() == result.tensors.keys() and all(
        torch.equal(own.nan_to_num(-1e30), result[name].nan_to_num(-1e30)) for name, own in again.items()
    )
    return items if alike else None


def beginning(analysis: Analysis, result: Result, subject: Subject) -> Subject | None:
    """The first of a subject's prompts, as many as a result has; None where it does not have fewer."""
    count, inputs = (result.metadata.get("data") or {}).get("n_prompts"), subject.inputs
    if analysis.needs not in _OF_PROMPTS or not isinstance(count, int) or not 0 < count < len(inputs.prompts):
        return None
    first = {name: getattr(inputs, name)[:count] for name in ("prompts", "cuts", "texts")}
    return replace(subject, inputs=replace(inputs, **first))


def merge(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    warn: Callable[[str], None] | None = None,
) -> dict[str, Result]:
    """Put runs over different prompts, all else equal, together as one, as `hookdepth merge` does.

        for folder, text in {"first": "Anna has 12 apples.", "second": "Ben has 7 pears."}.items():
            analyse(model, name, [text], out=folder)
        merge(["first", "second"], "both")[name]["kl"]     # [L+1], over the prompts of both

    Args:
        folders: two or more, with results.
        out: a folder for the new results; it holds none yet.
        warn: is given a line for each analysis that is left out; default a `UserWarning`.

    Returns:
        The results by name.

    Raises:
        HookdepthError: fewer than two folders, results of the same prompts or of other settings, none that all have,
            or a folder for the results that holds some.
    """
    if isinstance(folders, str | os.PathLike) or len(folders) < 2:
        raise HookdepthError("merge puts several runs together", "give two folders or more, and --out (out=)")
    warn = warn or (lambda line: warnings.warn(line, stacklevel=3))
    given, folder = [str(as_path(one)) for one in folders], str(as_path(out))
    check_folder_name(folder)
    if list(Path(folder).glob(f"*{SUFFIX}")):
        raise HookdepthError(f"{folder!r} holds results already", "give another --out folder")
    runs = [load_folder(one) for one in given]
    names = [name for name in runs[0] if all(name in own for own in runs)]
    for name in sorted({name for own in runs for name in own} - set(names)):
        warn(f"{name} is not in all of the folders, and is left out")
    merged = []
    for name in names:
        paths = [Path(one) / f"{name}{SUFFIX}" for one in given]
        results = [own[name] for own in runs]
        analysis = declared(results[0])
        if analysis is None or analysis.needs not in _OF_PROMPTS:
            warn(f"{name} is not over prompts, and is left out")
            continue
        if (whole := _merged(analysis, results, paths)) is None:
            warn(
                f"{name} cannot be put together from its prompts' values, and is left out: run it on all of the prompts"
            )
            continue
        merged.append(whole)
    if not merged:
        raise HookdepthError("the folders have no analysis over prompts in common", "give runs of the same analyses")
    for result in merged:
        result.save(Path(folder) / f"{result.analysis}{SUFFIX}")
    return {result.analysis: result for result in merged}


def _merged(analysis: Analysis, results: Sequence[Result], paths: Sequence[Path]) -> Result | None:
    first, items = _apart(results[0].metadata), []
    known: set[str] = set()
    for result, path in zip(results, paths, strict=True):
        refuse_other(path, _apart(result.metadata), first)
        prompts = result.metadata["data"].get("prompts") or [result.metadata["data"]["tokens_sha256"]]
        if known & set(prompts):
            raise HookdepthError(f"{str(path)!r} holds prompts that another of the runs has", "give each prompt once")
        known |= set(prompts)
        own = items_of(analysis, _subject([result]), result)
        if own is None:
            return None
        items += own
    parts = [Partial({}, 0, one.metadata.get("null_effect"), one.metadata.get("null_where")) for one in results]
    metadata = {**results[0].metadata, **noise_floor(parts), "data": _joined([one.metadata["data"] for one in results])}
    if "shown" in metadata:  # of the first prompts of each
        metadata["shown"] = [one for result in results for one in result.metadata.get("shown", [])]
    if "cuts" in (settings := metadata.get("settings") or {}):
        cuts = [cut for one in results for cut in one.metadata["settings"]["cuts"]]
        metadata["settings"] = {**settings, "cuts": cuts}
    return Result(results[0].analysis, analysis.reduce(_subject(results), items), metadata)


def _apart(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What merged runs must have in common: all but prompts, cuts, noise floor and digest."""
    settings = {key: value for key, value in (metadata.get("settings") or {}).items() if key != "cuts"}
    left_out = ("data", "digest", "null_effect", "null_where", "settings", "declaration", "shown")
    return {key: value for key, value in metadata.items() if key not in left_out} | {"settings": settings}


def _subject(results: Sequence[Result]) -> Subject:
    """What a result's own `reduce` asks for: lengths of prompts and settings, without a model."""
    lengths = [length for one in results for length in one.metadata["data"]["lengths"]]
    stored = results[0].metadata.get("settings") or {}
    known = {one.name: stored[one.name] for one in fields(Settings) if stored.get(one.name) is not None}
    inputs = Inputs(tuple((0,) * length for length in lengths), ((),) * len(lengths))
    return Subject(cast(Decoder, None), inputs, Settings(**known))


def _joined(data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    digests = [one["tokens_sha256"] for one in data]
    return {
        **data[0],
        "name": " + ".join(dict.fromkeys(str(one.get("name")) for one in data)),
        "n_prompts": sum(one["n_prompts"] for one in data),
        "lengths": [length for one in data for length in one["lengths"]],
        **{key: [own for one in data for own in one[key]] for key in ("prompts", "texts") if key in data[0]},
        "tokens_sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        "merged": digests,
    }
