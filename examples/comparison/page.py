"""One HTML file that shows a comparison: self-contained, for phone and paper, light and dark. Writes text; reads none."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from comparison.tables import Column, Row


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Args:
        title: above it.
        caption: below it, what is to be seen.
        png: its bytes.
    """

    title: str
    caption: str
    png: bytes


GROUPS = {
    "accuracy": "Accuracy",
    "parameters": "Parameters per class",
    "images": "Images",
    "work": "Work",
    "kept": "Kept between tasks",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #dcdcdc; --ground: #ffffff; --raised: #f5f6f8;
  --bad: #a3341f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a5a5a5; --line: #3a3d42; --ground: #16181b; --raised: #1f2226; --bad: #ff9c85; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 104rem; padding: 1.25rem 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p, dd, li, figcaption { max-width: 46rem; }
.soft, figcaption, .note { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { background: var(--raised); font-weight: 600; vertical-align: bottom; }
thead tr:last-child th { font-weight: 500; line-height: 1.25; white-space: normal; min-width: 4.2rem; }
thead th.group { text-align: center; border-bottom-color: transparent; }
.first { border-left: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
th.name { position: sticky; left: 0; text-align: left; background: var(--raised); border-right: 1px solid var(--line);
  font-weight: 600; min-width: 8.5rem; max-width: 12rem; white-space: normal; overflow-wrap: break-word; z-index: 1; }
figure { margin: 0 0 1rem; }
figure img { display: block; max-width: min(100%, 60rem); height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: .5rem; padding: .5rem; }
figcaption { margin-top: .4rem; }
.failed { border-left: .25rem solid var(--bad); padding-left: .75rem; }
.failed strong { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  th.name { min-width: 7rem; max-width: 8rem; } }
@media print { body { max-width: none; padding: 0; } .wide { overflow: visible; border: 0; } figure { break-inside: avoid; } }
"""


def comparison_page(
    *,
    title: str,
    summary: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    failures: Sequence[tuple[str, int, str]],
    details: Mapping[str, str],
) -> str:
    """The page as HTML. All text is escaped; nothing is loaded from elsewhere.

    Args:
        title: of the page.
        summary: below the title.
        rows: of the table.
        columns: of the table.
        notes: below the table, how to read it.
        pictures: in their order.
        failures: strategy, seed and error of each run that failed.
        details: what else there is to know of how it was made, text by name.

    Returns:
        A whole document.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(summary)}</p>',
        *_failures(failures),
        "<h2>Results</h2>",
        *_table(rows, columns),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        *(line for picture in pictures for line in _picture(picture)),
        "<h2>How it was made</h2>",
        "<dl>",
        *(f"<dt>{escape(name)}</dt><dd>{_detail(name, text)}</dd>" for name, text in details.items()),
        "</dl>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    groups = [(name, len(list(members))) for name, members in groupby(column.group for column in columns)]
    first = {next(column.key for column in columns if column.group == name) for name, _ in groups}
    heads = "".join(
        f'<th class="group first" scope="colgroup" colspan="{size}">{escape(GROUPS[name])}</th>'
        for name, size in groups
    )
    titles = "".join(f"<th{_first(column, first)} scope='col'>{escape(column.title)}</th>" for column in columns)
    lines = [
        '<div class="wide" tabindex="0" role="region" aria-label="Results">',
        "<table>",
        "<thead>",
        f'<tr><th class="name" scope="col" rowspan="2">strategy</th><th scope="col" rowspan="2">seeds</th>{heads}</tr>',
        f"<tr>{titles}</tr>",
        "</thead>",
        "<tbody>",
    ]
    for row in rows:
        cells = "".join(f"<td{_first(column, first)}>{escape(row.cell(column))}</td>" for column in columns)
        name, seeds = escape(row.compared.choice.label), escape(row.seeds_text)
        lines.append(f'<tr><th class="name" scope="row">{name}</th><td>{seeds}</td>{cells}</tr>')
    return [*lines, "</tbody>", "</table>", "</div>"]


def _first(column: Column, first: set[str]) -> str:
    return ' class="first"' if column.key in first else ""


def _picture(picture: Picture) -> list[str]:
    data = base64.b64encode(picture.png).decode("ascii")
    return [
        f"<h2>{escape(picture.title)}</h2>",
        "<figure>",
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">',
        f"<figcaption>{escape(picture.caption)}</figcaption>",
        "</figure>",
    ]


def _failures(failures: Sequence[tuple[str, int, str]]) -> list[str]:
    if not failures:
        return []
    lines = [
        '<div class="failed">',
        f"<p><strong>Failed runs: {len(failures)}.</strong> The means leave them out.</p>",
        "<ul>",
    ]
    lines += [
        f"<li>{escape(strategy)}, seed {seed}: <code>{escape(error)}</code></li>" for strategy, seed, error in failures
    ]
    return [*lines, "</ul>", "</div>"]


def _detail(name: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if name == "command" else escape(text)
