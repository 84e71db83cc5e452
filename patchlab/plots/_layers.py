"""Layers: numbers by layer with their intervals, one panel per metric, one line per model or corpus."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from patchlab.errors import MetricError
from patchlab.layer_metrics import LayerMetrics
from patchlab.plots._style import Box, Page, flow, heading, heading_height, lines, sparse_ticks
from patchlab.plots._trajectories import COLOURS, TrajectoryLine, draw_line

_WIDTH, _HEIGHT, _LEFT, _GAP, _TOP, _WIDEST = 300, 190, 62, 22, 66, 1240


@dataclass(frozen=True)
class LayersPanel:
    """One metric: what it is, and a line per result that has it."""

    metric: str
    what: str
    lines: tuple[TrajectoryLine, ...]


@dataclass(frozen=True)
class LayersData:
    """Panels, and the name and colour of each line."""

    title: str
    subtitle: tuple[str, ...]
    panels: tuple[LayersPanel, ...]


def _prepare_layers(metrics: LayerMetrics | Mapping[str, LayerMetrics], title: str) -> LayersData:
    given = {metrics.subject: metrics} if isinstance(metrics, LayerMetrics) else dict(metrics)
    if not given:
        raise MetricError("there is nothing to draw; give layer metrics, or several by name.")
    names = dict.fromkeys(name for one in given.values() for name in one.names)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(given)}
    panels = []
    for metric in names:
        drawn = []
        for name, one in given.items():
            if metric not in one.names:
                continue
            own = one.data.sel(metric=metric)
            there = ~np.isnan(own["value"].to_numpy())
            values = [own[part].to_numpy()[there] for part in ("value", "low", "high")]
            drawn.append(TrajectoryLine(name, colours[name], False, np.array(one.layers)[there], *values))
        what = next(one.what.get(metric, "") for one in given.values() if metric in one.names)
        panels.append(LayersPanel(metric, what, tuple(drawn)))
    legend = [f'<span style="color:{colours[name]}">━━</span> {escape(name, quote=False)}' for name in given]
    return LayersData(title, (*legend, "bands: 95 % CI over texts"), tuple(panels))


def layers(metrics: LayerMetrics | Mapping[str, LayerMetrics], *, title: str = "By layer") -> go.Figure:
    """Numbers by layer with 95 % intervals: a panel per metric, and a line per result where several are given by name.

    Raises:
        MetricError: nothing to draw.

    Example:
        >>> pl.plots.layers(layer_metrics.measure(model, texts)).show()  # doctest: +SKIP
    """
    return _draw(_prepare_layers(metrics, title))


def _draw(data: LayersData) -> go.Figure:
    rows = flow([_LEFT + _WIDTH + _GAP] * len(data.panels), _WIDEST)
    width = max(max(len(row) for row in rows) * (_LEFT + _WIDTH + _GAP) + 16, 560)
    subtitle = lines(data.subtitle, width)
    top = _TOP + 18 * (len(subtitle) - 1)
    head = max(heading_height(panel.what, _WIDTH) for panel in data.panels)
    height = head + _HEIGHT + 62
    page = Page(width, top + len(rows) * height, data.title, "<br>".join(subtitle))
    for r, row in enumerate(rows):
        for c, i in enumerate(row):
            panel = data.panels[i]
            box = Box(_LEFT + c * (_LEFT + _WIDTH + _GAP), top + r * height + head, _WIDTH, _HEIGHT)
            page.note(box.left, box.top - head, heading(panel.metric, panel.what, _WIDTH))
            every = sorted({int(layer) for line in panel.lines for layer in line.layers})
            ticks = [every[k] for k in sparse_ticks(len(every), 14)]
            xaxis = {"title": {"text": "layer"}, "tickmode": "array", "tickvals": ticks, "range": [every[0] - 0.3, every[-1] + 0.3]}
            where = page.panel(box, xaxis, {})
            for line in panel.lines:
                draw_line(page, line, where)
    return page.figure
