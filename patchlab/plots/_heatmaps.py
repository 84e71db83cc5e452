"""Heatmaps of effects, one per site, layer 0 at the top, blue where a cell supports the behaviour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.comparison.alignment import check_alike
from patchlab.errors import ScoreError
from patchlab.plots._facets import MOST_CELLS, ZEROS, Facet, facets_of
from patchlab.plots._style import GREY, INK, MUTED, PALE, Box, Page, Pixels, Signs, about, flow, heading, lines, signs, words_width
from patchlab.scores import NO_EDGE, NO_PATH, SAME, ScoreMap

WIDTH = 1240
"""Pixels that the panels of a row may take together, before the next row starts."""
MOST_ROWS, TOP = 200, 20
"""Beyond so many rows, or 5,000 cells, a figure is an image to zoom into, beside a table of so many of the largest effects."""
_HATCHED = 3000
"""Beyond this many structural zeros of a kind in a panel the hatching is left out; the grey stays."""
_NOTHING = np.array(None, dtype=object)
_TABLE, _VISIBLE, _LINE = 190, 4, 760
_PLAIN = ("▨", "#ced3d9", "line-ne", 0.8)
_LOOKS = {NO_PATH: _PLAIN, SAME: ("⊡", "#e9ebef", "circle", 0.15), NO_EDGE: ("□", "white", "", 0.0)}
"""How cells that cannot matter look: a sign for the legend, a grey, a symbol, and its share of the cell."""


@dataclass(frozen=True)
class HeatmapData:
    """Rows of panels, the colour limit of each row (its largest |value|; panels of a row share it), and the words around them.

    ``tops`` is empty unless the figure is large; then it has a table per row.
    """

    title: str
    subtitle: str
    value_label: str
    rows: tuple[tuple[Facet, ...], ...]
    limits: tuple[float, ...]
    signs: Signs
    tops: tuple["TopCells", ...] = ()


@dataclass(frozen=True)
class TopCells:
    """The largest effects of a row of panels: which panel (0 where the panels are methods) and cell, its name, and a value per column."""

    columns: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]
    names: tuple[str, ...]
    values: Float[np.ndarray, "cell column"]


def _prepare_heatmaps(scores: ScoreMap | Mapping[str, ScoreMap], *, normalised: bool = False) -> HeatmapData:
    maps = {"": scores} if isinstance(scores, ScoreMap) else dict(scores)
    if not maps:
        raise ScoreError("there is nothing to draw; give a score map, or maps by name.")
    (first_name, first), *others = maps.items()
    for name, other in others:
        check_alike(first_name, first, name, other)
    record = first.provenance
    unit = "of the gap" if normalised else str(record.get("metric_unit", ""))
    room = 330 if len(maps) == 1 else max(160.0, min(330.0, WIDTH / len(maps) - 40))
    means = {name: each.normalised().value if normalised else {site: each.mean(site) for site in each.sites} for name, each in maps.items()}

    def arranged(compact: bool) -> list[list[Facet]]:
        panels = {}
        for name, each in maps.items():
            options: dict[str, Any] = {"ranked_by": first, "heading": name, "unit": unit, "room": room, "first": each is first, "compact": compact}
            panels[name] = [facets_of(each, means[name][site], most=6 if each is scores else 3, **options) for site in first.sites]
        if isinstance(scores, ScoreMap):
            return _grouped(panels[""])
        return [list(row) for site in zip(*panels.values(), strict=True) for row in zip(*site, strict=True)]

    rows = arranged(compact=True)
    n_rows, n_cells = sum(max(len(facet.values) for facet in row) for row in rows), sum(facet.values.size for row in rows for facet in row)
    large = n_rows > MOST_ROWS or n_cells > MOST_CELLS
    rows = rows if large else arranged(compact=False)
    metric = record.get("metric", "the metric")
    title = f"Effect of patching on {metric}" + (f": {record.get('method')}" if isinstance(scores, ScoreMap) else "")
    label = "effect, share of the gap" if normalised else f"effect ({unit})" if unit else "effect"
    limits = _limits(rows, by_site=not isinstance(scores, ScoreMap))
    tops = tuple(_top_cells(row, list(maps) if len(maps) > 1 else []) for row in rows) if large else ()
    means_what = signs({**record, "unsigned": all(each.provenance.get("unsigned") for each in maps.values())})
    return HeatmapData(title, about(first), label, tuple(tuple(row) for row in rows), limits, means_what, tops)


def _top_cells(row: Sequence[Facet], methods: list[str]) -> TopCells:
    """The largest effects of the first method, with those of the others at the same cells; without methods, of all panels."""
    shown = [(i, facet) for i, facet in enumerate(row) if facet.not_scored is None and facet.rows.names and facet.columns.names]
    ranked = shown[:1] if methods else shown
    found = [(i, int(y), int(x)) for i, facet in ranked for y, x in np.argwhere(facet.live)]
    found.sort(key=lambda cell: -abs(row[cell[0]].values[cell[1:]]))
    cells = tuple(found[:TOP])
    values = [
        [float(facet.values[place]) for facet in row] if methods else [float(row[i].values[place])] for i, *at in cells for place in [tuple(at)]
    ]
    names = tuple((f"{row[i].site} " if len(row) > 1 and not methods else "") + row[i].name(y, x) for i, y, x in cells)
    columns = tuple(methods) or ("effect",)
    return TopCells(columns, cells, names, np.array(values).reshape(len(cells), len(columns)))


def _grouped(sites: list[list[Facet]]) -> list[list[Facet]]:
    """Panels of one map: sites of one group side by side, as many as fit."""
    groups: dict[str, list[Facet]] = {}
    for facet in (facet for site in sites for facet in site):
        groups.setdefault(facet.group, []).append(facet)
    return [[group[i] for i in row] for group in groups.values() for row in flow([_outer(facet)[0] for facet in group], WIDTH)]


def _limits(rows: list, *, by_site: bool) -> tuple[float, ...]:
    """The largest |value| per scale: sites of one group share a scale, or the methods of one site."""
    largest: dict[str, float] = {}
    keys = [row[0].site if by_site else row[0].group for row in rows]
    for key, row in zip(keys, rows, strict=True):
        for facet in row:
            drawn = np.abs(facet.values[facet.live & np.isfinite(facet.values)])
            largest[key] = max(largest.get(key, 0.0), float(drawn.max(initial=0.0)))
    return tuple(largest[key] or 1.0 for key in keys)


def heatmaps(scores: ScoreMap | Mapping[str, ScoreMap], *, normalised: bool = False) -> go.Figure:
    """Heatmaps of the example-mean effects, one panel per site.

    Sites with positions are layer × position, heads layer × head, neurons the largest of each layer; more axes are laid out as
    rows ``L9.H6``, or as one panel per head with the largest effects. Layer 0 is at the top; blue supports the behaviour (denoising there raises
    the metric, noising lowers it), red works against it, white is a measured 0, grey cannot matter: hatched where no path leads to the metric, pale
    where both prompts are the same. Panels of one row share a colour scale. A column is headed by its token where all examples agree, else by its
    named position or its index (the tokens are in the hover text).

    Figures of more than 200 rows or 5,000 cells are images of a fixed height to zoom into; more rows and columns are named as they find room. A
    table beside them has the 20 largest effects, which are ringed.

    Args:
        scores: one map; or maps by name, which become columns on one colour scale per site.
        normalised: effects as a share of the gap between clean and corrupted.

    Raises:
        ScoreError: maps with unlike sites, or ``normalised`` with a gap that is not distinguishable from 0.

    Example:
        >>> pl.plots.heatmaps({"exact": exact, "AtP": atp, "RelP": relp}).show()  # doctest: +SKIP
    """
    return _draw(_prepare_heatmaps(scores, normalised=normalised))


def _outer(facet: Facet) -> tuple[Pixels, Pixels]:
    """Width and height of a panel with its heading and tick labels, in pixels."""
    left, top, bottom = facet.margins
    return left + facet.size[0] + 26, top + facet.size[1] + bottom


def _draw(data: HeatmapData) -> go.Figure:
    sizes = [[_outer(facet) for facet in row] for row in data.rows]
    tables = [_TABLE + 62 * len(top.columns) for top in data.tops] or [0] * len(data.rows)
    widths = [16 + sum(w for w, _ in row) + 80 + table for row, table in zip(sizes, tables, strict=True)]
    subtitle = lines(_words(data), max(_LINE, *widths))
    top = 50.0 + 16 * len(subtitle)
    width = max(*widths, *(words_width(data.title, line) for line in subtitle))
    page = Page(width, top + sum(max(h for _, h in row) for row in sizes) + 10, data.title, "<br>".join(subtitle))
    for number, (row, row_sizes, limit) in enumerate(zip(data.rows, sizes, data.limits, strict=True), start=1):
        left, head = 16.0, max(facet.margins[1] for facet in row)
        marked = data.tops[number - 1] if data.tops else None
        for i, (facet, (w, _)) in enumerate(zip(row, row_sizes, strict=True)):
            box = Box(left + facet.margins[0], top + head, *facet.size)
            page.note(box.left, top, heading(facet.title, facet.description, facet.size[0]))
            where = _draw_facet(page, facet, box, f"coloraxis{number}", limit)
            if marked and facet.not_scored is None:
                _draw_rings(page, facet, [cell[1:] for cell in marked.cells if len(marked.columns) > 1 or cell[0] == i], where)
            left += w
        height = max(facet.size[1] for facet in row)
        if any(facet.not_scored is None for facet in row):
            _draw_scale(page, f"coloraxis{number}", data, limit, Box(left - 8, top + head, 10, height))
        if marked and marked.cells:
            _draw_table(page, marked, Box(left + 72, top + head, tables[number - 1] - 16, max(height, 240)))
        top += max(h for _, h in row_sizes)
    return page.figure


def _words(data: HeatmapData) -> list[str]:
    """What was patched, what the colours mean, and how cells that cannot matter look."""
    kinds = {str(kind) for row in data.rows for facet in row for kind in np.unique(facet.zero)}
    looks = {kind: _LOOKS.get(kind, _PLAIN) for kind in ZEROS if kind in kinds}
    marks = {kind: ("■", fill) if data.tops else (mark, MUTED) for kind, (mark, fill, *_) in looks.items()}
    words = [f'<span style="color:{colour}">{mark}</span> {ZEROS[kind]}' for kind, (mark, colour) in marks.items()]
    thin = data.tops and any(facet.size[1] / len(facet.values) < _VISIBLE for row in data.rows for facet in row)
    words += [f"○ the {TOP} largest; rows are thin: zoom in for the others"] if thin else []
    return [data.subtitle, data.signs.legend, *words]


def _draw_facet(page: Page, facet: Facet, box: Box, scale: str, limit: float) -> dict[str, str]:
    n_rows, n_columns = facet.values.shape
    named = facet.hover is None
    across = {"range": [-0.5, n_columns - 0.5], **(facet.columns.named() if named else facet.columns.layout())}
    down = {"range": [n_rows - 0.5, -0.5], **(facet.rows.named() if named else facet.rows.layout())}
    down |= {} if facet.first else {"showticklabels": False, "title": {"text": ""}}
    down |= {"tickfont": {"size": 9}} if len(facet.rows.places) == n_rows > 60 else {}
    where = page.panel(box, across | {"mirror": True}, down | {"mirror": True})
    if facet.not_scored is not None:
        page.figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", **where))  # axes without a trace are not drawn
        domain = {"xref": f"{where['xaxis']} domain", "yref": f"{where['yaxis']} domain"}
        page.figure.add_shape(type="rect", **domain, x0=0, x1=1, y0=0, y1=1, fillcolor=PALE, line_width=0, layer="below")
        text = heading("not scored", facet.not_scored, facet.size[0] - 16)
        page.note(box.left + box.width / 2, box.top + box.height / 2, text, colour=MUTED, xanchor="center", yanchor="middle", align="center")
        return where
    gap = 0 if facet.compact else facet.line
    common = {"xgap": gap, "ygap": gap, "hoverongaps": False, **where}
    common |= {"x": list(facet.columns.names), "y": list(facet.rows.names)} if named else {}

    def told(mask: np.ndarray, words: str) -> dict[str, Any]:
        if facet.hover is None:
            return {"hovertemplate": f"%{{y}}<br>%{{x}}<br>{words}<extra></extra>"}
        return {"text": np.where(mask, facet.hover, _NOTHING), "hovertemplate": "%{text}<extra></extra>"}

    values = np.where(facet.live, facet.values, np.nan).astype(np.float32 if named else np.float64)
    colours: dict[str, Any] = {"coloraxis": scale}
    if facet.unsigned:
        colours = {"colorscale": signs({"unsigned": True}).scale, "zmin": 0, "zmax": limit, "showscale": False}
    page.figure.add_trace(go.Heatmap(z=values, **colours, **told(facet.live, "effect %{z:.3g}"), **common))
    for place in facet.rows.breaks if n_rows <= MOST_ROWS else ():
        line = {"color": MUTED, "width": 0.5}
        page.figure.add_shape(type="line", xref=f"{where['xaxis']} domain", yref=where["yaxis"], x0=0, x1=1, y0=place, y1=place, line=line)
    for kind, words in ZEROS.items():
        mask = facet.zero == kind
        if not mask.any():
            continue
        _, fill, symbol, share = _LOOKS.get(kind, _PLAIN)
        shade = np.where(mask, 0.0, np.nan).astype(values.dtype)
        page.figure.add_trace(go.Heatmap(z=shade, colorscale=[[0, fill], [1, fill]], showscale=False, **told(mask, words), **common))
        y, x = np.nonzero(mask)
        if symbol and len(x) <= _HATCHED and not named:
            size = share * min(box.width / n_columns, box.height / n_rows)
            stroke = {"symbol": symbol, "size": size, "line": {"color": "#a8adb3", "width": 1}, "color": "#a8adb3"}
            page.figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=stroke, hoverinfo="skip", **where))
    return where


def _draw_rings(page: Page, facet: Facet, cells: Sequence[tuple[int, int]], where: dict[str, str]) -> None:
    """Rings around the largest effects where rows may be thinner than a pixel."""
    if facet.size[1] / len(facet.values) >= _VISIBLE:
        return
    ring = {"symbol": "circle-open", "size": 9, "color": INK, "line": {"width": 1}}
    at = {"x": [facet.columns.names[x] for _, x in cells], "y": [facet.rows.names[y] for y, _ in cells]}
    if facet.hover is not None:
        at = {"x": [x for _, x in cells], "y": [y for y, _ in cells]}
    page.figure.add_trace(go.Scatter(mode="markers", marker=ring, hoverinfo="skip", **at, **where))


def _draw_table(page: Page, top: TopCells, box: Box) -> None:
    digits = max(0, 2 - int(np.floor(np.log10(np.abs(top.values).max() or 1.0))))
    numbers = [[f"{value:+.{digits}f}".replace("-", "−") for value in column] for column in top.values.T]
    columns = [list(top.names), *numbers]
    across = [box.left / page.width, (box.left + box.width) / page.width]
    up = [1 - (box.top + box.height) / page.height, 1 - box.top / page.height]
    look = {"align": ["left", *["right"] * len(top.columns)], "line": {"color": GREY}}
    head = {"values": ["<b>largest</b>", *(f"<b>{escape(name, quote=False)}</b>" for name in top.columns)], "fill": {"color": PALE}, "height": 22}
    body = {"values": columns, "fill": {"color": "white"}, "height": 21, "font": {"size": 11}}
    sizes = [_TABLE - 16, *[62] * len(top.columns)]
    page.figure.add_trace(go.Table(domain={"x": across, "y": up}, header=head | look, cells=body | look, columnwidth=sizes))


def _draw_scale(page: Page, name: str, data: HeatmapData, limit: float, box: Box) -> None:
    bar = {
        "x": box.left / page.width,
        "y": 1 - (box.top + box.height / 2) / page.height,
        "xanchor": "left",
        "yanchor": "middle",
        "thickness": box.width,
        "lenmode": "pixels",
        "len": max(box.height, 96),
        "ypad": 0,
        "xpad": 0,
        "outlinewidth": 0,
        "nticks": 5,
        "tickfont": {"size": 11},
    }
    middle = {"xanchor": "center", "yanchor": "middle", "textangle": -90}
    page.note(box.left + box.width + 42, box.top + box.height / 2, escape(data.value_label, quote=False), **middle)
    page.figure.update_layout(
        {name: {"colorscale": data.signs.scale, "cmin": 0.0 if data.signs.above == data.signs.below else -limit, "cmax": limit, "colorbar": bar}}
    )
