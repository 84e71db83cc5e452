"""Methods in the order of their ranks over many settings, and how far each is behind the first where both ran."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from patchlab.errors import ScoreError
from patchlab.plots._style import GREY, INK, MUTED, Box, Page, method_colours, words_width

ROW, LEFT_PANEL, RIGHT_PANEL, WORDS = 34, 280, 380, 170
_RANKING, _DIFFERENCES = {"site", "setting", "method", "value"}, {"site", "setting", "method", "other", "value", "lo", "hi"}


@dataclass(frozen=True)
class Ranked:
    """One method at one site: its mean rank and its rank in each setting that counts, in how many it is best, and its paired differences from the
    first method (method minus first) with their intervals, in all settings where both ran.

    ``better``, ``worse`` and ``open`` count those whose interval is above 0, below 0, or contains it (or is not defined).
    """

    method: str
    mean_rank: float
    ranks: Float[np.ndarray, " setting"]
    best: int
    settings: tuple[str, ...]
    value: Float[np.ndarray, " paired"]
    low: Float[np.ndarray, " paired"]
    high: Float[np.ndarray, " paired"]
    better: int
    worse: int
    open: int


@dataclass(frozen=True)
class SiteRanking:
    """The methods of one site, the best mean rank first: over the ``complete`` settings, of ``settings``, in which all of them have a value.

    ``absent`` methods have a value in no setting of this site; ``names`` are the complete settings, in the order of the ranks.
    """

    site: str
    methods: tuple[Ranked, ...]
    complete: int
    settings: int
    absent: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class RankingData:
    """A panel per site, and the words around them."""

    title: str
    subtitle: str
    what: str
    sites: tuple[SiteRanking, ...]


def rank_methods(values: pd.DataFrame, differences: pd.DataFrame) -> tuple[SiteRanking, ...]:
    """The ranking of methods at each site; rank 1 is the largest value, equal values share the mean of their ranks.

    Args:
        values: ``site``, ``setting``, ``method`` and ``value``, at most one row of each; what is undefined is NaN.
        differences: ``site``, ``setting``, ``method``, ``other``, ``value`` (method minus other), ``lo`` and ``hi``.

    Raises:
        ScoreError: a column is missing, or a method has two values in one setting.
    """
    for frame, columns in ((values, _RANKING), (differences, _DIFFERENCES)):
        if missing := sorted(columns - {*map(str, frame)}):
            raise ScoreError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, frame)) or 'none'}.")
    if values.duplicated(["site", "setting", "method"]).any():
        row = values[values.duplicated(["site", "setting", "method"])].iloc[0]
        raise ScoreError(f"{row['method']} has two values at {row['site']} in {row['setting']}; give one per site, setting and method.")
    names = list(dict.fromkeys(values["method"]))
    return tuple(_site(str(site), rows, differences[differences["site"] == site], names) for site, rows in values.groupby("site", sort=False))


def _site(site: str, rows: pd.DataFrame, differences: pd.DataFrame, names: list[str]) -> SiteRanking:
    order = list(dict.fromkeys(rows["setting"]))
    spread = rows.pivot_table(index="setting", columns="method", values="value", dropna=False).reindex(order).astype(float)
    spread = spread.reindex(columns=[name for name in names if name in spread]).dropna(axis="columns", how="all")
    whole = spread.dropna()
    ranks = whole.rank(axis="columns", ascending=False)
    best = whole.eq(whole.max(axis="columns"), axis="index")
    mean = ranks.mean()
    listed = sorted(spread.columns, key=lambda name: mean[name] if len(whole) else 0.0)  # in the order of the table where ranks are equal
    first = listed[0] if listed and len(whole) else None
    methods = tuple(
        _ranked(str(name), float(mean[name]) if len(whole) else np.nan, ranks[name].to_numpy(float), int(best[name].sum()), first, differences)
        for name in listed
    )
    absent = tuple(name for name in names if name not in spread)
    return SiteRanking(site, methods, len(whole), len(spread), absent, tuple(map(str, whole.index)))


def _ranked(name: str, mean: float, ranks: np.ndarray, best: int, first: str | None, differences: pd.DataFrame) -> Ranked:
    found: list[tuple[str, float, float, float]] = []
    for row in differences.to_dict("records") if first not in (None, name) else ():
        value, low, high = (float("nan") if row[one] is None else float(row[one]) for one in ("value", "lo", "hi"))
        if (row["method"], row["other"]) == (name, first):
            found.append((str(row["setting"]), value, low, high))
        elif (row["method"], row["other"]) == (first, name):
            found.append((str(row["setting"]), -value, -high, -low))
    value, low, high = (np.array([one[i] for one in found], dtype=float) for i in (1, 2, 3))
    better, worse = int((low > 0).sum()), int((high < 0).sum())
    return Ranked(name, mean, ranks, best, tuple(one[0] for one in found), value, low, high, better, worse, len(found) - better - worse)


def _prepare_ranking(values: pd.DataFrame, differences: pd.DataFrame, what: str) -> RankingData:
    sites = rank_methods(values, differences)
    if not any(site.methods for site in sites):
        raise ScoreError("no method has a value, so there is no ranking to draw.")
    subtitle = "a dot per setting; ranks are over settings in which all methods of the site have a value; intervals are 95 %"
    return RankingData(f"Methods by their rank in {what}", subtitle, what, sites)


def ranking(values: pd.DataFrame, differences: pd.DataFrame, *, what: str = "the Pearson correlation per prompt") -> go.Figure:
    """Methods by mean rank over settings, one panel per site, with how often each is best; beside them paired differences from the first.

    Ranks are over the settings in which all methods of the site have a value; rank 1 is the largest. A filled dot is a difference whose interval
    excludes 0; the stroke is the mean over settings, each counting once.

    Args:
        values: ``site``, ``setting`` (what is ranked within), ``method`` and ``value``.
        differences: ``site``, ``setting``, ``method``, ``other``, ``value`` (method minus other) and its 95 % interval ``lo``, ``hi``.
        what: the values, in words.

    Raises:
        ScoreError: a column is missing, a method has two values in one setting, or none has one.

    Example:
        >>> pl.plots.ranking(values, differences).show()  # doctest: +SKIP
    """
    return _draw(_prepare_ranking(values, differences, what))


def _draw(data: RankingData) -> go.Figure:
    colours = method_colours(one.method for site in data.sites for one in site.methods)
    left = 30 + 7 * max(len(name) for name in colours)
    width = max(left + LEFT_PANEL + WORDS + RIGHT_PANEL + WORDS, words_width(data.title, data.subtitle))
    heights = [ROW * max(1, len(site.methods)) + 100 for site in data.sites]
    page = Page(width, 68 + sum(heights), data.title, escape(data.subtitle, quote=False))
    ends = [bound for site in data.sites for one in site.methods for part in (one.value, one.low, one.high) for bound in part[np.isfinite(part)]]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    margin = 0.06 * (high - low) or 0.1
    most = max(len(site.methods) for site in data.sites)
    top = 68.0
    for site, height in zip(data.sites, heights, strict=True):
        _draw_site(page, site, Box(left, top, LEFT_PANEL, ROW * max(1, len(site.methods))), colours, most, (low - margin, high + margin))
        top += height
    return page.figure


def _draw_site(page: Page, site: SiteRanking, box: Box, colours: dict[str, str], most: int, span: tuple[float, float]) -> None:
    words = f"{site.complete} of {site.settings} settings" if site.complete < site.settings else f"{site.settings} settings"
    words += f"; no value: {', '.join(site.absent)}" if site.absent else ""
    page.note(box.left, box.top, f"<b>{escape(site.site, quote=False)}</b> &nbsp; <span style='color:{MUTED}'>{escape(words, quote=False)}</span>")
    if not site.complete:
        text = "in no setting do all methods have a value, so none is ranked"
        page.note(box.left, box.top + 30, text, colour=MUTED)
        return
    names, first = [one.method for one in site.methods], site.methods[0].method
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [escape(name, quote=False) for name in names]}
    down = {"range": [len(names) - 0.5, -0.5], **ticks}
    frame = {"left": box.left, "top": box.top + 26, "height": box.height}
    across: dict[str, Any] = {"range": [0.7, most + 0.3], "dtick": 1, "title": {"text": "rank (1 is best)"}, "showgrid": True, "gridcolor": GREY}
    where = page.panel(Box(frame["left"], frame["top"], LEFT_PANEL, frame["height"]), across, down)
    for row, one in enumerate(site.methods):
        spread = row + np.linspace(-0.22, 0.22, len(one.ranks)) if len(one.ranks) > 1 else np.array([float(row)])
        texts = [f"<b>{escape(one.method)}</b><br>{escape(name)}<br>rank {rank:g}" for name, rank in zip(site.names, one.ranks, strict=True)]
        look = {"size": 5, "color": colours[one.method], "opacity": 0.45}
        hover = {"text": texts, "hovertemplate": "%{text}<extra></extra>"}
        page.figure.add_trace(go.Scatter(x=one.ranks, y=spread, mode="markers", marker=look, **hover, **where))
        mark = {"size": 11, "color": colours[one.method], "line": {"width": 1.5, "color": "white"}}
        text = f"<b>{escape(one.method)}</b><br>mean rank {one.mean_rank:.2f}<br>best in {one.best} of {site.complete}"
        mean = {"text": [text], "hovertemplate": "%{text}<extra></extra>"}
        page.figure.add_trace(go.Scatter(x=[one.mean_rank], y=[row], mode="markers", marker=mark, **mean, **where))
        at = {"xanchor": "left", "yanchor": "middle", "size": 11, "colour": INK if one.best else MUTED}
        best = f"{one.mean_rank:.2f}, best in {one.best}"
        page.note(box.left + LEFT_PANEL + 10, frame["top"] + ROW * (row + 0.5), best, **at)
    right = Box(box.left + LEFT_PANEL + WORDS, frame["top"], RIGHT_PANEL, frame["height"])
    title = {"text": f"difference from {escape(first, quote=False)} where both ran"}
    beside = page.panel(right, {"range": span, "nticks": 6, "title": title}, {**down, "showticklabels": False})
    zero = {"color": MUTED, "width": 1, "dash": "dash"}
    page.figure.add_shape(type="line", xref=beside["xaxis"], yref=f"{beside['yaxis']} domain", x0=0, x1=0, y0=0, y1=1, line=zero, layer="below")
    for row, one in enumerate(site.methods):
        _draw_differences(page, one, row, first, colours[one.method], beside)
        said = "the first" if one.method == first else f"{one.worse} below, {one.better} above, {one.open} open"
        said = said if len(one.value) or one.method == first else "no pairs"
        at = {"xanchor": "left", "yanchor": "middle", "size": 11, "colour": MUTED}
        page.note(right.left + right.width + 10, right.top + ROW * (row + 0.5), said, **at)


def _draw_differences(page: Page, one: Ranked, row: int, first: str, colour: str, where: dict[str, str]) -> None:
    if not len(one.value):
        page.figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", **where))  # axes without a trace are not drawn
        return
    y = row + np.linspace(-0.28, 0.28, len(one.value)) if len(one.value) > 1 else np.array([float(row)])
    whiskers = {"type": "data", "array": (one.high - one.low) / 2, "color": colour, "thickness": 1, "width": 0}
    middle = {"mode": "markers", "marker": {"size": 0.1, "color": colour}, "hoverinfo": "skip"}
    # around the middle of the interval, since a percentile interval need not contain the value
    page.figure.add_trace(go.Scatter(x=(one.low + one.high) / 2, y=y, error_x=whiskers, **middle, **where))
    sure = (one.low > 0) | (one.high < 0)
    marker = {"size": 6, "color": [colour if yes else "white" for yes in sure], "line": {"width": 1.2, "color": colour}}
    texts = [
        f"<b>{escape(one.method)} − {escape(first)}</b><br>{escape(name)}<br>{v:+.3f} [{a:+.3f}, {b:+.3f}]"
        for name, v, a, b in zip(one.settings, one.value, one.low, one.high, strict=True)
    ]
    hover = {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}
    page.figure.add_trace(go.Scatter(x=one.value, y=y, mode="markers", marker=marker, **hover, **where))
    stroke = {"symbol": "line-ns", "size": 20, "line": {"width": 2, "color": INK}}
    mean = float(np.nanmean(one.value)) if np.isfinite(one.value).any() else np.nan
    said = {"hovertext": [f"mean over {len(one.value)} settings {mean:+.3f}"], "hovertemplate": "%{hovertext}<extra></extra>"}
    page.figure.add_trace(go.Scatter(x=[mean], y=[row], mode="markers", marker=stroke, **said, **where))
