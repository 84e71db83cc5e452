"""Pieces of pages: documents that need no network, paragraphs, tables and figures."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

import plotly.graph_objects as go

from patchlab.plots import DARK

FIT = """
function fit() {
  for (const figure of document.querySelectorAll("figure .plotly-graph-div")) {
    const { width, height } = figure.layout, box = figure.parentElement;
    if (!width) continue;
    const room = figure.closest("figure").clientWidth - 16, scale = Math.max(0.65, Math.min(1, room / width));
    const transform = scale < 1 ? `scale(${scale})` : "";
    Object.assign(figure.style, { width: `${width}px`, height: `${height}px`, transformOrigin: "0 0", transform });
    Object.assign(box.style, { width: `${width * scale}px`, height: `${height * scale}px`, overflow: "hidden" });
  }
}
addEventListener("load", fit);
addEventListener("resize", fit);
"""
"""Figures have a width in pixels: on a narrower page they shrink, to no less than 65 % (below that they scroll)."""


def document(title: str, body: str, *, plotly: bool = True, head: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: in the browser's bar, as text.
        body: what is in ``<main>``, as HTML.
        plotly: load ``plotly.min.js``, which lies beside the page.
        head: more for ``<head>``, as HTML.
        script: JavaScript at the end.
    """
    css = files("patchlab.report").joinpath("page.css").read_text(encoding="utf-8")
    drawn = '<script src="plotly.min.js"></script>' if plotly else ""
    scripts = (FIT if plotly else "") + script
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8">{head}<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}{DARK}\n</style>",
            f"{drawn}</head>",
            f"<body><main>{body}</main>{f'<script>{scripts}</script>' if scripts else ''}</body></html>\n",
        ]
    )


def inline(name: str, figure: go.Figure) -> str:
    """A figure as HTML, for a page that has plotly."""
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config={"displaylogo": False})


def captioned(html: str, caption: str) -> str:
    """A figure, as HTML, with the text that says what it shows."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{html}</figure>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text, of a class of the style sheet if one is given."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listed(lines: Iterable[str]) -> str:
    """A list of texts."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table of cells that are HTML already; rows whose first cell repeats are one group, which names it once."""
    kinds = [' class="text"' if column < text_columns else "" for column in range(len(head))]
    body, group = [], None
    for row in rows:
        first, group = row[0] != group, row[0]
        cells = [row[0] if first else "", *row[1:]]
        columns = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True))
        body.append(f"<tr{' class=first' if first else ''}>{columns}</tr>")
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
