"""Declarations in result files: whoever has the file can check, draw and report it without the code that made it.

declaration = read(written(HalfMlp()))
declaration.heading, declaration.figures
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hookdepth.analyses.base import Analysis
from hookdepth.errors import HookdepthError
from hookdepth.report import figures
from hookdepth.report.figures import Kind

_TEXTS = ("name", "question", "heading", "paper", "needs")
_KINDS = {name: kind for name, kind in vars(figures).items() if isinstance(kind, type) and issubclass(kind, Kind)}


def written(analysis: Analysis) -> dict[str, Any]:
    """A declaration as JSON-able data: what an analysis says about itself, less what only code can say.

    written(HalfMlp())["figures"][0]["kind"]      # 'Bars'
    """
    drawn = [_written(kind) for kind in analysis.figures if type(kind) in _KINDS.values()]
    found = {
        **{name: getattr(analysis, name) for name in _TEXTS},
        "order": analysis.order,
        "tensors": dict(analysis.tensors),
        "labels": {axis: list(words) for axis, words in analysis.labels.items()},
        "figures": drawn,
    }
    return dict(json.loads(json.dumps(found)))  # as it reads back from a file


def declaration_of(analysis: Analysis) -> dict[str, Any]:
    """What the metadata of a result say about its analysis: nothing where it is one of ours.

    declaration_of(HalfMlp())["declaration"]["heading"]     # 'Half of an MLP'
    """
    return {} if type(analysis).__module__.startswith("hookdepth.analyses.") else {"declaration": written(analysis)}


def _written(kind: Kind) -> dict[str, Any]:
    """The fields of a figure; a function among them (a threshold, a mark) stays with the code."""
    found = {}
    for one in fields(kind):
        try:
            json.dumps(value := getattr(kind, one.name))
        except TypeError:
            continue
        found[one.name] = value
    return {"kind": type(kind).__name__, **found}


def read(data: Any) -> Analysis:
    """An analysis that cannot be run, from what a file says about it.

    Raises:
        HookdepthError: the data is no declaration.
    """
    try:
        made = [_KINDS[one["kind"]] for one in data["figures"]]
        given = [{key: _whole(value) for key, value in one.items() if key != "kind"} for one in data["figures"]]
        own: dict[str, Any] = {name: str(data[name]) for name in _TEXTS}
        own |= {
            "order": float(data["order"]),
            "tensors": {str(key): str(axes) for key, axes in data["tensors"].items()},
        }
        own["labels"] = {str(axis): tuple(map(str, words)) for axis, words in data.get("labels", {}).items()}
        own["figures"] = tuple(kind(**values) for kind, values in zip(made, given, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HookdepthError(f"its declaration cannot be read ({error!r})", "run the analysis again") from error
    found: Analysis = type("Stored", (Analysis,), own)()
    return found


def _whole(value: Any) -> Any:
    """JSON has lists only."""
    if isinstance(value, list):
        return tuple(_whole(item) for item in value)
    return dict(value) if isinstance(value, Mapping) else value
