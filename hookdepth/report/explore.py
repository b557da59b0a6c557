"""The interactive page beside a report: every map of a run, to be pointed at. `explore.html`, one file.

What is drawn comes from the figures' kinds, as for the report: whatever is a map is here, in the same colours. The
page is `explore.html.jinja` with the script `explore.js` in it: a plotting library would put 3.5 MB or more into every
file, the script is 6 kB. It fetches nothing and runs no other script (its policy names this one by its digest), and it
makes no text into markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookdepth.report.figures import pictures_of
from hookdepth.report.hover import Values
from hookdepth.report.kind import Lookup
from hookdepth.report.page import rendered
from hookdepth.report.scale import Scale
from hookdepth.report.summary import ordered
from hookdepth.results import Result, write_atomic

_COLOURS = 33  # of each scale; those between are mixed


def write_explorer(path: Path, results: Mapping[str, Result], lookup: Lookup) -> Path | None:
    """Write the page of all maps of some results, and return its path; None where there is no map."""
    maps = []
    for result in ordered(results, lookup).values():
        if (declaration := lookup(result)) is None:
            continue
        for kind, pictures in pictures_of(result, declaration, page=True):
            heading = declaration.heading or result.analysis
            for picture in pictures:
                said = {"section": heading, "caption": picture.caption, "said": picture.said, "reading": kind.reading}
                maps += [said | {"label": kind.label} | _map(values) for values in picture.values if values.is_map]
    if not maps:
        return None
    script = Path(__file__).with_name("explore.js").read_text(encoding="utf-8")
    data = {"colours": {"plain": _colours(False), "signed": _colours(True)}, "maps": maps}
    text = rendered(
        "explore.html.jinja",
        title=f"hookdepth: {((next(iter(results.values())).metadata.get('model') or {}).get('id')) or 'unnamed model'}",
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    return write_atomic(path, text.encode(errors="replace"))


def _map(values: Values) -> dict[str, Any]:
    columns = len(values.columns) - values.hidden
    scale = values.scale or Scale.of(values.matrix)
    numbers = [[_short(number) for number in row[:columns]] for row in values.matrix.tolist()]
    words = [[[(word, _short(share)) for word, share in cell] for cell in row] for row in values.words]
    ends = {"low": _short(scale.low), "high": _short(scale.high), "log": scale.log, "signed": scale.signed}
    about = {name: getattr(values, name) for name in ("title", "corner", "upward")} | {"first": list(values.first)}
    names = {"rows": list(values.rows), "columns": list(values.columns[:columns])}
    return {**about, **ends, **names, "values": numbers, "words": words}


def _short(number: float) -> float | None:
    """Four digits are what the report's tables show."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _colours(signed: bool) -> list[list[int]]:
    from hookdepth.report.drawing.style import colour_map

    colours = colour_map(signed)
    return [[round(255 * part) for part in colours(place / (_COLOURS - 1))[:3]] for place in range(_COLOURS)]
