"""Exact patches beyond single edges: sets of edges at once, and keys and values for all query heads that share them."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from patchlab.digest import digest
from patchlab.errors import MethodError
from patchlab.graph import Graph
from patchlab.host import to_array
from patchlab.methods.cells.edges import edge_effects, set_effects
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.unpatched import Runs, required
from patchlab.methods.verified.patcher import Patcher
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.scores import Cost, ScoreMap
from patchlab.scores.arrays import CellNames
from patchlab.tasks.task import Task

BY_POSITION, SETS = "edges[writer,reader,pos]", "sets"


def patch_edges(
    model: Model,
    task: Task,
    edge_sets: Mapping[str, Any] | Sequence[Any],
    *,
    direction: str = "denoising",
    source: str = "paired",
    post_norm: str = "renormalised",
    batch_size: int | None = None,
    progress: bool = True,
    max_memory: int | float | None = None,
) -> ScoreMap:
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
        direction: ``denoising`` (clean outputs into the corrupted run) or ``noising``.
        source: as for methods: ``paired``, ``zero``, ``mean``, ``mean_positional``.
        post_norm: see :class:`patchlab.ActivationPatching`; all edges out of a head are the head where it is ``renormalised``.
        batch_size: examples per batch.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.
        max_memory: most bytes to use for activations.

    Returns:
        A map with the site ``sets``, whose one axis is the sets by name: ``scores.sel("S-inhibition")``.

    Raises:
        MethodError: no sets, an empty one, a mask of another graph, and as every method.
        SiteError: a name that is no edge.

    Example:
        >>> sets = {"S-inhibition": ["a7.h3->a9.h6<q>", "a7.h9->a9.h6<q>"]}  # doctest: +SKIP
        >>> patch_edges(model, task, sets).top()  # doctest: +SKIP
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
        live = required(patcher.setting.live[str(patcher.setting.sites[0])])
        cells = {name: mask & live for name, mask in zip(named, masks, strict=True)}
        what = digest({name: (list(mask.shape), mask.tobytes()) for name, mask in cells.items()}, "sets")

        def of_sets(runs: Runs) -> Float[np.ndarray, "set batch"]:
            return set_effects(patcher.setting, runs, patcher.meter, masks, post_norm=post_norm)

        return _collected(patcher, {name: bool(mask.any()) for name, mask in cells.items()}, what, of_sets)


def kv_effects(
    model: Model,
    task: Task,
    *,
    direction: str = "denoising",
    source: str = "paired",
    engine: str = "auto",
    post_norm: str = "renormalised",
    batch_size: int | None = None,
    progress: bool = True,
    max_memory: int | float | None = None,
) -> ScoreMap:
    """The exact effect of every edge into a key-value head: the changed key or value is seen by all query heads that share it.

    Scores of edges into ``a3.h7<k>`` change what that query head alone sees. Under grouped queries the effect of changing the key
    itself is not the sum of its copies' (an attention pattern is not linear), so it is measured here.

    Args:
        model: the model.
        task: prompt pairs, answers and metric.
        direction: ``denoising`` or ``noising``.
        source: what is patched in; see :class:`patchlab.methods.Method`.
        engine: see :class:`patchlab.ActivationPatching`.
        post_norm: see there.
        batch_size: examples per batch.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.
        max_memory: most bytes to use for activations.

    Returns:
        A map with the site ``sets``: each is the copies of one edge, named ``m0->a1.kv0<k>``.

    Raises:
        MethodError: as every method.
    """
    exact, graph = ActivationPatching(source=source, engine=engine, post_norm=post_norm), model.arch.graph
    options = {"direction": direction, "batch_size": batch_size, "max_memory": max_memory}
    with _patching(exact, model, task, "edges", 0, progress, options) as patcher:
        first = np.isin(graph.reader_kind, ("k", "v")) & (graph.reader_head % graph.copies == 0)
        cells = np.argwhere(required(patcher.setting.live["edges"]) & first)
        names = [f"{graph.writers[writer]}->{graph.kv_name(reader)}" for writer, reader in cells.tolist()]

        def of_edges(runs: Runs) -> Float[np.ndarray, "edge batch"]:
            return edge_effects(patcher.setting, runs, patcher.meter, cells, engine=engine, grouped=True, post_norm=post_norm)

        return _collected(patcher, dict.fromkeys(names, True), digest(names, "sets"), of_edges)


def _mask(graph: Graph, name: str, edges: Any) -> Bool[np.ndarray, "writer reader *pos"]:
    edges = getattr(edges, "edges", edges)
    mask: np.ndarray = edges if _is_mask(edges) else graph.mask([edges] if isinstance(edges, str) else edges)
    if mask.ndim not in (2, 3) or mask.shape[:2] != graph.allowed.shape:
        raise MethodError(f"the set {name!r} has the shape {list(mask.shape)}, but the model is {graph}: expected {list(graph.allowed.shape)}.")
    if not mask.any():
        raise MethodError(f"the set {name!r} has no edges, so nothing would change; name at least one.")
    outside = mask & ~graph.allowed.reshape(*graph.allowed.shape, *[1] * (mask.ndim - 2))
    if outside.any():
        writer, reader = np.argwhere(outside)[0][:2].tolist()
        raise MethodError(f"the set {name!r} holds {graph.name(writer, reader)}, which is no edge: the writer must be computed before the reader.")
    return mask


def _is_mask(edges: object) -> bool:
    return isinstance(edges, np.ndarray) and cast(np.ndarray, edges).dtype == bool


@contextmanager
def _patching(
    exact: ActivationPatching, model: Model, task: Task, site: str, total: int, progress: bool, options: Mapping[str, Any]
) -> Generator[Patcher, None, None]:
    setting, batches, predicted = exact.prepared(model, task, site, **options)
    with progress_bar("patch edges", "set" if total else "edge", total * len(batches) or None, show=progress) as bar:
        yield Patcher(exact, setting, batches, predicted, Meter(bar, "cell"))


def _collected(patcher: Patcher, live: Mapping[str, bool], what: str | None, effects: Callable[[Runs], Float[np.ndarray, "set batch"]]) -> ScoreMap:
    """The effects of all batches; ``live`` says of each set whether any of its edges is, ``what`` identifies their edges."""
    started = time.perf_counter()
    parts: list[np.ndarray] = []
    clean: list[np.ndarray] = []
    corrupted: list[np.ndarray] = []
    rounding: list[np.ndarray] = []
    for runs in patcher.runs():
        parts.append(effects(runs).T)
        clean.append(to_array(runs.clean))
        corrupted.append(to_array(runs.corrupted))
        rounding.append(np.sqrt(2) * runs.rounding.metric)
    setting, meter = patcher.setting, patcher.meter
    return ScoreMap.build(
        {SETS: np.concatenate(parts)},
        {SETS: np.array(list(live.values()))},
        task_axis=None,
        examples=np.concatenate([batch.examples.cpu().numpy() for batch in patcher.batches]),
        metric_clean=np.concatenate(clean),
        metric_corrupted=np.concatenate(corrupted),
        provenance={**patcher.exact.provenance_of(setting, {}), "engine": meter.engine, "added_sites": {SETS: what}},
        cost=Cost(meter.forwards, meter.backwards, meter.positions, time.perf_counter() - started),
        noise={SETS: np.concatenate(rounding)},
        names={SETS: CellNames({"set": list(live)}, "set", "{set}")},
    )
