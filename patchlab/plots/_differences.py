"""Paired differences of agreement between methods: a dot with its interval for each pair, site and form of correlation."""

from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.comparison.compare import CELLS, FORMS, Comparison
from patchlab.errors import ScoreError, unknown
from patchlab.plots._style import INK, MUTED, Box, Page, words_width

PANEL, ROW, GAP_X, GAP_Y = 230, 44, 26, 62
_COLUMNS = 4
_OFFSET = {"pearson": -0.25, "pearson_per_prompt": 0.0, "pearson_pooled": 0.25}

_COLOURS = (INK, "#8250df", "#9a6700")
"""Of the three forms of agreement: none is a method's, nor says what supports or opposes."""


@dataclass(frozen=True)
class DifferencesData:
    """Differences (method minus other) of each form, pair and site with their intervals, NaN where a site lacks one of the two; and the words."""

    title: str
    subtitle: str
    pairs: tuple[tuple[str, str], ...]
    sites: tuple[str, ...]
    value: dict[str, Float[np.ndarray, "pair site"]]
    low: dict[str, Float[np.ndarray, "pair site"]]
    high: dict[str, Float[np.ndarray, "pair site"]]


def _prepare_differences(comparison: Comparison, *, cells: str = "live") -> DifferencesData:
    if cells not in CELLS:
        raise ScoreError(unknown("set of cells", cells, CELLS))
    if comparison.differences.empty:
        raise ScoreError("there are no differences to draw; compare at least two methods (both signed, or both unsigned) with the reference.")
    rows = pd.DataFrame(comparison.differences[comparison.differences["cells"] == cells]).to_dict("records")
    pairs = tuple(dict.fromkeys((str(row["method"]), str(row["other"])) for row in rows))
    sites = tuple(dict.fromkeys(str(row["site"]) for row in rows))
    found = {(row["method"], row["other"], row["site"]): row for row in rows}

    def spread(column: str) -> Float[np.ndarray, "pair site"]:
        return np.array([[found.get((*pair, site), {}).get(column, np.nan) for site in sites] for pair in pairs], dtype=float)

    setting = comparison.setting
    what = f"{setting['subject']}, {setting['direction']}, {setting['metric']}"
    subtitle = f"{what} · {CELLS[cells]} · 95 % CI over examples, both methods on the same draws"
    title = f"Differences between methods in their agreement with {setting['reference']} patching"
    value, low, high = ({name: spread(f"{name}{end}") for name in FORMS} for end in ("", "_lo", "_hi"))
    return DifferencesData(title, subtitle, pairs, sites, value, low, high)


def differences(comparison: Comparison, *, cells: str = "live") -> go.Figure:
    """Paired differences of the three Pearson correlations: a panel per site, a row per pair of methods, a dot with its interval per form.

    Right of the line the first method of a pair agrees better. A filled dot has an interval that excludes 0; with many pairs, some do by chance.

    Args:
        comparison: what :func:`patchlab.comparison.compare` returned.
        cells: ``live`` or ``all``.

    Raises:
        ScoreError: another set of cells, or a comparison without pairs of methods.

    Example:
        >>> pl.plots.differences(pl.compare(exact, {"AtP": atp, "RelP": relp})).show()  # doctest: +SKIP
    """
    return _draw(_prepare_differences(comparison, cells=cells))


def _draw(data: DifferencesData) -> go.Figure:
    labels = [escape(f"{method} − {other}", quote=False) for method, other in data.pairs]
    left = 24 + 6.6 * max(len(f"{method} − {other}") for method, other in data.pairs)
    columns = min(_COLUMNS, len(data.sites))
    n_rows = -(-len(data.sites) // columns)
    height = len(labels) * ROW
    keys = [f'<span style="color:{colour}">●</span> {title}' for colour, title in zip(_COLOURS, FORMS.values(), strict=True)]
    legend = " &nbsp; ".join([*keys, f'<span style="color:{MUTED}">filled: the interval excludes 0</span>'])
    width = max(words_width(data.title, data.subtitle), 0.95 * words_width("", legend), left + columns * (PANEL + GAP_X))
    page = Page(width, 118 + n_rows * (height + GAP_Y), data.title, escape(data.subtitle, quote=False))
    page.note(16, 60, legend, size=13)
    span = _span(data)
    for i, site in enumerate(data.sites):
        row, column = divmod(i, columns)
        box = Box(left + column * (PANEL + GAP_X), 122 + row * (height + GAP_Y), PANEL, height)
        page.note(box.left, box.top - 24, f"<b>{escape(site, quote=False)}</b>", size=12)
        ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels if column == 0 else [""] * len(labels)}
        across = {"range": span, "nticks": 5, "title": {"text": "difference of correlations" if i + columns >= len(data.sites) else ""}}
        where = page.panel(box, across, {"range": [len(labels) - 0.5, -0.5], **ticks, "showgrid": False})
        zero = {"color": MUTED, "width": 1, "dash": "dash"}
        page.figure.add_shape(type="line", xref=where["xaxis"], yref=f"{where['yaxis']} domain", x0=0, x1=0, y0=0, y1=1, line=zero, layer="below")
        for name, colour in zip(FORMS, _COLOURS, strict=True):
            _draw_form(page, data, name, i, colour, where)
    return page.figure


def _draw_form(page: Page, data: DifferencesData, name: str, site: int, colour: str, where: dict[str, str]) -> None:
    value, low, high = (part[name][:, site] for part in (data.value, data.low, data.high))
    y = np.arange(len(data.pairs)) + _OFFSET[name]
    sure = (low > 0) | (high < 0)
    whiskers = {"type": "data", "array": (high - low) / 2, "color": colour, "thickness": 1.5, "width": 0}
    middle = {"mode": "markers", "marker": {"size": 0.1, "color": colour}, "hoverinfo": "skip"}
    # around the middle of the interval, since a percentile interval need not contain the value
    page.figure.add_trace(go.Scatter(x=(low + high) / 2, y=y, error_x=whiskers, **middle, **where))
    marker = {"size": 8, "color": [colour if one else "white" for one in sure], "line": {"width": 1.5, "color": colour}}
    texts = [
        f"<b>{escape(method)} − {escape(other)}</b>, {escape(data.sites[site])}<br>{FORMS[name]} {v:+.3f} [{a:+.3f}, {b:+.3f}]"
        for (method, other), v, a, b in zip(data.pairs, value, low, high, strict=True)
    ]
    hover = {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>", "name": name}
    page.figure.add_trace(go.Scatter(x=value, y=y, mode="markers", marker=marker, **hover, **where))
    for place in y[np.isnan(value)]:
        dash = {"text": "–", "showarrow": False, "font": {"size": 12, "color": colour}}
        page.figure.add_annotation(x=0, y=float(place), xref=where["xaxis"], yref=where["yaxis"], **dash)


def _span(data: DifferencesData) -> list[float]:
    """From the lowest to the highest bound of all panels, 0 included, with a margin."""
    values = np.concatenate([np.ravel(part) for one in (data.value, data.low, data.high) for part in one.values()])
    values = values[np.isfinite(values)]
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    margin = 0.06 * (high - low) or 0.1
    return [low - margin, high + margin]
