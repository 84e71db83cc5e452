"""Attention scores taken apart: the pairs of components that matter most, and all others together."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.errors import LensError
from patchlab.lenses import QKAttribution
from patchlab.plots._style import Box, Page, words_width

_TOP, _CELL, _ROW, _LETTER = 150, 58, 26, 6.5
_OPPOSITE = "blue raises the score, red lowers it; components of the query down, of the key across"


@dataclass(frozen=True)
class QKData:
    """Mean pairs ``[query, key]`` with their names."""

    title: str
    subtitle: str
    values: Float[np.ndarray, "query key"]
    queries: tuple[str, ...]
    keys: tuple[str, ...]


def _prepare_qk(found: QKAttribution, n: int) -> QKData:
    if n < 1:
        raise LensError(f"n is {n}; draw at least one component of each side.")
    grid = found.grid(n)
    sides = (tuple(str(name) for name in grid[side].to_numpy()) for side in ("query", "key"))
    return QKData(f"What makes the score {found.site}: {found.subject}", _OPPOSITE, grid.to_numpy(), *sides)


def qk_pairs(found: QKAttribution, n: int = 12) -> go.Figure:
    """Pairs of components that make an attention score, means over examples.

    The n components of the query and of the key that matter most are rows and columns, all others together are ``others``: the whole adds up to
    the score.

    Args:
        found: what :func:`patchlab.lenses.qk_attribution` gave.
        n: components of each side.

    Raises:
        LensError: n is below 1.

    Example:
        >>> pl.plots.qk_pairs(pl.lenses.qk_attribution(model, task, "L5.H1.pattern@END<S1")).show()  # doctest: +SKIP
    """
    return _draw(_prepare_qk(found, n))


def _draw(data: QKData) -> go.Figure:
    rows, columns = data.values.shape
    left, top = 24 + _LETTER * max(map(len, data.queries)), _TOP - 60 + _LETTER * max(map(len, data.keys))
    width = max(left + _CELL * columns + 30, words_width(data.title, data.subtitle))
    page = Page(width, top + _ROW * rows + 24, data.title, data.subtitle)
    xaxis = {"tickmode": "array", "tickvals": list(range(columns)), "ticktext": list(data.keys), "side": "top", "tickangle": -90}
    yaxis = {"tickmode": "array", "tickvals": list(range(rows)), "ticktext": list(data.queries), "range": [rows - 0.5, -0.5]}
    where = page.panel(Box(left, top, _CELL * columns, _ROW * rows), {**xaxis, "range": [-0.5, columns - 0.5]}, yaxis)
    limit = max(float(np.abs(data.values).max()), 1e-12)
    hover = [
        [f"<b>{query} × {key}</b><br>{value:+.4g}" for key, value in zip(data.keys, line, strict=True)]
        for query, line in zip(data.queries, data.values, strict=True)
    ]
    texts = [[f"{round(value, 2) + 0.0:.2f}".replace("-", "−") for value in line] for line in data.values]
    scale = {"colorscale": "RdBu", "zmin": -limit, "zmax": limit, "showscale": False, "xgap": 1, "ygap": 1}
    words = {"text": texts, "texttemplate": "%{text}", "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>"}
    page.figure.add_trace(go.Heatmap(z=data.values, **words, **scale, **where))
    return page.figure
