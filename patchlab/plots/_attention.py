"""Attention: patterns of chosen heads with their tokens, thumbnails of all heads, and one number per head."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Shaped

from patchlab.errors import LensError
from patchlab.lenses import Attention
from patchlab.plots._patterns import patterns
from patchlab.plots._style import Box, Page, lines, shown, signs, words_width

_TOP, _LEFT, _THUMB = 88, 70, 64


def attention(attention: Attention, heads: str | Sequence[str] | None = None, example: int | None = 0) -> go.Figure:
    """Attention patterns: of chosen heads with their tokens, or of all heads as thumbnails.

    Args:
        attention: what :func:`patchlab.lenses.attention` gave.
        heads: names such as ``a5.h3``; None for all.
        example: which prompt; None for the mean over examples (tokens of the first).

    Raises:
        LensError: a head or example that is not there.

    Example:
        >>> pl.plots.attention(pl.lenses.attention(model, task), ["a5.h1"]).show()  # doctest: +SKIP
    """
    if heads is None:
        return _draw_thumbnails(_prepare_thumbnails(attention, example))
    chosen = [heads] if isinstance(heads, str) else list(heads)
    if not chosen:
        raise LensError("no heads to draw; name at least one, or None for all.")
    found = {head: attention.pattern(head, example) for head in chosen}
    at = 0 if example is None else example
    tokens = [str(token) for token in attention.patterns["token"].to_numpy()[at]]
    spots: dict[int, list[str]] = {}
    for name, places in sorted(attention.positions.items()):
        if example is not None or len(set(places.tolist())) == 1:
            spots.setdefault(int(places[at]), []).append(name)
    roles = ["/".join(spots.get(i, ())) for i in range(len(tokens))]
    who = attention.subject + (", mean over examples" if example is None else f", example {example}")
    return patterns(found, tokens, roles, title=f"Attention: {who}")


@dataclass(frozen=True)
class ThumbnailsData:
    """All patterns in one image ``[layer · (pos + 1), head · (pos + 1)]`` with NaN between them, and hover texts."""

    title: str
    subtitle: tuple[str, ...]
    image: Float[np.ndarray, "y x"]
    hover: Shaped[np.ndarray, "y x"]
    layers: tuple[int, ...]
    n_heads: int
    side: int


def _prepare_thumbnails(attention: Attention, example: int | None) -> ThumbnailsData:
    layers = tuple(int(layer) for layer in attention.patterns["layer"].to_numpy())
    n_heads, length = attention.patterns.sizes["head"], attention.patterns.sizes["dest"]
    tokens = [shown(str(token)) for token in attention.patterns["token"].to_numpy()[0 if example is None else example]]
    side = length + 1
    image = np.full((len(layers) * side - 1, n_heads * side - 1), np.nan)
    hover = np.full(image.shape, "", dtype=object)
    for i, layer in enumerate(layers):
        for head in range(n_heads):
            own = attention.pattern(f"a{layer}.h{head}", example)
            place = slice(i * side, i * side + length), slice(head * side, head * side + length)
            image[place] = np.where(np.tril(np.ones_like(own)) > 0, own, np.nan)
            texts = [[f"<b>a{layer}.h{head}</b><br>{a} → {b}: {own[x, y]:.2f}" for y, b in enumerate(tokens)] for x, a in enumerate(tokens)]
            hover[place] = np.where(np.tril(np.ones_like(own)) > 0, np.array(texts, dtype=object), "")
    words = (attention.subject, "mean over examples" if example is None else f"example {example}", "rows look, columns are looked at")
    return ThumbnailsData("Attention of every head", words, image, hover, layers, n_heads, side)


def _draw_thumbnails(data: ThumbnailsData) -> go.Figure:
    n_layers, thumb = len(data.layers), max(_THUMB, 3 * data.side)
    width = max(_LEFT + thumb * data.n_heads + 24, words_width(data.title, ""))
    subtitle = lines(data.subtitle, width)
    top = _TOP + 18 * (len(subtitle) - 1)
    page = Page(width, top + thumb * n_layers + 20, data.title, "<br>".join(subtitle))
    middle = (data.side - 2) / 2
    xaxis = {
        "tickmode": "array",
        "tickvals": [head * data.side + middle for head in range(data.n_heads)],
        "ticktext": [f"h{head}" for head in range(data.n_heads)],
        "side": "top",
        "showline": False,
        "ticks": "",
        "range": [-1, data.image.shape[1]],
    }
    yaxis = {
        "tickmode": "array",
        "tickvals": [i * data.side + middle for i in range(n_layers)],
        "ticktext": [f"a{layer}" for layer in data.layers],
        "showline": False,
        "ticks": "",
        "range": [data.image.shape[0], -1],
    }
    where = page.panel(Box(_LEFT, top, thumb * data.n_heads, thumb * n_layers), xaxis, yaxis)
    scale = {"colorscale": "Greens", "zmin": 0, "zmax": 1, "showscale": False, "hoverongaps": False}
    page.figure.update_layout(plot_bgcolor="#eceef0")
    page.figure.add_trace(go.Heatmap(z=data.image, hovertext=data.hover, hovertemplate="%{hovertext}<extra></extra>", **scale, **where))
    return page.figure


@dataclass(frozen=True)
class HeadGridData:
    """One number per head ``[layer, head]``, and whether it has a sign."""

    title: str
    subtitle: str
    values: Float[np.ndarray, "layer head"]
    layers: tuple[int, ...]
    signed: bool


def _prepare_head_grid(values: xr.DataArray, title: str) -> HeadGridData:
    data = values.mean("example") if "example" in values.dims else values
    if len(data.dims) != 2 or data.dims[0] != "layer":
        raise LensError(f"a head grid has the axes [layer, head] (or [example, layer, head]); got {list(values.dims)}.")
    array = data.to_numpy().astype(float)
    layers = tuple(int(layer) for layer in (data["layer"].to_numpy() if "layer" in data.coords else range(len(array))))
    signed = bool((array < 0).any())
    words = signs({"direction": "denoising"}).legend if signed else "darker is more"
    return HeadGridData(title or str(values.name or "heads").capitalize(), words, array, layers, signed)


def head_grid(values: xr.DataArray, *, title: str = "") -> go.Figure:
    """One number for every head: an attribution, an entropy, a count of tokens.

    Args:
        values: ``[layer, head]``, or ``[example, layer, head]``, of which the mean is drawn.
        title: of the figure; default the name of the values.

    Raises:
        LensError: other axes.

    Example:
        >>> pl.plots.head_grid(pl.lenses.attention(model, task).at("effective", "END")).show()  # doctest: +SKIP
    """
    return _draw_grid(_prepare_head_grid(values, title))


def _draw_grid(data: HeadGridData) -> go.Figure:
    n_layers, n_heads = data.values.shape
    cell, row = 58 if n_heads <= 16 else 44, 26
    width = max(_LEFT + cell * n_heads + 30, words_width(data.title, data.subtitle))
    page = Page(width, _TOP + row * n_layers + 24, data.title, data.subtitle)
    xaxis = {
        "tickmode": "array",
        "tickvals": list(range(n_heads)),
        "ticktext": [f"h{head}" for head in range(n_heads)],
        "side": "top",
        "range": [-0.5, n_heads - 0.5],
    }
    yaxis = {
        "tickmode": "array",
        "tickvals": list(range(n_layers)),
        "ticktext": [f"a{layer}" for layer in data.layers],
        "range": [n_layers - 0.5, -0.5],
    }
    where = page.panel(Box(_LEFT, _TOP, cell * n_heads, row * n_layers), xaxis, yaxis)
    limit = max(float(np.nanmax(np.abs(data.values))), 1e-12)
    scale = {"colorscale": "RdBu", "zmin": -limit, "zmax": limit} if data.signed else {"colorscale": "Greens", "zmin": 0, "zmax": limit}
    texts = np.array([[_number(value) for value in line] for line in data.values])
    hover = np.array(
        [[f"<b>a{layer}.h{head}</b><br>{value:.4g}" for head, value in enumerate(line)] for layer, line in zip(data.layers, data.values, strict=True)]
    )
    page.figure.add_trace(
        go.Heatmap(
            z=data.values,
            text=texts,
            texttemplate="%{text}",
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            showscale=False,
            xgap=1,
            ygap=1,
            **scale,
            **where,
        )
    )
    return page.figure


def _number(value: float | int) -> str:
    """Two decimals, a true minus, and no negative zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
