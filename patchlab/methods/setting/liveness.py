"""Structural zeros: the cells that cannot matter, decided from token ids and the computational graph."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from patchlab.adapters import Architecture
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import PositionAxis, Task


def live_cells(arch: Architecture, site: Site, task: Task, axis: PositionAxis | None, *, paired: bool) -> Bool[np.ndarray, "*cells"]:
    """Which cells of a site can matter for at least one example; False marks a structural zero.

    A cell is a structural zero if nothing that the metric reads depends on it (positions other than the answer's, after
    the last attention layer), or, with a ``paired`` source, if for every example the tokens up to it are unchanged, or it is a
    position-local activation of layer 0 at an unchanged token.
    """
    first = np.unique(live_patterns(task, axis, paired=paired), return_index=True)[1]
    return np.asarray(pattern_cells(arch, site, task, axis, first.tolist(), paired=paired).any(0))


def live_patterns(task: Task, axis: PositionAxis | None, *, paired: bool) -> Int[np.ndarray, " example"]:
    """The pattern of each example, counted from 0: examples of one pattern have the same live cells, at every site."""
    keys = [(_changed(task, e, paired).tobytes(), None if axis is None or axis.names is None else axis.index[e].tobytes()) for e in range(len(task))]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def pattern_cells(
    arch: Architecture, site: Site, task: Task, axis: PositionAxis | None, examples: Iterable[int], *, paired: bool
) -> Bool[np.ndarray, "pattern *cells"]:
    """Which cells of a site can matter for each of these examples (one of every pattern is enough)."""
    one = _edges_of_one if site.kind == "edges" else _one_example
    reads_answer = task.metric.reads == "answer"
    return np.stack([one(arch, site, _changed(task, e, paired), None if axis is None else axis.index[e], reads_answer) for e in examples])


def _changed(task: Task, example: int, paired: bool) -> Bool[np.ndarray, " pos"]:
    """Positions at which what is patched in can differ before anything mixes positions."""
    pair = task.pairs[example]
    return np.asarray(pair.clean_ids) != np.asarray(pair.corrupted_ids) if paired else np.ones(len(pair), dtype=bool)


def without_path(arch: Architecture, site: Site, task: Task, axis: PositionAxis | None) -> Bool[np.ndarray, "*cells"]:
    """Which cells of a site have, in no example, a causal path to what the metric reads, whatever the prompts are.

    The other structural zeros are *the same in both prompts*: at every position and in every example from which a path leads to the metric.
    """
    return ~live_cells(arch, site, task, axis, paired=False)


def cell_shape(arch: Architecture, site: Site, axis: PositionAxis | None) -> tuple[int, ...]:
    """Length of each scored axis of a site."""
    return tuple(len(axis) if name in ("pos", "dest", "src") and axis is not None else arch.size(name) for name in site.axes)


def _one_example(arch: Architecture, site: Site, changed: Bool[np.ndarray, " pos"], index: Any, reads_answer: bool) -> Bool[np.ndarray, "*cells"]:
    kind = KINDS[site.kind]
    length = len(changed)
    prefix = np.logical_or.accumulate(changed)
    layers = arch.n_layers if kind.layered else 1
    by_pos = np.tile(prefix, (layers, 1))  # layer, position
    if kind.first == "always" or (arch.parallel and kind.first == "parallel"):
        by_pos[0] = changed
    if reads_answer and kind.layered and not kind.attended:
        by_pos[-1, : length - 1] = False
    live = by_pos
    names = ["layer", kind.position]
    if kind.source is not None:
        live = by_pos[:, :, None] & np.tri(length, dtype=bool)
        names.append(kind.source)
    for dim, name in enumerate(names):
        if name in site.axes and name != "layer" and index is not None:
            live = live.take(index, axis=dim)
    joint = tuple(dim for dim, name in enumerate(names) if name not in site.axes)
    live = np.asarray(live.any(axis=joint))
    kept = [name for name in names if name in site.axes]
    for dim, name in enumerate(site.axes):
        if name not in kept:
            live = np.repeat(np.expand_dims(live, dim), arch.size(name), axis=dim)
    return live


def _edges_of_one(arch: Architecture, site: Site, changed: Bool[np.ndarray, " pos"], index: Any, reads_answer: bool) -> Bool[np.ndarray, "*cells"]:
    """Edges: what the writer holds can differ at a position, and what the reader reads there can matter."""
    graph, length = arch.graph, len(changed)
    prefix = np.logical_or.accumulate(changed)
    written = np.tile(prefix, (len(graph.writers), 1))
    written[0] = changed
    if arch.parallel and graph.mlps:
        written[graph.n_heads + 1] = changed  # the first MLP reads the input alone
    last = np.arange(length) == length - 1
    read = np.ones((len(graph.readers), length), dtype=bool)
    crossing = np.isin(graph.reader_kind, ("k", "v"))
    if reads_answer:
        late = [*range(graph.reader_slice(graph.n_layers - 1).start, len(graph.readers))]
        read[[reader for reader in late if not crossing[reader]]] = last
    if "dest" not in site.axes:
        by_pos = written[:, None, :] & read[None, :, :]
        if "pos" not in site.axes:
            return graph.allowed & by_pos.any(-1)
        return graph.allowed[:, :, None] & (by_pos if index is None else by_pos.take(index, axis=2))
    pairs = np.where(crossing[:, None, None], np.tri(length, dtype=bool), np.eye(length, dtype=bool) & read[:, :, None])
    if reads_answer:
        pairs[graph.reader_slice(graph.n_layers - 1).start :] &= last[:, None]
    if index is not None:
        pairs, written = pairs.take(index, axis=1).take(index, axis=2), written.take(index, axis=1)
    return graph.allowed[:, :, None, None] & written[:, None, None, :] & pairs[None]
