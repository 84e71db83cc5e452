"""Stability against the size of the circuit: how much of it is chosen again on resamples of the prompts."""

from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped

from patchlab.circuits.evaluation.curve import FaithfulnessCurve
from patchlab.errors import CircuitError
from patchlab.plots._faithfulness import faint, percent, thinned, whole
from patchlab.plots._style import INK, MUTED, Box, Page, method_colours, words_width
from patchlab.stats.jaccard import BAR, ENOUGH

_WIDTH, _HEIGHT, _LEFT = 720, 320, 70


@dataclass(frozen=True)
class StabilityLine:
    """One method: at each number of edges asked for the mean Jaccard index of pairs of resamples, where 95 % of them lie, and what chance gives."""

    method: str
    colour: str
    n_requested: Int[np.ndarray, " size"]
    value: Float[np.ndarray, " size"]
    low: Float[np.ndarray, " size"]
    high: Float[np.ndarray, " size"]
    chance: Float[np.ndarray, " size"]
    hover: Shaped[np.ndarray, " size"]


@dataclass(frozen=True)
class StabilityData:
    """Lines in the order of the curve, all edges (or nodes) that there are to choose from, what they are, and the words."""

    title: str
    subtitle: str
    total: int
    unit: str
    lines: tuple[StabilityLine, ...]


def _prepare_stability(curve: FaithfulnessCurve) -> StabilityData:
    if "jaccard" not in curve.table:
        raise CircuitError("the stability of these circuits was not measured. Make the curve with faithfulness_curve(..., stability=100).")
    table = curve.table[curve.table["jaccard"].notna()]
    names = list(dict.fromkeys(table["method"]))
    if not names:
        raise CircuitError(f"no circuit of the curve has {curve.unit}, so there is no stability to draw.")
    colours, lines = method_colours(names), list[StabilityLine]()
    for name in names:
        rows = table[table["method"] == name]
        hover = [
            f"<b>{escape(name)}</b><br>{row['n_requested']:,} {curve.unit} ({row['fraction']:.2%}) asked for<br>Jaccard {row['jaccard']:.3f}, "
            f"95 % of pairs in {row['jaccard_lo']:.3f} to {row['jaccard_hi']:.3f}<br>with the choice on all prompts {row['jaccard_to_choice']:.3f}"
            f"<br>chance {row['jaccard_chance']:.3f}"
            for row in rows.to_dict("records")
        ]
        value, low, high, chance = (rows[column].to_numpy(float) for column in ("jaccard", "jaccard_lo", "jaccard_hi", "jaccard_chance"))
        sizes = rows["n_requested"].to_numpy(int)
        lines.append(StabilityLine(name, colours[name], sizes, value, low, high, chance, np.array(hover, dtype=object)))
    about = curve.provenance
    who = " × ".join(str(about[key]) for key in ("model", "task") if about.get(key))
    measured = about["stability"]
    prompts = sorted(set(measured["prompts"].values()))
    pairs = f"{measured['draws']} resamples of {' or '.join(map(str, prompts))} prompts"
    few = "" if min(prompts) >= ENOUGH else f"the bar of {BAR:g} asks for {ENOUGH}"
    subtitle = " · ".join(filter(None, [who, pairs, few, "bands: 95 % of pairs of resamples; dotted: chance"]))
    return StabilityData("Stability of circuits by size", subtitle, whole(curve), curve.unit, tuple(lines))


def stability(curve: FaithfulnessCurve) -> go.Figure:
    """Stability against the number of edges or nodes asked for (log axis): the mean Jaccard index of circuits chosen on resamples of the prompts.

    A line per method with a band in which 95 % of pairs of resamples lie; dotted in its colour what random circuits of the same sizes would
    share, which grows with the size; the dashed line is the literature's bar of .8, which it asks of 100 prompts and more.

    Args:
        curve: what :func:`patchlab.circuits.faithfulness_curve` returned with ``stability``, or :meth:`FaithfulnessCurve.load` read.

    Raises:
        CircuitError: stability was not measured.
    """
    data = _prepare_stability(curve)
    top = 68 + 20 * len(data.lines) + 14
    legend = [f'<span style="color:{line.colour}">━━</span> <b>{escape(line.method, quote=False)}</b>' for line in data.lines]
    width = max(words_width(data.title, data.subtitle), _LEFT + _WIDTH + 20)
    page = Page(width, top + _HEIGHT + 74, data.title, escape(data.subtitle, quote=False))
    for i, line in enumerate(legend):
        page.note(16, 64 + 20 * i, line)
    sizes = np.unique(np.concatenate([line.n_requested for line in data.lines]))
    ends = np.log10([sizes[0], sizes[-1]])
    margin = 0.03 * max(float(ends[1] - ends[0]), 0.3)
    ticks = thinned(sizes.tolist(), (_WIDTH - 20) / (float(ends[1] - ends[0]) + 2 * margin))
    share = [f"{n:,}<br><span style='color:{MUTED}'>{percent(n / data.total)}</span>" for n in ticks]
    across = {"type": "log", "range": [float(ends[0]) - margin, float(ends[1]) + margin], "tickmode": "array", "tickvals": ticks, "ticktext": share}
    across |= {"title": {"text": f"{data.unit} asked for, of {data.total:,} (log scale)"}, "showgrid": False}
    where = page.panel(
        Box(_LEFT, top, width - _LEFT - 20, _HEIGHT), across, {"range": [-0.02, 1.02], "title": {"text": "Jaccard index"}, "nticks": 6}
    )
    rule = {"color": MUTED, "width": 1, "dash": "dash"}
    page.figure.add_shape(type="line", xref="x domain", yref="y", x0=0, x1=1, y0=BAR, y1=BAR, line=rule, layer="below")
    for line in data.lines:
        quiet = {"mode": "lines", "hoverinfo": "skip", **where}
        page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.low, line={"width": 0}, **quiet))
        page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.high, line={"width": 0}, fill="tonexty", fillcolor=faint(line.colour), **quiet))
        page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.chance, line={"width": 1, "dash": "dot", "color": line.colour}, **quiet))
    for line in data.lines:
        look = {"mode": "lines+markers", "line": {"color": line.colour, "width": 2}, "marker": {"size": 5, "color": line.colour}}
        more = {"text": line.hover, "hovertemplate": "%{text}<extra></extra>", "name": line.method}
        page.figure.add_trace(go.Scatter(x=line.n_requested, y=line.value, **look, **more, **where))
    page.figure.update_layout(hovermode="closest", font={"color": INK})
    return page.figure
