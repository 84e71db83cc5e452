"""Exact patches beyond single edges: sets of edges at once, and keys and values for all query heads that share them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from patchlab.errors import MethodError
from patchlab.graph import Graph
from patchlab.methods.cells.edges import edge_effects, set_effects
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.unpatched import Runs, required
from patchlab.methods.verified.patcher import Patcher
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.tasks.task import Task

BY_POSITION = "edges[writer,reader,pos]"


def patch_edges(
    model: Model,
    task: Task,
    edge_sets: Mapping[str, Any] | Sequence[Any],
    *,
    direction: str = "noising",
    source: str = "paired",
    post_norm: str = "renormalised",
    batch_size: int | None = None,
    progress: bool = True,
    max_memory: int | float | None = None,
) -> xr.DataArray:
    """The exact effect of patching each set of edges at once, per example (path patching).

    Along the edges of a set readers get what the writers hold in the other run, along all other edges what they hold in this very run:
    a writer that reads through a patched edge changes, and is carried on as it is then. A set of one edge has that edge's exact
    effect; all edges out of a node together are the node's. One whole forward pass per set and batch.
    Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Args:
        model: the model.
        task: prompt pairs, answers and metric.
        edge_sets: by name or in order; each a list of edge names, a mask ``[writer, reader]`` over the model's graph, a mask
            ``[writer, reader, pos]`` by the position (of the task's position axis) at which the reader reads, or a circuit.
        direction: ``noising`` (corrupted outputs into the clean run) or ``denoising``.
        source: as for methods: ``paired``, ``zero``, ``mean``, ``mean_positional``.
        post_norm: see :class:`patchlab.ActivationPatching`; all edges out of a head are the head where it is ``renormalised``.
        batch_size: examples per batch.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.
        max_memory: most bytes to use for activations.

    Returns:
        Effects in metric units, dims ``set`` and ``example``, with ``metric_clean`` and ``metric_corrupted`` beside them and
        the provenance as JSON among the attributes.

    Raises:
        MethodError: no sets, an empty one, a mask of another graph, and as every method.
        SiteError: a name that is no edge.

    Example:
        >>> sets = {"S-inhibition": ["a7.h3->a9.h6<q>", "a7.h9->a9.h6<q>"]}  # doctest: +SKIP
        >>> patch_edges(model, task, sets).mean("example")  # doctest: +SKIP
    """
    named = dict(edge_sets) if isinstance(edge_sets, Mapping) else {str(i): one for i, one in enumerate(edge_sets)}
    if not named:
        raise MethodError("no sets of edges given; give at least one, such as {'direct': ['a0.h1->logits']}.")
    masks = [_mask(model.arch.graph, name, one) for name, one in named.items()]
    by_position = {mask.ndim for mask in masks}
    if len(by_position) > 1:
        raise MethodError("some sets are masks by position and others are not; give all of them one way.")
    exact = ActivationPatching(source=source, post_norm=post_norm)
    options = {"direction": direction, "batch_size": batch_size, "max_memory": max_memory}
    with _patching(exact, model, task, BY_POSITION if by_position == {3} else "edges", len(masks), progress, options) as patcher:
        places = required(patcher.setting.live[str(patcher.setting.sites[0])]).shape
        for name, mask in zip(named, masks, strict=True):
            if mask.shape != places:
                raise MethodError(f"the set {name!r} has the shape {list(mask.shape)}; edges of {model.name} on {task.name} have {list(places)}.")
        return _collected(patcher, list(named), lambda runs: set_effects(patcher.setting, runs, patcher.meter, masks, post_norm=post_norm))


def kv_effects(
    model: Model,
    task: Task,
    *,
    direction: str = "noising",
    source: str = "paired",
    engine: str = "auto",
    post_norm: str = "renormalised",
    batch_size: int | None = None,
    progress: bool = True,
    max_memory: int | float | None = None,
) -> xr.DataArray:
    """The exact effect of every edge into a key-value head: the changed key or value is seen by all query heads that share it.

    Scores of edges into ``a3.h7<k>`` change what that query head alone sees. Under grouped queries the effect of changing the key
    itself is not the sum of its copies' (an attention pattern is not linear), so it is measured here.

    Args:
        model: the model.
        task: prompt pairs, answers and metric.
        direction: ``noising`` or ``denoising``.
        source: what is patched in; see :class:`patchlab.methods.Method`.
        engine: see :class:`patchlab.ActivationPatching`.
        post_norm: see there.
        batch_size: examples per batch.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.
        max_memory: most bytes to use for activations.

    Returns:
        Effects in metric units, dims ``edge`` (named ``m0->a1.kv0<k>``) and ``example``.

    Raises:
        MethodError: as every method.
    """
    exact, graph = ActivationPatching(source=source, engine=engine, post_norm=post_norm), model.arch.graph
    options = {"direction": direction, "batch_size": batch_size, "max_memory": max_memory}
    with _patching(exact, model, task, "edges", 0, progress, options) as patcher:
        first = np.isin(graph.reader_kind, ("k", "v")) & (graph.reader_head % graph.copies == 0)
        cells = np.argwhere(required(patcher.setting.live["edges"]) & first)
        names = [f"{graph.writers[writer]}->{graph.kv_name(reader)}" for writer, reader in cells.tolist()]
        options = {"engine": engine, "grouped": True, "post_norm": post_norm}
        return _collected(patcher, names, lambda runs: edge_effects(patcher.setting, runs, patcher.meter, cells, **options), "edge")


def _mask(graph: Graph, name: str, edges: Any) -> Bool[np.ndarray, "writer reader *pos"]:
    edges = getattr(edges, "edges", edges)
    if isinstance(edges, str):
        edges = [edges]
    mask = edges if isinstance(edges, np.ndarray) and edges.dtype == bool else graph.mask(edges)
    if mask.ndim not in (2, 3) or mask.shape[:2] != graph.allowed.shape:
        raise MethodError(f"the set {name!r} has the shape {list(mask.shape)}, but the model is {graph}: expected {list(graph.allowed.shape)}.")
    if not mask.any():
        raise MethodError(f"the set {name!r} has no edges, so nothing would change; name at least one.")
    outside = mask & ~graph.allowed.reshape(*graph.allowed.shape, *[1] * (mask.ndim - 2))
    if outside.any():
        writer, reader = np.argwhere(outside)[0][:2].tolist()
        raise MethodError(f"the set {name!r} holds {graph.name(writer, reader)}, which is no edge: the writer must be computed before the reader.")
    return mask


@contextmanager
def _patching(
    exact: ActivationPatching, model: Model, task: Task, site: str, total: int, progress: bool, options: Mapping[str, Any]
) -> Iterator[Patcher]:
    setting, batches, predicted = exact.prepared(model, task, site, **options)
    with progress_bar("patch edges", "set" if total else "edge", total * len(batches) or None, show=progress) as bar:
        yield Patcher(exact, setting, batches, predicted, Meter(bar, "cell"))


def _collected(patcher: Patcher, names: list[str], effects: Any, dim: str = "set") -> xr.DataArray:
    """Effects of all batches, in the order of the examples."""
    parts: list[Float[np.ndarray, "set batch"]] = []
    metrics: list[tuple[np.ndarray, np.ndarray]] = []
    for runs in patcher.runs():
        parts.append(effects(runs))
        metrics.append(_values(runs))
    clean, corrupted = (np.concatenate([pair[i] for pair in metrics])[patcher.order] for i in (0, 1))
    metric = patcher.setting.task.metric
    provenance = {**patcher.exact._provenance(patcher.setting, {}), "engine": patcher.meter.engine}
    return xr.DataArray(
        np.concatenate(parts, axis=1)[:, patcher.order],
        dims=(dim, "example"),
        coords={dim: names, "metric_clean": ("example", clean), "metric_corrupted": ("example", corrupted)},
        attrs={"units": metric.unit, "provenance": json.dumps(provenance)},
    )


def _values(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    clean, corrupted = (value.double().cpu().numpy() for value in (runs.clean, runs.corrupted))
    return clean, corrupted
