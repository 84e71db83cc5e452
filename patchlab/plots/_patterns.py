"""Attention patterns: where heads look from each position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.errors import ScoreError
from patchlab.plots._style import Box, Page, flow, shown

_CELL, _GAP, _TOP, _WIDEST = 22, 60, 100, 1400


@dataclass(frozen=True)
class PatternsData:
    """Patterns by the head's name, and the text of each position."""

    title: str
    subtitle: str
    patterns: dict[str, Float[np.ndarray, "dest src"]]
    ticks: tuple[str, ...]


def _prepare_patterns(
    patterns: Mapping[str, Float[np.ndarray, "dest src"]], tokens: Sequence[str], roles: Sequence[str] = (), *, title: str = "Attention"
) -> PatternsData:
    if not patterns:
        raise ScoreError("there are no attention patterns to draw.")
    sizes = {part.shape for part in patterns.values()}
    if sizes != {(len(tokens), len(tokens))}:
        raise ScoreError(
            f"the patterns have the shapes {sorted(sizes)}, and there are {len(tokens)} tokens; give square patterns with a token for each position."
        )
    named = [*roles, *[""] * (len(tokens) - len(roles))]
    ticks = tuple(f"{role}: {shown(token)}" if role else shown(token) for token, role in zip(tokens, named, strict=True))
    return PatternsData(title, "a row is where a position looks; each row adds up to 1", dict(patterns), ticks)


def patterns(
    patterns: Mapping[str, Float[np.ndarray, "dest src"]], tokens: Sequence[str], roles: Sequence[str] = (), *, title: str = "Attention"
) -> go.Figure:
    """Attention patterns of several heads side by side.

    Args:
        patterns: ``[dest, src]`` by the head's name; rows add up to 1.
        tokens: the text at each position.
        roles: the name of each position, "" where it has none.
        title: of the figure.

    Raises:
        ScoreError: no patterns, or shapes that do not fit the tokens.

    Example:
        >>> pl.plots.patterns({"a9.h6": pattern}, ["The", " cat"]).show()  # doctest: +SKIP
    """
    return _draw(_prepare_patterns(patterns, tokens, roles, title=title))


def _draw(data: PatternsData) -> go.Figure:
    count = len(data.ticks)
    side = max(120, _CELL * count)
    margin = 16 + 6.5 * max(map(len, data.ticks))
    rows = flow([side + margin + _GAP] * len(data.patterns), _WIDEST)
    width = max(len(row) for row in rows) * (side + margin + _GAP) + 40
    height = _TOP + len(rows) * (side + margin + _GAP) - _GAP
    page = Page(max(width, 420), height, data.title, data.subtitle)
    names = list(data.patterns)
    numbers = list(range(count))
    for r, row in enumerate(rows):
        for c, i in enumerate(row):
            box = Box(margin + c * (side + margin + _GAP), _TOP - 8 + r * (side + margin + _GAP), side, side)
            page.note(box.left, box.top - 22, f"<b>{names[i]}</b>", size=13)
            ticks = {"tickmode": "array", "tickvals": numbers, "ticktext": list(data.ticks), "showgrid": False, "zeroline": False}
            where = page.panel(box, {**ticks, "tickangle": -90, "range": [-0.5, count - 0.5]}, {**ticks, "range": [count - 0.5, -0.5]})
            values = data.patterns[names[i]]
            text = [[f"<b>{names[i]}</b><br>{a} → {b}: {values[x, y]:.2f}" for y, b in enumerate(data.ticks)] for x, a in enumerate(data.ticks)]
            scale = {"colorscale": "Greens", "zmin": 0, "zmax": 1, "showscale": False, "xgap": 1, "ygap": 1}
            page.figure.add_trace(go.Heatmap(z=values, hovertext=text, hovertemplate="%{hovertext}<extra></extra>", **scale, **where))
    return page.figure
