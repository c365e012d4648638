"""Write a self-contained HTML page about training data, with tokens colored by whether they contribute to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lorakit.data.quality import Quality, Token, row_title
from lorakit.durable import write_text
from lorakit.errors import printable

_STYLE = """
:root { color-scheme: light dark; --loss: #b7ebc6; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --bar: #57a773 }
@media (prefers-color-scheme: dark) {
  :root { --loss: #1f5131; --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --bar: #3fb950 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 60rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
h3 { font-size: .9rem; font-weight: 600; margin: 1rem 0 -.4rem }
table { border-collapse: collapse; width: 100%; max-width: 36rem }
td, th { padding: .15rem .75rem .15rem 0; text-align: right; white-space: nowrap }
td:last-child { width: 100%; text-align: left }
td { font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .8em; background: var(--bar); min-width: 2px }
.row { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .4rem; padding: .75rem; margin: .75rem 0 }
.row span { border-radius: .2rem; box-shadow: inset 0 -1px var(--line) }
.loss { background: var(--loss) }
.warning { border-left: .3rem solid #d4a72c; padding-left: .6rem }
"""


def write_page(path: Path, files: Sequence[str], quality: Quality, note: str) -> None:
    """Write the page; it makes no network requests and needs no scripts.

    Raises:
        DiskError: The file cannot be written.
    """
    title = escape(printable(", ".join(files), one_line=True))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Data: {title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Data: {title}</h1>",
        *(f"<p>{escape(printable(line))}</p>" for line in [*quality.report.lines(), note, *quality.notes]),
        *(f'<p class="warning">{escape(printable(line))}</p>' for line in quality.warnings()),
        "<h2>Lengths</h2>",
        _histogram(quality),
        "<h2>Rows</h2>",
        '<p>Tokens on a <span class="loss">colored background</span> contribute to the loss.</p>',
        *(_row(number, tokens) for number, tokens in enumerate(quality.examples, start=1)),
        "</body></html>",
    ]
    write_text(path, "\n".join(parts) + "\n")


def _histogram(quality: Quality) -> str:
    most = max((count for _, count in quality.histogram), default=1)
    rows = [
        f"<tr><td>{size:,}</td><td>{count:,}</td>"
        f'<td><span class="bar" style="width: {100 * count / most:.1f}%"></span></td></tr>'
        for size, count in quality.histogram
    ]
    head = "<tr><th>up to (tokens)</th><th>sequences</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _row(number: int, tokens: Sequence[Token]) -> str:
    spans = (
        f"<span{' class=loss' if token.is_trained else ''}>{escape(printable(token.text))}</span>" for token in tokens
    )
    return f'<h3>{row_title(number, tokens)}</h3><div class="row">{"".join(spans)}</div>'
