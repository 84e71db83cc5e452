"""The token table of a lens: the most likely token at every layer and position, its probability as colour."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped

from patchlab.errors import LensError
from patchlab.lenses import Distributions
from patchlab.plots._style import INK, Box, Page, lines, shown, words_width

MOST = 24
"""Positions that are drawn unless more are asked for: the last ones."""
_ROW, _TOP, _LEFT, _RIGHT = 26, 72, 70, 100
_LETTER = 7.2


@dataclass(frozen=True)
class TokenTableData:
    """Cells ``[layer, pos]``: text, probability and hover text; the labels of both axes."""

    title: str
    subtitle: tuple[str, ...]
    texts: Shaped[np.ndarray, "layer pos"]
    probability: Float[np.ndarray, "layer pos"]
    hover: Shaped[np.ndarray, "layer pos"]
    layers: tuple[int, ...]
    ticks: tuple[str, ...]


def _prepare_token_table(distributions: Distributions, example: int, positions: Sequence[int] | None) -> TokenTableData:
    data, sizes = distributions.data, distributions.data.sizes
    if not 0 <= example < sizes["example"]:
        raise LensError(f"example is {example}; there are {sizes['example']}, from 0.")
    chosen = list(range(sizes["pos"]))[-MOST:] if positions is None else [position % sizes["pos"] for position in positions]
    if not chosen:
        raise LensError("no positions to draw; give at least one.")
    ids, p = (data[name].to_numpy()[example][:, chosen] for name in ("top_id", "top_probability"))
    kl, entropy = (data[name].to_numpy()[example][:, chosen] for name in ("kl", "entropy"))
    tokens = data["token"].to_numpy()[example][chosen]
    roles = [distributions.roles[i] if distributions.roles else "" for i in chosen]
    ticks = tuple(f"{role}: {shown(token)}" if role else shown(token) for token, role in zip(tokens, roles, strict=True))
    texts, hover = np.empty(p.shape[:2], dtype=object), np.empty(p.shape[:2], dtype=object)
    for i, layer in enumerate(distributions.layers):
        for j in range(len(chosen)):
            names = [shown(distributions.texts[int(token)], 18) for token in ids[i, j]]
            best = "<br>".join(f"{chance:.3f} {name}" for name, chance in zip(names, p[i, j], strict=True))
            texts[i, j] = shown(distributions.texts[int(ids[i, j, 0])], 9)
            hover[i, j] = f"<b>layer {layer}, position {chosen[j]} ({ticks[j]})</b><br>{best}<br>entropy {entropy[i, j]:.2f}, KL {kl[i, j]:.2f} nats"
    left_out = sizes["pos"] - len(chosen)
    words = [distributions.subject, f"example {example}", "after each layer, the most likely next token"]
    words += [f"{len(chosen)} of {sizes['pos']} positions"] if left_out else []
    return TokenTableData(
        f"What each position predicts: {distributions.name}", tuple(words), texts, p[:, :, 0], hover, tuple(distributions.layers), ticks
    )


def token_table(distributions: Distributions, example: int = 0, *, positions: Sequence[int] | None = None) -> go.Figure:
    """The most likely token by layer and position, with its probability as colour; the others are in the hover labels.

    Args:
        distributions: what a readout read.
        example: which prompt.
        positions: which positions; default the last 24.

    Raises:
        LensError: an example or positions that are not there.

    Example:
        >>> pl.plots.token_table(pl.lenses.logit_lens().read(model, task)).show()  # doctest: +SKIP
    """
    return _draw(_prepare_token_table(distributions, example, positions))


def _draw(data: TokenTableData) -> go.Figure:
    n_layers, n = data.probability.shape
    cell = max(46, *(int(_LETTER * len(_plain(text))) + 12 for text in data.texts.ravel()))
    below = 22 + int(6.3 * max(len(_plain(tick)) for tick in data.ticks))
    width = max(_LEFT + cell * n + _RIGHT, words_width(data.title, ""))
    subtitle = lines(data.subtitle, width)
    top = _TOP + 18 * (len(subtitle) - 1)
    page = Page(width, top + _ROW * n_layers + below, data.title, "<br>".join(subtitle))
    numbers, rows = list(range(n)), list(range(n_layers))
    xaxis = {"tickmode": "array", "tickvals": numbers, "ticktext": list(data.ticks), "tickangle": -90, "range": [-0.5, n - 0.5]}
    yaxis = {
        "tickmode": "array",
        "tickvals": rows,
        "ticktext": [str(layer) for layer in data.layers],
        "range": [n_layers - 0.5, -0.5],
        "title": {"text": "layer"},
    }
    where = page.panel(Box(_LEFT, top, cell * n, _ROW * n_layers), xaxis, yaxis)
    bar = {
        "title": {"text": "probability", "side": "right"},
        "thickness": 10,
        "len": min(160, _ROW * n_layers) / page.height,
        "x": 1 - (_RIGHT - 14) / width,
        "tickvals": [0, 0.5, 1],
    }
    page.figure.add_trace(
        go.Heatmap(
            z=data.probability,
            hovertext=data.hover,
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale="Greens",
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar={**bar, "y": 1 - (top + _ROW * n_layers / 2) / page.height, "outlinewidth": 0},
            **where,
        )
    )
    # texts of their own, as those of a heatmap are too pale on the middle of the scale
    x, y = np.meshgrid(numbers, rows)
    colours = np.where(data.probability.ravel() > 0.5, "white", INK).tolist()
    font = {"size": 11, "color": colours}
    points = {"x": x.ravel(), "y": y.ravel(), "text": data.texts.ravel().tolist(), "mode": "text", "textfont": font, "hoverinfo": "skip"}
    page.figure.add_trace(go.Scatter(**points, cliponaxis=False, **where))
    return page.figure


def _plain(text: str) -> str:
    """Text as it is seen: without escapes."""
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
