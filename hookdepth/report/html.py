"""The few pieces of HTML that the pages are built from; every text that comes in is escaped here.

page("hookdepth: demo", [facts({"Layers": 30}), section("Effective depth", [table(("a", "b"), [("1", "2")])])])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light; --line: #d8dce0; --soft: #f4f6f8; --text: #1c2126; --quiet: #59626b; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--text); line-height: 1.5;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--text); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
h4 { font-size: .9rem; margin: 1.25rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 72ch; }
h2 code { font-size: .85rem; font-weight: normal; color: var(--quiet); margin-left: .4rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85em; }
cite, .small, figcaption { color: var(--quiet); font-style: normal; }
.small, figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.small { margin-bottom: 1.25rem; }
.note { border-left: 4px solid var(--blue); background: var(--soft); padding: .4rem .75rem; }
.warn { border-color: #d55e00; background: #fdf1e7; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem 1.25rem; margin: 0; }
dl div { min-width: 0; }
dl .long { grid-column: 1 / -1; }
dt { color: var(--quiet); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.1rem 0 0; font-size: .9rem; }
a { color: var(--blue); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .5rem 2rem;
  align-items: start; }
figure { margin: .75rem 0; min-width: 0; }
figcaption b { color: var(--text); font-weight: 600; }
.scroll { overflow-x: auto; }
.plot { position: relative; width: calc(var(--inches) * 115px); max-width: 100%; }
img { display: block; height: auto; width: 100%; }
.over { position: absolute; overflow: hidden; }
.over path { fill: #000; fill-opacity: 0; pointer-events: all; }
.over path:hover { fill-opacity: .25; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--blue); padding: .35rem 0; }
details .scroll { max-height: 75vh; overflow: auto; }
details table { font-size: .75rem; white-space: pre; }
details thead th { position: sticky; top: 0; background: #fff; }
@media (max-width: 700px) {
  main { padding: 1rem .7rem 3rem; }
  h1 { font-size: 1.3rem; }
  .plot { max-width: none; width: calc(var(--inches) * 57px); min-width: 100%; }
  dl { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (min-width: 1800px) { html { font-size: 125%; } main { max-width: 1700px; } }
@media print {
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, table { break-inside: avoid; }
  .plot { max-width: 100%; }
  nav { display: none; }
  details:not([open]) { display: none; }
  details .scroll { max-height: none; overflow: visible; }
}
"""


_LONG = ("Settings", "Versions")


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; `body` is HTML already, the title is not."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Should anything ever slip through unescaped: no script runs, and nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, parts: Iterable[str], name: str = "") -> str:
    """A heading, with the name used on the command line beside it, and what belongs under it."""
    beside = f" <code>{escape(name)}</code>" if name else ""
    anchor = f' id="{escape(name or heading)}"'
    return (
        f"<section{anchor}>\n<h2>{escape(heading)}{beside}</h2>\n"
        + "\n".join(part for part in parts if part)
        + "\n</section>"
    )


def contents(names: Mapping[str, str]) -> str:
    """Links to sections of the same page: contents({"logit-lens": "Logit lens"})."""
    links = (f'<a href="#{escape(name)}">{escape(heading)}</a>' for name, heading in names.items())
    return f"<nav>{''.join(links)}</nav>"


def arranged(groups: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """Groups of figures that are read alike, each between how to read them and what they were made with.

    Figures lie beside each other where the screen is wide enough, and so do groups of a single one.

        arranged([("<p>How to read them.</p>", ["<figure>…</figure>"], "<p>Settings</p>")])
    """
    if all(len(shown) == 1 for _, shown, _ in groups):
        return _grid(f"<div>{before}{shown[0]}{after}</div>" for before, shown, after in groups)
    return "".join(f"{before}{_grid(shown)}{after}" for before, shown, after in groups)


def _grid(cells: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(cells)}</div>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Short facts in a grid, "—" for what is unknown; long values have a row of their own."""
    shown = {name: "—" if value is None or value == "" else str(value) for name, value in pairs.items()}
    cells = (
        f"<div{' class=long' if len(value) > 40 or name in _LONG else ''}>"
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in shown.items()
    )
    return f"<dl>{''.join(cells)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def note(text: str, warn: bool = False) -> str:
    """A line that stands out; `warn` for what a reader must not miss."""
    return f'<p class="note{" warn" if warn else ""}">{escape(text)}</p>'


def small(text: str) -> str:
    """A quiet line of details."""
    return f'<p class="small">{escape(text)}</p>'


def details(title: str, content: str) -> str:
    """Closed until it is asked for; `content` is HTML already."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
