"""Edges as a matrix: writers down, readers across, and the queries, keys and values apart."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Shaped

from patchlab.circuits import Circuit
from patchlab.circuits.select import mean_effects
from patchlab.errors import CircuitError
from patchlab.graph import Graph, Node
from patchlab.plots._facets import ZEROS
from patchlab.plots._style import INK, MUTED, Box, Page, Signs, signs, words_width
from patchlab.scores import NO_PATH, SAME, ScoreMap

_ALL = "q, k and v"
_SIDE, _MOST_NODES = 940, 320
"""Pixels of the matrix at most; more nodes than this are cut to those with the largest edges."""
_NO_EDGE, _CANNOT, _NOT_SCORED = "#e9ebee", "#d3d8de", "#b6bcc3"
_TEXTS = 60_000
"""Beyond this many cells there is no hover text of one's own per cell."""


@dataclass(frozen=True)
class EdgePanel:
    """One matrix: the edges into ``q``, ``k`` or ``v``, or all edges with the three summed; NaN where there is nothing to show."""

    name: str
    effects: Float[np.ndarray, "writer node"]
    hover: Shaped[np.ndarray, "writer node"] | None


@dataclass(frozen=True)
class EdgeHeatmapData:
    """Panels to switch between, on one colour scale: which pairs are edges at all, the largest |value|, and the words around them."""

    title: str
    subtitle: str
    value_label: str
    writers: tuple[str, ...]
    nodes: tuple[str, ...]
    possible: Bool[np.ndarray, "writer node"]
    not_scored: Bool[np.ndarray, "writer node"]
    panels: tuple[EdgePanel, ...]
    limit: float
    zero: Shaped[np.ndarray, "writer node"]
    signs: Signs


def _prepare_edge_heatmap(scores: ScoreMap | Circuit) -> EdgeHeatmapData:
    if isinstance(scores, Circuit):
        graph, record, flat = scores.graph, scores.provenance, scores.collapsed()
        if flat.scores is None:
            raise CircuitError("the circuit has no scores to draw; plots.circuit draws its edges, and edge scores come from method.run(.., 'edges').")
        kept, effects, zero = flat.edges, np.asarray(flat.scores), np.full(graph.allowed.shape, "")
        subtitle = f"{flat.n_edges:,} of {graph.n_edges:,} edges of a circuit" + (f", {record['how']}" if record.get("how") else "")
    else:
        graph, (effects, record) = scores.graph, mean_effects(scores)
        effects = effects.sum(2) if effects.ndim == 3 else effects
        zero = _zeros(scores)
        kept, subtitle = graph.allowed & (zero == ""), f"{graph.n_edges:,} edges"
    missing = graph.allowed & np.isnan(effects)
    values = np.where(kept, effects, np.nan)
    panels = {_ALL: _per_node(graph, values, "qkv")} | {letter: _per_node(graph, values, letter) for letter in "qkv"}
    limit = max((float(np.nanmax(np.abs(part))) for part in panels.values() if np.isfinite(part).any()), default=0.0) or 1.0
    rows, columns = _largest(graph, values)
    cells = np.ix_(rows, columns)
    writers, nodes = tuple(graph.writers[i] for i in rows), tuple(graph.nodes[i + 1] for i in columns)
    unit = str(record.get("metric_unit", ""))
    texts = {name: _texts(graph, values, part, name, writers, nodes, cells, unit) for name, part in panels.items()}
    drawn = tuple(EdgePanel(name, part[cells], texts[name]) for name, part in panels.items())
    if (len(rows), len(columns)) != (len(graph.writers), len(graph.nodes) - 1):
        subtitle += f"; the {len(rows)} writers and {len(columns)} readers with the largest"
    who = " × ".join(str(record[key]) for key in ("model", "task") if record.get(key))
    kinds = np.array(graph.reader_kind)
    cut = [letter for letter in "qkv" if (missing | ~graph.allowed)[:, kinds == letter].all()]
    summed = f"{_ALL} of a head summed unless one is chosen" + (f" ({' and '.join(cut)} not scored)" if cut else "")
    words = filter(None, [who, record.get("direction"), subtitle, summed])
    method = record.get("method") or record.get("file")
    title = f"Edge effects on {record.get('metric', 'the metric')}" + (f": {method}" if method else "")
    possible = _any_per_node(graph, graph.allowed)[cells]
    label = f"effect ({unit})" if unit else "effect"
    missed = _any_per_node(graph, missing)[cells]
    dead = _zero_per_node(graph, zero)[cells]
    return EdgeHeatmapData(title, " · ".join(map(str, words)), label, writers, nodes, possible, missed, drawn, limit, dead, signs(record))


def _zeros(scores: ScoreMap) -> Shaped[np.ndarray, "writer reader"]:
    """Why an edge cannot matter at any of its positions; "" where it can."""
    (site,) = scores.sites
    words = scores.zeros(site).to_numpy()
    words = words.reshape(*words.shape[:2], -1)
    live = (words == "").any(2)
    same = (words == SAME).any(2)
    return np.where(live | ~scores.graph.allowed, "", np.where(same, SAME, words[:, :, 0]))


def _zero_per_node(graph: Graph, zero: Shaped[np.ndarray, "writer reader"]) -> Shaped[np.ndarray, "writer node"]:
    """Why no edge from a writer to any input of a node can matter; "" where one can."""
    live = _any_per_node(graph, graph.allowed & (zero == ""))
    words = np.full(live.shape, "", dtype=zero.dtype)
    for kind in (word for word in (NO_PATH, "structural zero", SAME) if (zero == word).any()):
        words[_any_per_node(graph, zero == kind)] = kind
    return np.where(live, "", words)


def _per_node(graph: Graph, values: Float[np.ndarray, "writer reader"], kinds: str) -> Float[np.ndarray, "writer node"]:
    """Edges into the inputs of these kinds, summed per head; NaN where none of them has a value. Of all three, the other nodes are there, too."""
    kind = np.array(graph.reader_kind)
    chosen = np.isin(kind, [*kinds, "mlp", "logits"] if len(kinds) > 1 else [kinds])
    total = np.full((len(graph.writers), len(graph.nodes) - 1), np.nan)
    for reader in np.flatnonzero(chosen):
        column, new = total[:, graph.reader_node[reader] - 1], values[:, reader]
        total[:, graph.reader_node[reader] - 1] = np.where(np.isnan(column), new, column + np.nan_to_num(new))
    return total


def _any_per_node(graph: Graph, mask: Bool[np.ndarray, "writer reader"]) -> Bool[np.ndarray, "writer node"]:
    found = np.zeros((len(graph.writers), len(graph.nodes) - 1), dtype=bool)
    for reader, node in enumerate(graph.reader_node):
        found[:, node - 1] |= mask[:, reader]
    return found


def _largest(graph: Graph, values: Float[np.ndarray, "writer reader"]) -> tuple[np.ndarray, np.ndarray]:
    """Writers and reading nodes to draw, in the order of the graph."""
    size = np.nan_to_num(_per_node(graph, np.abs(values), "qkv"))
    chosen = []
    for largest in (size.max(1), size.max(0)):
        order = np.argsort(-largest, kind="stable")
        few = order[:_MOST_NODES][largest[order[:_MOST_NODES]] > 0] if len(order) > _MOST_NODES else order
        chosen.append(np.sort(few))
    return chosen[0], chosen[1]


def _texts(
    graph: Graph,
    values: Float[np.ndarray, "writer reader"],
    part: Float[np.ndarray, "writer node"],
    name: str,
    writers: tuple[str, ...],
    nodes: tuple[str, ...],
    cells: Any,
    unit: str,
) -> Shaped[np.ndarray, "shown_writer shown_node"] | None:
    """What to say of each cell; of the sums, the three parts too."""
    if len(writers) * len(nodes) > _TEXTS:
        return None
    parts = [_per_node(graph, values, letter)[cells] for letter in "qkv"]
    shown = part[cells]
    texts = np.full(shown.shape, "", dtype=object)
    for i, j in np.argwhere(~np.isnan(shown)):
        is_head = Node.parse(nodes[j]).kind == "head"
        end = nodes[j] + (f"&lt;{name}&gt;" if name != _ALL else "")
        texts[i, j] = f"<b>{writers[i]}->{end}</b><br>effect {shown[i, j]:+.3g} {escape(unit)}"
        if is_head and name == _ALL:
            texts[i, j] += "<br>" + ", ".join(f"{letter} {values[i, j]:+.2g}" for letter, values in zip("qkv", parts, strict=True))
    return texts


def edge_heatmap(scores: ScoreMap | Circuit) -> go.Figure:
    """Heatmap of edge effects: a row per writer, a column per reading node, in the order of the graph.

    A head's column is the sum over its query, key and value inputs; the buttons show one of them. Blue edges support the behaviour, red ones work
    against it; colour goes with the square root of the size, so that a few large edges do not hide the others. Pale cells are no edges or cannot
    matter (the hover text says why), grey ones were not scored, and of a circuit the edges outside are left white. With more than 320 nodes only
    those with the largest edges are drawn.

    Args:
        scores: a map with ``edges``, whose example means are drawn, or a circuit with scores. Positions are summed.

    Raises:
        CircuitError: a map without edge scores, or a circuit without scores.

    Example:
        >>> pl.plots.edge_heatmap(pl.RelevancePatching().run(model, task, "edges", direction="noising")).show()  # doctest: +SKIP
    """
    return _draw(_prepare_edge_heatmap(scores))


def _draw(data: EdgeHeatmapData) -> go.Figure:
    n_rows, n_columns = len(data.writers), len(data.nodes)
    cell = max(2.0, min(26.0, _SIDE / max(n_rows, n_columns)))
    left, top, foot = 92, 96, 78
    legend = f'<span style="color:{_NOT_SCORED}">■</span> not scored &nbsp;·&nbsp; ' if data.not_scored.any() else ""
    legend += f'<span style="color:{_NO_EDGE}">■</span> no edge &nbsp;·&nbsp; '
    kinds = [ZEROS[kind] for kind in ZEROS if (data.zero == kind).any()]
    legend += f'<span style="color:{_CANNOT}">■</span> {" or ".join(kinds)} &nbsp;·&nbsp; ' if kinds else ""
    legend += f"{data.signs.legend} &nbsp;·&nbsp; colours go with the square root of the effect"
    width = max(words_width(data.title, data.subtitle), words_width("", legend), left + cell * n_columns + 110)
    page = Page(width, top + cell * n_rows + foot, data.title, escape(data.subtitle, quote=False))
    page.note(16, 58, legend, colour=MUTED)
    box = Box(left, top, cell * n_columns, cell * n_rows)
    across = {"range": [-0.5, n_columns - 0.5], **_ticks(data.nodes, cell, -90), "title": {"text": "reader"}, "mirror": True}
    down = {"range": [n_rows - 0.5, -0.5], **_ticks(data.writers, cell, 0), "title": {"text": "writer"}, "mirror": True}
    where = page.panel(box, across, down)
    shade = np.where(data.not_scored, 1.0, np.where(~data.possible, 0.0, np.where(data.zero != "", 0.5, np.nan)))
    greys = [[0, _NO_EDGE], [0.5, _CANNOT], [1, _NOT_SCORED]]
    texts = [
        [f"<b>{a}->{b}</b><br>{ZEROS[word]}" if word else None for b, word in zip(data.nodes, row, strict=True)]
        for a, row in zip(data.writers, data.zero.tolist(), strict=True)
    ]
    more = {"text": texts, "hovertemplate": "%{text}<extra></extra>"} if (data.zero != "").any() else {"hoverinfo": "skip"}
    page.figure.add_trace(go.Heatmap(z=shade, zmin=0, zmax=1, colorscale=greys, showscale=False, **more, **where))
    for i, panel in enumerate(data.panels):
        z = np.sign(panel.effects) * np.sqrt(np.abs(panel.effects))
        more = {"text": panel.hover, "hovertemplate": "%{text}<extra></extra>"} if panel.hover is not None else {"hoverinfo": "skip"}
        page.figure.add_trace(go.Heatmap(z=z, coloraxis="coloraxis", hoverongaps=False, visible=i == 0, name=panel.name, **more, **where))
    line = {"color": MUTED, "width": 0.5}
    for names, along in ((data.nodes, "x"), (data.writers, "y")):
        for place in _breaks(names):
            ends = {"x0": place, "x1": place, "y0": 0, "y1": 1} if along == "x" else {"x0": 0, "x1": 1, "y0": place, "y1": place}
            page.figure.add_shape(
                type="line", xref="x" if along == "x" else "x domain", yref="y" if along == "y" else "y domain", line=line, opacity=0.5, **ends
            )
    _draw_scale(page, data, Box(left + box.width + 16, top + 20, 10, min(260, max(96, box.height))))
    buttons = [
        {"label": panel.name, "method": "restyle", "args": [{"visible": [True, *(other is panel for other in data.panels)]}]} for panel in data.panels
    ]
    place = {"x": (page.width - 16) / page.width, "y": 1 - 56 / page.height, "xanchor": "right", "yanchor": "top"}
    page.figure.update_layout(updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, "font": {"size": 11}, **place}])
    return page.figure


def _ticks(names: tuple[str, ...], cell: float, angle: int) -> dict[str, Any]:
    """Every node where there is room, else the layers."""
    if cell >= 11:
        look = {"tickangle": angle, "tickfont": {"size": 9, "color": INK}}
        return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names), **look}
    layers = [Node.parse(name).layer for name in names]
    ends = [i for i, name in enumerate(names) if name in ("input", "logits")]
    middles = {layer: float(np.mean([i for i, own in enumerate(layers) if own == layer])) for layer in dict.fromkeys(layers) if layer is not None}
    words = [f"layer {layer}" if len(middles) <= 14 or layer % 4 == 0 else "" for layer in middles]
    return {
        "tickmode": "array",
        "tickvals": [*middles.values(), *map(float, ends)],
        "ticktext": [*words, *(names[i] for i in ends)],
        "tickangle": 0,
        "tickfont": {"size": 10},
    }


def _breaks(names: tuple[str, ...]) -> list[float]:
    """Where a new layer begins."""
    layers = [name if (layer := Node.parse(name).layer) is None else layer for name in names]
    return [i - 0.5 for i in range(1, len(names)) if layers[i] != layers[i - 1]]


def _draw_scale(page: Page, data: EdgeHeatmapData, box: Box) -> None:
    marks = [share * data.limit for share in (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)]
    bar = {
        "x": box.left / page.width,
        "y": 1 - box.top / page.height,
        "xanchor": "left",
        "yanchor": "top",
        "thickness": box.width,
        "lenmode": "pixels",
        "len": box.height,
        "ypad": 0,
        "xpad": 0,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "tickvals": [float(np.sign(value) * np.sqrt(abs(value))) for value in marks],
        "ticktext": [f"{value:.2g}".replace("-", "−") for value in marks],
    }
    turned = {"xanchor": "center", "yanchor": "middle", "textangle": -90}
    page.note(box.left + box.width + 46, box.top + box.height / 2, escape(data.value_label, quote=False), **turned)
    top = float(np.sqrt(data.limit))
    page.figure.update_layout(coloraxis={"colorscale": data.signs.scale, "cmin": -top, "cmax": top, "colorbar": bar})
