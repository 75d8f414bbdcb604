"""The report of a comparison as one HTML file that needs nothing beside it: images inside, no script, no link.

Its content security policy forbids everything but its own style and images, so that a browser enforces this too.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from llm4msr.comparison.tables import Grid

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #666; --back: #fff; --line: #d8d8d8; --stripe: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #a5a5a5; --back: #16181c; --line: #3a3d44; --stripe: #1f2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 0.3rem; }
p { margin: 0.3rem 0; } .remark { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 0.5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
tr:last-child td { border-bottom: 0; } tbody tr:nth-child(even) { background: var(--stripe); }
.text { text-align: left; } .long { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 20rem; }
figure { margin: 0.5rem 0; } figure .wide { background: #fff; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; font-size: 0.9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--stripe); border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem;
  font-size: 0.85rem; }
@media (max-width: 40rem) {
  img { width: 44rem; max-width: none; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_html(
    heading: str,
    sentences: Iterable[str],
    grids: Sequence[Grid],
    plots: Mapping[str, tuple[str, bytes]],
    last_grids: Sequence[Grid],
    command: str,
    facts: Mapping[str, str],
) -> str:
    """Returns the document.

    Args:
        heading: Of the report.
        sentences: How to read the figures.
        grids: Tables above the plots.
        plots: By heading, what a plot shows, for those who cannot see it, and its PNG.
        last_grids: Tables below the plots.
        command: That made the report.
        facts: Seeds, digests, versions.
    """
    body = [f"<h1>{_text(heading)}</h1>", "<ul>", *(f"<li>{_text(line)}</li>" for line in sentences), "</ul>"]
    body += map(_table, grids)
    for title, (alternative, image) in plots.items():
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        body.append(
            f'<h2>{_text(title)}</h2>\n<figure><div class="wide"><img alt="{_text(alternative)}" src="{source}">'
            "</div></figure>"
        )
    body += map(_table, last_grids)
    body += ["<h2>How it was made</h2>", f"<pre>{_text(command)}</pre>", "<dl>"]
    body += [f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()]
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(heading)}</title><style>{STYLE}</style></head><body>",
        *body,
        "</dl></body></html>",
    ]
    return "\n".join(lines) + "\n"


def _table(grid: Grid) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        out = []
        for place, cell in enumerate(row):
            kind = ("text long" if len(cell) > 60 else "text") if place < grid.num_text else ""
            out.append(f'<{tag} class="{kind}">{_text(cell)}</{tag}>' if kind else f"<{tag}>{_text(cell)}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"

    rows = "\n".join(cells("td", row) for row in grid.rows)
    remark = f'<p class="remark">{_text(grid.remark)}</p>' if grid.remark else ""
    head = cells("th", grid.headings)
    return (
        f'<h2>{_text(grid.title)}</h2>{remark}\n<div class="wide"><table><thead>{head}</thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _text(value: str) -> str:
    return html.escape(value)
