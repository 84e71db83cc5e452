"""Circuits of edges between nodes of sites: activations upwards as a model computes them, nodes as marks, edges by sign and size."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from patchlab.circuits.sparse import LOGITS, SparseCircuit, point_of
from patchlab.errors import CircuitError
from patchlab.features import Examples
from patchlab.plots._style import GREY, INK, MUTED, PALE, UNSCORED, Box, Page, Signs, lines, shown, signs, words_width

MOST = 150
"""Edges that are drawn of a larger circuit, unless another number is asked for."""
_ROW, _LAYER_GAP, _TOP, _BOTTOM, _LEFT, _WIDTH = 58.0, 14.0, 88.0, 44.0, 128.0, 1160.0
_SLOT = 66.0
_LINES = (0.8, 1.4, 2.2, 3.4, 5.0)
_LISTED = 5


@dataclass(frozen=True)
class Mark:
    """A node: its name, what it is (feature, error, node, logits), its place in pixels, its size (share of the largest), label and hover text."""

    name: str
    kind: str
    x: float
    y: float
    size: float
    score: float
    label: str
    hover: str


@dataclass(frozen=True)
class Line:
    """An edge between two marks (by number), with its score (NaN: none) and its share of the largest."""

    source: int
    target: int
    score: float
    share: float


@dataclass(frozen=True)
class SparseData:
    """Marks and lines in pixels, the names of rows and of columns (by their places), and the words around them."""

    title: str
    subtitle: str
    signs: Signs
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...]
    rows: tuple[tuple[str, float], ...]
    bands: tuple[tuple[float, float], ...]
    columns: tuple[tuple[str, float, float], ...]
    width: float
    height: float


def _prepare_sparse(circuit: SparseCircuit, most: int | None = None, examples: Iterable[Examples] = ()) -> SparseData:
    if most is not None and most < 1:
        raise CircuitError(f"the number of edges to draw is {most}; draw at least 1.")
    if circuit.all_but:
        raise CircuitError(
            "the circuit is all but the edges that it lists, too many to draw; draw its complement (~circuit), which has the listed ones."
        )
    if not circuit.n_edges:
        raise CircuitError("the circuit has no edges, so there is nothing to draw; choose more.")
    table, n = circuit.table_of_nodes, circuit.nodes.n_nodes
    scores = np.full(circuit.n_edges, np.nan) if circuit.scores is None else np.asarray(circuit.scores)
    order = np.argsort(-np.abs(np.nan_to_num(scores)), kind="stable")[: most or MOST]
    source, target, value = circuit.source[order], circuit.target[order], scores[order]
    drawn = np.union1d(np.union1d(source, target), [n])
    stages = {int(stage): i for i, stage in enumerate(np.unique(table.stage[drawn[:-1]]))}
    row_of = {int(node): len(stages) if node == n else stages[int(table.stage[node])] for node in drawn}
    heights, rows, bands = _rows(circuit, drawn[:-1], row_of)
    places, columns, width = _places(circuit, drawn, row_of, source, target)
    known = _node_scores(circuit)
    largest = float(np.nan_to_num(np.abs(known[drawn[:-1]])).max(initial=0.0)) or 1.0
    tokens = {feature.address: feature for one in examples for feature in one}
    words = _Words(circuit, source, target, value, known, tokens)
    marks = tuple(
        Mark(
            words.name(node),
            words.kind(node),
            places[node],
            heights[row_of[node]],
            1.0 if node == n else float(np.nan_to_num(abs(known[node])) / largest),
            np.nan if node == n else float(known[node]),
            words.label(node),
            words.hover(node),
        )
        for node in map(int, drawn)
    )
    number = {int(node): i for i, node in enumerate(drawn)}
    biggest = float(np.nan_to_num(np.abs(value)).max(initial=0.0)) or 1.0
    drawn_lines = tuple(
        Line(number[int(a)], number[int(b)], float(v), float(np.nan_to_num(abs(v)) / biggest)) for a, b, v in zip(source, target, value, strict=True)
    )
    record = circuit.provenance
    who = " × ".join(str(record[key]) for key in ("model", "task") if record.get(key))
    title = "Edges between nodes" + (f" of {who}" if who else "") + (f", {record['method']}" if record.get("method") else "")
    which = f"all {circuit.n_edges:,} edges" if len(order) == circuit.n_edges else f"the largest {len(order):,} of {circuit.n_edges:,} edges"
    about = [f"<b>{which}</b>, {len(drawn) - 1:,} nodes", *(escape(str(record[key]), quote=False) for key in ("how", "direction") if record.get(key))]
    return SparseData(title, " · ".join(about), signs(record), marks, drawn_lines, rows, bands, columns, width, heights[-1])


def _node_scores(circuit: SparseCircuit) -> np.ndarray:
    """The score of each node where it has one; NaN else."""
    nodes = circuit.nodes
    if nodes.scores is None:
        return np.full(nodes.n_nodes, np.nan)
    return np.concatenate([nodes.scores[one.name] for one in nodes.universe])


def _rows(
    circuit: SparseCircuit, drawn: np.ndarray, row_of: Mapping[int, int]
) -> tuple[list[float], tuple[tuple[str, float], ...], tuple[tuple[float, float], ...]]:
    """The height of each row, their names, and the shaded bands of every other layer."""
    table = circuit.table_of_nodes
    of_row: dict[int, tuple[int, str]] = {}
    for node in drawn.tolist():
        of_row[row_of[node]] = (int(table.layer[node]), point_of(circuit.nodes.universe[table.which[node]].site.kind))
    heights: list[float] = []
    names: list[tuple[str, float]] = []
    y = 0.0
    several = len({point for _, point in of_row.values()}) > 1
    extents: dict[int, list[float]] = {}
    for row in range(len(of_row)):
        layer, point = of_row[row]
        if row:
            y += _ROW + (_LAYER_GAP if layer != of_row[row - 1][0] else 0.0)
        heights.append(y)
        names.append((f"layer {layer}" + (f" {point}" if several else ""), y))
        extents.setdefault(layer, []).append(y)
    heights.append(y + _ROW + _LAYER_GAP)
    names.append(("logits", heights[-1]))
    reach = (_ROW + _LAYER_GAP) / 2
    bands = tuple((min(ys) - reach, max(ys) + reach) for i, ys in enumerate(extents.values()) if i % 2 == 0)
    return heights, tuple(names), bands


def _places(
    circuit: SparseCircuit, drawn: np.ndarray, row_of: Mapping[int, int], source: np.ndarray, target: np.ndarray
) -> tuple[dict[int, float], tuple[tuple[str, float, float], ...], float]:
    """Where nodes stand across: in the column of their position, if they have one, near what their edges join."""
    table, n = circuit.table_of_nodes, circuit.nodes.n_nodes
    nodes = [int(node) for node in drawn if node != n]
    positions = sorted({int(table.pos[node]) for node in nodes})
    cells: dict[tuple[int, int], list[int]] = {}
    for node in nodes:
        cells.setdefault((int(table.pos[node]), row_of[node]), []).append(node)
    wide = {pos: max(len(members) for (own, _), members in cells.items() if own == pos) for pos in positions}
    slot = max(_SLOT, _WIDTH / sum(wide.values())) if len(positions) > 1 else _SLOT
    width = max(_WIDTH, slot * sum(wide.values()))
    bounds: dict[int, tuple[float, float]] = {}
    at = 0.0
    for pos in positions:
        bounds[pos] = (at, at + width * wide[pos] / sum(wide.values()))
        at = bounds[pos][1]
    joined: dict[int, list[int]] = {}
    for a, b in zip(source.tolist(), target.tolist(), strict=True):
        joined.setdefault(a, []).append(b)
        joined.setdefault(b, []).append(a)
    places = {n: width / 2}
    for members in cells.values():
        _spread(members, bounds[int(table.pos[members[0]])], places)
    for sweep in range(8):  # towards the middle of what each is joined with, alternately from below and from above
        for key in sorted(cells, key=lambda key: key[1], reverse=sweep % 2 == 1):
            side = key[1]
            middle = {
                node: np.mean([places[other] for other in joined.get(node, []) if (row_of[other] < side) == (sweep % 2 == 0)] or [places[node]])
                for node in cells[key]
            }
            cells[key].sort(key=lambda node: float(middle[node]))
            _spread(cells[key], bounds[key[0]], places)
    names = circuit.positions
    columns = tuple((names[pos] if names else str(pos), *bounds[pos]) for pos in positions if pos >= 0)
    return places, columns, width


def _spread(members: list[int], bounds: tuple[float, float], places: dict[int, float]) -> None:
    left, right = bounds
    step = min((right - left) / len(members), 3 * _SLOT)
    start = (left + right) / 2 - step * (len(members) - 1) / 2
    places.update({node: start + step * i for i, node in enumerate(members)})


@dataclass(frozen=True)
class _Words:
    """What is written at nodes and shown on hover."""

    circuit: SparseCircuit
    source: np.ndarray
    target: np.ndarray
    value: np.ndarray
    known: np.ndarray
    tokens: Mapping[str, Any]

    def name(self, node: int) -> str:
        names = self.circuit.table_of_nodes.names
        return LOGITS if node == len(names) else names[node]

    def kind(self, node: int) -> str:
        if node == self.circuit.nodes.n_nodes:
            return LOGITS
        kind = self.circuit.nodes.universe[self.circuit.table_of_nodes.which[node]].site.kind.partition(".")[0]
        return {"features": "feature", "error": "error"}.get(kind, "node")

    def label(self, node: int) -> str:
        if node == self.circuit.nodes.n_nodes:
            return LOGITS
        table = self.circuit.table_of_nodes
        kind, unit = self.kind(node), int(table.unit[node])
        if kind == "error":
            return "error"
        parts = self.name(node).partition("@")[0].split(".")
        first = parts[1] if unit >= 0 else parts[-1]
        about = self.tokens.get(self.name(node).partition("@")[0])
        return f"{first}<br><i>{shown(about.tokens[0][0], 9)}</i>" if about is not None and about.tokens else first

    def hover(self, node: int) -> str:
        words = [f"<b>{escape(self.name(node), quote=False)}</b>"]
        if node < self.circuit.nodes.n_nodes:
            about = self.tokens.get(self.name(node).partition("@")[0])
            if about is not None and about.tokens:
                words.append("most active at: " + ", ".join(shown(token) for token, _ in about.tokens[:8]))
                words += [f"promotes: {', '.join(shown(token) for token, _ in about.promoted[:6])}"] if about.promoted else []
                words += [escape(str(context), quote=False) for context in about.contexts[:2]]
            unit = str(self.circuit.provenance.get("metric_unit", ""))
            words += [f"effect {self.known[node]:+.3g} {unit}".rstrip()] if np.isfinite(self.known[node]) else []
        return "<br>".join([*words, *self._strongest(node, into=True), *self._strongest(node, into=False)])

    def _strongest(self, node: int, *, into: bool) -> list[str]:
        rows = np.flatnonzero((self.target if into else self.source) == node)
        if not len(rows):
            return []
        others = self.source if into else self.target
        found = [f"{self.value[i]:+.3g} {escape(self.name(int(others[i])), quote=False)}" for i in rows[:_LISTED].tolist()]
        rest = len(rows) - len(found)
        return [f"{'from' if into else 'to'}: " + ", ".join(found) + (f" and {rest} more" if rest else "")]


def sparse(circuit: SparseCircuit, most: int | None = None, examples: Examples | Iterable[Examples] = ()) -> go.Figure:
    """A circuit of edges between nodes: see :func:`patchlab.plots.circuit`."""
    return _draw(_prepare_sparse(circuit, most, (examples,) if isinstance(examples, Examples) else examples))


def _draw(data: SparseData) -> go.Figure:
    tall = data.height + 1.3 * _ROW
    words = f'width: size of the edge · <span style="color:{MUTED}">● feature &nbsp; ◆ error &nbsp; ■ other</span>'
    legend = lines([data.signs.legend, words], _LEFT + data.width)
    top = _TOP + 20 * (len(legend) - 1)
    page = Page(max(_LEFT + data.width + 24, words_width(data.title, data.subtitle)), top + tall + _BOTTOM, data.title, data.subtitle)
    for i, line in enumerate(legend):
        page.note(16, 58 + 20 * i, line)
    hidden = {"showline": False, "ticks": "", "showticklabels": False}
    box = Box(_LEFT, top, data.width, tall)
    where = page.panel(box, {"range": [0, data.width], **hidden}, {"range": [-0.75 * _ROW, data.height + 0.55 * _ROW], **hidden})
    figure = page.figure
    for low, high in data.bands:
        figure.add_shape(type="rect", xref="x domain", yref="y", x0=0, x1=1, y0=low, y1=high, fillcolor=PALE, line_width=0, layer="below")
    for name, left, right in data.columns:
        if left > 0:
            line = {"color": GREY, "width": 1}
            figure.add_shape(type="line", xref="x", yref="y domain", x0=left, x1=left, y0=0, y1=1, line=line, layer="below")
        at = {"xref": "x", "x": (left + right) / 2, "yref": "paper", "y": (_BOTTOM - 8) / page.height, "yanchor": "top"}
        figure.add_annotation(text=shown(name), showarrow=False, font={"size": 12, "color": INK}, **at)
    for name, height in data.rows:
        at = {"xref": "paper", "x": (_LEFT - 8) / page.width, "xanchor": "right", "yref": "y", "y": height, "yanchor": "middle"}
        figure.add_annotation(text=name, showarrow=False, font={"size": 11, "color": MUTED}, **at)
    _draw_lines(figure, data, where)
    _draw_marks(figure, data, where)
    figure.update_layout(hovermode="closest", hoverdistance=14)
    return figure


def _colour(data: SparseData, score: float) -> str:
    return UNSCORED if np.isnan(score) else data.signs.negative if score < 0 else data.signs.positive


def _draw_lines(figure: go.Figure, data: SparseData, where: dict[str, str]) -> None:
    """Edges of one colour and width are one trace, the thin ones first; those that pass rows bow to the side."""
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in data.lines:
        width = _LINES[min(int(line.share * len(_LINES)), len(_LINES) - 1)]
        groups.setdefault((width, _colour(data, line.score)), []).append(line)
    along = np.linspace(0, 1, 21)
    for (width, colour), members in sorted(groups.items()):
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str | None] = []
        for line in members:
            a, b = data.marks[line.source], data.marks[line.target]
            bow = max(0.0, (b.y - a.y) / (_ROW + _LAYER_GAP) - 1.2) * 14.0 * (1 if b.x >= a.x else -1)
            smooth = along**2 * (3 - 2 * along)
            x += [*(a.x + (b.x - a.x) * smooth + bow * np.sin(np.pi * along)).tolist(), None]
            y += [*(a.y + (b.y - a.y) * along).tolist(), None]
            value = "no score" if np.isnan(line.score) else f"{line.score:+.3g}"
            text += [f"{escape(a.name, quote=False)} → {escape(b.name, quote=False)}<br>{value}"] * len(along) + [None]
        look = {"mode": "lines", "line": {"color": colour, "width": width, "simplify": False}, "opacity": 0.55}
        figure.add_trace(go.Scatter(x=x, y=y, text=text, hovertemplate="%{text}<extra></extra>", **look, **where))


def _draw_marks(figure: go.Figure, data: SparseData, where: dict[str, str]) -> None:
    for kind, symbol in (("feature", "circle"), ("error", "diamond"), ("node", "square"), (LOGITS, "square")):
        marks = [mark for mark in data.marks if mark.kind == kind]
        if not marks:
            continue
        edge = [INK if kind == LOGITS else _colour(data, mark.score) for mark in marks]
        sizes = [10.0 if kind == LOGITS else 7 + 9 * float(np.sqrt(mark.size)) for mark in marks]
        marker = {"symbol": symbol, "size": sizes, "color": GREY if kind in ("error", LOGITS) else "white", "line": {"color": edge, "width": 1.6}}
        hover = {"hovertext": [mark.hover for mark in marks], "hovertemplate": "%{hovertext}<extra></extra>"}
        figure.add_trace(go.Scatter(x=[m.x for m in marks], y=[m.y for m in marks], mode="markers", marker=marker, **hover, **where))
        for mark, size in zip(marks, sizes, strict=True):
            at = {"xref": "x", "yref": "y", "x": mark.x, "y": mark.y, "yshift": -size / 2 - 1, "yanchor": "top", "showarrow": False}
            halo = {"bgcolor": "rgba(255,255,255,0.72)", "borderpad": 0}
            figure.add_annotation(text=mark.label if kind != LOGITS else "", font={"size": 9.5, "color": INK}, **at, **halo)
