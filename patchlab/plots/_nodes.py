"""The nodes of a circuit: a column per layer, a lane per site, the largest on top."""

from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped

from patchlab.circuits import NodeCircuit
from patchlab.errors import CircuitError
from patchlab.plots._style import MUTED, UNSCORED, Box, Page, Signs, signs, words_width

MOST = 200
"""Nodes that are drawn at most, unless a number is asked for: those of largest |score|."""
_COLUMN, _ROW, _LEFT, _TOP = 96, 20, 140, 84


@dataclass(frozen=True)
class Lane:
    """The drawn nodes of one site: where each stands (layer, row in its layer), its score (NaN: none), its label, its address, and its hover
    text.
    """

    site: str
    count: str
    layer: Int[np.ndarray, " node"]
    row: Int[np.ndarray, " node"]
    score: Float[np.ndarray, " node"]
    label: Shaped[np.ndarray, " node"]
    address: tuple[str, ...]
    hover: Shaped[np.ndarray, " node"]

    @property
    def height(self) -> int:
        """Rows that it takes."""
        return int(self.row.max(initial=0)) + 1


@dataclass(frozen=True)
class NodesData:
    """Lanes in the order of the sites, how many layers there are, the largest |score|, and the words around them."""

    title: str
    subtitle: str
    n_layers: int
    largest: float
    signs: Signs
    lanes: tuple[Lane, ...]


def _prepare_nodes(circuit: NodeCircuit, most: int | None = None) -> NodesData:
    if most is not None and most < 1:
        raise CircuitError(f"the number of nodes to draw is {most}; draw at least 1.")
    if not circuit.n_nodes:
        raise CircuitError("the circuit has no nodes, so there is nothing to draw; choose more.")
    table, record = circuit.table(), circuit.provenance
    drawn = table.head(most or MOST)
    unit, what = str(record.get("metric_unit", "")), "effect" if record.get("direction") else "score"
    lanes: list[Lane] = []
    for one in circuit.universe:
        rows = drawn[drawn["site"] == one.name]
        layers = rows["layer"].to_numpy(dtype=int) if "layer" in rows else np.zeros(len(rows), dtype=int)
        seen: dict[int, int] = {}
        places = []
        for layer in layers.tolist():
            places.append(seen.get(layer, 0))
            seen[layer] = places[-1] + 1
        scores = rows["score"].to_numpy(dtype=float)
        values = ["no score" if np.isnan(score) else f"{what} {score:+.3g} {unit}".rstrip() for score in scores]
        hover = [f"<b>{escape(name)}</b><br>{escape(value)}" for name, value in zip(rows["node"], values, strict=True)]
        labels = [_short(name, one.site.kind) for name in rows["node"]]
        count = f"{len(circuit.ids(one.name)):,} of {one.size:,}"
        arrays = (np.array(places, dtype=int), scores, np.array(labels, dtype=object), tuple(rows["node"]), np.array(hover, dtype=object))
        lanes.append(Lane(one.name, count, layers, *arrays))
    who = " × ".join(str(record[key]) for key in ("model", "task") if record.get(key))
    method = record.get("method") or record.get("file")
    title = "Nodes of a circuit" + (f" of {who}" if who else "") + (f", {method}" if method else "")
    shown = f"the {len(drawn):,} largest of {len(table):,} nodes" if len(drawn) < len(table) else f"all {len(table):,} nodes"
    words = [f"<b>{shown}</b>", *(escape(str(record[key]), quote=False) for key in ("how", "direction") if record.get(key))]
    sizes = np.abs(drawn["score"].to_numpy(dtype=float))
    largest = float(np.nan_to_num(sizes).max(initial=0.0))
    n_layers = max(one.shape[0] if "layer" in one.site.axes else 1 for one in circuit.universe)
    return NodesData(title, " · ".join(words), n_layers, largest, signs(record), tuple(lane for lane in lanes if len(lane.layer)))


def nodes(circuit: NodeCircuit, most: int | None = None) -> go.Figure:
    """The nodes of a circuit: layers from left to right, a lane per site, in each layer the largest on top; colour and size are the score.

    Args:
        circuit: what to draw.
        most: how many nodes are drawn, those of largest |score|; None for at most 200. The figure says which of how many it shows.

    Raises:
        CircuitError: a circuit without nodes, or ``most`` below 1.
    """
    return _draw(_prepare_nodes(circuit, most))


def _draw(data: NodesData) -> go.Figure:
    across, tall = _COLUMN * data.n_layers, [_ROW * lane.height + 34 for lane in data.lanes]
    legend = data.signs.legend if data.largest else ""
    width = max(_LEFT + across + 24, words_width(data.title, data.subtitle))
    page = Page(width, _TOP + sum(tall) + 36, data.title, data.subtitle)
    page.note(16, 58, legend)
    top = _TOP
    for i, (lane, height) in enumerate(zip(data.lanes, tall, strict=True)):
        last = i == len(data.lanes) - 1
        x = {"range": [-0.5, data.n_layers - 0.5], "tickmode": "array", "tickvals": list(range(data.n_layers)), "showgrid": False, "zeroline": False}
        x |= {"title": {"text": "layer"}} if last else {"showticklabels": False, "ticks": ""}
        y = {"range": [lane.height - 0.4, -0.8], "showticklabels": False, "showgrid": False, "zeroline": False, "ticks": ""}
        where = page.panel(Box(_LEFT, top, across, height - 8), x, y)
        page.note(16, top + 4, f"<b>{escape(lane.site, quote=False)}</b><br><span style='color:{MUTED}'>{lane.count}</span>")
        shares = np.nan_to_num(np.abs(lane.score)) / (data.largest or 1.0)
        colours = [UNSCORED if np.isnan(score) else data.signs.negative if score < 0 else data.signs.positive for score in lane.score]
        marker = {"size": 5 + 11 * np.sqrt(shares), "color": colours, "line": {"width": 0}}
        text = {"mode": "markers+text", "text": lane.label, "textposition": "middle right", "textfont": {"size": 10}}
        hover = {"hovertext": lane.hover, "hovertemplate": "%{hovertext}<extra></extra>"}
        own = {"circuit": "addresses", "nodes": list(lane.address)}
        page.figure.add_trace(go.Scatter(x=(lane.layer - 0.36).tolist(), y=lane.row.tolist(), marker=marker, meta=own, **text, **hover, **where))
        top += height
    page.figure.update_layout(hovermode="closest")
    return page.figure


def _short(address: str, kind: str) -> str:
    """What an address says beside its layer and its site: ``H3@END``.

    >>> _short("L3.H3.z@END", "z"), _short("L0.mlp_out", "mlp_out"), _short("L1.F7.resid_post", "features.resid_post")
    ('H3@END', '', 'F7')
    """
    name, _, place = address.partition("@")
    parts = name.split(".")
    return (parts[1] if len(parts) > 2 and kind.partition(".")[0] != "error" else "") + (f"@{place}" if place else "")
