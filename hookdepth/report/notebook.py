"""A result as a notebook shows it: a small table, a figure, a data frame; and as a file of values.

`Result` has all of these as methods.
"""

from __future__ import annotations

import base64
import csv
import html as escaping
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from hookdepth.errors import HookdepthError, choose
from hookdepth.metrics import over_prompts as reduce_prompts
from hookdepth.model.ambient import plainly
from hookdepth.report.figures import Bars, Heatmap, Kind
from hookdepth.report.kind import Declaration, floor_of
from hookdepth.report.patterns import PAGE, axes_of, match
from hookdepth.report.tables import statistics, table
from hookdepth.results import PER_PROMPT, Result, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("csv", "parquet")
_SHOWN = 20  # tensors of a small table


def axes_of_result(result: Result, declaration: Declaration | None, name: str) -> tuple[str, ...]:
    """The words of a tensor's axes; of one that nobody declares, their numbers: axes_of_result(result, None, "kl")."""
    inner = name.removeprefix(PER_PROMPT)
    found = [] if declaration is None else axes_of(declaration.tensors, inner)
    if inner != name:
        found = ["prompt", *found]
    wanted = result.tensors[name].ndim
    return tuple(found) if len(found) == wanted else tuple(f"axis {n}" for n in range(wanted))


@plainly
def summary(result: Result, declaration: Declaration | None) -> str:
    """A line and a row a tensor: print(summary(result, declaration))"""
    own = [name for name in result.tensors if not name.startswith((PER_PROMPT, PAGE))] or list(result.tensors)
    rows = [("tensor", "axes", "shape", "min", "mean", "max")]
    for name in own[:_SHOWN]:
        words = ", ".join(axes_of_result(result, declaration, name))
        rows.append((name, words, str(list(result.tensors[name].shape)), *statistics(result.tensors[name])[:3]))
    data, model = result.metadata.get("data") or {}, result.metadata.get("model") or {}
    count = data.get("n_prompts")
    said = [model.get("id"), "" if count is None else f"{count} prompt{'s' * (count != 1)}", floor_of(result.metadata)]
    head = f"{result.analysis}: {', '.join(str(one).lower() if one == said[2] else str(one) for one in said if one)}"
    more = len(result.tensors) - len(rows) + 1
    rest = f"\n  and {more} more (see .tensors)" if more else ""
    return f"{head.removesuffix(': ')}\n{table(rows)}{rest}"


@plainly
def html(result: Result, declaration: Declaration | None) -> str:
    """The small table, and the first figure where there is one: html(result, declaration)"""
    said = f"<pre>{escaping.escape(summary(result, declaration))}</pre>"
    if not any(kind.tensors(drawn(result, declaration)) for kind in (declaration.figures if declaration else ())):
        return said
    from hookdepth.report.drawing.style import render

    image = base64.b64encode(render(plot(result, declaration), "png")[0]).decode()
    return f'{said}<img style="max-width: 100%" width="560" src="data:image/png;base64,{image}">'


@plainly
def over_prompts(result: Result, declaration: Declaration | None, how: str) -> Result:
    """A result with prompts reduced: over_prompts(result, declaration, "mean")["kl"]"""
    axes = {name: axes_of_result(result, declaration, name) for name in result.tensors}
    own = {name.removeprefix(PER_PROMPT): name for name in result.tensors if axes[name][:1] == ("prompt",)}
    if not own:
        raise HookdepthError("this result has no prompt's own values", "give several prompts")
    reduced = {name: reduce_prompts(result.tensors[full], how) for name, full in own.items()}
    kept = {f"{PER_PROMPT}{name}": result.tensors[full] for name, full in own.items()}
    settings = {**(result.metadata.get("settings") or {}), "over_prompts": how}
    metadata = {**result.metadata, "settings": settings}
    if stored := metadata.get("declaration"):
        words = {name: axes.removeprefix("prompt").strip() for name, axes in stored["tensors"].items()}
        metadata["declaration"] = {**stored, "tensors": words}
    return Result(result.analysis, {**result.tensors, **reduced, **kept}, metadata)


def drawn(result: Result, declaration: Declaration | None) -> Result:
    """The result as it is drawn: with the mean over prompts, where it has them beside each other."""
    beside = declaration is not None and any(words.startswith("prompt") for words in declaration.tensors.values())
    return over_prompts(result, declaration, "mean") if beside else result


@plainly
def plot(result: Result, declaration: Declaration | None, name: str | None = None, **options: Any) -> Figure:
    """The figure of a tensor: plot(result, declaration, "kl", vmax=2.0)"""
    from hookdepth.report.drawing.options import drawn_with

    if name is not None:
        choose("tensor", name, result.tensors)
    shown = drawn(result, declaration)
    kind, values = _kind(shown, declaration, name)
    limited = kind.limited(options.get("norm"), options.pop("vmin", None), options.pop("vmax", None))
    known: Any = declaration or SimpleNamespace(tensors={}, labels={})  # of tensors that nobody declares
    pictures = [one for one in limited.pictures(shown, known) if values is None or one.of == values]
    return drawn_with(pictures[0].draw, **options)


def _kind(result: Result, declaration: Declaration | None, name: str | None) -> tuple[Kind, Mapping[str, str] | None]:
    kinds = () if declaration is None else declaration.figures
    for kind in kinds:
        if name is None and kind.tensors(result):
            return kind, None
        for pattern in kind.patterns:
            if name is not None and (found := match(pattern, name)) is not None:
                return kind, {key: value for key, value in found.items() if key != "*"}
    if name is None:
        raise HookdepthError(f"nobody says how {result.analysis} is drawn", f"name one of {', '.join(result.tensors)}")
    axes = axes_of_result(result, declaration, name)
    if len(axes) == 1:
        return Bars(name, "", label=name, axis=axes[0].capitalize()), {}
    if len(axes) == 2:
        return Heatmap(name, "", label=name, rows=axes[0].capitalize(), columns=axes[1].capitalize()), {}
    raise HookdepthError(f"{name!r} has the axes {', '.join(axes) or 'of a number'}", "draw a part of it by hand")


def columns(result: Result, declaration: Declaration | None, names: Sequence[str]) -> dict[str, list[Any]]:
    """Values with where they stand, a column each; the second of two axes of one word is `layer_2`."""
    parts: list[dict[str, Any]] = []
    known = {**(declaration.labels if declaration else {}), **(result.metadata.get("labels") or {})}
    for name in names:
        values = result.tensors[name]
        own: dict[str, Any] = {"tensor": [name] * values.numel()}
        places = np.indices(values.shape).reshape(values.ndim, values.numel())
        for axis, along in zip(axes_of_result(result, declaration, name), places, strict=True):
            axis = axis.replace(" ", "_")
            axis = axis if axis not in own else f"{axis}_2"
            own[axis] = along.tolist()
            labels = known.get(axis, ())
            if labels and len(labels) > int(along.max(initial=0)):
                own[f"{axis}_label"] = [labels[place] for place in along]
        parts.append({**own, "value": values.flatten().tolist()})
    words = list(dict.fromkeys(word for own in parts for word in own if word != "value"))
    return {
        word: [one for own in parts for one in own.get(word, [None] * len(own["value"]))] for word in [*words, "value"]
    }


def _of_tables(result: Result) -> list[str]:
    return [name for name in result.tensors if not name.startswith(PAGE)]


@plainly
def dataframe(result: Result, declaration: Declaration | None, name: str | None = None) -> Any:
    """A pandas frame with a row a value: dataframe(result, declaration, "kl")  # needs pandas"""
    try:
        import pandas
    except ImportError as error:
        raise HookdepthError("a data frame needs pandas", "pip install pandas, or `hookdepth export` to CSV") from error
    if name is not None:
        choose("tensor", name, result.tensors)
    found = pandas.DataFrame(columns(result, declaration, _of_tables(result) if name is None else [name]))
    return found if name is None else found.drop(columns="tensor")


def export(result: Result, declaration: Declaration | None, path: Path) -> Path:
    """Write all values to a .csv or .parquet file, a row a value: export(result, declaration, Path("kl.csv"))"""
    kind = choose("format", path.suffix.removeprefix("."), FORMATS)
    found = columns(result, declaration, _of_tables(result))
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(found)
        writer.writerows(zip(*found.values(), strict=True))
        return write_atomic(path, text.getvalue().encode())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise HookdepthError("Parquet needs pyarrow", "pip install pyarrow, or export to csv") from error
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(found), buffer)
    return write_atomic(path, buffer.getvalue())
