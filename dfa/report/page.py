"""One self-contained HTML file that shows a run: scores, pictures, curves, tables, and how it was made."""

import base64
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from dfa.data import storage
from dfa.report.figures import Panel

_LARGE_BYTES = 5_000_000
_log = logging.getLogger(__name__)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Link:
    """A cell that leads to the picture with this anchor."""

    text: str
    anchor: str


Cell = str | float | int | Link | None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under a title; numbers get one decimal, None a dash.

    bar_column: the column whose numbers (0..100) are also drawn as bars, or None.
    folded: shown closed, to be opened by a click.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bar_column: int | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} row {number}: {len(row)} cells for {len(self.columns)} columns")
        if self.bar_column is not None and not 0 <= self.bar_column < len(self.columns):
            raise ValueError(f"table {self.title!r} has no column {self.bar_column} to draw bars for")


@dataclass(frozen=True)
class Picture:
    """The panels of one sample, side by side, with its name, the colours of its classes, and where a `Link` leads."""

    name: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, Colour], ...] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Report:
    """All that a page shows; every part may be empty and is then left out.

    scores: label -> number (percent, unless the label says otherwise); the first is shown largest, None as a dash.
    figures: curves, as captioned image bytes. pictures: samples.
    provenance: how it was made: command, versions, seed, seconds, memory. The value of "command" is shown as code.
    notes: for a score's label, the small line below its number. summary: one paragraph under the title.
    pictures_title: what the pictures show. contents: a table of them, before them.
    """

    title: str
    scores: Mapping[str, float | None] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    figures: tuple[Panel, ...] = ()
    pictures: tuple[Picture, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    pictures_title: str = "What it sees"
    contents: Table | None = None


def write_page(report: Report, address: str | os.PathLike[str]) -> str:
    """Write the report as one HTML file into a folder that is there, and return its address. A reader sees the old page
    or the new one.

    Images are embedded, nothing is loaded from elsewhere and there is no script. Warns above 5 MB.

    Raises:
        ValueError: image bytes that are neither PNG nor JPEG.
    """
    address, content = os.fspath(address), render(report).encode()
    if len(content) > _LARGE_BYTES:
        _log.warning("report %s is large: %.1f MB; show fewer or smaller pictures", address, len(content) / 1e6)
    storage.write_atomic(address, lambda file: file.write(content))
    return address


def render(report: Report) -> str:
    """The page as text."""
    parts = (
        _scores(report.scores, report.notes),
        _section(report.contents.title, "", _table(report.contents)) if report.contents else "",
        _section(report.pictures_title, "pictures", "".join(_picture(picture) for picture in report.pictures)),
        _section("Curves", "curves", "".join(_figure(figure) for figure in report.figures)),
        "".join(_section(table.title, "", _table(table)) for table in report.tables),
        _section("How it was made", "", _provenance(report.provenance)),
    )
    summary = f"<p>{escape(report.summary)}</p>" if report.summary else ""
    return _PAGE.format(title=escape(report.title), style=_STYLE, summary=summary, body="\n".join(filter(None, parts)))


def _section(title: str, kind: str, content: str) -> str:
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="{kind or "plain"}">{content}</div></section>'


def _scores(scores: Mapping[str, float | None], notes: Mapping[str, str]) -> str:
    cards = []
    for label, value in scores.items():
        note = f"<small>{escape(notes[label])}</small>" if label in notes else ""
        meter = ""
        if value is not None and 0 <= value <= 100:
            meter = f'<i class="meter"><i style="width:{value:.1f}%"></i></i>'
        cards.append(f'<div class="card"><span>{escape(label)}</span><b>{_number(value)}</b>{meter}{note}</div>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _picture(picture: Picture) -> str:
    panels = "".join(_figure(panel, alt=f"{picture.name}: {panel.caption}") for panel in picture.panels)
    legend = "".join(
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
        for name, (red, green, blue) in picture.legend
    )
    anchor = f' id="{escape(picture.anchor)}"' if picture.anchor else ""
    return (
        f'<article{anchor}><header><h3>{escape(picture.name)}</h3><ul class="legend">{legend}</ul></header>'
        f'<div class="panels">{panels}</div></article>'
    )


def _figure(panel: Panel, *, alt: str = "") -> str:
    text = escape(alt or panel.caption)
    caption = f"<figcaption>{escape(panel.caption)}</figcaption>"
    return f'<figure><img src="{_data_address(panel)}" alt="{text}">{caption}</figure>'


def _data_address(panel: Panel) -> str:
    if panel.image.startswith(b"\x89PNG"):
        kind = "png"
    elif panel.image.startswith(b"\xff\xd8"):
        kind = "jpeg"
    else:
        raise ValueError(f"picture {panel.caption!r} must be PNG or JPEG bytes, it begins with {panel.image[:8]!r}")
    return f"data:image/{kind};base64,{base64.b64encode(panel.image).decode()}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(_cell(value, bar=number == table.bar_column) for number, value in enumerate(row))}</tr>"
        for row in table.rows
    )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{len(table.rows)} rows</summary>{body}</details>" if table.folded else body


def _cell(value: Cell, *, bar: bool) -> str:
    if isinstance(value, Link):
        return f'<td><a href="#{escape(value.anchor)}">{escape(value.text)}</a></td>'
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    meter = ""
    if bar:
        width = min(max(float(value or 0), 0), 100)
        meter = f'<i class="meter"><i style="width:{width:.1f}%"></i></i>'
    return f'<td class="number{" bar" if bar else ""}">{meter}{_number(value)}</td>'


def _number(value: float | int | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _provenance(provenance: Mapping[str, str]) -> str:
    entries = []
    for key, value in provenance.items():
        shown = f"<pre>{escape(value)}</pre>" if key == "command" else escape(value)
        entries.append(f"<dt>{escape(key)}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(entries)}</dl>" if entries else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header class="top"><h1>{title}</h1>{summary}</header>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper:#f5f6f8; --card:#fff; --ink:#1a2130; --soft:#667085; --line:#e3e6ec; --accent:#3f6fe8; --track:#e9ecf3;
  --shadow:0 1px 2px rgb(16 24 40 / .05), 0 4px 16px rgb(16 24 40 / .05); }
@media (prefers-color-scheme: dark) { :root { --paper:#0e1116; --card:#171b22; --ink:#e8ebf1; --soft:#929cad;
  --line:#272d38; --accent:#7ea2ff; --track:#252b36; --shadow:none; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.5;
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width:1160px; margin:0 auto; padding:clamp(1.2rem, 4vw, 3rem) clamp(.9rem, 3vw, 2rem) 4rem; }
h1 { font-size:clamp(1.6rem, 4.5vw, 2.5rem); line-height:1.15; letter-spacing:-.025em; margin:0 0 .4rem; }
h2 { font-size:1.2rem; letter-spacing:-.01em; margin:0 0 .9rem; }
h3 { font-size:.9rem; font-weight:600; margin:0; overflow-wrap:anywhere; }
.top p { color:var(--soft); font-size:1.05rem; max-width:68ch; margin:0; }
section { margin-top:2.8rem; }
.cards { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap:.9rem;
  margin-top:1.8rem; }
.card, article, .curves figure, .scroll, dl { background:var(--card); border:1px solid var(--line); border-radius:14px;
  box-shadow:var(--shadow); }
.card { padding:1.05rem 1.2rem 1.1rem; display:flex; flex-direction:column; }
.card span { color:var(--soft); font-size:.86rem; font-weight:500; }
.card b { font-size:2.3rem; line-height:1.2; letter-spacing:-.035em; font-variant-numeric:tabular-nums; }
.card:first-child { border-color:var(--accent); }
.card:first-child b { color:var(--accent); font-size:2.9rem; line-height:1.05; }
.card small { color:var(--soft); font-size:.78rem; margin-top:.5rem; line-height:1.35; }
.meter { display:block; height:6px; border-radius:3px; background:var(--track); overflow:hidden; }
.meter i { display:block; height:100%; border-radius:3px; background:var(--accent); }
.card .meter { margin-top:auto; }
.card b + .meter { margin-top:.55rem; }
article { padding:.9rem 1rem 1rem; margin-bottom:.9rem; }
article header { display:flex; flex-wrap:wrap; gap:.25rem 1.2rem; align-items:baseline; justify-content:space-between; }
.legend { display:flex; flex-wrap:wrap; gap:.2rem .9rem; list-style:none; margin:0; padding:0; font-size:.82rem; }
.legend i { display:inline-block; width:.78em; height:.78em; border-radius:3px; margin-right:.4em;
  box-shadow:inset 0 0 0 1px rgb(128 128 128 / .35); }
.panels { display:grid; grid-auto-flow:column; grid-auto-columns:minmax(9.5rem, 1fr); gap:.6rem; overflow-x:auto;
  margin-top:.7rem; scroll-snap-type:x proximity; }
.panels figure { margin:0; scroll-snap-align:start; }
.panels img { display:block; width:100%; height:auto; border-radius:8px; }
figcaption { color:var(--soft); font-size:.78rem; text-align:center; margin-top:.3rem; }
.curves { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap:.9rem;
  align-items:start; }
.curves figure { margin:0; padding:.9rem .9rem .7rem; }
.curves img { display:block; width:100%; height:auto; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:.92rem; }
th { text-align:left; color:var(--soft); font-weight:500; font-size:.8rem; }
th, td { padding:.5rem 1rem; border-bottom:1px solid var(--line); vertical-align:middle; }
tbody tr:last-child td { border-bottom:0; }
.number { font-variant-numeric:tabular-nums; white-space:nowrap; }
.bar { min-width:9rem; }
.bar .meter { display:inline-block; vertical-align:middle; width:calc(100% - 4rem); margin-right:.8rem; }
details summary { cursor:pointer; color:var(--accent); font-size:.9rem; margin-bottom:.7rem; }
dl { display:grid; grid-template-columns:minmax(6rem, max-content) 1fr; margin:0; padding:.5rem 1.1rem;
  font-size:.92rem; }
dt, dd { padding:.45rem 0; margin:0; min-width:0; }
dt { color:var(--soft); padding-right:1.6rem; }
dd { overflow-wrap:anywhere; }
pre { margin:0; white-space:pre-wrap; overflow-wrap:anywhere;
  font:.86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width:600px) { .cards { grid-template-columns:1fr 1fr; } .card:first-child { grid-column:1 / -1; }
  .card { padding:.85rem 1rem; } .card b { font-size:1.9rem; } th, td { padding:.45rem .75rem; }
  .panels { grid-auto-columns:minmax(8.2rem, 1fr); }
  .bar .meter { width:calc(100% - 3.6rem); margin-right:.6rem; } }
@media print { body { background:#fff; } .card, article, figure { break-inside:avoid; } }
"""
