"""Facets: panels of two axes that show a site's mean map of one to four: which axis runs down, which across, and what their ticks say."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Shaped

from patchlab.errors import ScoreError
from patchlab.plots._style import Pixels, heading_height, shown, sparse_ticks
from patchlab.scores import NO_EDGE, NO_PATH, SAME, ScoreMap
from patchlab.scores.arrays import label_of
from patchlab.sites import KINDS, POSITION_AXES, Site

TOP_NEURONS = 32
MOST_CELLS = 5000
"""Beyond so many cells hover texts are left out or short."""
COMPACT = 560
"""Pixels of the height of a panel in a large figure."""
TOP_EDGE_ENDS = 24
"""Writers, and readers, that a panel of edges shows."""
ZEROS = {
    NO_PATH: "no path to the metric",
    SAME: "same in both prompts",
    NO_EDGE: "no edge: the writer is not computed before the reader",
    "structural zero": "structural zero: cannot affect the metric",
}
"""Why a cell cannot matter, in the words of a figure."""
_TITLES = {"pos": "position", "dest": "destination", "src": "source", "kv_head": "KV head"}


@dataclass(frozen=True)
class Axis:
    """Numeric places with text; ``angle`` turns the text, ``breaks`` are places between which a line is drawn.

    ``names`` has one name per place, each once (``L9.H6``, ``the (14)``); empty where a row or column is no single layer, head or position.
    """

    title: str
    places: tuple[int, ...]
    texts: tuple[str, ...]
    angle: int = 0
    breaks: tuple[float, ...] = ()
    names: tuple[str, ...] = ()

    def named(self) -> dict[str, Any]:
        """For plotly: an axis of names, which shows as many of them as there is room for at any zoom."""
        ticks = {"type": "category", "categoryorder": "array", "categoryarray": list(self.names), "tickangle": self.angle}
        return {**ticks, "title": {"text": self.title}}

    def layout(self) -> dict[str, Any]:
        """For plotly: an array of ticks on a linear axis, so that equal texts stay apart."""
        ticks = {"type": "linear", "tickmode": "array", "tickvals": list(self.places), "ticktext": list(self.texts), "tickangle": self.angle}
        return {**ticks, "title": {"text": self.title}}

    @property
    def extent(self) -> Pixels:
        """Pixels that the tick texts need."""
        longest = max((len(text.replace("&lt;", "<").replace("&gt;", ">")) for text in self.texts), default=0)
        return 6.2 * longest


@dataclass(frozen=True)
class Facet:
    """One panel: values in metric units (or shares of the gap), why a cell cannot matter ("": it can), the hover text of every cell.

    ``index`` is the number of each cell in the flattened effects of the site; the number of cells stands for none. A ``compact`` panel keeps to a
    fixed height, and its cells to the names of its axes. ``room`` is the width in pixels it should try to keep to; ``first`` is False where the panel
    to its left has the same rows; ``unsigned`` values are sizes.
    """

    site: str
    title: str
    description: str
    group: str
    values: Float[np.ndarray, "row column"]
    zero: Shaped[np.ndarray, "row column"]
    hover: Shaped[np.ndarray, "row column"] | None
    rows: Axis
    columns: Axis
    index: Int[np.ndarray, "row column"]
    not_scored: str | None = None
    room: Pixels = 330
    first: bool = True
    compact: bool = False
    unsigned: bool = False

    @property
    def live(self) -> Bool[np.ndarray, "row column"]:
        """The cells that can matter."""
        return self.zero == ""

    def name(self, row: int, column: int) -> str:
        """A cell by its row and column: ``L9.H6 · the (14)``."""
        head = self.title.rpartition(" ")[2] + " · " if self.rows.title == _TITLES["dest"] else ""  # a panel per head
        between = "." if self.columns.title in ("head", _TITLES["kv_head"]) else " · "
        return f"{head}{self.rows.names[row]}{between}{self.columns.names[column]}"

    @property
    def size(self) -> tuple[Pixels, Pixels]:
        """Pixels of the cells' area."""
        n_rows, n_columns = self.values.shape
        if self.compact:
            return _between(132, 24 * n_columns, max(self.room, 160)), _between(110, 22 * n_rows, COMPACT)
        least = 5 if len(self.rows.places) < n_rows else 14 if n_rows <= 60 else 11
        return max(132, n_columns * _between(13, self.room / n_columns, 24)), max(110, n_rows * _between(least, 264 / n_rows, 22))

    @property
    def margins(self) -> tuple[Pixels, Pixels, Pixels]:
        """Pixels left of, above and below the cells."""
        below = 40 + 0.9 * self.columns.extent + 12 * self.compact if self.columns.angle else 46
        return 34 + self.rows.extent if self.first else 6, heading_height(self.description, self.size[0]), below

    @property
    def line(self) -> int:
        """Pixels between cells: none where cells are small."""
        return int(min(self.size[0] / self.values.shape[1], self.size[1] / self.values.shape[0]) >= 12)


def facets_of(
    scores: ScoreMap,
    mean: xr.DataArray,
    *,
    ranked_by: ScoreMap,
    heading: str = "",
    unit: str = "",
    most: int = 6,
    room: Pixels = 330,
    first: bool = True,
    compact: bool = False,
) -> list[Facet]:
    """The panels of one site.

    Args:
        scores: the map.
        mean: what to draw of one of its sites, named by the site.
        ranked_by: the map whose effects choose which neurons and heads are shown (the same for all maps of a figure).
        heading: the name of the map where a figure has several.
        unit: of the values, for the hover text.
        most: at most this many panels for a site that needs one per head.
        room: see :class:`Facet`.
        first: see :class:`Facet`.
        compact: see :class:`Facet`; panels whose rows or columns have no names keep their hover text.
    """
    site = str(mean.name)
    cells = _SomeCells(scores, site, mean) if scores.is_sparse(site) else _Cells(scores, site, mean)
    size = np.nan_to_num(np.abs(ranked_by.mean(site).to_numpy()))
    axes = cells.axes
    values, zero = np.append(mean.to_numpy().ravel(), 0.0), np.append(scores.zeros(site).to_numpy().ravel(), SAME)  # the last: no cell
    shape = "position" if axes[-1] in POSITION_AXES else "neuron" if "neuron" in axes else "head"
    group = shape if len(axes) <= 2 else site
    unsigned = bool(scores.provenance.get("unsigned"))
    what = KINDS[Site.parse(site).kind].what + ("; sizes without sign" if unsigned else "")
    facets = []
    for name, note, index, rows, columns in _layout(cells, size, most):
        title = " · ".join(part for part in (heading, site + name) if part)
        texts = None
        if not (compact and rows.names and columns.names):
            texts = np.array([cells.hover(i, unit) for i in index.ravel().tolist()], dtype=object).reshape(index.shape)
        about = what + note if first else "sizes without sign" if unsigned else ""
        panel = (values[index], zero[index], texts, rows, columns, index, scores.not_scored.get(site))
        facets.append(Facet(site, title, about, group, *panel, room, first, compact, unsigned))
    return facets


_Panel = tuple[str, str, Int[np.ndarray, "row column"], Axis, Axis]


def _layout(cells: "_Cells", size: np.ndarray, most: int) -> Iterator[_Panel]:
    """Name, note, indices of the cells (into the flattened map), and the two axes of every panel."""
    axes, index = cells.axes, np.arange(size.size).reshape(size.shape)
    if isinstance(cells, _SomeCells):
        rows, places, index, n_rows = cells.table(size)
        yield "", f"; the {len(index)} of {n_rows} with the largest effect", index, rows, places
    elif axes[0] == "writer":
        if len(axes) > 2:
            raise ScoreError(
                f"heatmaps has no panels for edges by position; got {cells.site}. Draw it with plots.edge_heatmap, which sums positions."
            )
        rows, columns = (np.sort(np.argsort(-size.max(other), kind="stable")[:TOP_EDGE_ENDS]) for other in (1, 0))
        note = f"; the {len(rows)} of {len(size)} writers and {len(columns)} of {size.shape[1]} readers with the largest effect"
        yield "", note, index[np.ix_(rows, columns)], cells.ends("writer", rows), cells.ends("reader", columns, angle=-60)
    elif "dest" in axes and "src" in axes:
        lead = axes[:-2]
        chosen = _largest(size.max((-1, -2)), most)
        note = f"; the {len(chosen)} of {size[..., 0, 0].size} {lead[-1]}s with the largest effect"
        for place in chosen:
            yield f" {_short(lead, place)}", note, index[place], cells.axis("dest", down=True), cells.axis("src")
    elif "neuron" in axes and len(axes) == 3:
        chosen = _largest(size.max(1), TOP_NEURONS)
        texts = tuple(_short(("layer", "neuron"), place) for place in chosen)
        names = Axis("neuron", tuple(range(len(chosen))), texts, names=texts)
        note = f"; the {len(chosen)} of {size[:, 0].size} with the largest effect"
        yield "", note, np.stack([index[layer, :, neuron] for layer, neuron in chosen]), names, cells.axis("pos")
    elif "neuron" in axes:
        order = np.argsort(-size, axis=1, kind="stable")[:, :TOP_NEURONS]
        places = tuple(range(0, order.shape[1], 5))
        ranks = Axis(f"rank among the layer's {size.shape[1]}", places, tuple(str(i + 1) for i in places))
        yield "", ", by |effect| in their layer", np.take_along_axis(index, order, axis=1), cells.axis("layer", down=True), ranks
    elif len(axes) == 1:
        named = f"{axes[0]}_name" in cells.mean.coords
        rows = cells.ends(axes[0], np.arange(len(index))) if named else cells.axis(axes[0], down=True)
        whole = "all positions" if axes[0] == "layer" else "effect"
        yield "", "", index[:, None], rows, Axis(whole, (), (), names=(whole,))
    elif len(axes) == 2:
        yield "", "", index, cells.axis("layer", down=True), cells.axis(axes[1])
    else:
        head, position = sorted(axes[1:], key=lambda axis: axis in POSITION_AXES)
        n_layers, n_heads = size.shape[0], size.shape[axes.index(head)]
        names = tuple(_short(("layer", head), (layer, i)) for layer in range(n_layers) for i in range(n_heads))
        breaks = tuple(n_heads * layer - 0.5 for layer in range(1, n_layers))
        rows = Axis(f"layer and {_TITLES.get(head, head)}", tuple(range(len(names))), names, breaks=breaks, names=names)
        yield "", "", np.moveaxis(index, axes.index(position), -1).reshape(n_layers * n_heads, -1), rows, cells.axis(position)


class _Cells:
    """The cells of a site, with their labels."""

    def __init__(self, scores: ScoreMap, site: str, mean: xr.DataArray) -> None:
        self.scores, self.site, self.mean = scores, site, mean
        self.axes = tuple(str(dim) for dim in mean.dims)
        self._values, self._zero = mean.to_numpy().ravel(), scores.zeros(site).to_numpy().ravel()
        self._lines = [self._axis_lines(axis) for axis in self.axes]
        self._names = [self.axis(axis).names if f"{axis}_name" not in mean.coords else tuple(map(escape, self._ends(axis))) for axis in self.axes]

    def axis(self, name: str, *, down: bool = False) -> Axis:
        """Ticks of an axis: tokens of positions, else indices."""
        size, title = self.mean.sizes[name], _TITLES.get(name, name)
        if name in POSITION_AXES:
            texts = tuple(label for label, _ in self._positions(name))
            names = tuple(f"{text} ({i})" if texts.count(text) > 1 else text for i, text in enumerate(texts))
            return Axis(title, tuple(range(size)), texts, 0 if down else -60, names=names)
        places, indices = sparse_ticks(size, 16), self.mean[name].to_numpy().tolist()
        names = tuple(_short((name,), (i,)) for i in indices)
        return Axis(title, tuple(places), tuple(str(indices[i]) for i in places), names=names)

    def ends(self, name: str, chosen: Int[np.ndarray, " end"], *, angle: int = 0) -> Axis:
        """Ticks of some writers or readers: their names."""
        texts = tuple(escape(self._ends(name)[i]) for i in chosen)
        return Axis(name, tuple(range(len(chosen))), texts, angle, names=texts)

    def _ends(self, name: str) -> list[str]:
        """Names of all writers or readers."""
        return self.mean[f"{name}_name"].to_numpy().tolist()

    def place(self, cell: int) -> str:
        """Where a cell is: its site, and a line per axis."""
        index = np.unravel_index(cell, self.mean.shape)
        return f"<b>{escape(self.site)}</b>" + "".join(lines[i] for lines, i in zip(self._lines, index, strict=True))

    def hover(self, cell: int, unit: str) -> str:
        """Where a cell is, and its value."""
        return f"{self.place(cell)}<br>effect {self._values[cell]:.3g} {escape(unit)}{self.why(cell)}"

    def short(self, cell: int) -> str:
        """The name of a cell: ``L9.the (14).H6``."""
        index = np.unravel_index(cell, self.mean.shape)
        return ".".join(names[i] for names, i in zip(self._names, index, strict=True))

    def why(self, cell: int) -> str:
        """Why a cell cannot matter, as a line; nothing where it can."""
        return f"<br>{ZEROS[str(self._zero[cell])]}" if self._zero[cell] else ""

    def _axis_lines(self, axis: str) -> list[str]:
        shown_by = f"{axis}_name" if f"{axis}_name" in self.mean.coords else axis
        lines = [f"<br>{_TITLES.get(axis, axis)} {escape(str(index))}" for index in self.mean[shown_by].to_numpy()]
        if axis in POSITION_AXES:
            lines = [f"{line} {tokens}" for line, (_, tokens) in zip(lines, self._positions(axis), strict=True)]
        return lines

    def _positions(self, name: str) -> list[tuple[str, str]]:
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


class _SomeCells(_Cells):
    """The cells of a sparse site: a row for each entry of its layers (a feature, say), a column for each position if it has any."""

    def __init__(self, scores: ScoreMap, site: str, mean: xr.DataArray) -> None:
        self.scores, self.site, self.mean = scores, site, mean
        self.axes, self.index = scores.axes(site), scores.cells(site)
        self._values, self._zero = np.append(mean.to_numpy().ravel(), 0.0), np.append(scores.zeros(site).to_numpy().ravel(), SAME)

    def table(self, size: Float[np.ndarray, " cell"]) -> tuple[Axis, Axis, Int[np.ndarray, "row column"], int]:
        """The axes of the entries with the largest effects and of the positions; the number of each cell (the last: none); and of all entries."""
        place = next((i for i, axis in enumerate(self.axes) if axis in POSITION_AXES), None)
        own = [i for i in range(len(self.axes)) if i != place]
        entries, entry = np.unique(self.index[:, own], axis=0, return_inverse=True)
        largest = np.zeros(len(entries))
        np.maximum.at(largest, entry.reshape(-1), size)
        chosen = np.sort(np.argsort(-largest, kind="stable")[:TOP_NEURONS])
        row_of = {int(number): row for row, number in enumerate(chosen)}
        n_columns = 1 if place is None else int(self.index[:, place].max(initial=0)) + 1
        found = np.full((len(chosen), n_columns), len(self.index))
        for cell, number in enumerate(entry.reshape(-1).tolist()):
            if number in row_of:
                found[row_of[number], 0 if place is None else self.index[cell, place]] = cell
        texts = tuple(_short([self.axes[i] for i in own], entries[number].tolist()) for number in chosen)
        rows = Axis(" and ".join(self.axes[i] for i in own), tuple(range(len(texts))), texts, names=texts)
        if place is None:
            return rows, Axis("all positions", (), (), names=("all positions",)), found, len(entries)
        places = tuple(map(str, range(n_columns)))
        return rows, Axis(_TITLES.get(self.axes[place], self.axes[place]), tuple(range(n_columns)), places, names=places), found, len(entries)

    def place(self, cell: int) -> str:
        if cell == len(self.index):
            return f"<b>{escape(self.site)}</b>"
        pairs = zip(self.axes, self.index[cell].tolist(), strict=True)
        return f"<b>{escape(self.site)}</b>" + "".join(f"<br>{_TITLES.get(axis, axis)} {i}" for axis, i in pairs)

    def short(self, cell: int) -> str:
        return _short(self.axes, self.index[cell].tolist())


def cell_texts(scores: ScoreMap, site: str) -> Shaped[np.ndarray, " cell"]:
    """For every cell of a site (flattened), where it is (layer, head, position with its tokens) and why it cannot matter, if so; in plotly's HTML.

    Of more than 5,000 cells only their names, since the text is most of a figure's size.
    """
    cells = (_SomeCells if scores.is_sparse(site) else _Cells)(scores, site, scores.mean(site))
    text = cells.short if scores.live[site].size > MOST_CELLS else cells.place
    return np.array([text(i) + cells.why(i) for i in range(scores.live[site].size)], dtype=object)


def _largest(size: np.ndarray, most: int) -> list[tuple[int, ...]]:
    """Indices of the largest entries, in reading order."""
    top = np.sort(np.argsort(-size, axis=None, kind="stable")[:most])
    return [tuple(int(i) for i in index) for index in zip(*np.unravel_index(top, size.shape), strict=True)]


def _short(axes: Sequence[str], index: Sequence[int]) -> str:
    """L5.H1, as the site grammar writes it."""
    return ".".join(f"{'H' if axis == 'kv_head' else axis[0].upper()}{i}" for axis, i in zip(axes, index, strict=True))


def _between(low: Pixels, value: Pixels, high: Pixels) -> Pixels:
    return max(low, min(value, high))
