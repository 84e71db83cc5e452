"""From a site's mean map, of two to four axes, to panels of two: which axis runs down, which across, and what their ticks say."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Shaped

from patchlab.plots._style import heading_height, shown, sparse_ticks
from patchlab.score_arrays import label_of
from patchlab.scores import ScoreMap
from patchlab.sites import KINDS, POSITION_AXES, parse_site

TOP_NEURONS = 32
_TITLES = {"pos": "position", "dest": "destination", "src": "source", "kv_head": "KV head"}


@dataclass(frozen=True)
class Axis:
    """Numeric places with text; ``angle`` turns the text."""

    title: str
    places: tuple[int, ...]
    texts: tuple[str, ...]
    angle: int = 0

    def layout(self) -> dict[str, Any]:
        """For plotly: an array of ticks on a linear axis, so that equal texts stay apart."""
        ticks = {"type": "linear", "tickmode": "array", "tickvals": list(self.places), "ticktext": list(self.texts), "tickangle": self.angle}
        return {**ticks, "title": {"text": self.title}}

    @property
    def extent(self) -> float:
        """Pixels that the tick texts need."""
        longest = max((len(text.replace("&lt;", "<").replace("&gt;", ">")) for text in self.texts), default=0)
        return 6.2 * longest


@dataclass(frozen=True)
class Facet:
    """One panel: values in metric units (or shares of the gap), structural zeros, the hover text of every cell."""

    site: str
    title: str
    description: str
    group: str
    values: Float[np.ndarray, "row column"]
    live: Bool[np.ndarray, "row column"]
    hover: Shaped[np.ndarray, "row column"]
    rows: Axis
    columns: Axis
    not_scored: str | None = None
    breaks: tuple[float, ...] = ()
    """Places between rows where a line is drawn."""

    @property
    def size(self) -> tuple[float, float]:
        """Pixels of the cells' area."""
        n_rows, n_columns = self.values.shape
        least = 14 if len(self.rows.places) == n_rows else 5 if n_rows > 60 else 9
        return max(132, n_columns * _between(13, 330 / n_columns, 24)), max(110, n_rows * _between(least, 264 / n_rows, 22))

    @property
    def margins(self) -> tuple[float, float, float]:
        """Pixels left of, above and below the cells."""
        below = 40 + 0.9 * self.columns.extent if self.columns.angle else 46
        return 34 + self.rows.extent, heading_height(self.description, self.size[0]), below

    @property
    def line(self) -> int:
        """Pixels between cells: none where cells are small."""
        return int(min(self.size[0] / self.values.shape[1], self.size[1] / self.values.shape[0]) >= 9)


def facets_of(scores: ScoreMap, mean: xr.DataArray, *, ranked_by: ScoreMap, heading: str, unit: str, most: int) -> list[Facet]:
    """The panels of one site.

    Args:
        scores: the map.
        mean: what to draw of one of its sites, named by the site.
        ranked_by: the map whose effects choose which neurons and heads are shown (the same for all maps of a figure).
        heading: the name of the map where a figure has several.
        unit: of the values, for the hover text.
        most: at most this many panels for a site that needs one per head.
    """
    site = str(mean.name)
    cells = _Cells(scores, site, mean, scores.live[site].to_numpy(), unit)
    size = np.nan_to_num(np.abs(ranked_by.mean(site).to_numpy()))
    axes = [str(axis) for axis in mean.dims]
    breaks: tuple[float, ...] = ()
    description = KINDS[parse_site(site).kind].what
    if "dest" in axes and "src" in axes:
        lead = axes[:-2]
        chosen = _largest(size.max((-1, -2)), most)
        panels = [(index, cells.at(index), f" {_short(lead, index)}") for index in chosen]
        description += f"; the {len(chosen)} of {size[..., 0, 0].size} {lead[-1]}s with the largest effect"
        layout = [(panel, cells.axis("dest", down=True), cells.axis("src"), name) for _, panel, name in panels]
    elif "neuron" in axes and len(axes) == 3:
        chosen = _largest(size.max(1), TOP_NEURONS)
        panel = _Panel.stacked([cells.at((layer, slice(None), neuron)) for layer, neuron in chosen])
        names = Axis("neuron", tuple(range(len(chosen))), tuple(_short(["layer", "neuron"], index) for index in chosen))
        layout = [(panel, names, cells.axis("pos"), "")]
        description += f"; the {len(chosen)} of {size[:, 0].size} with the largest effect"
    elif "neuron" in axes:
        order = np.argsort(-size, axis=1, kind="stable")[:, :TOP_NEURONS]
        panel = cells.at(()).taken(order)
        ranks = Axis(
            f"rank among the layer's {size.shape[1]}", tuple(range(0, order.shape[1], 5)), tuple(str(i + 1) for i in range(0, order.shape[1], 5))
        )
        layout = [(panel, cells.axis("layer", down=True), ranks, "")]
        description += ", by |effect| in their layer"
    elif len(axes) == 1:
        layout = [(cells.at(()).reshaped((-1, 1)), cells.axis("layer", down=True), Axis("all positions", (), ()), "")]
    elif len(axes) == 2:
        layout = [(cells.at(()), cells.axis("layer", down=True), cells.axis(axes[1]), "")]
    else:
        head, position = (axis for axis in sorted(axes[1:], key=lambda axis: axis in POSITION_AXES))
        panel = cells.at(()).moved(axes.index(position)).reshaped((-1, mean.sizes[position]))
        starts = range(0, mean.sizes["layer"] * mean.sizes[head], mean.sizes[head])
        middle = (mean.sizes[head] - 1) // 2
        rows = Axis(f"layer (one row per {_TITLES.get(head, head)})", tuple(i + middle for i in starts), tuple(map(str, range(len(starts)))))
        breaks = tuple(i - 0.5 for i in starts[1:])
        layout = [(panel, rows, cells.axis(position), "")]
    across = axes[-1] if len(axes) > 1 else "layer"
    shape = "position" if across in POSITION_AXES else "neuron" if "neuron" in axes else "head"
    group = shape if len(axes) <= 2 else site
    prefix = f"{heading} · " if heading else ""
    return [
        Facet(
            site,
            f"{prefix}{site}{name}",
            description,
            group,
            panel.values,
            panel.live,
            panel.hover,
            rows,
            columns,
            scores.not_scored.get(site),
            breaks,
        )
        for panel, rows, columns, name in layout
    ]


def cell_texts(scores: ScoreMap, site: str) -> Shaped[np.ndarray, "..."]:
    """For every cell of a site, where it is: layer, head, position with its tokens; in plotly's HTML."""
    return _Cells(scores, site, scores.mean(site), scores.live[site].to_numpy(), "").places()


@dataclass(frozen=True)
class _Panel:
    values: np.ndarray
    live: np.ndarray
    hover: np.ndarray

    def _each(self, change: Any) -> "_Panel":
        return _Panel(change(self.values), change(self.live), change(self.hover))

    def reshaped(self, shape: tuple[int, ...]) -> "_Panel":
        return self._each(lambda part: part.reshape(shape))

    def moved(self, axis: int) -> "_Panel":
        """This axis last."""
        return self._each(lambda part: np.moveaxis(part, axis, -1))

    def taken(self, order: np.ndarray) -> "_Panel":
        return self._each(lambda part: np.take_along_axis(part, order, axis=1))

    @staticmethod
    def stacked(panels: "Sequence[_Panel]") -> "_Panel":
        return _Panel(*(np.stack([getattr(panel, name) for panel in panels]) for name in ("values", "live", "hover")))


@dataclass(frozen=True)
class _Cells:
    """The cells of a site with their labels."""

    scores: ScoreMap
    site: str
    mean: xr.DataArray
    live: np.ndarray
    unit: str

    def at(self, index: tuple) -> _Panel:
        return _Panel(self.mean.to_numpy()[index], self.live[index], self.hover()[index])

    def axis(self, name: str, *, down: bool = False) -> Axis:
        size = self.mean.sizes[name]
        title = _TITLES.get(name, name)
        if name in POSITION_AXES:
            texts = [label for label, _ in self.positions(name)]
            return Axis(title, tuple(range(size)), tuple(texts), 0 if down else -60)
        places = sparse_ticks(size, 16)
        return Axis(title, tuple(places), tuple(str(self.mean[name].to_numpy()[i]) for i in places))

    def positions(self, name: str) -> list[tuple[str, str]]:
        """Per cell of a position axis: its tick text, and the tokens found there."""
        token, position = (self.scores.data.coords.get(label_of(what, name)) for what in ("token", "position"))
        labels = []
        for i, index in enumerate(self.mean[name].to_numpy()):
            named = "" if position is None else escape(str(position.to_numpy()[i]), quote=False)
            found = Counter() if token is None else Counter(token.to_numpy()[:, i].tolist())
            only = shown(next(iter(found))) if len(found) == 1 else ""
            text = ": ".join(part for part in (named, only) if part) or f"pos {index}"
            common = ", ".join(f"“{shown(text)}” {count}×" for text, count in found.most_common(3))
            labels.append((text, f"“{only}”" if only else common + (", …" if len(found) > 3 else "")))
        return labels

    def places(self) -> np.ndarray:
        """One line per axis, per cell."""
        texts = np.full(self.mean.shape, f"<b>{escape(self.site)}</b>", dtype=object)
        for place, axis in enumerate(str(dim) for dim in self.mean.dims):
            lines = [f"<br>{_TITLES.get(axis, axis)} {index}" for index in self.mean[axis].to_numpy()]
            if axis in POSITION_AXES:
                lines = [f"{line} {tokens}" for line, (_, tokens) in zip(lines, self.positions(axis), strict=True)]
            texts = texts + np.array(lines, dtype=object).reshape([-1 if i == place else 1 for i in range(texts.ndim)])
        return texts

    def hover(self) -> np.ndarray:
        """Where the cell is, and its value."""
        values = self.mean.to_numpy()
        ends = np.array([f"<br>effect {value:.3g} {self.unit}" for value in values.ravel()], dtype=object).reshape(values.shape)
        zeros = np.where(self.live, "", "<br>structural zero: cannot affect the metric").astype(object)
        return self.places() + ends + zeros


def _largest(size: np.ndarray, most: int) -> list[tuple[int, ...]]:
    """Indices of the largest entries, in reading order."""
    top = np.sort(np.argsort(-size, axis=None, kind="stable")[:most])
    return [tuple(int(i) for i in index) for index in zip(*np.unravel_index(top, size.shape), strict=True)]


def _short(axes: Sequence[str], index: Sequence[int]) -> str:
    """L5.H1, as the site grammar writes it."""
    return ".".join(f"{axis[0].upper() if axis != 'kv_head' else 'H'}{i}" for axis, i in zip(axes, index, strict=True))


def _between(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))
