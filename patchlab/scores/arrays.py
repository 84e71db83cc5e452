"""The arrays of a score map: dense or sparse, their checks, their names, their position labels."""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from patchlab.errors import ScoreError
from patchlab.graph import Graph
from patchlab.labelled import Variable, variables_of, with_attrs, with_coords
from patchlab.sites import POSITION_AXES, Site


@runtime_checkable
class PositionLabels(Protocol):
    """Labels of positions, as a score map takes them from a task's position axis: ``roles`` per cell and ``tokens`` per example and cell."""

    @property
    def roles(self) -> Any:
        """Named position of each cell, "" where it has none; empty if there are no names at all."""

    @property
    def tokens(self) -> Any:
        """Token text per example and cell."""


@dataclass(frozen=True)
class Patterns:
    """Patterns of cells that can matter, and which one an example has: row ``of[e]`` of ``cells[site]``, bool ``[pattern, *axes]``."""

    of: Int[np.ndarray, " example"]
    cells: Mapping[str, Bool[np.ndarray, "pattern *axes"]]


@dataclass(frozen=True, eq=False)
class Sparse:
    """Effects of some cells of a site that are not known, or too many, beforehand: row ``i`` of ``index`` is the cell of column ``i``.

    All other cells of the site have no effect: what a patch would put there is what is there.
    """

    index: Int[np.ndarray, "cell axis"]
    effects: Float[np.ndarray, "example cell"]


Effects = np.ndarray | Sparse
"""Effects of the cells of a site per example: ``[example, *axes]``, or those of some cells."""


@dataclass(frozen=True, eq=False)
class CellNames:
    """Names along the axes of a site, and which combinations are cells.

    ``names`` maps an axis to its names; ``exists`` is False at combinations of the first axes that are no cell, which ``noun`` names ("no
    edge"); ``joined`` puts the names of a cell together (``{writer}->{reader}``); ``layer`` is each cell's layer where no axis says it.
    ``scored`` is False at cells that the method could not score. Masks are along the first axes.
    """

    names: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    noun: str = ""
    joined: str = ""
    exists: Bool[np.ndarray, "*first"] | None = None
    layer: Int[np.ndarray, "*first"] | None = None
    scored: Bool[np.ndarray, "*first"] | None = None


def concatenated(parts: Sequence[Effects]) -> Effects:
    """The effects of several batches, one after the other; of sparse ones the cells of all."""
    dense = [part for part in parts if isinstance(part, np.ndarray)]
    sparse = [part for part in parts if isinstance(part, Sparse)]
    if not sparse:
        return np.concatenate(dense)
    if len(sparse) == 1:
        return sparse[0]
    index, where = np.unique(np.concatenate([part.index for part in sparse]), axis=0, return_inverse=True)
    values, row, column = np.zeros((sum(len(part.effects) for part in sparse), len(index))), 0, 0
    for part in sparse:
        values[row : row + len(part.effects), where.reshape(-1)[column : column + len(part.index)]] = part.effects
        row, column = row + len(part.effects), column + len(part.index)
    return Sparse(index, values)


def values_of(effects: Mapping[str, Effects]) -> dict[str, np.ndarray]:
    """The numbers alone."""
    return {name: found.effects if isinstance(found, Sparse) else found for name, found in effects.items()}


def cell_dim(name: str) -> str:
    """The dimension along which the cells of a sparse site lie."""
    return f"{name}.cell"


def label_of(what: str, axis: str) -> str:
    """Name of the coordinate that labels a position axis.

    >>> label_of("token", "pos"), label_of("token", "dest")
    ('token', 'dest_token')
    """
    return what if axis == "pos" else f"{axis}_{what}"


def plain(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as it comes back from a file: plain JSON values."""
    try:
        return json.loads(json.dumps(dict(provenance)))
    except (TypeError, ValueError) as error:
        raise ScoreError(f"provenance must be JSON (strings, numbers, lists, dicts): {error}. Convert it first.") from error


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a site name that may key a score map."""
    site = Site.parse(name)
    short = site.kind if site.narrowed else str(site)
    if short != name:
        raise ScoreError(f"score maps are keyed by whole sites in their short form; got {name!r}, expected {short!r}.")
    return site.axes


def check_rows(scores: Mapping[str, np.ndarray], live: Mapping[str, np.ndarray], index: np.ndarray, clean: np.ndarray, corrupted: np.ndarray) -> None:
    """One row per example in everything, and the same sites on both sides."""
    if not scores or set(scores) != set(live):
        raise ScoreError(f"scores and live must name the same sites, at least one; got {sorted(scores)} and {sorted(live)}.")
    if index.ndim != 1 or not index.size or len(set(index.tolist())) != len(index):
        raise ScoreError(f"examples must be a list of distinct task indices, at least one; got {index.tolist()}.")
    if len(clean) != len(index) or len(corrupted) != len(index):
        raise ScoreError(f"there are {len(index)} examples, but metric_clean has {len(clean)} values and metric_corrupted {len(corrupted)}.")
    if not (np.isfinite(clean).all() and np.isfinite(corrupted).all()):
        raise ScoreError("metric_clean and metric_corrupted must be finite; check the model's logits (dtype overflow?).")


def check_shape(name: str, axes: tuple[str, ...], values: np.ndarray, live: np.ndarray, sizes: dict[str, int]) -> None:
    """Floats with a dim per axis; adds the axes' sizes to ``sizes`` or holds them against it."""
    dims = ("example", *axes)
    if values.ndim != len(dims) or values.dtype.kind != "f" or live.shape != values.shape[1:]:
        raise ScoreError(
            f"{name}: got {values.dtype} scores of shape {list(values.shape)} and a live mask of shape {list(live.shape)}; "
            f"expected floats with the dims {list(dims)} and the mask without example."
        )
    for dim, size in zip(dims, values.shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise ScoreError(f"{name} has {size} along {dim}, the other sites {sizes[dim]}; all sites of a map share their axes.")


def check_patterns(patterns: Patterns, live: Mapping[str, np.ndarray], n: int) -> None:
    """A pattern per example, and for every site cells that together are the live ones."""
    if patterns.of.shape != (n,) or set(patterns.cells) != set(live):
        raise ScoreError(
            f"patterns must give one number per example ({n}) and the sites {sorted(live)}; "
            f"got {len(patterns.of)} numbers and {sorted(patterns.cells)}."
        )
    for name, cells in patterns.cells.items():
        if cells.shape[1:] != live[name].shape or not 0 <= patterns.of.min() <= patterns.of.max() < len(cells):
            raise ScoreError(
                f"the patterns of {name} have the shape {list(cells.shape)} and the numbers {patterns.of.min()} to {patterns.of.max()}; "
                f"expected one row per pattern, each of shape {list(live[name].shape)}."
            )
        if not np.array_equal(cells[np.unique(patterns.of)].any(0), live[name]):
            raise ScoreError(f"the live cells of {name} are not those that can matter for at least one example; build live from the patterns.")


def check_no_path(no_path: Mapping[str, np.ndarray], live: Mapping[str, np.ndarray]) -> None:
    """The sites and shapes of the live cells, none of which is without a path."""
    if set(no_path) != set(live):
        raise ScoreError(f"no_path and live must name the same sites; got {sorted(no_path)} and {sorted(live)}.")
    for name, cut in no_path.items():
        if cut.shape != live[name].shape:
            raise ScoreError(f"{name}: no_path has the shape {list(cut.shape)}, live {list(live[name].shape)}; give one value per cell.")
        if (cut & live[name]).any():
            raise ScoreError(f"{name}: {(cut & live[name]).sum()} cells are live and have no path to the metric; a cell is one or the other.")


def check_finite(name: str, axes: tuple[str, ...], values: np.ndarray, record: Mapping[str, Any], names: CellNames) -> None:
    """A site is scored throughout but for the cells that its method could not score, or not scored and listed with its reason."""
    bad, skipped = ~np.isfinite(values), name in record.get("not_scored", {})
    if not skipped and names.scored is not None:
        bad[:, ~names.scored] &= ~np.isnan(values[:, ~names.scored])
    if skipped and not np.isnan(values).all():
        raise ScoreError(f"{name} is in not_scored but has values; fill it with NaN or take it out of not_scored.")
    if bad.any() and not skipped:
        where = ", ".join(f"{dim} {i}" for dim, i in zip(("row", *axes), np.argwhere(bad)[0], strict=True))
        raise ScoreError(
            f"{name}: {bad.sum()} of {bad.size} scores are not finite, the first at {where}. A site is scored throughout, "
            f"or NaN throughout with a reason in provenance['not_scored']."
        )


def graph_of(record: Mapping[str, Any]) -> Graph:
    """The graph whose edges a map scores.

    Raises:
        ScoreError: provenance without one.
    """
    if "graph" not in record:
        raise ScoreError("a map of edges needs provenance['graph'], the fields of its patchlab.graph.Graph.")
    return Graph(**record["graph"])


def name_coords(name: str, axes: tuple[str, ...], names: CellNames, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Names along the axes, and which combinations are cells, as coordinates that are never an index."""
    coords: dict[str, Any] = {}
    for axis, words in names.names.items():
        if len(words) != sizes.get(axis):
            raise ScoreError(f"{name} has {sizes.get(axis)} along {axis}, and {len(words)} names for them; give one each.")
        coords[f"{axis}_name"] = (axis, np.array(words, dtype=str))
    if names.exists is not None:
        coords[f"is_{names.noun}"] = (axes[: names.exists.ndim], names.exists.astype(bool))
    if names.layer is not None:
        coords[f"layer_of_{names.noun}"] = (axes[: names.layer.ndim], names.layer)
    return coords


def upgraded(data: xr.Dataset, live: xr.Dataset, record: Mapping[str, Any]) -> tuple[xr.Dataset, xr.Dataset]:
    """A map of format 2, whose edges said by their graph alone which there are."""
    if record["format"] > 2 or "graph" not in record["provenance"]:
        return data, live
    graph, axes = graph_of(record["provenance"]), ("writer", "reader")
    is_edge = {"is_edge": (axes, graph.allowed), "layer_of_edge": (axes, np.broadcast_to(graph.reader_layer, graph.allowed.shape))}
    about = {"noun": "edge", "names": "{writer}->{reader}"}
    return with_attrs(with_coords(data, is_edge), about), with_coords(live, is_edge)


def position_coords(labels: PositionLabels | None, examples: np.ndarray, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Token text and names of the positions, as coordinates that are never an index."""
    coords: dict[str, Any] = {}
    if labels is None:
        return coords
    for axis in POSITION_AXES:
        if axis not in sizes:
            continue
        rows = [labels.tokens[e] for e in examples] if examples.max() < len(labels.tokens) else []
        if not rows or {len(row) for row in rows} != {sizes[axis]} or len(labels.roles or rows[0]) != sizes[axis]:
            raise ScoreError(
                f"the task's position axis has {len(labels.tokens)} examples of {len(labels.tokens[0])} positions; "
                f"the scores have {sizes[axis]} along {axis} and examples up to {examples.max()}. Build both from one task."
            )
        # HDF5 text ends at the first NUL, which byte-level vocabularies do contain
        coords[label_of("token", axis)] = (("example", axis), np.array([[text.replace("\0", "\\0") for text in row] for row in rows], dtype=str))
        if any(labels.roles):
            coords[label_of("position", axis)] = (axis, np.array(labels.roles, dtype=str))
    return coords


def spread(data: xr.Dataset, values: Mapping[str, np.ndarray] | None, order: np.ndarray) -> xr.Dataset | None:
    """Errors of the effects of a map: an array per site with the dims of its effects, or ``example`` alone where the cells share it.

    Raises:
        ScoreError: other sites or shapes, or negative values.
    """
    if values is None:
        return None
    if set(values) != set(data.data_vars):
        raise ScoreError(f"noise and standard errors must be of the sites that are scored, {sorted(map(str, data.data_vars))}; got {sorted(values)}.")
    variables: dict[str, Variable] = {}
    for name, found in values.items():
        dims = tuple(map(str, data[name].dims)) if found.ndim > 1 else ("example",)
        if found.shape != tuple(data.sizes[dim] for dim in dims) or bool((found < 0).any()):
            raise ScoreError(
                f"the noise or standard error of {name} must be [example] or of the shape {list(data[name].shape)}, and nowhere below 0; "
                f"got the shape {list(found.shape)}."
            )
        variables[name] = Variable(dims, found[order].astype(np.float32), {"units": data[name].attrs.get("units", "")})
    return frozen(xr.Dataset(variables, coords={"example": data["example"]}))


def checksum(record: Mapping[str, Any], *parts: xr.Dataset) -> str:
    """A hash of everything that a file of scores holds."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for part in parts:
        variables = variables_of(part)
        for name in sorted(map(str, variables)):
            dims, values, attrs = variables[name]
            plain = values.tobytes() if values.dtype.kind in "biuf" else json.dumps(values.tolist()).encode()
            kept = {key: str(value) for key, value in attrs.items()}
            digest.update(json.dumps([name, list(dims), values.dtype.kind, values.shape, kept], sort_keys=True).encode() + plain)
    return digest.hexdigest()


def frozen(dataset: xr.Dataset) -> xr.Dataset:
    """The same dataset on arrays of its own that cannot be written to, text as fixed-width strings."""
    parts: dict[Hashable, Variable] = {}
    for name, part in variables_of(dataset).items():
        values = np.array(part.data, dtype=str if part.data.dtype.kind in "OTU" else part.data.dtype)
        values.setflags(write=False)
        parts[name] = part._replace(data=values)
    return xr.Dataset({name: parts[name] for name in dataset.data_vars}, coords={name: parts[name] for name in dataset.coords}, attrs=dataset.attrs)
