"""Trajectories: what the answers are worth after each layer, as lenses read it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from patchlab.errors import LensError
from patchlab.lenses import Distributions
from patchlab.plots._style import INK, Box, Page, Pixels, lines, words_width
from patchlab.stats.bootstrap import interval, resampling_weights

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
_VALUES = {"metric": "metric", "probability": "probability of the answers", "rank": "rank of the best correct answer (0: the most likely token)"}
_WIDTH, _HEIGHT, _LEFT = 640, 340, 76


@dataclass(frozen=True)
class TrajectoryLine:
    """One line: mean over examples after each layer, with its 95 % bootstrap interval."""

    name: str
    colour: str
    dashed: bool
    layers: Int[np.ndarray, " layer"]
    mean: Float[np.ndarray, " layer"]
    low: Float[np.ndarray, " layer"]
    high: Float[np.ndarray, " layer"]


@dataclass(frozen=True)
class TrajectoriesData:
    """Lines, and what the vertical axis says."""

    title: str
    subtitle: tuple[str, ...]
    label: str
    lines: tuple[TrajectoryLine, ...]


def _prepare_trajectories(distributions: Distributions | Mapping[str, Distributions], value: str) -> TrajectoriesData:
    if value not in _VALUES:
        raise LensError(f"unknown value {value!r}; there are {', '.join(_VALUES)}.")
    given = {distributions.name: distributions} if isinstance(distributions, Distributions) else dict(distributions)
    if not given:
        raise LensError("there is nothing to draw; give distributions, or several by name.")
    found: list[TrajectoryLine] = []
    for i, (name, one) in enumerate(given.items()):
        if one.metric is None:
            raise LensError(f"{name} was read from plain prompts, which have no answers to follow; read a task.")
        parts = {"probability": ("correct", "incorrect")}.get(value, (value,))
        for part in parts:
            values = one.data[part].to_numpy()
            low, high = interval(resampling_weights(len(values), 1000, 0) @ values)
            label = f"{name}: {part}" if len(parts) > 1 else name
            colour = COLOURS[i % len(COLOURS)]
            found.append(TrajectoryLine(label, colour, part == "incorrect", np.array(one.layers), values.mean(0), low, high))
    first = next(iter(given.values()))
    metric, unit = first.metric or ("", "")
    label = f"{metric} ({unit})" if value == "metric" and unit else _VALUES[value]
    words = (first.subject, "read after each layer at the answer position", "bands: 95 % CI over examples")
    return TrajectoriesData(
        f"Where the answer appears: {metric if value == 'metric' else _VALUES[value].partition(' (')[0]}", words, label, tuple(found)
    )


def trajectories(distributions: Distributions | Mapping[str, Distributions], value: str = "metric") -> go.Figure:
    """The answers after each layer, as one or several lenses read them.

    Args:
        distributions: read from a task; or several by name.
        value: ``metric``; ``probability`` of the correct (solid) and incorrect answers (dashed); or ``rank`` of the best correct one.

    Raises:
        LensError: plain prompts, or an unknown value.

    Example:
        >>> pl.plots.trajectories({"logit lens": plain, "Jacobian lens": fitted}, "probability").show()  # doctest: +SKIP
    """
    return _draw(_prepare_trajectories(distributions, value))


def _draw(data: TrajectoriesData) -> go.Figure:
    right = 40 + int(6.8 * max(len(line.name) for line in data.lines))
    width = max(_LEFT + _WIDTH + right, words_width(data.title, ""))
    subtitle = lines(data.subtitle, width)
    top = 84 + 18 * (len(subtitle) - 1)
    page = Page(width, top + _HEIGHT + 56, data.title, "<br>".join(subtitle))
    every = sorted({int(layer) for line in data.lines for layer in line.layers})
    xaxis = {"title": {"text": "after layer"}, "tickmode": "array", "tickvals": every, "range": [every[0] - 0.3, every[-1] + 0.3]}
    where = page.panel(Box(_LEFT, top, _WIDTH, _HEIGHT), xaxis, {"title": {"text": data.label}, "zeroline": True, "zerolinecolor": "#dcdfe3"})
    for line in data.lines:
        draw_line(page, line, where)
    _legend(page, data, top)
    return page.figure


def draw_line(page: Page, line: TrajectoryLine, where: dict[str, str]) -> None:
    """One line by layer with its band, in a panel."""
    layers = line.layers.tolist()
    band = f"rgba({','.join(str(int(line.colour[i : i + 2], 16)) for i in (1, 3, 5))},0.15)"
    page.figure.add_trace(
        go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*line.high.tolist(), *line.low.tolist()[::-1]],
            fill="toself",
            fillcolor=band,
            line={"width": 0},
            hoverinfo="skip",
            mode="lines",
            **where,
        )
    )
    texts = [
        f"<b>{line.name}</b>, layer {layer}<br>{m:.4g} [{a:.4g}, {b:.4g}]"
        for layer, m, a, b in zip(layers, line.mean, line.low, line.high, strict=True)
    ]
    style = {"color": line.colour, "width": 2, "dash": "dash" if line.dashed else "solid"}
    page.figure.add_trace(
        go.Scatter(
            x=layers,
            y=line.mean,
            mode="lines+markers",
            line=style,
            marker={"size": 5},
            hovertext=texts,
            hovertemplate="%{hovertext}<extra></extra>",
            **where,
        )
    )


def _legend(page: Page, data: TrajectoriesData, top: Pixels) -> None:
    """Names beside the panel, each with a piece of its line."""
    for i, line in enumerate(data.lines):
        sign = "┅" if line.dashed else "━"
        page.note(_LEFT + _WIDTH + 12, top + 4 + 20 * i, f'<span style="color:{line.colour}">{sign}{sign}</span> {line.name}', colour=INK)
