"""Agreement against cost, one point per run and site."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.errors import ScoreError
from patchlab.plots._style import INK, MUTED, Box, Page, method_colours, words_width

PANEL, GAP_X, GAP_Y = 300, 60, 76
_COLUMNS, _KEYS = 4, 900
_NEEDED = {"site", "setting", "method", "passes", "value"}


@dataclass(frozen=True)
class Points:
    """The runs of one method at one site: passes (forwards + 2 · backwards), agreement, and which run."""

    method: str
    passes: Float[np.ndarray, " run"]
    value: Float[np.ndarray, " run"]
    settings: tuple[str, ...]


@dataclass(frozen=True)
class CostsData:
    """A panel per site with the points of each method, the ticks of ``reference`` runs in it, both axes' ranges, and the words.

    ``missing`` is how many rows have no value, or no passes, and so no point.
    """

    title: str
    subtitle: str
    sites: tuple[str, ...]
    panels: tuple[tuple[Points, ...], ...]
    reference: tuple[Points, ...]
    across: tuple[float, float]
    down: tuple[float, float]
    missing: int


def _prepare_costs(values: pd.DataFrame, reference: pd.DataFrame, what: str) -> CostsData:
    for frame in (values, reference):
        if missing := sorted((_NEEDED if frame is values else _NEEDED - {"value"}) - {*map(str, frame)}):
            raise ScoreError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, frame)) or 'none'}.")
    drawn = values[values["value"].notna() & (values["passes"] > 0)]
    if drawn.empty:
        raise ScoreError("no run has an agreement and passes, so there is nothing to draw.")
    sites = tuple(map(str, dict.fromkeys(drawn["site"])))
    methods = list(dict.fromkeys(drawn["method"]))
    panels = tuple(tuple(_points(drawn[(drawn["site"] == site) & (drawn["method"] == name)], name) for name in methods) for site in sites)
    exact = tuple(_points(reference[reference["site"] == site].assign(value=1.0), "exact") for site in sites)
    passes = np.concatenate([one.passes for panel in panels for one in panel] + [one.passes for one in exact])
    across = (float(np.log10(passes.min())) - 0.12, float(np.log10(passes.max())) + 0.12)
    low, high = float(drawn["value"].min()), 1.0
    margin = 0.08 * (high - low) or 0.05
    missing = len(values) - len(drawn)
    words = [f"{what} (higher is better) by forwards + 2 · backwards (log scale)", "one point per run"]
    words += [f"{missing} runs without a value are left out"] if missing else []
    return CostsData("Agreement against cost", " · ".join(words), sites, panels, exact, across, (low - margin, high + margin), missing)


def _points(rows: pd.DataFrame, method: str) -> Points:
    return Points(str(method), rows["passes"].to_numpy(float), rows["value"].to_numpy(float), tuple(map(str, rows["setting"])))


def costs(values: pd.DataFrame, reference: pd.DataFrame, *, what: str = "Pearson correlation per prompt") -> go.Figure:
    """Agreement against passes (log axis), a panel per site, a colour per method, a point per run; strokes at the top are runs of the reference.

    Args:
        values: ``site``, ``setting``, ``method``, ``passes`` (forwards + 2 · backwards) and ``value``.
        reference: ``site``, ``setting``, ``method`` and ``passes`` of the runs that agreement is with.
        what: the values, in words.

    Raises:
        ScoreError: a column is missing, or no row has a value and passes.

    Example:
        >>> pl.plots.costs(values, reference).show()  # doctest: +SKIP
    """
    return _draw(_prepare_costs(values, reference, what))


def _draw(data: CostsData) -> go.Figure:
    colours = method_colours(one.method for panel in data.panels for one in panel)
    columns = min(_COLUMNS, len(data.sites))
    keys = [f'<span style="color:{colour}">●</span> {escape(name, quote=False)}' for name, colour in colours.items()]
    keys += [f'<span style="color:{INK}">┃</span> exact patching itself (1 by definition)'] if any(len(one.passes) for one in data.reference) else []
    width = max(64 + columns * (PANEL + GAP_X), words_width(data.title, data.subtitle), min(_KEYS, words_width("", " ".join(keys))))
    legend = _broken(keys, width)
    head = 66 + 19 * len(legend) + 32
    n_rows = -(-len(data.sites) // columns)
    page = Page(width, head + n_rows * (PANEL * 0.8 + GAP_Y) - 22, data.title, escape(data.subtitle, quote=False))
    for i, line in enumerate(legend):
        page.note(16, 60 + 19 * i, line, size=13)
    for i, (site, panel, exact) in enumerate(zip(data.sites, data.panels, data.reference, strict=True)):
        row, column = divmod(i, columns)
        box = Box(64 + column * (PANEL + GAP_X), head + row * (PANEL * 0.8 + GAP_Y), PANEL, PANEL * 0.8)
        page.note(box.left, box.top - 24, f"<b>{escape(site, quote=False)}</b>", size=12)
        across: dict[str, Any] = {"type": "log", "range": data.across, "title": {"text": "forwards + 2 · backwards"}}
        ticks = _ticks(data.across)
        across |= {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}
        where = page.panel(box, across, {"range": data.down, "nticks": 7})
        line = {"color": MUTED, "width": 1, "dash": "dot"}
        page.figure.add_shape(type="line", xref=f"{where['xaxis']} domain", yref=where["yaxis"], x0=0, x1=1, y0=1, y1=1, line=line, layer="below")
        for one in panel:
            look = {"size": 8, "color": colours[one.method], "opacity": 0.75, "line": {"width": 0.5, "color": "white"}}
            _draw_points(page, one, look, where)
        _draw_points(page, exact, {"symbol": "line-ns", "size": 12, "line": {"width": 1.5, "color": INK}}, where)
    return page.figure


def _draw_points(page: Page, one: Points, look: dict[str, Any], where: dict[str, str]) -> None:
    texts = [
        f"<b>{escape(one.method)}</b><br>{escape(setting)}<br>{value:.3f} at {passes:,.0f} passes"
        for setting, value, passes in zip(one.settings, one.value, one.passes, strict=True)
    ]
    hover = {"text": texts, "hovertemplate": "%{text}<extra></extra>"}
    page.figure.add_trace(go.Scatter(x=one.passes, y=one.value, mode="markers", marker=look, name=one.method, **hover, **where))


def _ticks(span: tuple[float, float]) -> list[int]:
    """Whole numbers on a log axis: 1, 2, 5, 10, ..., or powers of ten where those are many.

    >>> _ticks((0.5, 1.8)), _ticks((0.5, 3.8))
    ([5, 10, 20, 50], [10, 100, 1000])
    """
    digits = (1, 2, 5) if span[1] - span[0] <= 2.2 else (1,)
    return [digit * 10**power for power in range(12) for digit in digits if span[0] <= np.log10(digit * 10**power) <= span[1]]


def _broken(keys: list[str], width: float | int) -> list[str]:
    """A legend in lines of this width."""
    found: list[list[str]] = [[]]
    for key in keys:
        if found[-1] and words_width("", " &nbsp; ".join([*found[-1], key])) * 1.15 > width:
            found.append([])
        found[-1].append(key)
    return [" &nbsp; ".join(line) for line in found]
