"""The layout of a circuit: where its nodes stand and how its edges run, in pixels with y upwards.

The input, the MLPs and the logits form a column on the right; the heads stand left of it, a column per head index. Depth grows upwards:
attention and MLP of a layer have rows of their own, rows without nodes are left out, and every other row of heads is moved by half a column, so that
edges have room to pass. Edges within the column bow to its right, edges to and from heads run on its left. Edges that leave or reach a box on one
side are spread over that side in the order in which they cross least.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from patchlab.graph import Graph, Node

HALF_WIDTH, HALF_HEIGHT = 34.0, 15.0
"""Half the sides of a node's box."""
ROW, LAYER_GAP, COLUMN, CLEARANCE = 54.0, 12.0, 170.0, 34.0
_WIDEST, _MOST_COLUMNS = 1400.0, 12
PORTS = {"q": -20.0, "k": 0.0, "v": 20.0}
"""Where in the lower side of a head its query, key and value inputs are."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Band:
    """The rows of a layer: its number, its lower and its upper end."""

    layer: int
    low: float
    high: float


@dataclass(frozen=True)
class Layout:
    """The place of each node (the middle of its box), the bands of the layers, and the area that nodes and edges take."""

    places: dict[str, Point]
    bands: tuple[Band, ...]
    left: float
    right: float
    height: float
    spine: tuple[float, ...]
    """Where the nodes of the right column are, from below."""


def place(graph: Graph, nodes: Iterable[str], edges: Sequence[tuple[str, str, str]] = ()) -> Layout:
    """Stand the nodes in rows and columns; the area leaves room for these edges (writer, reader, kind of input)."""
    nodes = tuple(nodes)
    rows: dict[int, list[str]] = {}
    for node in nodes:
        kind, layer, head = Node.parse(node)
        depth = 2 * layer + (2 if head is None else 1) if layer is not None else 0 if kind == "input" else 2 * graph.n_layers + 1
        rows.setdefault(depth, []).append(node)
    heights: dict[str, float] = {}
    y, previous = 0.0, None
    for depth in sorted(rows):
        layer = Node.parse(rows[depth][0]).layer
        if previous is not None:
            y += ROW + (LAYER_GAP if layer != previous[0] else 0.0)
        previous = (layer,)
        heights |= dict.fromkeys(rows[depth], y)
    columns = _columns(rows)
    step = min(COLUMN, _WIDEST / max(1.0, -min(columns.values(), default=0.0)))
    places = {node: (columns[node] * step if node in columns else 0.0, heights[node]) for node in nodes}
    spine = tuple(sorted(heights[node] for node in nodes if node not in columns))
    left = min((x for x, _ in places.values()), default=0.0) - HALF_WIDTH
    bands = tuple(
        Band(layer, min(ys) - ROW / 2 - LAYER_GAP / 4, max(ys) + ROW / 2 + LAYER_GAP / 4)
        for layer in range(graph.n_layers)
        if (ys := [heights[node] for node in nodes if Node.parse(node).layer == layer])
    )
    layout = Layout(places, bands, left - CLEARANCE, HALF_WIDTH + CLEARANCE, y, spine)
    reached = [bound for line in routes(layout, edges, 12) for bound in (line[:, 0].min(), line[:, 0].max())]
    return replace(layout, left=min([left, *reached]) - CLEARANCE, right=max([HALF_WIDTH, *reached]) + CLEARANCE)


def _columns(rows: dict[int, list[str]]) -> dict[str, float]:
    """Columns of the heads, counted from the right: one per head index, or where those are many, as close as the fullest row allows."""
    heads = [sorted((head, node) for node in rows[depth] if (head := Node.parse(node).unit) is not None) for depth in sorted(rows)]
    heads = [row for row in heads if row]
    used = sorted({head for row in heads for head, _ in row})
    width = len(used) if len(used) <= _MOST_COLUMNS else max(map(len, heads))
    columns = {}
    for number, row in enumerate(heads):
        aside = 0.25 if number % 2 else 0.75
        for i, (head, node) in enumerate(row):
            columns[node] = (used.index(head) if len(used) <= _MOST_COLUMNS else i + (width - len(row)) // 2) - width - aside + 0.4
    return columns


def routes(layout: Layout, edges: Sequence[tuple[str, str, str]], points: int) -> list[Float[np.ndarray, "point xy"]]:
    """The curves of edges, given as writer, reader and kind of input."""
    ways = [_way(layout, *edge) for edge in edges]
    leaving: dict[tuple[str, str], list[int]] = {}
    reaching: dict[tuple[str, str], list[int]] = {}
    for i, ((writer, reader, _), way) in enumerate(zip(edges, ways, strict=True)):
        leaving.setdefault((writer, way.out), []).append(i)
        reaching.setdefault((reader, way.into), []).append(i)
    starts, ends = [(0.0, 0.0)] * len(edges), [(0.0, 0.0)] * len(edges)
    for some, places, upper in ((leaving, starts, True), (reaching, ends, False)):
        for (node, side), members in some.items():
            ordered = sorted(members, key=lambda i: ways[i].first if upper else ways[i].last)
            for rank, i in enumerate(ordered):
                port = PORTS.get(edges[i][2], 0.0)
                places[i] = _landing(layout.places[node], side, (rank + 0.5) / len(members), port, upper)
    return [_bezier(start, *way.bends(start, end), end, points) for way, start, end in zip(ways, starts, ends, strict=True)]


@dataclass(frozen=True)
class _Way:
    """How an edge runs: the sides of the boxes it leaves and reaches, its ranks among the edges there (the smallest at the top, or on the left),
    and how its curve bends.
    """

    out: str
    into: str
    first: tuple[float, ...]
    last: tuple[float, ...]
    bow: float

    def bends(self, start: Point, end: Point) -> tuple[Point, Point]:
        """The two inner points of the curve."""
        (x0, y0), (x1, y1) = start, end
        if self.out == self.into == "right":
            return (x0 + self.bow, y0), (x1 + self.bow, y1)
        if self.out == "left":
            return (0.2 * x0 + 0.8 * x1, y0), (x1, 0.7 * y0 + 0.3 * y1)
        if self.into == "left":
            return (x0, 0.3 * y0 + 0.7 * y1), (0.8 * x0 + 0.2 * x1, y1)
        middle = 0.5 * (y1 - y0)
        return (x0 + self.bow, y0 + middle), (x1 + self.bow, y1 - middle)


def _way(layout: Layout, writer: str, reader: str, kind: str) -> _Way:
    (x0, y0), (x1, y1) = layout.places[writer], layout.places[reader]
    from_head, to_head = (Node.parse(end).kind == "head" for end in (writer, reader))
    if not from_head and not to_head:
        if not any(y0 < y < y1 for y in layout.spine):
            return _Way("top", "bottom", (0.0,), (0.0,), 0.0)
        return _Way("right", "right", (y1,), (y0,), 4 / 3 * _bow(y1 - y0))
    if not from_head:
        return _Way("left", "bottom", (-x1, y1), (0.0,), 0.0)
    if not to_head:
        return _Way("top", "left", (1.0, -y1), (x0, y0), 0.0)
    same = abs(x0 - x1) < HALF_WIDTH and y1 - y0 > 2 * ROW
    return _Way("top", "bottom", (0.0 if x1 < x0 else 2.0, x1), (0.0,), -_bow(y1 - y0) / 2 if same else 0.0)


def _landing(middle: Point, side: str, share: float, port: float, leaving: bool) -> Point:
    """A point on a side of a box. What leaves to a side uses its upper half, what arrives there the lower half."""
    x, y = middle
    if side == "top":
        return x + (share - 0.5) * HALF_WIDTH, y + HALF_HEIGHT
    if side == "bottom":
        return x + port, y - HALF_HEIGHT
    half = HALF_HEIGHT - 3.0
    across = HALF_WIDTH if side == "right" else -HALF_WIDTH
    return x + across, y + (half * (1 - share) if leaving else -half * share)


def _bow(span: float) -> float:
    """How far an edge within the column reaches to the side."""
    return 24.0 + 0.24 * span


def _bezier(a: Point, b: Point, c: Point, d: Point, points: int) -> Float[np.ndarray, "point xy"]:
    t = np.linspace(0.0, 1.0, points)[:, None]
    return (1 - t) ** 3 * np.array(a) + 3 * t * (1 - t) ** 2 * np.array(b) + 3 * t**2 * (1 - t) * np.array(c) + t**3 * np.array(d)
