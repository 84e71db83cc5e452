"""Agreement as bars with their intervals, and the cost beside them."""

import math
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.comparison.compare import CELLS, QUARTILES, STATISTICS, Comparison
from patchlab.errors import ScoreError, unknown
from patchlab.plots._style import INK, MUTED, Box, Page, method_colours, words_width

PANEL_HEIGHT, GAP_X, GAP_Y, BAR = 190, 70, 92, 17
_TITLES = {
    "pearson": "Pearson of example-mean maps",
    "pearson_per_prompt": "Pearson per prompt: mean, quartiles (○)",
    "pearson_pooled": "Pearson of all prompts’ effects, pooled",
    "spearman": "Spearman correlation",
    "slope": "Slope through the origin (1 = right size)",
    "sign_agreement": "Sign agreement, |exact| > 1 % of the gap",
    "topk_recall": "Recall of the top 10 % of live cells",
}


@dataclass(frozen=True)
class Bars:
    """One statistic: its value and interval per method and site (NaN where it is undefined or was not scored).

    ``quartiles``, the lower and the upper over prompts, where the statistic is a mean over prompts.
    """

    statistic: str
    title: str
    value: Float[np.ndarray, "method site"]
    low: Float[np.ndarray, "method site"]
    high: Float[np.ndarray, "method site"]
    quartiles: tuple[Float[np.ndarray, "method site"], ...] = ()


@dataclass(frozen=True)
class ComparisonData:
    """A panel per statistic, split-half reliability of the reference per site, the token positions each method computed, and the words."""

    title: str
    subtitle: str
    methods: tuple[str, ...]
    sites: tuple[str, ...]
    panels: tuple[Bars, ...]
    half_pearson: tuple[float, ...]
    costs: tuple[tuple[str, float, str], ...]


def _prepare_comparison(comparison: Comparison, *, cells: str = "live") -> ComparisonData:
    if cells not in CELLS:
        raise ScoreError(unknown("set of cells", cells, CELLS))
    table = comparison.table[comparison.table["cells"] == cells]
    methods, sites = tuple(dict.fromkeys(table["method"])), tuple(dict.fromkeys(comparison.reliability["site"]))

    def spread(column: str) -> np.ndarray:
        return table.pivot(index="method", columns="site", values=column).reindex(index=list(methods), columns=list(sites)).to_numpy(dtype=float)

    quartiles = {"pearson_per_prompt": tuple(spread(column) for column, share in QUARTILES.items() if share != 0.5)}
    panels = tuple(
        Bars(name, _TITLES[name], spread(name), spread(f"{name}_lo"), spread(f"{name}_hi"), quartiles.get(name, ())) for name in STATISTICS
    )
    rows = comparison.reliability[comparison.reliability["cells"] == cells]
    half = dict(zip(rows["site"], rows["half_pearson"], strict=True))
    costs = tuple(
        (str(name), float(positions), f"{forwards} forwards, {backwards} backwards, {seconds:.2f} s")
        for name, positions, forwards, backwards, seconds in comparison.costs[["method", "positions", "forwards", "backwards", "seconds"]].itertuples(
            index=False
        )
    )
    setting = comparison.setting
    what = f"{setting['subject']}, {setting['direction']}, {setting['metric']}"
    subtitle = f"{what} · {CELLS[cells]} · whiskers: 95 % CI over examples"
    return ComparisonData(
        f"Agreement with {setting['reference']} patching", subtitle, methods, sites, panels, tuple(half[site] for site in sites), costs
    )


def comparison(comparison: Comparison, *, cells: str = "live") -> go.Figure:
    """Bars of every statistic, grouped by site and coloured by method, with 95 % intervals, and the cost on a log scale.

    The dotted strokes beside the Pearson bars of mean maps are the split-half correlation of the reference itself; the rings on the bars per
    prompt are the lower and upper quartile over prompts.

    Args:
        comparison: what :func:`patchlab.comparison.compare` returned.
        cells: ``live`` or ``all``.

    Raises:
        ScoreError: another set of cells.

    Example:
        >>> pl.plots.comparison(pl.compare(exact, {"AtP": atp, "RelP": relp})).show()  # doctest: +SKIP
    """
    return _draw(_prepare_comparison(comparison, cells=cells))


def _draw(data: ComparisonData) -> go.Figure:
    colours = method_colours(data.methods)
    panel = max(260, len(data.sites) * (len(data.methods) * BAR + 20))
    columns = max(1, min(3, int(1300 // (panel + GAP_X))))
    n_rows = math.ceil((len(data.panels) + 1) / columns)
    width = max(words_width(data.title, data.subtitle), 60 + columns * (panel + GAP_X))
    gap = max(GAP_Y, 48 + 3.1 * max(map(len, data.sites))) if _angle(data, panel) else GAP_Y  # names that are turned hang down by half their length
    page = Page(width, 112 + n_rows * (PANEL_HEIGHT + gap) - 20, data.title, escape(data.subtitle, quote=False))
    keys = [f'<span style="color:{colour}">■</span> {escape(name, quote=False)}' for name, colour in colours.items()]
    page.note(16, 60, " &nbsp; ".join([*keys, f'<span style="color:{INK}">┄</span> split-half correlation of the reference']), size=13)
    for i in range(len(data.panels) + 1):
        row, column = divmod(i, columns)
        box = Box(60 + column * (panel + GAP_X), 124 + row * (PANEL_HEIGHT + gap), panel, PANEL_HEIGHT)
        if i < len(data.panels):
            _draw_bars(page, data, data.panels[i], box, colours)
        else:
            _draw_costs(page, data, box, colours)
    return page.figure


def _draw_bars(page: Page, data: ComparisonData, bars: Bars, box: Box, colours: dict[str, str]) -> None:
    page.note(box.left, box.top - 26, f"<b>{escape(bars.title, quote=False)}</b>", size=12)
    places = np.arange(len(data.sites), dtype=float)
    n = len(data.methods)
    step = 0.82 / n
    ticks = {
        "tickmode": "array",
        "tickvals": places.tolist(),
        "ticktext": [escape(site, quote=False) for site in data.sites],
        "tickangle": _angle(data, box.width),
    }
    where = page.panel(box, {"range": [-0.5, len(places) - 0.5], **ticks}, _vertical(bars, data))
    for i, name in enumerate(data.methods):
        x, value, low, high = places + (i - (n - 1) / 2) * step, bars.value[i], bars.low[i], bars.high[i]
        cells = zip(data.sites, value, low, high, strict=True)
        texts = [f"<b>{escape(name)}</b>, {escape(site)}<br>{v:.3f} [{a:.3f}, {b:.3f}]" for site, v, a, b in cells]
        look = {"width": step * 0.92, "marker": {"color": colours[name], "line": {"width": 0}}}
        page.figure.add_trace(go.Bar(x=x, y=value, **look, hovertext=texts, hovertemplate="%{hovertext}<extra></extra>", **where))
        # around the middle of the interval, since a percentile interval need not contain the value
        whiskers = {"type": "data", "array": (high - low) / 2, "color": INK, "thickness": 1, "width": 2.5}
        dot = {"size": 0.1, "color": INK}
        page.figure.add_trace(go.Scatter(x=x, y=(high + low) / 2, mode="markers", marker=dot, error_y=whiskers, hoverinfo="skip", **where))
        for quartile in bars.quartiles:
            marks = {"symbol": "circle", "size": 6, "color": "white", "line": {"width": 1.2, "color": INK}}
            page.figure.add_trace(go.Scatter(x=x, y=quartile[i], mode="markers", marker=marks, hoverinfo="skip", **where))
        for place in x[np.isnan(value)]:
            dash = {"text": "–", "showarrow": False, "yanchor": "bottom", "font": {"size": 13, "color": colours[name]}}
            page.figure.add_annotation(x=place, y=0, xref=where["xaxis"], yref=where["yaxis"], **dash)
    if bars.statistic == "pearson":
        line = {"mode": "lines", "line": {"color": INK, "width": 1.5, "dash": "dot"}, "hovertemplate": "split-half %{y:.3f}<extra></extra>"}
        for place, half in zip(places, data.half_pearson, strict=True):
            page.figure.add_trace(go.Scatter(x=[place - 0.46, place + 0.46], y=[half, half], **line, **where))
    if bars.statistic == "slope":
        line = {"color": MUTED, "width": 1, "dash": "dash"}
        page.figure.add_shape(type="line", xref=f"{where['xaxis']} domain", yref=where["yaxis"], x0=0, x1=1, y0=1, y1=1, line=line)


def _vertical(bars: Bars, data: ComparisonData) -> dict:
    bounds = [bars.value, bars.low, bars.high, *bars.quartiles, *([np.array(data.half_pearson)] if bars.statistic == "pearson" else [])]
    values = np.concatenate([np.ravel(part) for part in bounds])
    values = values[np.isfinite(values)]
    top = max(1.03, 1.05 * float(values.max(initial=0.0)))
    bottom = min(0.0, 1.05 * float(values.min(initial=0.0)))
    return {"range": [bottom, top], "nticks": 6, "zeroline": bottom < 0, "zerolinecolor": MUTED, "zerolinewidth": 1}


def _angle(data: ComparisonData, width: float | int) -> int:
    return -30 if max(map(len, data.sites)) * 6.5 > width / len(data.sites) else 0


def _draw_costs(page: Page, data: ComparisonData, box: Box, colours: dict[str, str]) -> None:
    page.note(box.left, box.top - 26, "<b>Cost: token positions computed (log scale)</b>", size=12)
    names = [name for name, _, _ in data.costs]
    values = np.array([positions for _, positions, _ in data.costs])
    drawn = values[values > 0]
    span = [math.floor(math.log10(drawn.min())) if drawn.size else 0, math.log10(drawn.max()) + 0.15 if drawn.size else 1]
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [escape(name, quote=False) for name in names]}
    where = page.panel(box, {"range": [-0.6, len(names) - 0.4], **ticks}, {"type": "log", "range": span, "dtick": 1, "exponentformat": "SI"})
    texts = [
        f"<b>{escape(name)}</b><br>{value:,.0f} token positions<br>{escape(text)}" for (name, _, text), value in zip(data.costs, values, strict=True)
    ]
    bar_colours = [colours.get(name, INK) for name in names]
    page.figure.add_trace(
        go.Bar(
            x=list(range(len(names))),
            y=values,
            width=0.6,
            marker_color=bar_colours,
            hovertext=texts,
            hovertemplate="%{hovertext}<extra></extra>",
            **where,
        )
    )
