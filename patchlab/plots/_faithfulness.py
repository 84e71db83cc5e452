"""Faithfulness against the size of the circuit: which score finds the smaller faithful one."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped

from patchlab.circuits.evaluation.curve import RANDOM, FaithfulnessCurve
from patchlab.circuits.smallest import SmallestFaithful
from patchlab.errors import CircuitError
from patchlab.plots._style import INK, MUTED, Box, Page, method_colours, words_width

LEVEL = 0.9
"""What counts as faithful in the legend: 90 % of what the model does beyond its ablated self."""
_WIDTH, _HEIGHT, _LEFT = 720, 380, 70


@dataclass(frozen=True)
class FaithfulnessLine:
    """One method: faithfulness with its 95 % interval at each number of edges (or nodes) asked for, what the legend says of it, and the ring.

    ``smallest`` is the number of edges asked for of the smallest faithful circuit (None: there is none), ``at`` its faithfulness.
    """

    method: str
    colour: str
    n_requested: Int[np.ndarray, " size"]
    n_edges: Float[np.ndarray, " size"]
    value: Float[np.ndarray, " size"]
    low: Float[np.ndarray, " size"]
    high: Float[np.ndarray, " size"]
    hover: Shaped[np.ndarray, " size"]
    smallest: int | None
    at: float
    ringed: str
    legend: str


@dataclass(frozen=True)
class FaithfulnessData:
    """Lines in the order of the curve (random circuits last), all edges of the graph, the range of the vertical axis, and the words.

    ``unit`` is what the circuits are made of, edges or nodes.
    """

    title: str
    subtitle: str
    total: int
    lines: tuple[FaithfulnessLine, ...]
    span: tuple[float, float]
    unit: str = "edges"


def _prepare_faithfulness(curve: FaithfulnessCurve, found: SmallestFaithful | None = None, level: float | int = LEVEL) -> FaithfulnessData:
    table = curve.table.to_dict("records")
    areas = {str(row["method"]): row if curve.mib_sizes else {} for row in curve.areas.to_dict("records")}
    names = sorted(dict.fromkeys(str(row["method"]) for row in table), key=lambda name: name == RANDOM)
    if not names:
        raise CircuitError("the curve has no rows, so there is nothing to draw.")
    rings = {name: _ring(curve, found, name, level) for name in names}
    colours = method_colours(names)
    lines = tuple(_line(name, colours[name], [row for row in table if row["method"] == name], areas[name], rings[name], curve.unit) for name in names)
    about = curve.provenance
    total = whole(curve)
    who = " × ".join(str(about[key]) for key in ("model", "task") if about.get(key))
    words = [who, about.get("metric"), f"{about['ablation']} ablation" if about.get("ablation") else None]
    importance = "|effect|" if about.get("by", "abs") == "abs" else "signed importance"
    chosen = {
        "top_n": f"{curve.unit} of largest {importance}",
        "thresholds": f"{curve.unit} above thresholds of {importance}",
        "greedy": f"chosen greedily by {importance}",
    }.get(str(about.get("how")))
    words += [chosen, "bands: 95 % CI over examples"]
    if found is not None:
        pairs = found.table.iloc[0]
        words.append(f"rings: sizes found on {pairs['finding_pairs']} pairs, f there on {pairs['reporting_pairs']} others")
    subtitle = " · ".join(str(word) for word in words if word)
    return FaithfulnessData("Faithfulness of circuits by size", subtitle, total, lines, _span(lines), curve.unit)


def _ring(curve: FaithfulnessCurve, found: SmallestFaithful | None, name: str, level: float | int) -> tuple[int | None, float, str, str]:
    """Where the smallest faithful circuit is (edges asked for, faithfulness), what it says there, and what the legend says."""
    if found is None:
        series = curve.smallest(name, level)
        best = {} if series is None else series.to_dict()
        if not best:
            return None, np.nan, "", f"f ≥ {level:g} from none of these sizes on"
        legend = f"f ≥ {level:g} from {best[curve.size_column]:,.0f} {curve.unit} on (of {len(curve.table[curve.table['method'] == name])} sizes)"
        return int(best["n_requested"]) or None, float(best["faithfulness"]), "", legend
    row = {str(row["method"]): row for row in found.table.to_dict("records")}.get(name)
    if row is None:  # random circuits
        return None, np.nan, "", ""
    if not np.isfinite(row["n_edges"]):
        return None, np.nan, "", f"f ≥ {found.level:g} from no size on"
    text = f"<b>{escape(name)}</b><br>" + escape(found.sentence(name)).replace("; ", "<br>")
    interval = f" [{row['n_edges_lo']:,.0f}, {row['n_edges_hi']:,.0f}]" if np.isfinite(row["n_edges_lo"]) else ""
    return int(row["n_requested"]), float(row["faithfulness"]), text, f"f ≥ {found.level:g} from {row['n_edges']:,.0f}{interval} edges on"


def _line(
    name: str, colour: str, rows: list[dict[Any, Any]], area: dict[Any, Any], ring: tuple[int | None, float, str, str], unit: str
) -> FaithfulnessLine:
    smallest, at, ringed, reach = ring
    words = [f"{key.upper()} {_with_interval(area[key], area[f'{key}_lo'], area[f'{key}_hi'])}" for key in ("cpr", "cmd")] if area else []
    drawn = [row for row in rows if row["n_requested"] > 0]
    hover = [
        f"<b>{escape(name)}</b><br>{row['n_requested']:,} {unit} ({row['fraction']:.2%}) asked for"
        + (f", {row['n_edges']:,.4g} after pruning<br>" if unit == "edges" else _threshold(row))
        + f"faithfulness {_with_interval(row['faithfulness'], row['lo'], row['hi'])}<br>metric {row['metric']:.3g}"
        + (f"<br>Jaccard between resamples {row['jaccard']:.3f}" if np.isfinite(row.get("jaccard", np.nan)) else "")
        for row in drawn
    ]
    requested = np.array([row["n_requested"] for row in drawn], dtype=int)
    n_edges, value, low, high = (np.array([row[column] for row in drawn], dtype=float) for column in (f"n_{unit}", "faithfulness", "lo", "hi"))
    if smallest is not None and not ringed:
        ringed = hover[int(np.flatnonzero(requested == smallest)[0])]
    legend = " · ".join(filter(None, [*words, reach]))
    return FaithfulnessLine(name, colour, requested, n_edges, value, low, high, np.array(hover, dtype=object), smallest, at, ringed, legend)


def _threshold(row: dict[Any, Any]) -> str:
    """The threshold of a circuit of nodes, and what the model does without it."""
    level = f", at least {row['threshold']:.2g}" if np.isfinite(row["threshold"]) else ""
    return f"{level}<br>completeness {_with_interval(row['completeness'], row['completeness_lo'], row['completeness_hi'])}<br>"


def _with_interval(value: float, low: float, high: float) -> str:
    """A value with its interval; without, where there is none (one example)."""
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def _span(lines: tuple[FaithfulnessLine, ...]) -> tuple[float, float]:
    """From 0 (or below) to 1 (or above), without letting a wild interval squeeze the rest."""
    values = np.concatenate([*(line.value for line in lines), np.array([line.at for line in lines if line.smallest is not None])])
    bounds = np.concatenate([part for line in lines for part in (line.low, line.high)])
    bounds = bounds[np.isfinite(bounds)]
    low, high = float(values.min(initial=0.0)), float(values.max(initial=1.0))
    room = 0.35 * (high - low)
    low, high = max(low - room, float(bounds.min(initial=low))), min(high + room, float(bounds.max(initial=high)))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def whole(curve: FaithfulnessCurve) -> int:
    """Edges of the graph (or candidate nodes), which a curve has as shares: of the largest size, since sizes are rounded down."""
    last = curve.table.sort_values("fraction").iloc[-1]
    return round(last["n_requested"] / last["fraction"])


def faithfulness(curve: FaithfulnessCurve, found: SmallestFaithful | None = None, *, level: float | int = LEVEL) -> go.Figure:
    """Faithfulness against the number of edges that were asked for (before pruning; log axis), or of nodes, a line with a 95 % band per method.

    Random circuits of the same sizes are grey. The dashed line is 1, the whole model; the dotted one the level, and a ring marks the smallest
    circuit from which on all larger ones reach it. The legend has the areas (CPR: under the curve, high is good; CMD: between the curve and 1,
    low is good) and the number of edges of that circuit, after pruning. A size of 0 has no place on the axis.

    Args:
        curve: what :func:`patchlab.circuits.faithfulness_curve` returned.
        found: what :func:`patchlab.circuits.smallest_faithful` returned: the rings are those circuits, at their faithfulness on the reporting
            pairs; without, they are among the sizes of the curve.
        level: what counts as faithful, without ``found``.

    Raises:
        CircuitError: a curve without rows.

    Example:
        >>> pl.plots.faithfulness(pl.circuits.faithfulness_curve(model, {"EAP": atp, "edge-RelP": relp}, held_out)).show()  # doctest: +SKIP
    """
    return _draw(_prepare_faithfulness(curve, found, level), float(level) if found is None else found.level)


def _draw(data: FaithfulnessData, level: float) -> go.Figure:
    top = 68 + 20 * len(data.lines) + 14
    legend = [f'<span style="color:{line.colour}">━━</span> <b>{escape(line.method, quote=False)}</b> &nbsp; {line.legend}' for line in data.lines]
    width = max(words_width(data.title, data.subtitle), *(0.97 * words_width("", line) for line in legend), _LEFT + _WIDTH + 20)
    page = Page(width, top + _HEIGHT + 74, data.title, escape(data.subtitle, quote=False))
    for i, line in enumerate(legend):
        page.note(16, 64 + 20 * i, line)
    sizes = np.unique(np.concatenate([line.n_requested for line in data.lines]))
    rings = [line.smallest for line in data.lines if line.smallest is not None]
    ends = np.log10([min([sizes[0], *rings]), max([sizes[-1], *rings])])
    margin = 0.03 * max(float(ends[1] - ends[0]), 0.3)
    ticks = thinned(sizes.tolist(), (_WIDTH - 20) / (float(ends[1] - ends[0]) + 2 * margin))
    share = [f"{n:,}<br><span style='color:{MUTED}'>{percent(n / data.total)}</span>" for n in ticks]
    across = {"type": "log", "range": [float(ends[0]) - margin, float(ends[1]) + margin], "tickmode": "array", "tickvals": ticks, "ticktext": share}
    across |= {"title": {"text": f"{data.unit} asked for, of {data.total:,} (log scale)"}, "showgrid": False}
    box = Box(_LEFT, top, width - _LEFT - 20, _HEIGHT)
    where = page.panel(box, across, {"range": data.span, "title": {"text": "faithfulness"}, "nticks": 8})
    for height, dash in ((1.0, "dash"), (level, "dot")):
        line = {"color": MUTED, "width": 1, "dash": dash}
        page.figure.add_shape(type="line", xref="x domain", yref="y", x0=0, x1=1, y0=height, y1=height, line=line, layer="below")
        mark = {"xanchor": "right", "yanchor": "bottom", "showarrow": False, "font": {"size": 10, "color": MUTED}}
        page.figure.add_annotation(x=1, xref="x domain", y=height, yref="y", text=f"{height:g}", **mark)
    for line in data.lines:
        if np.isfinite(line.low).any():
            band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", **where}
            page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.low, **band))
            page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.high, fill="tonexty", fillcolor=faint(line.colour), **band))
    for line in sorted(data.lines, key=lambda line: line.method != RANDOM):
        look = {"mode": "lines+markers", "line": {"color": line.colour, "width": 2}, "marker": {"size": 5, "color": line.colour}}
        more = {"text": line.hover, "hovertemplate": "%{text}<extra></extra>", "name": line.method}
        page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.value, **look, **more, **where))
        if line.smallest is not None:
            ring = {"size": 12, "color": "white", "line": {"width": 2.5, "color": line.colour}}
            ringed = {"mode": "markers", "marker": ring, "text": [line.ringed], "hovertemplate": "%{text}<extra></extra>"}
            page.figure.add_trace(go.Scatter(x=[line.smallest], y=[line.at], **ringed, **where))
    page.figure.update_layout(hovermode="closest", font={"color": INK})
    return page.figure


def thinned(sizes: list[int], per_decade: float) -> list[int]:
    """Ticks with room for their labels."""
    kept: list[int] = []
    for n in sizes:
        if not kept or (np.log10(n) - np.log10(kept[-1])) * per_decade >= 44:
            kept.append(n)
    return kept


def percent(share: float) -> str:
    """A share of the edges, to two digits: ``0.1 %``.

    >>> percent(0.001), percent(0.2), percent(1.0)
    ('0.1 %', '20 %', '100 %')
    """
    return f"{float(f'{100 * share:.2g}'):g} %"


def faint(colour: str) -> str:
    """A colour of six digits, almost transparent."""
    return f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.16)"
