"""Conservation: the stream's and the biases' shares of the metric by layer, stacked, one panel per rule set."""

from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.lenses import Conservation
from patchlab.plots._style import INK, MUTED, Box, Page, flow, lines, sparse_ticks

_WIDTH, _HEIGHT, _LEFT, _GAP, _TOP, _WIDEST = 320, 240, 64, 34, 100, 1320
STREAM, BIASES = "#0072b2", "#e69f00"


@dataclass(frozen=True)
class ConservationPanel:
    """Shares of the metric under one rule set, by layer, with the interval of the stream's."""

    rules: str
    layers: tuple[int, ...]
    stream: Float[np.ndarray, " layer"]
    low: Float[np.ndarray, " layer"]
    high: Float[np.ndarray, " layer"]
    biases: Float[np.ndarray, " layer"]


@dataclass(frozen=True)
class ConservationData:
    """Panels in the order of the rule sets, and the range that all share."""

    title: str
    subtitle: tuple[str, ...]
    panels: tuple[ConservationPanel, ...]
    span: tuple[float, float]


def _prepare_conservation(conservation: Conservation) -> ConservationData:
    table = conservation.table()
    panels = []
    for rules in dict.fromkeys(table["rules"]):
        part = table[table["rules"] == rules]
        columns = [part[name].to_numpy() for name in ("stream", "low", "high", "biases")]
        panels.append(ConservationPanel(str(rules), tuple(int(layer) for layer in part["layer"]), *columns))
    tops = [np.maximum(panel.high, np.maximum(panel.stream, 0) + np.maximum(panel.biases, 0)).max() for panel in panels]
    bottoms = [np.minimum(panel.low, np.minimum(panel.stream, 0) + np.minimum(panel.biases, 0)).min() for panel in panels]
    top, bottom = max(1.0, *tops), min(0.0, *bottoms)
    room = 0.06 * (top - bottom)
    words = (
        escape(conservation.subject, quote=False),
        f'<span style="color:{STREAM}">■</span> Σ relevance of the stream before a layer (whiskers: 95 % CI)',
        f'<span style="color:{BIASES}">■</span> biases from there on',
        "▬ their sum",
        "dotted: the metric",
    )
    return ConservationData(f"Conservation of {conservation.metric[0]}", words, tuple(panels), (bottom - room, top + room))


def conservation(conservation: Conservation) -> go.Figure:
    """How much of the metric the relevance of each layer adds up to, with the biases' share stacked on it: one panel per rule set.

    The last layer on the horizontal axis is the state before the final norm. Where both add up to 1, nothing appears or disappears.

    Example:
        >>> pl.plots.conservation(pl.lenses.conservation(model, task)).show()  # doctest: +SKIP
    """
    return _draw(_prepare_conservation(conservation))


def _draw(data: ConservationData) -> go.Figure:
    rows = flow([_WIDTH + _LEFT + _GAP] * len(data.panels), _WIDEST)
    columns = max(len(row) for row in rows)
    width = max(columns * (_LEFT + _WIDTH + _GAP) + 16, 520)
    subtitle = lines(data.subtitle, width)
    top = _TOP + 18 * (len(subtitle) - 1)
    height = _HEIGHT + 74
    page = Page(width, top + len(rows) * height, data.title, "<br>".join(subtitle))
    for r, row in enumerate(rows):
        for c, i in enumerate(row):
            panel = data.panels[i]
            box = Box(_LEFT + c * (_LEFT + _WIDTH + _GAP), top + r * height, _WIDTH, _HEIGHT)
            page.note(box.left, box.top - 24, f"<b>{escape(panel.rules, quote=False)}</b>", size=13)
            ticks = [panel.layers[k] for k in sparse_ticks(len(panel.layers), 14)]
            xaxis = {"title": {"text": "before layer"}, "tickmode": "array", "tickvals": ticks, "range": [-0.7, panel.layers[-1] + 0.7]}
            yaxis = {"range": list(data.span), "zeroline": True, "zerolinecolor": MUTED, "zerolinewidth": 1}
            where = page.panel(box, xaxis, {**yaxis, "title": {"text": "share of the metric"}} if c == 0 else yaxis)
            _bars(page, panel, where)
    page.figure.update_layout(barmode="relative", bargap=0.25)
    return page.figure


def _bars(page: Page, panel: ConservationPanel, where: dict[str, str]) -> None:
    layers, total = list(panel.layers), panel.stream + panel.biases
    texts = [
        f"<b>{escape(panel.rules, quote=False)}, before layer {layer}</b><br>stream {stream:.3f} [{low:.3f}, {high:.3f}]<br>"
        f"biases {bias:.3f}<br>sum {stream + bias:.3f}"
        for layer, stream, low, high, bias in zip(layers, panel.stream, panel.low, panel.high, panel.biases, strict=True)
    ]
    hover = {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}
    error = {
        "type": "data",
        "symmetric": False,
        "array": panel.high - panel.stream,
        "arrayminus": panel.stream - panel.low,
        "thickness": 1,
        "width": 2,
        "color": INK,
    }
    # bars of one panel are stacked on each other, not on those of other panels
    group = {"offsetgroup": panel.rules, "alignmentgroup": panel.rules}
    page.figure.add_trace(go.Bar(x=layers, y=panel.stream, marker={"color": STREAM}, error_y=error, **hover, **group, **where))
    page.figure.add_trace(go.Bar(x=layers, y=panel.biases, marker={"color": BIASES}, **hover, **group, **where))
    marks = {"symbol": "line-ew", "size": 12, "line": {"width": 2.5, "color": INK}}
    page.figure.add_trace(go.Scatter(x=layers, y=total, mode="markers", marker=marks, **hover, **where))
    ends = {"x": [-0.7, layers[-1] + 0.7], "y": [1, 1], "mode": "lines", "line": {"color": INK, "width": 1, "dash": "dot"}, "hoverinfo": "skip"}
    page.figure.add_trace(go.Scatter(**ends, **where))
