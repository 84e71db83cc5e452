"""Token strips: the tokens of a prompt, coloured by what each is worth."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float

from patchlab.errors import LensError
from patchlab.plots._style import Box, Page, lines, shown, signs, words_width

_ROW, _GAP, _LETTER, _WIDEST = 44, 34, 7.2, 1300


@dataclass(frozen=True)
class TokenStripData:
    """Strips by name ``[strip, pos]``, their tokens, and the limit of the colours, which all strips share."""

    title: str
    subtitle: tuple[str, ...]
    names: tuple[str, ...]
    values: Float[np.ndarray, "strip pos"]
    tokens: tuple[str, ...]
    limit: float
    unit: str


def _prepare_token_strip(values: xr.DataArray | Mapping[str, xr.DataArray], example: int | None) -> TokenStripData:
    given = {"": values} if isinstance(values, xr.DataArray) else dict(values)
    if not given:
        raise LensError("there are no attributions to draw; give at least one array.")
    strips: list[np.ndarray] = []
    for name, one in given.items():
        if one.dims != ("example", "pos") or "token" not in one.coords:
            raise LensError(
                f"a strip has the axes [example, pos] and a coordinate token; {name or 'the array'} has {list(one.dims)}. See lenses.relevance."
            )
        if example is not None and not 0 <= example < one.sizes["example"]:
            raise LensError(f"example is {example}; there are {one.sizes['example']}, from 0 (None: the mean).")
        strips.append((one.mean("example") if example is None else one.isel(example=example)).to_numpy().astype(float))
    first = next(iter(given.values()))
    if any(len(strip) != len(strips[0]) for strip in strips):
        raise LensError(f"the strips have {[len(strip) for strip in strips]} positions; give attributions of the same prompts.")
    at = 0 if example is None else example
    tokens = tuple(shown(str(token)) for token in first["token"].to_numpy()[at])
    if example is None and "position" in first.coords:
        tokens = tuple(shown(str(name)) for name in first["position"].to_numpy())
    about = first.attrs
    words = [str(about.get("subject", "")), f"example {example}" if example is not None else "mean over examples (tokens of the first)"]
    words += [signs({"direction": "denoising"}).legend]
    limit = max(float(np.abs(np.array(strips)).max()), 1e-12)
    title = f"What each token adds to {about.get('metric', 'the metric')}"
    names = tuple(name or str(about.get("rules", "")) for name in given)
    return TokenStripData(title, tuple(word for word in words if word), names, np.array(strips), tokens, limit, str(about.get("unit", "")))


def token_strip(values: xr.DataArray | Mapping[str, xr.DataArray], example: int | None = 0) -> go.Figure:
    """The tokens of a prompt, coloured by their attributions; several methods below each other with one colour scale.

    Args:
        values: attributions ``[example, pos]``, such as ``lenses.relevance(model, task, "input")``; or several by name.
        example: which prompt; None for the mean over examples.

    Raises:
        LensError: other axes, or an example that is not there.

    Example:
        >>> pl.plots.token_strip({"RelP": pl.lenses.relevance(model, task, "input")}).show()  # doctest: +SKIP
    """
    return _draw(_prepare_token_strip(values, example))


def _draw(data: TokenStripData) -> go.Figure:
    widths = [max(48.0, _LETTER * len(token.replace("&lt;", "<").replace("&gt;", ">")) + 14) for token in data.tokens]
    cell = max(widths)
    per_line = max(1, min(len(data.tokens), int(_WIDEST // cell)))
    parts = [range(start, min(start + per_line, len(data.tokens))) for start in range(0, len(data.tokens), per_line)]
    width = max(32 + cell * per_line, min(words_width(data.title, ""), _WIDEST))
    subtitle = lines(data.subtitle, width)
    top, block = 78 + 18 * (len(subtitle) - 1), _ROW * len(parts) + _GAP
    page = Page(width, top + block * len(data.names), data.title, "<br>".join(subtitle))
    for s, name in enumerate(data.names):
        page.note(16, top + s * block, f"<b>{name}</b>", size=13)
        for p, part in enumerate(parts):
            box = Box(16, top + s * block + 22 + p * _ROW, cell * len(part), _ROW - 4)
            bare = {"showticklabels": False, "ticks": "", "showline": False, "fixedrange": True}
            where = page.panel(box, {**bare, "range": [-0.5, len(part) - 0.5]}, {**bare, "range": [-0.5, 0.5]})
            values = data.values[s, list(part)]
            texts = [f"{data.tokens[i]}<br>{data.values[s, i]:+.2f}" for i in part]
            hover = [f"<b>{data.tokens[i]}</b> (position {i})<br>{data.values[s, i]:+.4f} {data.unit}" for i in part]
            scale = {"colorscale": "RdBu", "zmin": -data.limit, "zmax": data.limit, "zmid": 0, "showscale": False, "xgap": 2}
            page.figure.add_trace(
                go.Heatmap(
                    z=[values], text=[texts], texttemplate="%{text}", hovertext=[hover], hovertemplate="%{hovertext}<extra></extra>", **scale, **where
                )
            )
    return page.figure
