"""Skip effects: what skipping one layer does to the later ones, layer by layer."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Shaped

from patchlab.depth import SkipEffects
from patchlab.errors import LensError
from patchlab.plots._style import Box, Page, lines, sparse_ticks, words_width

_TOP, _LEFT, _CELL = 96, 74, 30


@dataclass(frozen=True)
class LayerGridData:
    """A number for every pair of layers, hover texts, and what the axes are."""

    title: str
    subtitle: tuple[str, ...]
    values: Float[np.ndarray, "row column"]
    hover: Shaped[np.ndarray, "row column"]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    axes: tuple[str, str]


def _prepare_skip_effects(effects: SkipEffects, over: str) -> LayerGridData:
    values = effects.matrix(over)
    where = "at all positions" if effects.start is None else f"skipped before position {effects.start}, measured from it on"
    how = "removed from the input of one layer at a time" if effects.local else "the change runs through all layers"
    words = (effects.subject, f"{over} over prompts of the largest relative change over positions", how, where)
    layers = tuple(range(len(values)))
    return _grid("Effect of skipping a layer on the contribution of later ones", words, values, layers, layers, ("skipped layer", "later layer"))


def _grid(
    title: str,
    words: tuple[str, ...],
    values: Float[np.ndarray, "row column"],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    axes: tuple[str, str],
) -> LayerGridData:
    texts = [
        [f"<b>{axes[0]} {r}, {axes[1]} {c}</b><br>{value:.4g}" for c, value in zip(columns, line, strict=True)]
        for r, line in zip(rows, values, strict=True)
    ]
    return LayerGridData(title, words, values, np.where(np.isnan(values), "", np.array(texts, dtype=object)), rows, columns, axes)


def skip_effects(effects: SkipEffects, over: str = "max") -> go.Figure:
    """A layer × layer heatmap of :func:`patchlab.depth.skip_effects`: rows are skipped, columns are changed.

    Args:
        effects: to draw.
        over: prompts: the ``max`` (as in the paper) or the ``mean``.

    Raises:
        LensError: another word.

    Example:
        >>> pl.plots.skip_effects(depth.skip_effects(model, task)).show()  # doctest: +SKIP
    """
    return _draw(_prepare_skip_effects(effects, over))


def layer_grid(values: xr.DataArray, *, title: str = "") -> go.Figure:
    """A number for every pair of layers of one or two models, such as what :func:`patchlab.depth.maps_between` gives.

    Raises:
        LensError: an array that has not two axes.
    """
    if values.ndim != 2:
        raise LensError(f"a grid of layers has two axes; got {list(values.dims)}.")
    rows, columns = (tuple(int(layer) for layer in values[dim].to_numpy()) for dim in values.dims)
    axes = tuple(str(dim).replace("_", " ") for dim in values.dims)
    return _draw(_grid(title or str(values.name or "layers"), ("darker is more",), values.to_numpy(), rows, columns, (axes[0], axes[1])))


def _draw(data: LayerGridData) -> go.Figure:
    n_rows, n_columns = data.values.shape
    cell = max(12, min(_CELL, 900 // max(n_rows, n_columns)))
    width = max(_LEFT + cell * n_columns + 110, words_width(data.title, ""))
    subtitle = lines(data.subtitle, width)
    top = _TOP + 18 * (len(subtitle) - 1)
    page = Page(width, top + cell * n_rows + 24, data.title, "<br>".join(subtitle))
    ticks = [sparse_ticks(len(names), 24) for names in (data.columns, data.rows)]
    xaxis = {"tickmode": "array", "tickvals": ticks[0], "ticktext": [data.columns[i] for i in ticks[0]], "side": "top"}
    yaxis = {"tickmode": "array", "tickvals": ticks[1], "ticktext": [data.rows[i] for i in ticks[1]]}
    where = page.panel(
        Box(_LEFT, top, cell * n_columns, cell * n_rows),
        {**xaxis, "title": {"text": data.axes[1]}, "range": [-0.5, n_columns - 0.5]},
        {**yaxis, "title": {"text": data.axes[0]}, "range": [n_rows - 0.5, -0.5]},
    )
    limits = {"zmin": 0, "zmax": max(float(np.nanmax(data.values, initial=0.0)), 1e-12)}
    page.figure.add_trace(
        go.Heatmap(
            z=data.values,
            hovertext=data.hover,
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale="Greens",
            hoverongaps=False,
            colorbar={"thickness": 12, "outlinewidth": 0, "len": 1, "tickfont": {"size": 11}},
            **limits,
            **where,
        )
    )
    return page.figure
