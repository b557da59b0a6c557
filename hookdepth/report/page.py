"""What a page consists of, and how it is written: one self-contained file from a template.

The page is `page.html.jinja`, which is given what is defined here. It needs nothing but itself: images are inside,
there is no script, and nothing is fetched. The same results give the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hookdepth.report.drawing.style import render
from hookdepth.report.hover import Overlay, overlays
from hookdepth.report.kind import Declaration, Kind, Picture, floor_of
from hookdepth.report.tables import Table, number
from hookdepth.results import write_atomic

DEPTH_NOTE = "Ratio: (layer + 1) / L. Definitions: arXiv 2512.14064."
_LONG = ("Settings", "Versions")


@dataclass(frozen=True)
class Shown:
    """A figure on a page: its picture as PNG, what lies over it, and its numbers: shown(picture, "kl", folder)."""

    name: str
    caption: str
    said: str
    png: str
    inches: str
    overlays: Sequence[Overlay]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Group:
    """Figures that are read alike: Group("How to read them.", "arXiv 2505.13898, Fig. 4", [], "2 prompts")."""

    reading: str
    paper: str
    figures: Sequence[Shown]
    below: str


@dataclass(frozen=True)
class Note:
    """A line that stands out; `warn` for what a reader must not miss: Note("Noise floor: not measured.", warn=True)."""

    text: str
    warn: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it: Section("Half of an MLP", "half-mlp", question="who needs it?")."""

    heading: str
    name: str = ""
    question: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[Note] = ()
    groups: Sequence[Group] = ()
    last: Sequence[Note] = ()

    @property
    def beside(self) -> bool:
        """Whether groups, being of a single figure each, lie beside each other: Section("Logit lens").beside"""
        return all(len(group.figures) == 1 for group in self.groups)


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    facts: Mapping[str, Any],
    warning: str = "",
    prompts: Sequence[str] = (),
) -> Path:
    """A page from the template, written atomically; its path.

        write_page(Path("out/report.html"), "Title", [Section("Effective depth")], {"Layers": 30})

    Args:
        facts: name → value, "—" for what is unknown; long values have a row of their own.
        warning: over everything, or nothing.
        prompts: texts, folded up.
    """
    cells = [(name, "—" if value is None or value == "" else str(value)) for name, value in facts.items()]
    text = rendered(
        "page.html.jinja",
        title=title,
        facts=[(name, value, len(value) > 40 or name in _LONG) for name, value in cells],
        warning=warning,
        prompts=prompts,
        sections=sections,
    )
    return write_atomic(path, text.encode(errors="replace"))


def rendered(template: str, **values: Any) -> str:
    """A page from one of the templates here, every text escaped: rendered("page.html.jinja", title="Title", …)"""
    folder = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.get_template(template).render(**values)


def depth_cells(depth: Mapping[str, Any]) -> tuple[str, str]:
    """An effective depth of the summary as two cells: its layer, or why there is none, and its share of the layers."""
    if depth["status"] != "found":
        return str(depth["status"]), "—"
    return str(depth["index"]), number(depth["ratio"])


def groups_of(
    drawn: Sequence[tuple[Kind, Sequence[Picture]]],
    declaration: Declaration,
    folder: Path,
    below: str,
    prefix: str = "",
) -> list[Group]:
    """Figures by how they are read, drawn and written to a folder: groups_of(drawn, declaration, folder, "below")."""
    found: dict[tuple[str, str], list[Shown]] = {}
    for kind, pictures in drawn:
        paper = kind.paper or declaration.paper
        own = found.setdefault((kind.reading, f"arXiv {paper}." if paper else ""), [])
        own += [shown(picture, f"{prefix}{picture.name}", folder) for picture in pictures]
    return [Group(reading, paper, figures, below) for (reading, paper), figures in found.items()]


def shown(picture: Picture, name: str, folder: Path) -> Shown:
    """Draw a figure, write its files and return it for a page: shown(picture, "half-mlp-output", Path("out"))."""
    figure = picture.draw()
    png, svg = render(figure, "png", "svg")
    write_atomic(folder / f"{name}.png", png)
    write_atomic(folder / f"{name}.svg", svg)
    return Shown(
        name,
        picture.caption,
        picture.said,
        base64.b64encode(png).decode(),
        f"{figure.get_figwidth():.2f}",
        overlays(figure, picture.values),
        [values.table for values in picture.values],
    )


def floor_in_brief(facts: Mapping[str, Any]) -> str:
    """The noise floor of an analysis in a few words, from its part of the summary."""
    if facts["null_effect"] is None and facts["largest_effect"] is None:
        return "No noise floor: nothing is intervened on"
    return floor_of(facts)
