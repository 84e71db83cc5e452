"""Attribution graphs: layers upwards, the prompt's tokens from left to right, edges by sign and weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from patchlab.errors import CircuitError
from patchlab.features.attribution import AttributionGraph
from patchlab.plots._style import GREY, INK, MUTED, PALE, Box, Page, shown, signs

FEWER = 300
"""Edges that are drawn of a larger graph, unless another number is asked for."""
_STEP, _COLUMN, _ROW, _LEFT, _TOP, _BOTTOM = 15.0, 46.0, 46.0, 86.0, 84.0, 46.0
_WIDTHS = (0.7, 1.2, 2.0, 3.2, 4.8)
_LISTED = 5


@dataclass(frozen=True)
class Mark:
    """A node: its kind, its place in pixels, how large it is (share of the most influential feature) and its hover text."""

    name: str
    kind: str
    x: float
    y: float
    size: float
    text: str
    hover: str


@dataclass(frozen=True)
class Line:
    """An edge between two marks (by number) with its weight, and its share of what enters the target (sizes, not signs)."""

    source: int
    target: int
    weight: float
    share: float


@dataclass(frozen=True)
class AttributionData:
    """Marks and lines in pixels, the bands of layers (name, height) and of positions (token, left, right), and the words around them."""

    title: str
    subtitle: str
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...]
    layers: tuple[tuple[str, float], ...]
    columns: tuple[tuple[str, float, float], ...]
    width: float
    height: float


def _prepare_attribution(
    graph: AttributionGraph,
    labels: Mapping[tuple[int, int], str] | None = None,
    top_tokens: Mapping[tuple[int, int], Sequence[str]] | None = None,
    max_edges: int | None = None,
) -> AttributionData:
    if max_edges is not None and max_edges < 1:
        raise CircuitError(f"max_edges is {max_edges}; draw at least 1 edge.")
    if not graph.n_edges:
        raise CircuitError("the graph has no edges, so there is nothing to draw; prune less.")
    edges, nodes = graph.adjacency.tocoo(), graph.nodes
    sums = abs(graph.adjacency).sum(1)
    influence = graph.influence()
    shares = np.abs(edges.data) / sums[edges.row]
    order = np.argsort(-shares * (influence + nodes.probability)[edges.row], kind="stable")[: max_edges or FEWER]
    lines = tuple(Line(int(edges.col[i]), int(edges.row[i]), float(edges.data[i]), float(shares[i])) for i in order.tolist())
    joined = {line.source for line in lines} | {line.target for line in lines}
    ends = set(np.flatnonzero(nodes.of("embedding") | nodes.of("logit")).tolist())
    drawn = sorted(joined | ends)
    largest = float(influence[nodes.of("feature")].max(initial=0.0)) or 1.0
    cells: dict[tuple[int, int], list[int]] = {}
    for node in drawn:
        cells.setdefault((int(nodes.pos[node]), int(nodes.layer[node])), []).append(node)
    for members in cells.values():
        members.sort(key=lambda node: (-nodes.probability[node], int(nodes.kind[node]), -influence[node]))
    used = sorted({pos for pos, _ in cells})
    columns: list[tuple[str, float, float]] = []
    at = 0.0
    for pos in used:
        most = max(len(members) * (3.4 if layer == graph.n_layers else 1) for (own, layer), members in cells.items() if own == pos)
        columns.append((shown(graph.strings[pos], 10), at, at := at + max(_COLUMN, _STEP * (most + 1))))
    places: dict[int, tuple[float, float]] = {}
    for (pos, layer), members in cells.items():
        _, left, right = columns[used.index(pos)]
        step = _STEP * (3.4 if layer == graph.n_layers else 1)
        start = (left + right) / 2 - step * (len(members) - 1) / 2
        places |= {node: (start + step * i, (layer + 1) * _ROW) for i, node in enumerate(members)}
    number = {node: i for i, node in enumerate(drawn)}
    marks = tuple(_mark(graph, node, places[node], float(influence[node]), largest, labels or {}, top_tokens or {}) for node in drawn)
    lines = tuple(Line(number[line.source], number[line.target], line.weight, line.share) for line in lines)
    which = f"all {graph.n_edges:,} edges" if len(lines) == graph.n_edges else f"the most influential {len(lines):,} of {graph.n_edges:,} edges"
    counts = f"{int(nodes.of('feature').sum()):,} features, {int(nodes.of('error').sum()):,} errors"
    pruning = graph.provenance.get("pruning")
    pruned = f" · pruned to {pruning['nodes']:.0%} of the nodes' and {pruning['edges']:.0%} of the edges' influence" if pruning else ""
    prompt = str(graph.provenance.get("prompt", ""))
    title = f"Attribution graph of {graph.provenance.get('model', 'a model')}: {prompt if len(prompt) <= 80 else '…' + prompt[-79:]}"
    layers = (("tokens", 0.0), *((f"layer {i}", (i + 1.0) * _ROW) for i in range(graph.n_layers)), ("logits", (graph.n_layers + 1.0) * _ROW))
    height = (graph.n_layers + 1) * _ROW
    return AttributionData(title, f"<b>{which}</b> · {counts}{pruned}", marks, lines, layers, tuple(columns), at, height)


def _mark(
    graph: AttributionGraph,
    node: int,
    place: tuple[float, float],
    influence: float,
    largest: float,
    labels: Mapping[tuple[int, int], str],
    top_tokens: Mapping[tuple[int, int], Sequence[str]],
) -> Mark:
    nodes, kind = graph.nodes, graph.nodes.kind[node]
    of = int(nodes.layer[node]), int(nodes.unit[node])
    words = [f"<b>{escape(graph.name(node), quote=False)}</b>"]
    text, name = "", ("feature", "error", "embedding", "logit")[kind]
    if kind == 3:
        text = f"{shown(graph.token_of(node), 8)}<br>{nodes.probability[node]:.0%}"
        words.append(f"probability {nodes.probability[node]:.3g}")
    elif kind == 2:
        text = shown(graph.token_of(node), 10)
    else:
        words.append(f"at {escape(repr(graph.strings[int(nodes.pos[node])]), quote=False)}")
    if kind == 0:
        words += [escape(labels[of], quote=False)] if of in labels else []
        if of in top_tokens:
            words.append("top tokens: " + ", ".join(escape(repr(token), quote=False) for token in top_tokens[of][:8]))
        words.append(f"activation {nodes.activation[node]:.3g}")
    if kind != 3:
        words.append(f"influence {influence:.3g}")
    words += _strongest(graph, node, into=True) + _strongest(graph, node, into=False)
    return Mark(graph.name(node), name, *place, min(1.0, influence / largest) if kind == 0 else 0.0, text, "<br>".join(words))


def _strongest(graph: AttributionGraph, node: int, *, into: bool) -> list[str]:
    """The largest edges into or out of a node, in words."""
    part = (graph.adjacency[[node]] if into else graph.adjacency[:, [node]]).tocoo()
    others = part.col if into else part.row
    order = np.argsort(-np.abs(part.data), kind="stable")[:_LISTED].tolist()
    if not order:
        return []
    found = [f"{part.data[i]:+.3g} {escape(graph.name(int(others[i])), quote=False)}" for i in order]
    rest = len(part.data) - len(found)
    return [f"{'from' if into else 'to'}: " + ", ".join(found) + (f" and {rest} more" if rest else "")]


def attribution_graph(
    graph: AttributionGraph,
    *,
    labels: Mapping[tuple[int, int], str] | None = None,
    top_tokens: Mapping[tuple[int, int], Sequence[str]] | None = None,
    max_edges: int | None = None,
) -> go.Figure:
    """An attribution graph: tokens at the bottom, logits on top, a column per position; what a node gives raises or lowers its target.

    Circles are features (the larger, the more influence), diamonds errors. Hover shows a node's activation, influence and strongest edges.

    Args:
        graph: usually pruned.
        labels: what features are about, by layer and number.
        top_tokens: tokens that activate features most, by layer and number; shown on hover.
        max_edges: how many edges are drawn, the most influential first; None draws 300. The figure says which of how many it shows.

    Raises:
        CircuitError: a graph without edges, or ``max_edges`` below 1.

    Example:
        >>> pl.plots.attribution_graph(graph.prune()).show()  # doctest: +SKIP
    """
    return _draw(_prepare_attribution(graph, labels, top_tokens, max_edges))


def _draw(data: AttributionData) -> go.Figure:
    raises, lowers = signs({}).positive, signs({}).negative
    width = max(data.width, 620)
    page = Page(_LEFT + width + 24, _TOP + data.height + 1.4 * _ROW + _BOTTOM, data.title, data.subtitle)
    legend = [f'<span style="color:{raises}">━━</span> raises its target', f'<span style="color:{lowers}">━━</span> lowers it']
    words = "width: share of what enters the target &nbsp;·&nbsp; ● feature &nbsp; ◆ error"
    page.note(16, 58, " &nbsp; ".join(legend) + f' <span style="color:{MUTED}">&nbsp;·&nbsp; {words}</span>')
    hidden = {"showline": False, "ticks": "", "showticklabels": False}
    box = Box(_LEFT, _TOP, width, data.height + 1.4 * _ROW)
    x = {"range": [0, width], **hidden}
    where = page.panel(box, x, {"range": [-0.5 * _ROW, data.height + 0.9 * _ROW], **hidden})
    figure = page.figure
    for i, (token, left, right) in enumerate(data.columns):
        if i % 2 == 0:
            figure.add_shape(type="rect", xref="x", yref="y domain", x0=left, x1=right, y0=0, y1=1, fillcolor=PALE, line_width=0, layer="below")
        at = {"xref": "x", "x": (left + right) / 2, "yref": "paper", "y": (_BOTTOM - 6) / page.height, "yanchor": "top"}
        figure.add_annotation(text=token, showarrow=False, font={"size": 11, "color": INK}, **at)
    for name, height in data.layers:
        at = {"xref": "paper", "x": (_LEFT - 8) / page.width, "xanchor": "right", "yref": "y", "y": height, "yanchor": "middle"}
        figure.add_annotation(text=name, showarrow=False, font={"size": 11, "color": MUTED}, **at)
    _draw_lines(figure, data, raises, lowers, where)
    _draw_marks(figure, data, where)
    figure.update_layout(hovermode="closest", hoverdistance=14)
    return figure


def _draw_lines(figure: go.Figure, data: AttributionData, raises: str, lowers: str, where: dict[str, str]) -> None:
    """Edges of one colour and width are one trace, the thin ones first."""
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in data.lines:
        width = _WIDTHS[min(int(line.share * 2 * len(_WIDTHS)), len(_WIDTHS) - 1)]
        groups.setdefault((width, raises if line.weight > 0 else lowers), []).append(line)
    for (width, colour), members in sorted(groups.items()):
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str | None] = []
        for line in members:
            a, b = data.marks[line.source], data.marks[line.target]
            along = np.linspace(0, 1, 9)
            x += [*(a.x + (b.x - a.x) * along).tolist(), None]
            y += [*(a.y + (b.y - a.y) * along).tolist(), None]
            words = f"{escape(a.name, quote=False)} → {escape(b.name, quote=False)}<br>{line.weight:+.3g}, {line.share:.0%} of what enters"
            text += [words] * 9 + [None]
        look = {"mode": "lines", "line": {"color": colour, "width": width, "simplify": False}, "opacity": 0.45}
        figure.add_trace(go.Scatter(x=x, y=y, text=text, hovertemplate="%{text}<extra></extra>", **look, **where))


def _draw_marks(figure: go.Figure, data: AttributionData, where: dict[str, str]) -> None:
    looks = {"feature": ("circle", INK), "error": ("diamond", MUTED), "embedding": ("square", MUTED), "logit": ("square", INK)}
    for kind, (symbol, colour) in looks.items():
        marks = [mark for mark in data.marks if mark.kind == kind]
        if not marks:
            continue
        sizes = [6 + 8 * mark.size if kind == "feature" else 6 for mark in marks]
        marker = {"symbol": symbol, "size": sizes, "color": "white" if kind == "feature" else GREY, "line": {"color": colour, "width": 1.2}}
        hover = {"hovertext": [mark.hover for mark in marks], "hovertemplate": "%{hovertext}<extra></extra>"}
        place = {"x": [mark.x for mark in marks], "y": [mark.y for mark in marks]}
        mode = "markers+text" if kind == "logit" else "markers"
        text = (
            {"text": [mark.text for mark in marks], "textposition": "top center", "textfont": {"size": 10, "color": INK}} if kind == "logit" else {}
        )
        figure.add_trace(go.Scatter(mode=mode, marker=marker, **place, **hover, **text, **where))
