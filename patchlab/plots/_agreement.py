"""Approximation against exact effect, cell by cell: a scatter per site and method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int, Shaped
from plotly.colors import sample_colorscale

from patchlab.comparison.alignment import check_alike, check_names
from patchlab.plots._facets import cell_texts
from patchlab.plots._style import INK, MUTED, PALE, Box, Page, about, heading, lines, words_width
from patchlab.scores import ScoreMap
from patchlab.stats.agreement import Moments, mean_of_defined, pearson, slope

PANEL, GAP_X, GAP_Y = 200, 58, 64
_MANY = 4000
STRUCTURAL = "#b6bcc3"
LAYERS = sample_colorscale("Viridis", [i / 10 for i in range(10)])
"""Viridis without its last tenth, whose yellow is lost on white."""


@dataclass(frozen=True)
class Scatter:
    """The cells of one site under one method: example means in metric units, their layer, and the agreement over live cells.

    The Pearson correlations are those of :func:`patchlab.compare`: of the means, per prompt (their mean), pooled. ``exact`` is |exact| beside an
    ``unsigned`` method.
    """

    site: str
    method: str
    exact: Float[np.ndarray, " cell"]
    approximation: Float[np.ndarray, " cell"]
    live: Bool[np.ndarray, " cell"]
    layer: Int[np.ndarray, " cell"]
    hover: Shaped[np.ndarray, " cell"]
    pearson: float
    pearson_per_prompt: float
    pearson_pooled: float
    slope: float
    unsigned: bool
    not_scored: str | None


@dataclass(frozen=True)
class AgreementData:
    """Rows of scatters (a row per site, a column per method), the range of each row's axes (both the same), and the words around them."""

    title: str
    subtitle: str
    reference: str
    unit: str
    rows: tuple[tuple[Scatter, ...], ...]
    ranges: tuple[tuple[float, float], ...]


def _prepare_agreement(reference: ScoreMap, methods: Mapping[str, ScoreMap]) -> AgreementData:
    name_of_reference = str(reference.provenance.get("method", "reference"))
    check_names(name_of_reference, methods)
    for name, other in methods.items():
        check_alike(name_of_reference, reference, name, other)
    every = (reference, *methods.values())
    rows = tuple(tuple(_scatter(reference, other, name, site, every) for name, other in methods.items()) for site in reference.sites)
    ranges = tuple(_range(row) for row in rows)
    title = f"Approximations against {name_of_reference} patching, effect on {reference.provenance.get('metric', 'the metric')}"
    unit = str(reference.provenance.get("metric_unit", ""))
    return AgreementData(title, about(reference), name_of_reference, unit, rows, ranges)


def _range(row: Sequence[Scatter]) -> tuple[float, float]:
    """From the smallest to the largest value of a row, 0 included, with a margin."""
    values = np.nan_to_num(np.concatenate([part for scatter in row for part in (scatter.exact, scatter.approximation)]))
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    margin = 0.07 * (high - low) or 1.0
    return low - margin, high + margin


def _scatter(reference: ScoreMap, other: ScoreMap, method: str, site: str, all_maps: Sequence[ScoreMap]) -> Scatter:
    exact, approximation = (scores.mean(site).to_numpy().ravel() for scores in (reference, other))
    unsigned = bool(other.provenance.get("unsigned"))
    exact = np.abs(exact) if unsigned else exact
    chosen = reference.live[site].to_numpy().ravel()
    layer, hover = reference.layers(site), cell_texts(reference, site)
    there = np.all([scores.scored(site).to_numpy().ravel() for scores in all_maps if site not in scores.not_scored], axis=0)
    there = np.broadcast_to(there, chosen.shape)  # no map scores it
    exact, approximation, chosen, layer, hover = (part[there] for part in (exact, approximation, chosen, layer, hover))
    pair = exact[None, chosen], approximation[None, chosen]
    skipped = reference.not_scored.get(site) or other.not_scored.get(site)
    r, s = (float(statistic(*pair)[0]) if chosen.any() else float("nan") for statistic in (pearson, slope))
    per_prompt, pooled = (float("nan"), float("nan")) if skipped else _of_prompts(reference, other, site, there, unsigned)
    return Scatter(site, method, exact, approximation, chosen, layer, hover, r, per_prompt, pooled, s, unsigned, skipped)


def _of_prompts(reference: ScoreMap, other: ScoreMap, site: str, there: Bool[np.ndarray, " cell"], unsigned: bool) -> tuple[float, float]:
    """The mean over prompts of each prompt's correlation, and that of all prompts' effects pooled, over what is live for a prompt."""
    live = reference.live_per_example(site)
    n = len(live)
    parts = []
    for example in range(n):  # one prompt at a time: maps can be large
        exact, approximation = (scores.data[site].to_numpy()[example].astype(np.float64).ravel()[there] for scores in (reference, other))
        parts.append(Moments.of((np.abs(exact) if unsigned else exact)[None], approximation[None], live[example].ravel()[there][None]))
    moments, even = Moments.joined(parts), np.full((1, n), 1 / n)
    return float(mean_of_defined(moments.per_prompt(), even)[0]), float(moments.pooled(even)[0])


def agreement(reference: ScoreMap, methods: Mapping[str, ScoreMap]) -> go.Figure:
    """Scatter of each approximation against the reference: a row per site, a column per method, a point per cell.

    Points are example means, coloured by layer (of an edge, its reader's); structural zeros are grey. The dashed line is identity, the solid one
    approximation = slope · exact. The Pearson correlations over live cells are of the means that are drawn, per prompt (their mean) and of all
    prompts' effects pooled. An unsigned method is drawn against |exact|. The panels of a row share their axes.

    Raises:
        ScoreError: as :func:`patchlab.comparison.compare` does, for unlike maps or bad names.

    Example:
        >>> pl.plots.agreement(exact, {"AtP": atp, "RelP": relp}).show()  # doctest: +SKIP
    """
    return _draw(_prepare_agreement(reference, methods))


def _draw(data: AgreementData) -> go.Figure:
    n_rows, n_columns = len(data.rows), len(data.rows[0])
    width = max(words_width(data.title, ""), 70 + n_columns * (PANEL + GAP_X) + 60)
    words = lines([data.subtitle, *_legend(data)], width)
    width, top = max(width, *(words_width("", line) for line in words)), 76 + 16 * len(words)
    page = Page(width, top - 12 + n_rows * (PANEL + GAP_Y), data.title, "<br>".join(words))
    unit = f" ({escape(data.unit, quote=False)})" if data.unit else ""
    for i, (row, span) in enumerate(zip(data.rows, data.ranges, strict=True)):
        for j, scatter in enumerate(row):
            box = Box(70 + j * (PANEL + GAP_X), top + i * (PANEL + GAP_Y), PANEL, PANEL)
            page.note(box.left, box.top - 22, heading(f"{scatter.method} · {scatter.site}" + (", |exact|" if scatter.unsigned else ""), "", PANEL))
            shared = {"range": span, "nticks": 6, "mirror": True}
            across = {**shared, "title": {"text": f"{escape(data.reference, quote=False)} effect{unit}" if i == n_rows - 1 else ""}}
            up = {**shared, "title": {"text": f"approximation{unit}" if j == 0 else ""}}
            _draw_scatter(page, scatter, box, page.panel(box, across, up), span)
    layers = 1 + max(int(scatter.layer.max(initial=0)) for row in data.rows for scatter in row)
    bar = {
        "x": (44 + n_columns * (PANEL + GAP_X)) / width,
        "y": 1 - top / page.height,
        "yanchor": "top",
        "xanchor": "left",
        "lenmode": "pixels",
        "len": PANEL,
        "thickness": 10,
    }
    bar |= {"outlinewidth": 0, "ypad": 0, "xpad": 0, "nticks": 6, "title": {"text": "layer", "font": {"size": 12}}}
    page.figure.update_layout(coloraxis={"colorscale": LAYERS, "cmin": 0, "cmax": max(1, layers - 1), "colorbar": bar})
    return page.figure


def _legend(data: AgreementData) -> list[str]:
    words = ["dashed: identity", "solid: slope through the origin", "Pearson over live cells: of the means drawn, per prompt, pooled"]
    if any((~scatter.live).any() for row in data.rows for scatter in row):
        words.append(f'<span style="color:{STRUCTURAL}">●</span> structural zero')
    return words


def _draw_scatter(page: Page, scatter: Scatter, box: Box, where: dict[str, str], span: tuple[float, float]) -> None:
    ends = np.array(span)
    line = {"mode": "lines", "hoverinfo": "skip", **where}
    if scatter.not_scored is not None:
        page.figure.add_trace(go.Scatter(x=[None], y=[None], **line))  # axes without a trace are not drawn
        domain = {"xref": f"{where['xaxis']} domain", "yref": f"{where['yaxis']} domain"}
        page.figure.add_shape(type="rect", **domain, x0=0, x1=1, y0=0, y1=1, fillcolor=PALE, line_width=0, layer="below")
        text = heading("not scored", scatter.not_scored, PANEL - 16)
        middle: dict[str, Any] = {"xanchor": "center", "yanchor": "middle", "align": "center"}
        page.note(box.left + PANEL / 2, box.top + PANEL / 2, text, colour=MUTED, **middle)
        return
    page.figure.add_trace(go.Scatter(x=ends, y=ends, line={"color": MUTED, "width": 1, "dash": "dash"}, **line))
    if np.isfinite(scatter.slope):
        page.figure.add_trace(go.Scatter(x=ends, y=scatter.slope * ends, line={"color": INK, "width": 1}, **line))
    kind = go.Scattergl if scatter.exact.size > _MANY else go.Scatter
    what = "|exact|" if scatter.unsigned else "exact"
    template = f"%{{text}}<br>{what} %{{x:.3g}}, {escape(scatter.method)} %{{y:.3g}}<extra></extra>"
    for chosen in (~scatter.live, scatter.live):
        if chosen.any():
            is_live = bool(scatter.live[chosen][0])
            colour = {"color": scatter.layer[chosen], "coloraxis": "coloraxis"} if is_live else {"color": STRUCTURAL}
            marker = {"size": 6 if is_live else 5, "opacity": 0.85, "line": {"width": 0.5, "color": "white"}, **colour}
            points = {"x": scatter.exact[chosen], "y": scatter.approximation[chosen], "text": scatter.hover[chosen]}
            page.figure.add_trace(kind(**points, mode="markers", marker=marker, hovertemplate=template, **where))
    numbers = {"r, means": scatter.pearson, "per prompt": scatter.pearson_per_prompt, "pooled": scatter.pearson_pooled, "slope": scatter.slope}
    lines = [f"{name} {'undefined' if np.isnan(value) else f'{value:.2f}'}" for name, value in numbers.items()]
    if _crowded(scatter, span):
        page.note(box.left + PANEL - 7, box.top + PANEL - 6, "<br>".join(lines), size=11, **_BEHIND, xanchor="right", yanchor="bottom")
    else:
        page.note(box.left + 7, box.top + 6, "<br>".join(lines), size=11, **_BEHIND)


_BEHIND = {"bgcolor": "rgba(255,255,255,0.75)", "borderpad": 1}


def _crowded(scatter: Scatter, span: tuple[float, float]) -> bool:
    """Whether more points lie where the numbers would stand at the top left than at the bottom right."""
    x, y = ((values - span[0]) / (span[1] - span[0]) for values in (scatter.exact, scatter.approximation))
    return int(((x < 0.5) & (y > 0.65)).sum()) > int(((x > 0.5) & (y < 0.35)).sum())
