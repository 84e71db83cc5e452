"""The graph of a circuit in layers: input at the bottom, logits on top, edges by sign and size."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from patchlab.circuits import Circuit, NodeCircuit, SparseCircuit
from patchlab.errors import CircuitError
from patchlab.features import Examples
from patchlab.plots._circuit_layout import HALF_HEIGHT, HALF_WIDTH, PORTS, Layout, place, routes
from patchlab.plots._nodes import nodes
from patchlab.plots._sparse import sparse
from patchlab.plots._style import INK, MUTED, PALE, UNSCORED, Box, Page, Signs, signs

SIZES = (5, 10, 20, 50, 100, 200, 500, 1000)
"""Sizes that the slider offers, beside the one asked for and the whole circuit."""
ALL, FEWER = 150, 60
"""A circuit of at most so many edges is shown whole; of a larger one so many at first."""
DASHES = {"q": "dash", "k": "dot"}
_WIDTHS = (1.0, 1.6, 2.4, 3.4, 4.6, 6.0, 7.6, 9.4)
_TOP, _BOTTOM, _SLIDER = 104, 12, 60
WIDTH = 1240
"""Pixels of an image of a circuit; in a page the figure takes the room there is."""


@dataclass(frozen=True)
class EdgeMark:
    """An edge: its ends, what it feeds (``q``, ``k``, ``v``, ``mlp``, ``logits``), its score (NaN: none), and its hover text."""

    name: str
    writer: str
    reader: str
    kind: str
    score: float
    hover: str

    @property
    def ends(self) -> tuple[str, str, str]:
        """Writer, reader and kind."""
        return self.writer, self.reader, self.kind


@dataclass(frozen=True)
class View:
    """The edges of largest |score| and the nodes they join, with the inputs of a head that are used, in places."""

    edges: tuple[EdgeMark, ...]
    nodes: dict[str, tuple[str, ...]]
    layout: Layout


@dataclass(frozen=True)
class CircuitData:
    """Views of several sizes, which of them is shown first, the largest |score|, and the words around them."""

    title: str
    about: str
    legend: tuple[str, ...]
    n_edges: int
    largest: float
    signs: Signs
    views: tuple[View, ...]
    shown: int

    def subtitle(self, view: View) -> str:
        """What a view shows: ``the strongest 60 of 756 edges``."""
        which = f"all {self.n_edges:,} edges" if len(view.edges) == self.n_edges else f"the strongest {len(view.edges):,} of {self.n_edges:,} edges"
        return f"<b>{which}</b>{self.about}"


def _prepare_circuit(circuit: Circuit, max_edges: int | None = None) -> CircuitData:
    if max_edges is not None and max_edges < 1:
        raise CircuitError(f"max_edges is {max_edges}; draw at least 1 edge.")
    if not circuit.n_edges:
        raise CircuitError(
            "the circuit has no edges, so there is nothing to draw; choose more (pruning leaves none where input and logits are not joined)."
        )
    flat = circuit.collapsed()
    marks = _marks(circuit, flat)
    first = min(max_edges or (len(marks) if len(marks) <= ALL else FEWER), len(marks))
    most = max(first, SIZES[-1])
    offered = {size for size in SIZES if size <= 0.75 * len(marks)}
    sizes = sorted({size for size in (*offered, first, len(marks)) if size <= most})
    views = []
    for size in sizes:
        edges = tuple(marks[:size])
        joined = {mark.writer for mark in edges} | {mark.reader for mark in edges}
        used = {(mark.reader, mark.kind) for mark in edges}
        nodes = {node: tuple(letter for letter in PORTS if (node, letter) in used) for node in circuit.graph.nodes if node in joined}
        views.append(View(edges, nodes, place(circuit.graph, nodes, [mark.ends for mark in edges])))
    scores = np.abs([mark.score for mark in marks])
    record = circuit.provenance
    who = " × ".join(str(record[key]) for key in ("model", "task") if record.get(key)) or str(circuit.graph)
    method = record.get("method") or record.get("file")
    title = f"Circuit of {who}" + (f", {method}" if method else "")
    words = [*([f"largest by |{_what(record)}|"] if len(sizes) > 1 else []), *(str(record[key]) for key in ("how", "direction") if record.get(key))]
    words += ["pruned"] * bool(record.get("pruned"))
    words += [f"{circuit.n_positions} positions collapsed"] * (circuit.n_positions is not None)
    about = "".join(f" · {escape(word, quote=False)}" for word in words)
    known = scores[np.isfinite(scores)]
    largest = float(known.max(initial=0.0))
    return CircuitData(title, about, _legend(record, marks, largest), len(marks), largest, signs(record), tuple(views), sizes.index(first))


def _what(record: dict[str, Any]) -> str:
    return "effect" if record.get("direction") else "score"


def _marks(circuit: Circuit, flat: Circuit) -> list[EdgeMark]:
    """The edges, largest |score| first; those without a score last, in the order of the graph."""
    graph, unit = circuit.graph, str(circuit.provenance.get("metric_unit", ""))
    pairs = np.argwhere(flat.edges)
    scores = np.full(len(pairs), np.nan) if flat.scores is None else flat.scores[tuple(pairs.T)]
    order = np.argsort(-np.nan_to_num(np.abs(scores), nan=-1.0), kind="stable")
    marks = []
    for i in order:
        writer, reader = pairs[i].tolist()
        name, score = graph.name(writer, reader), float(scores[i])
        value = "no score" if np.isnan(score) else f"{_what(circuit.provenance)} {score:+.3g} {unit}"
        hover = f"<b>{escape(name)}</b><br>{escape(value)}{_at(circuit, writer, reader)}"
        marks.append(EdgeMark(name, graph.writers[writer], graph.nodes[graph.reader_node[reader]], graph.reader_kind[reader], score, hover))
    return marks


def _at(circuit: Circuit, writer: int, reader: int) -> str:
    """At which positions an edge of a position-resolved circuit is kept, the largest first."""
    if circuit.n_positions is None:
        return ""
    kept = np.flatnonzero(circuit.edges[writer, reader])
    names = circuit.positions or [str(i) for i in range(circuit.n_positions)]
    if circuit.scores is None:
        return f"<br>at {escape(', '.join(names[i] for i in kept[:6]))}"
    values = circuit.scores[writer, reader]
    order = kept[np.argsort(-np.abs(values[kept]), kind="stable")][:6]
    return f"<br>at {escape(', '.join(f'{names[i]} {values[i]:+.2g}' for i in order))}"


def _legend(record: dict[str, Any], marks: list[EdgeMark], largest: float) -> tuple[str, ...]:
    """Two lines: what the colours mean, and the strokes and widths."""

    def line(colour: str, words: str, stroke: str = "━━") -> str:
        return f'<span style="color:{colour}">{stroke}</span> {escape(words, quote=False)}'

    metric, means = record.get("metric", "the metric"), signs(record)
    told = {means.negative: means.below, means.positive: means.above}
    if record.get("direction") in ("noising", "denoising") and not record.get("unsigned"):
        told = {means.negative: f"patching it lowers {metric}: it {means.below}", means.positive: f"patching it raises {metric}: it {means.above}"}
    has = {means.negative: any(mark.score < 0 for mark in marks), means.positive: any(mark.score > 0 for mark in marks)}
    words = [line(colour, told[colour]) for colour, some in has.items() if some]
    if any(np.isnan(mark.score) for mark in marks):
        words.append(line(UNSCORED, "no score"))
    kinds = {mark.kind for mark in marks}
    strokes = {letter: line(MUTED, f"into {letter}", stroke) for letter, stroke in {"q": "╍╍", "k": "┅┅"}.items() if letter in kinds}
    looks = [*strokes.values(), line(MUTED, "into v, an MLP or the logits")] if strokes else []
    if largest:
        unit = f" {record['metric_unit']}" if record.get("metric_unit") else ""
        looks.append(f"width: |{_what(record)}|, thickest {largest:.3g}{escape(unit, quote=False)}")
    return tuple(" &nbsp;·&nbsp; ".join(some) for some in (words, looks) if some)


def circuit(
    circuit: Circuit | NodeCircuit | SparseCircuit, max_edges: int | None = None, *, examples: Examples | Iterable[Examples] = ()
) -> go.Figure:
    """A circuit as a graph in layers: the input at the bottom, the logits on top, information flows upwards.

    The slider changes how many edges are shown (5, 10, 20, 50, ..., at most 1,000 or ``max_edges``), those of largest |score|. Heads stand in a
    column per head index, their inputs q, k, v are places in the lower side of the box. Blue edges support the behaviour, red ones work against
    it (as in the heatmaps), the width is |effect|. Of a position-resolved circuit the positions are summed; the hover text has them.

    In a page that :func:`patchlab.plots.save` wrote, a click on a node leaves only its edges, and a click on a layer's name draws its heads as one.

    Edges between features, errors, neurons or heads: their activations upwards, with a column per position where nodes have positions. A
    feature's label has the token at which it is most active, if ``examples`` are given, and its hover text contexts.

    A circuit of nodes has no edges: layers go from left to right, sites are lanes, and in each layer the largest node is on top.

    Args:
        circuit: what to draw.
        max_edges: how many edges are shown first, and in images; None shows all of a circuit of at most 150 edges, and of larger ones 60. Of
            nodes how many are drawn; None for at most 200, of edges between them at most 150. The figure says which of how many it shows.
        examples: what features stand for, of :func:`patchlab.features.examples`; of edges between nodes.

    Raises:
        CircuitError: a circuit without edges or nodes, ``max_edges`` below 1, or examples for another kind of circuit.

    Example:
        >>> relp = pl.RelevancePatching().run(model, task, "edges", direction="noising")  # doctest: +SKIP
        >>> pl.plots.circuit(pl.circuits.top_n(relp, 200)).show()  # doctest: +SKIP
    """
    if isinstance(circuit, SparseCircuit):
        return sparse(circuit, max_edges, examples)
    if examples != ():
        raise CircuitError("examples= are shown of edges between nodes (a SparseCircuit); leave them out.")
    return nodes(circuit, max_edges) if isinstance(circuit, NodeCircuit) else _draw(_prepare_circuit(circuit, max_edges))


def _draw(data: CircuitData) -> go.Figure:
    pages = [_draw_view(data, i) for i in range(len(data.views))]
    figure = pages[data.shown]
    if len(pages) == 1:
        return figure
    traces: list[tuple[Any, int]] = [(trace, i) for i, page in enumerate(pages) for trace in page.data]
    steps = []
    for i, (page, view) in enumerate(zip(pages, data.views, strict=True)):
        layout = page.layout
        changes = {name: layout[name] for name in ("height", "annotations", "shapes")}
        changes |= {f"{axis}.{name}": layout[axis][name] for axis in ("xaxis", "yaxis") for name in ("range", "domain")}
        steps.append({"label": f"{len(view.edges):,}", "method": "update", "args": [{"visible": [own == i for _, own in traces]}, changes]})
    whole = go.Figure(layout=figure.layout)
    for trace, own in traces:
        trace.visible = own == data.shown
        whole.add_trace(trace)
    whole.update_layout(sliders=[{
        "active": data.shown,
        "steps": steps,
        "currentvalue": {"prefix": "edges: ", "font": {"size": 12, "color": INK}},
        "x": 0, "y": 1, "xanchor": "left", "yanchor": "top", "lenmode": "fraction", "len": min(0.9, 0.06 + 0.06 * len(steps)),
        "pad": {"l": 16, "t": _TOP - 6, "b": 0},
        "font": {"size": 11, "color": MUTED},
        "minorticklen": 0,
        "ticklen": 4,
        "bordercolor": MUTED,
    }])  # fmt: skip
    return whole


def _draw_view(data: CircuitData, number: int) -> go.Figure:
    view = data.views[number]
    layout, top = view.layout, _TOP + (_SLIDER if len(data.views) > 1 else 0)
    margin, left = 42, 92
    height = layout.height + 2 * margin
    page = Page(WIDTH, top + height + _BOTTOM, data.title, data.subtitle(view))
    for i, words in enumerate(data.legend):
        page.note(16, 60 + 20 * i, words)
    hidden = {"showline": False, "ticks": "", "showticklabels": False}
    box = Box(left, top, WIDTH - left - 16, height)
    across = {"range": [layout.left, layout.right], **hidden}
    where = page.panel(box, across, {"range": [-margin, layout.height + margin], **hidden})
    for i, band in enumerate(layout.bands):
        shade = PALE if i % 2 == 0 else "white"
        size = {"x0": 0, "x1": 1, "y0": band.low, "y1": band.high}
        page.figure.add_shape(type="rect", xref="x domain", yref="y", **size, fillcolor=shade, line_width=0, layer="below")
        middle = {"xref": "paper", "x": (left - 6) / WIDTH, "xanchor": "right", "yref": "y", "y": (band.low + band.high) / 2, "yanchor": "middle"}
        look = {"showarrow": False, "font": {"size": 11, "color": MUTED}, "captureevents": True}
        page.figure.add_annotation(text=f"layer {band.layer}", name=f"layer {band.layer}", **middle, **look)
    _draw_edges(page, data, number, where)
    _draw_nodes(page, view, number, where)
    page.figure.update_layout(hovermode="closest", hoverdistance=12, width=None, autosize=True, meta={"figure": "circuit", "width": WIDTH})
    return page.figure


def _draw_edges(page: Page, data: CircuitData, number: int, where: dict[str, str]) -> None:
    """Edges of one colour, width and stroke are one trace, so that hundreds of edges are tens of traces; the thin ones are drawn first."""
    view = data.views[number]
    points = 24 if len(view.edges) <= 500 else 12
    lines = routes(view.layout, [mark.ends for mark in view.edges], points)
    groups: dict[tuple[float, str, str], list[tuple[EdgeMark, np.ndarray]]] = {}
    for mark, line in zip(view.edges, lines, strict=True):
        colour = UNSCORED if np.isnan(mark.score) else data.signs.negative if mark.score < 0 else data.signs.positive
        share = abs(mark.score) / data.largest if data.largest and not np.isnan(mark.score) else 0.0
        width = min(_WIDTHS, key=lambda w: abs(w - (_WIDTHS[0] + share * (_WIDTHS[-1] - _WIDTHS[0]))))
        groups.setdefault((width, colour, DASHES.get(mark.kind, "solid")), []).append((mark, line.round(1)))
    for (width, colour, dash), members in sorted(groups.items()):
        x, y, text = [], [], []
        for mark, line in members:
            x += [*line[:, 0].tolist(), None]
            y += [*line[:, 1].tolist(), None]
            text += [mark.hover] * len(line) + [None]
        look = {"mode": "lines", "line": {"color": colour, "width": width, "dash": dash, "simplify": False}, "opacity": 0.7}
        own = {"circuit": "edges", "view": number, "points": points, "edges": [[mark.writer, mark.reader] for mark, _ in members]}
        page.figure.add_trace(go.Scatter(x=x, y=y, text=text, hovertemplate="%{text}<extra></extra>", meta=own, **look, **where))


def _draw_nodes(page: Page, view: View, number: int, where: dict[str, str]) -> None:
    own = {"view": number, "nodes": list(view.nodes)}
    x, y = [], []
    for a, b in view.layout.places.values():
        x += [a - HALF_WIDTH, a + HALF_WIDTH, a + HALF_WIDTH, a - HALF_WIDTH, a - HALF_WIDTH, None]
        y += [b - HALF_HEIGHT, b - HALF_HEIGHT, b + HALF_HEIGHT, b + HALF_HEIGHT, b - HALF_HEIGHT, None]
    fill = {"fill": "toself", "fillcolor": "white", "line": {"color": INK, "width": 1}}
    page.figure.add_trace(go.Scatter(x=x, y=y, mode="lines", hoverinfo="skip", meta={**own, "circuit": "boxes"}, **fill, **where))
    names = [f"<b>{node}</b>" for node in view.nodes]
    places = [view.layout.places[node] for node in view.nodes]
    raised = [b + 5 if letters else b for (_, b), letters in zip(places, view.nodes.values(), strict=True)]
    hover = [_node_text(node, view.edges) for node in view.nodes]
    named = {**own, "circuit": "names", "places": [list(view.layout.places[node]) for node in view.nodes]}
    text = {"meta": named, "mode": "text", "text": names, "textfont": {"size": 11, "color": INK}, "hovertext": hover}
    page.figure.add_trace(go.Scatter(x=[a for a, _ in places], y=raised, hovertemplate="%{hovertext}<extra></extra>", **text, **where))
    ports = [(*view.layout.places[node], letter) for node, letters in view.nodes.items() for letter in letters]
    port_of = {**own, "circuit": "ports", "nodes": [node for node, letters in view.nodes.items() for _ in letters]}
    small = {"meta": port_of, "mode": "text", "textfont": {"size": 9, "color": MUTED}, "hoverinfo": "skip", "text": [letter for *_, letter in ports]}
    page.figure.add_trace(go.Scatter(x=[a + PORTS[letter] for a, _, letter in ports], y=[b - 8 for _, b, _ in ports], **small, **where))


def _node_text(node: str, edges: tuple[EdgeMark, ...]) -> str:
    into, out = ([mark for mark in edges if end(mark) == node] for end in (lambda mark: mark.reader, lambda mark: mark.writer))
    counts = [f"{len(some)} {words}" for some, words in ((into, "in"), (out, "out")) if some]
    return f"<b>{node}</b><br>edges shown: {', '.join(counts)}"
