"""Faithfulness and completeness of circuits of nodes by size, side by side for several kinds of nodes."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Int

from patchlab.errors import CircuitError
from patchlab.plots._style import INK, MUTED, Box, Page, lines, method_colours, words_width

MEASURES = {"faithfulness": "the circuit alone; 1 is the whole model", "completeness": "all but the circuit; low is good"}
WIDTH, HEIGHT, _LEFT, _GAP = 330, 230, 64, 34
_NEEDED = ("method", "nodes", "n_nodes", *(f"{measure}{end}" for measure in MEASURES for end in ("", "_lo", "_hi")))
_LAST = "random"


@dataclass(frozen=True)
class NodeLine:
    """One method in one panel: a measure with its 95 % interval at each number of nodes."""

    method: str
    n_nodes: Int[np.ndarray, " size"]
    value: Float[np.ndarray, " size"]
    low: Float[np.ndarray, " size"]
    high: Float[np.ndarray, " size"]


@dataclass(frozen=True)
class NodeCircuitsData:
    """Panels by measure and kind of nodes, the range of each measure's axis, and the words."""

    title: str
    subtitle: str
    methods: tuple[str, ...]
    nodes: tuple[str, ...]
    panels: dict[tuple[str, str], tuple[NodeLine, ...]]
    spans: dict[str, tuple[float, float]]


def _prepare_node_circuits(table: pd.DataFrame, title: str) -> NodeCircuitsData:
    if missing := [name for name in _NEEDED if name not in table]:
        raise CircuitError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, table)) or 'none'}.")
    if table.empty:
        raise CircuitError("the table has no rows, so there is nothing to draw.")
    methods = tuple(sorted(dict.fromkeys(map(str, table["method"])), key=lambda name: name == _LAST))
    nodes = tuple(dict.fromkeys(map(str, table["nodes"])))
    panels: dict[tuple[str, str], tuple[NodeLine, ...]] = {}
    for measure in MEASURES:
        for kind in nodes:
            found: list[NodeLine] = []
            for method in methods:
                rows = table[(table["nodes"] == kind) & (table["method"] == method)].sort_values("n_nodes")
                if len(rows):
                    value, low, high = (rows[f"{measure}{end}"].to_numpy(float) for end in ("", "_lo", "_hi"))
                    found.append(NodeLine(method, rows["n_nodes"].to_numpy(int), value, low, high))
            panels[measure, kind] = tuple(found)
    spans = {measure: _span([line for kind in nodes for line in panels[measure, kind]]) for measure in MEASURES}
    return NodeCircuitsData(title, "nodes chosen by |effect| (log axis) · bands: 95 % CI over examples", methods, nodes, panels, spans)


def _span(drawn: list[NodeLine]) -> tuple[float, float]:
    """From 0 (or below) to 1 (or above); a wild interval is cut off, a value never."""
    values = np.concatenate([line.value for line in drawn])
    low, high = min(0.0, float(np.nanmin(values))), max(1.0, float(np.nanmax(values)))
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def node_circuits(table: pd.DataFrame, *, title: str = "Circuits of nodes by size") -> go.Figure:
    """Faithfulness (above) and completeness (below) against the number of nodes, a panel per kind of nodes, a line with a 95 % band per method.

    Args:
        table: ``method``, ``nodes`` (the kind), ``n_nodes``, ``faithfulness`` and ``completeness``, each with ``_lo`` and ``_hi``: the
            ``circuits`` of :class:`patchlab.feature_comparison.FeatureResults`, and ``features.csv``.
        title: above the figure.

    Raises:
        CircuitError: a column is missing, or there are no rows.

    Example:
        >>> pl.plots.node_circuits(pd.read_csv("out/features.csv")).show()  # doctest: +SKIP
    """
    return _draw(_prepare_node_circuits(table, title))


def _draw(data: NodeCircuitsData) -> go.Figure:
    colours = method_colours(data.methods)
    width = max(_LEFT + len(data.nodes) * (WIDTH + _GAP), words_width(data.title, data.subtitle))
    keys = [f'<span style="color:{colours[name]}">━━</span> {escape(name, quote=False)}' for name in data.methods]
    legend = lines(keys, width)
    top = 66 + 19 * len(legend) + 34
    page = Page(width, top + 2 * HEIGHT + 52 + 56, data.title, data.subtitle)
    for i, line in enumerate(legend):
        page.note(16, 62 + 19 * i, line)
    for row, (measure, meaning) in enumerate(MEASURES.items()):
        for column, kind in enumerate(data.nodes):
            box = Box(_LEFT + column * (WIDTH + _GAP), top + row * (HEIGHT + 52), WIDTH, HEIGHT)
            page.note(box.left, box.top - 22, f"<b>{escape(kind, quote=False)}</b>" if row == 0 else "", size=13)
            across: dict[str, Any] = {"type": "log", "title": {"text": "nodes" if row else ""}, "nticks": 6, "dtick": 1}
            down: dict[str, Any] = {"range": data.spans[measure], "nticks": 7}
            if column == 0:
                down["title"] = {"text": f"{measure}<br><span style='font-size:10px;color:{MUTED}'>{meaning}</span>"}
            where = page.panel(box, across, down)
            line = {"color": MUTED, "width": 1, "dash": "dash"}
            height = 1.0 if measure == "faithfulness" else 0.0
            page.figure.add_shape(
                type="line", xref=f"{where['xaxis']} domain", yref=where["yaxis"], x0=0, x1=1, y0=height, y1=height, line=line, layer="below"
            )
            for one in sorted(data.panels[measure, kind], key=lambda one: one.method != _LAST):
                _draw_line(page, one, colours[one.method], measure, where)
    page.figure.update_layout(hovermode="closest", font={"color": INK})
    return page.figure


def _draw_line(page: Page, one: NodeLine, colour: str, measure: str, where: dict[str, str]) -> None:
    if np.isfinite(one.low).any():
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", **where}
        faint = f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.10)"
        page.figure.add_trace(go.Scatter(x=one.n_nodes, y=one.low, **band))
        page.figure.add_trace(go.Scatter(x=one.n_nodes, y=one.high, fill="tonexty", fillcolor=faint, **band))
    texts = [
        f"<b>{escape(one.method)}</b><br>{n:,} nodes<br>{measure} {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")
        for n, value, low, high in zip(one.n_nodes.tolist(), one.value, one.low, one.high, strict=True)
    ]
    look = {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "marker": {"size": 4, "color": colour}}
    page.figure.add_trace(
        go.Scatter(x=one.n_nodes, y=one.value, **look, text=texts, hovertemplate="%{text}<extra></extra>", name=one.method, **where)
    )
