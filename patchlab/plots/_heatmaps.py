"""Where the effect is: a heatmap per site, layer 0 at the top, blue where the patch raises the metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from patchlab.alignment import check_alike
from patchlab.errors import ScoreError
from patchlab.plots._facets import Facet, facets_of
from patchlab.plots._style import GREY, MUTED, PALE, RED_BLUE, Box, Page, Pixels, about, flow, heading, words_width
from patchlab.scores import ScoreMap

WIDTH = 1240
"""Pixels that the panels of a row may take together, before the next row starts."""
_HATCHED = 3000
"""Beyond this many structural zeros in a panel the hatching is left out; the grey stays."""


@dataclass(frozen=True)
class HeatmapData:
    """Rows of panels, the colour limit of each row (its largest |value|; panels of a row share it), and the words around them."""

    title: str
    subtitle: str
    value_label: str
    rows: tuple[tuple[Facet, ...], ...]
    limits: tuple[float, ...]


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
    panels = {}
    for name, each in maps.items():
        values = each.normalised().value if normalised else {site: each.mean(site) for site in each.sites}
        options: dict[str, Any] = {"ranked_by": first, "heading": name, "unit": unit, "room": room, "first": each is first}
        panels[name] = [facets_of(each, values[site], most=6 if each is scores else 3, **options) for site in first.sites]
    if isinstance(scores, ScoreMap):
        rows = _grouped(panels[""])
    else:
        rows = [row for site in zip(*panels.values(), strict=True) for row in zip(*site, strict=True)]
    metric = record.get("metric", "the metric")
    title = f"Effect of patching on {metric}" + (f": {record.get('method')}" if isinstance(scores, ScoreMap) else "")
    label = "effect, share of the gap" if normalised else f"effect ({unit})" if unit else "effect"
    limits = _limits(rows, by_site=not isinstance(scores, ScoreMap))
    return HeatmapData(title, about(first), label, tuple(tuple(row) for row in rows), limits)


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
    rows layer·head, or as one panel per head with the largest effects. Layer 0 is at the top; blue raises the metric,
    red lowers it, white is a measured 0, hatched grey a structural zero. Panels of one row share a colour scale. A column
    is headed by its token where all examples agree, else by its named position or its index (the tokens are in the hover text).

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
    width = max(words_width(data.title, _subtitle(data)), 16 + max(sum(w for w, _ in row) for row in sizes) + 80)
    page = Page(width, 66 + sum(max(h for _, h in row) for row in sizes) + 10, data.title, _subtitle(data))
    top = 66.0
    for number, (row, row_sizes, limit) in enumerate(zip(data.rows, sizes, data.limits, strict=True), start=1):
        left, head = 16.0, max(facet.margins[1] for facet in row)
        for facet, (w, _) in zip(row, row_sizes, strict=True):
            box = Box(left + facet.margins[0], top + head, *facet.size)
            page.note(box.left, top, heading(facet.title, facet.description, facet.size[0]))
            _draw_facet(page, facet, box, f"coloraxis{number}")
            left += w
        if any(facet.not_scored is None for facet in row):
            _draw_scale(page, f"coloraxis{number}", limit, Box(left - 8, top + head, 10, max(facet.size[1] for facet in row)), data.value_label)
        top += max(h for _, h in row_sizes)
    return page.figure


def _subtitle(data: HeatmapData) -> str:
    structural = any((~facet.live).any() for row in data.rows for facet in row)
    return data.subtitle + (" &nbsp;·&nbsp; ▨ structural zero: cannot affect the metric" if structural else "")


def _draw_facet(page: Page, facet: Facet, box: Box, scale: str) -> None:
    n_rows, n_columns = facet.values.shape
    across = {"range": [-0.5, n_columns - 0.5], **facet.columns.layout()}
    down = {"range": [n_rows - 0.5, -0.5], **facet.rows.layout(), **({} if facet.first else {"showticklabels": False, "title": {"text": ""}})}
    where = page.panel(box, across | {"mirror": True}, down | {"mirror": True})
    if facet.not_scored is not None:
        page.figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", **where))  # axes without a trace are not drawn
        page.figure.add_shape(
            type="rect",
            xref=f"{where['xaxis']} domain",
            yref=f"{where['yaxis']} domain",
            x0=0,
            x1=1,
            y0=0,
            y1=1,
            fillcolor=PALE,
            line_width=0,
            layer="below",
        )
        text = heading("not scored", facet.not_scored, facet.size[0] - 16)
        page.note(box.left + box.width / 2, box.top + box.height / 2, text, colour=MUTED, xanchor="center", yanchor="middle", align="center")
        return
    values = np.where(facet.live, facet.values, np.nan)
    common = {"text": facet.hover, "hovertemplate": "%{text}<extra></extra>", "xgap": facet.line, "ygap": facet.line, **where}
    page.figure.add_trace(go.Heatmap(z=values, coloraxis=scale, hoverongaps=False, **common))
    for place in facet.rows.breaks:
        line = {"color": MUTED, "width": 0.5}
        page.figure.add_shape(type="line", xref=f"{where['xaxis']} domain", yref=where["yaxis"], x0=0, x1=1, y0=place, y1=place, line=line)
    if facet.live.all():
        return
    page.figure.add_trace(
        go.Heatmap(z=np.where(facet.live, np.nan, 0.0), colorscale=[[0, GREY], [1, GREY]], showscale=False, hoverongaps=False, **common)
    )
    y, x = np.nonzero(~facet.live)
    if len(x) <= _HATCHED:
        size = 0.8 * min(box.width / n_columns, box.height / n_rows)
        stroke = {"symbol": "line-ne", "size": size, "line": {"color": "#a8adb3", "width": 1}}
        page.figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=stroke, hoverinfo="skip", **where))


def _draw_scale(page: Page, name: str, limit: float, box: Box, label: str) -> None:
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
    page.note(box.left + box.width + 42, box.top + box.height / 2, escape(label, quote=False), **middle)
    page.figure.update_layout({name: {"colorscale": RED_BLUE, "cmin": -limit, "cmax": limit, "colorbar": bar}})
