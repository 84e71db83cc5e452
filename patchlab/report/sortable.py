"""Tables that a reader sorts by their headers and filters: plain HTML, which ``page.js`` answers for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column: its name, what it means (shown on hover), whether it holds numbers, and whether a reader chooses among its values."""

    name: str
    hint: str = ""
    number: bool = False
    choose: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: its HTML, and the number that it is sorted by (None: it has none, and comes last)."""

    html: str
    value: float | None = None


def text(value: Any) -> Cell:
    """A cell of text."""
    return Cell(escape(str(value)))


def missing(why: str) -> Cell:
    """A cell of what is not there, with the reason on hover."""
    return Cell(f'<span class="none" title="{escape(why)}">–</span>')


def number(
    value: float | int | None, low: float | int | None = None, high: float | int | None = None, *, digits: int = 3, why: str = "it is not defined"
) -> Cell:
    """A cell of a number, with its interval where there is one; a dash and the reason where there is none.

    An interval whose lower end alone is known has no upper end.
    """
    if value is None or not math.isfinite(value):
        return missing(why)
    shown = said(value, digits)
    if low is not None and math.isfinite(low):
        end = said(high, digits) if high is not None and math.isfinite(high) else '<span title="no finite upper end">∞</span>'
        shown += f'<span class="ci">{said(low, digits)} to {end}</span>'
    return Cell(shown, float(value))


def said(value: float | int, digits: int) -> str:
    """A number with so many decimals.

    >>> said(-0.25, 2), said(1234, 0)
    ('−0.25', '1,234')
    """
    return f"{value:,.{digits}f}".replace("-", "−")


def sortable(name: str, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, filters: bool = True) -> str:
    """A table whose headers sort it, with a field to search it and a list of values for each column to choose from.

    Args:
        name: of the table in the page, unique there.
        columns: the columns, those of text first.
        rows: a cell per column.
        filters: with the field and the lists.
    """
    body = [list(row) for row in rows]
    heads = "".join(
        f"<th{'' if column.number else ' class=text'}{f' title={_quoted(column.hint)}' if column.hint else ''}>"
        f"<button type=button>{escape(column.name)}</button></th>"
        for column in columns
    )
    lines = "".join("<tr>" + "".join(_cell(column, cell) for column, cell in zip(columns, row, strict=True)) + "</tr>\n" for row in body)
    controls = _controls(name, columns, body) if filters else ""
    inner = f"<thead><tr>{heads}</tr></thead><tbody>\n{lines}</tbody>"
    return f'{controls}<div class="scroll tall"><table class="sortable" id="{name}">{inner}</table></div>'


def _cell(column: Column, cell: Cell) -> str:
    value = "" if cell.value is None else f" data-v={cell.value!r}"
    return f"<td{'' if column.number else ' class=text'}{value}>{cell.html}</td>"


def _controls(name: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> str:
    chosen = []
    for place, column in enumerate(columns):
        values = dict.fromkeys(row[place].html for row in rows)
        if column.choose and len(values) > 1:
            options = "".join(f"<option>{value}</option>" for value in values)
            chosen.append(f'<label>{escape(column.name)} <select data-column="{place}"><option value="">all</option>{options}</select></label>')
    field = f'<input type="search" placeholder="filter {len(rows):,} rows" aria-label="filter rows">'
    return f'<form class="filters" data-for="{name}">{field}{"".join(chosen)}<output>{len(rows):,} rows</output></form>'


def _quoted(words: str) -> str:
    return f'"{escape(words)}"'
