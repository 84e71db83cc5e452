"""Structural zeros: the cells that cannot matter, decided from token ids and the computational graph."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from patchlab.adapters import Architecture
from patchlab.methods.cells.kind import cells_of
from patchlab.sites import Site
from patchlab.tasks.task import PositionAxis, Task


def live_cells(arch: Architecture, site: Site, task: Task, axis: PositionAxis | None, *, paired: bool) -> Bool[np.ndarray, "*cells"] | None:
    """The cells of a site that can matter for at least one example; False marks a structural zero.

    A cell is a structural zero if nothing that the metric reads depends on it (positions other than the answer's, after
    the last attention layer), or, with a ``paired`` source, if for every example the tokens up to it are unchanged, or it is a
    position-local activation of layer 0 at an unchanged token. None for sites whose cells only the runs show.
    """
    first = np.unique(live_patterns(task, axis, paired=paired), return_index=True)[1]
    cells = pattern_cells(arch, site, task, axis, first.tolist(), paired=paired)
    return None if cells is None else np.asarray(cells.any(0))


def live_patterns(task: Task, axis: PositionAxis | None, *, paired: bool) -> Int[np.ndarray, " example"]:
    """The pattern of each example, counted from 0: examples of one pattern have the same live cells, at every site."""
    keys = [(_changed(task, e, paired).tobytes(), None if axis is None or axis.names is None else axis.index[e].tobytes()) for e in range(len(task))]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def pattern_cells(
    arch: Architecture, site: Site, task: Task, axis: PositionAxis | None, examples: Iterable[int], *, paired: bool
) -> Bool[np.ndarray, "pattern *cells"] | None:
    """The cells of a site that can matter for each of these examples (one of every pattern is enough); None as for :func:`live_cells`."""
    live, reads_answer = cells_of(site).live, task.metric.reads == "answer"
    found = [live(arch, site, _changed(task, e, paired), None if axis is None else axis.index[e], reads_answer) for e in examples]
    known = [mask for mask in found if mask is not None]
    return np.stack(known) if len(known) == len(found) else None


def _changed(task: Task, example: int, paired: bool) -> Bool[np.ndarray, " pos"]:
    """Positions at which what is patched in can differ before anything mixes positions."""
    pair = task.pairs[example]
    return np.asarray(pair.clean_ids) != np.asarray(pair.corrupted_ids) if paired else np.ones(len(pair), dtype=bool)


def without_path(arch: Architecture, site: Site, task: Task, axis: PositionAxis | None) -> Bool[np.ndarray, "*cells"] | None:
    """The cells of a site that have, in no example, a causal path to what the metric reads, whatever the prompts are.

    The other structural zeros are *the same in both prompts*: at every position and in every example from which a path leads to the metric.
    """
    live = live_cells(arch, site, task, axis, paired=False)
    return None if live is None else ~live
