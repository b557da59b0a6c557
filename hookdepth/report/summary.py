"""What a run was, and the numbers that its analyses derive: everything in `summary.json`.

The numbers are those of each analysis' `numbers`: its effective depths stand together under `effective_depth`, its
`depth_score` and `largest_effect` where their names say, all others with the analysis, under `numbers`. Everything is
JSON-able; what does not exist is null, never NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hookdepth._version import __version__
from hookdepth.report.kind import Declaration, Lookup
from hookdepth.report.scale import finite_of, interval_of
from hookdepth.results import PER_PROMPT, SUFFIX, Result

_ELSEWHERE = ("effective_depth", "depth_score", "largest_effect")


def effective_depth(
    results: Mapping[str, Result], lookup: Lookup, known: Iterable[Declaration] = ()
) -> dict[str, dict[str, Any]]:
    """Layer, ratio, status and definition of every effective depth; of `known` analyses, also that there is none."""
    depths: dict[str, dict[str, Any]] = {}
    found = [(own, result) for result in results.values() if (own := lookup(result)) is not None]
    found += [(own, Result(own.name, {})) for own in known if own.name not in results]
    for own, result in sorted(found, key=lambda item: (item[0].order, item[0].name)):
        depths |= own.numbers(result).get("effective_depth", {})
    return _json(depths)


def tells_depth(declaration: Declaration) -> bool:
    """Whether results of an analysis say an effective depth."""
    return "effective_depth" in declaration.numbers(Result(declaration.name, {}))


def depth_scores(results: Mapping[str, Result], lookup: Lookup) -> dict[str, dict[str, dict[str, float | None]]]:
    """Depth scores by analysis and part, from the effect on layers and on the output."""
    scores = {name: _numbers(result, lookup).get("depth_score") for name, result in results.items()}
    return _json({name: own for name, own in scores.items() if own})


def largest_effect(result: Result, lookup: Lookup) -> float | None:
    """The largest effect in a result: what its noise floor is to be compared with; None where nothing was changed.

    As its analysis says; where that says nothing, the largest value in its figures.
    """
    own, numbers = lookup(result), _numbers(result, lookup)
    if "largest_effect" in numbers:
        return _json(numbers["largest_effect"])
    if own is None or "null_effect" not in result.metadata:
        return None
    drawn = [finite_of(result.tensors[name]).abs() for kind in own.figures for name in kind.tensors(result)]
    return max((values.max().item() for values in drawn if values.numel()), default=None)


def ordered(results: Mapping[str, Result], lookup: Lookup) -> dict[str, Result]:
    """The results in the order in which they are reported; analyses that nobody knows come last."""
    declared = {name: lookup(result) for name, result in results.items()}
    places = {name: math.inf if own is None else own.order for name, own in declared.items()}
    return {name: results[name] for name in sorted(results, key=lambda name: (places[name], name))}


def summarise(
    results: Mapping[str, Result],
    lookup: Lookup,
    known: Iterable[Declaration] = (),
    log: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything that `summary.json` holds; arguments as of `write_report`.

    summarise(load_folder("out"), lookup)["effective_depth"]["kl"]["ratio"]   # 0.667
    """
    results = ordered(results, lookup)
    metadata = {name: result.metadata for name, result in results.items()}
    head = next(iter(metadata.values()), {})
    # Analyses over probes only take their baseline from the data set.
    over_prompts = next((m for m in metadata.values() if "probes" not in m), head)
    return {
        "hookdepth": __version__,
        "model": _json(head.get("model")),
        "data": _json(over_prompts.get("data")),
        "versions": _json(head.get("versions")),
        "seed": head.get("seed"),
        "effective_depth": effective_depth(results, lookup, known),
        "depth_scores": depth_scores(results, lookup),
        "analyses": {
            name: _analysis(name, result, lookup, (log or {}).get(name, {})) for name, result in results.items()
        },
        "mixed": [key for key in ("model", "versions") if any(m.get(key) != head.get(key) for m in metadata.values())],
    }


def _numbers(result: Result, lookup: Lookup) -> Mapping[str, Any]:
    own = lookup(result)
    return {} if own is None else own.numbers(result)


def _analysis(name: str, result: Result, lookup: Lookup, cost: Mapping[str, Any]) -> dict[str, Any]:
    metadata = result.metadata
    data = metadata.get("data") or {}
    lengths = data.get("lengths")
    facts = {
        "file": f"{name}{SUFFIX}",
        "wall_time_s": cost.get("wall_time_s"),
        "passes": cost.get("passes"),
        "null_effect": metadata.get("null_effect"),
        "null_where": metadata.get("null_where"),
        "largest_effect": largest_effect(result, lookup),
        "n_prompts": data.get("n_prompts"),
        "n_tokens": sum(lengths) if lengths else None,
        "settings": metadata.get("settings"),
    }
    means = [tensor.removeprefix(PER_PROMPT) for tensor in result.tensors if tensor.startswith(PER_PROMPT)]
    if intervals := {name: _listed(own) for name in means if (own := interval_of(result, name)) is not None}:
        facts["intervals"] = intervals
    others = {key: value for key, value in _numbers(result, lookup).items() if key not in _ELSEWHERE}
    return _json({**facts, "numbers": others} if others else facts)


def _listed(interval: Tensor) -> dict[str, list[float]]:
    return dict(zip(("mean", "from", "to"), interval.tolist(), strict=True))


def _json(value: Any) -> Any:
    """The value as it reads back from a file, with null for every float that is not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
