"""Bars: named numbers of one or several series side by side, such as a method and its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from patchlab.errors import PatchlabError
from patchlab.plots._style import UNSCORED, Box, Page, lines, words_width
from patchlab.plots._trajectories import COLOURS

_LEFT_LETTER, _WIDTH, _ROW = 6.6, 420, 22


@dataclass(frozen=True)
class BarsData:
    """Names, and by series a number for each (NaN: none) and a colour."""

    title: str
    subtitle: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    series: Mapping[str, tuple[float, ...]]
    colours: Mapping[str, str]


def _prepare_bars(names: Sequence[str], series: Mapping[str, Sequence[float | int]], title: str, label: str, words: Sequence[str]) -> BarsData:
    if not names or not series or any(len(values) != len(names) for values in series.values()):
        raise PatchlabError(
            f"bars need names and as many numbers in each series; got {len(names)} names and {[len(v) for v in series.values()]} numbers."
        )
    free = iter(COLOURS * (1 + len(series) // len(COLOURS)))
    # what is there to be beaten is grey
    colours = {name: UNSCORED if "control" in name or name == "random" else next(free) for name in series}
    legend = [f'<span style="color:{colours[name]}">■</span> {escape(name, quote=False)}' for name in series]
    return BarsData(
        title, (*legend, *words), label, tuple(names), {name: tuple(float(value) for value in values) for name, values in series.items()}, colours
    )


def bars(
    names: Sequence[str], series: Mapping[str, Sequence[float | int]], *, title: str = "", label: str = "", words: Sequence[str] = ()
) -> go.Figure:
    """Named numbers of several series, as bars; series that are called a control (or ``random``) are grey.

    Args:
        names: one per group of bars.
        series: by name, a number per group.
        title: of the figure.
        label: of the numbers.
        words: further words below the title.

    Raises:
        PatchlabError: nothing to draw, or series of other lengths.

    Example:
        >>> pl.plots.bars(["ioi", "facts"], {"void": [0.7, 1.0], "random": [0.2, 0.3]}, label="accuracy").show()  # doctest: +SKIP
    """
    return _draw(_prepare_bars(names, series, title, label, words))


def _draw(data: BarsData) -> go.Figure:
    left = 24 + int(_LEFT_LETTER * max(map(len, data.names)))
    width = max(left + _WIDTH + 40, words_width(data.title, ""))
    subtitle = lines(data.subtitle, width)
    top = 74 + 18 * (len(subtitle) - 1)
    height = len(data.names) * (_ROW * len(data.series) + 8)
    page = Page(width, top + height + 56, data.title, "<br>".join(subtitle))
    yaxis = {"tickmode": "array", "tickvals": list(range(len(data.names))), "ticktext": [escape(name, quote=False) for name in data.names]}
    xaxis = {"title": {"text": data.label}, "zeroline": True, "zerolinecolor": "#8b949e"}
    where = page.panel(Box(left, top, _WIDTH, height), xaxis, {**yaxis, "range": [len(data.names) - 0.5, -0.5]})
    for name, values in data.series.items():
        texts = [
            f"<b>{escape(group, quote=False)}</b>, {escape(name, quote=False)}: {value:.4g}" for group, value in zip(data.names, values, strict=True)
        ]
        hover = {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}
        page.figure.add_trace(go.Bar(y=list(range(len(values))), x=values, orientation="h", marker={"color": data.colours[name]}, **hover, **where))
    page.figure.update_layout(barmode="group", bargap=0.25)
    return page.figure
