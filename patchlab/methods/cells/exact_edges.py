"""Exact patches of edges: the reader's input carries the writer's output of the other run, everything else is as it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.engine import Support, Work
from patchlab.engine.contributions import has_post_norm, post_norm_problem, post_norm_record
from patchlab.engine.edge_sweep import Differences, edge_sweep
from patchlab.engine.trust.edges import edge_mask, edge_support, run_edge_sets
from patchlab.errors import MethodError
from patchlab.graph import Graph
from patchlab.interventions import Kept
from patchlab.methods.setting.runs import Meter, Runs, Setting, first_difference, itemsize, program, token_bytes


@dataclass(frozen=True)
class EdgeCell:
    """One edge as an address: writer, reader and (if it has one) place along the position axis, which ``label`` names.

    >>> str(EdgeCell(Graph(2, 2, 8), (2, 13)))
    'a0.h1->m1'
    """

    graph: Graph
    index: tuple[int, ...]
    label: int | str | None = None

    def __str__(self) -> str:
        return self.graph.name(*self.index[:2]) + ("" if self.label is None else f"@{self.label}")


def edge_cells(setting: Setting) -> Iterator[tuple[tuple[int, ...], EdgeCell]]:
    """Index and address of every live edge."""
    names = None if setting.axis is None else setting.axis.names
    for index in map(tuple, np.argwhere(setting.live[str(setting.edges)]).tolist()):
        place = index[2] if len(index) > 2 else None
        yield index, EdgeCell(setting.model.arch.graph, index, place if place is None or names is None else names[place])


def check_edges(setting: Setting, post_norm: str) -> None:
    """Check that the edges can be patched exactly, and in the form that is asked for.

    Raises:
        MethodError: edges by pairs of positions; a held denominator where there are no edges, or no norm after the attention.
    """
    if post_norm != "renormalised" and setting.edges is None:
        raise MethodError(
            f"post_norm={post_norm!r} says what an edge out of a head carries; got the sites {', '.join(map(str, setting.sites))}, which are patched "
            f"in the model as it runs. Leave it out, or ask for 'edges'."
        )
    if (problem := post_norm_problem(setting.model, post_norm)) is not None:
        raise MethodError(problem)
    if setting.edges is not None and "dest" in setting.edges.axes:
        raise MethodError(
            "exact patching scores an edge by the position at which its reader reads, not by pairs of positions; got "
            f"{setting.edges}. Ask for 'edges' or 'edges[writer,reader,pos]', or take a linearised method such as RelevancePatching()."
        )


def score_edges(setting: Setting, runs: Runs, meter: Meter, *, engine: str, post_norm: str) -> Float[np.ndarray, "batch writer reader *pos"]:
    """Exact effects of all live edges on one batch, in metric units; zero for the others."""
    live = setting.live[str(setting.edges)]
    cells = np.argwhere(live)
    scores = np.zeros((len(runs.batch), *live.shape))
    scores[(slice(None), *cells.T)] = edge_effects(setting, runs, meter, cells, engine=engine, finished=meter.cells, post_norm=post_norm).T
    return scores


def edge_effects(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    cells: Int[np.ndarray, "edge axis"],
    *,
    engine: str = "auto",
    finished: dict[int, np.ndarray] | None = None,
    grouped: bool = False,
    post_norm: str = "renormalised",
) -> Float[np.ndarray, "edge batch"]:
    """Exact effects of single edges on one batch, in metric units.

    Args:
        setting: with edges as its site.
        runs: the unpatched runs, with the writers' activations.
        meter: counts the work.
        cells: writer, reader and (if the site has it) place along the position axis, per edge.
        engine: ``auto`` or ``literal``.
        finished: effects found before, by number; gets the others as they are found.
        grouped: a changed key or value is seen by all query heads that share it.
        post_norm: see :data:`patchlab.engine.contributions.POST_NORMS`.
    """
    finished = {} if finished is None else finished
    way = edge_support(setting.model) if engine == "auto" else Support("literal", "asked for")
    meter.engine = str(way)
    base, where = runs.baseline_values.double(), _positions(setting, runs, cells)
    left = [i for i in range(len(cells)) if i not in finished]

    def done(numbers: list[int], values: Tensor) -> None:
        meter.bar.update(len(numbers) * (meter.unit == "cell"))
        finished.update(zip(numbers, (values.double() - base).cpu().numpy(), strict=True))
        meter.keep()

    if left and way.mode == "literal":
        masks = (edge_mask(setting.model, cells[i, :2], grouped=grouped) for i in left)
        if where is not None:
            length = runs.baseline_tokens.shape[1]
            masks = (mask[:, :, None, None] & _one_hot(where[i], length) for mask, i in zip(masks, left, strict=True))
        run_sets(setting, runs, meter, masks, lambda places, values: done([left[i] for i in places], values), post_norm=post_norm)
    elif left:
        work = Work()
        try:
            edge_sweep(
                setting.model,
                program(setting, runs),
                cells[:, :2],
                _differences(setting, runs, post_norm),
                where=where,
                grouped=grouped,
                prefix=way.mode == "prefix",
                start=first_difference(runs.batch) if isinstance(runs.source, Kept) else 0,
                base=runs.base if way.mode == "prefix" else None,
                max_tokens=_max_tokens(setting, runs),
                done=done,
                skip=finished.keys(),
                work=work,
            )
        finally:
            meter.forwards += work.forwards + work.cells
            meter.positions += round(work.block_positions / setting.model.arch.n_layers) + work.forwards * runs.baseline_tokens.numel()
    return np.stack([finished[i] for i in range(len(cells))]) if len(cells) else np.zeros((0, len(runs.batch)))


def set_effects(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    sets: Iterable[Bool[np.ndarray, "writer reader *pos"]],
    *,
    post_norm: str = "renormalised",
) -> Float[np.ndarray, "set batch"]:
    """Exact effects of sets of edges on one batch, each set patched at once, in metric units.

    A set is a mask over the edges, ``[writer, reader]`` or by place along the position axis ``[writer, reader, pos]``.
    """
    found: list[np.ndarray] = []
    base = runs.baseline_values.double()
    meter.engine = "literal (sets of edges are routed)"
    masks = (_everywhere(setting, runs, mask) for mask in sets)

    def done(numbers: list[int], values: Tensor) -> None:
        meter.bar.update(len(numbers) * (meter.unit == "cell"))
        found.append((values.double() - base).cpu().numpy())

    run_sets(setting, runs, meter, masks, done, post_norm=post_norm)
    return np.concatenate(found) if found else np.zeros((0, len(runs.batch)))


def run_sets(setting: Setting, runs: Runs, meter: Meter, masks: Iterator[Bool[Tensor, "writer reader *where"]], done: Any, *, post_norm: str) -> None:
    """Run sets of edges with whole forward passes, and count them."""

    def counted(numbers: list[int], values: Tensor) -> None:
        meter.forwards += len(numbers)
        meter.positions += len(numbers) * runs.baseline_tokens.numel()
        done(numbers, values)

    budget = None if setting.max_memory is None else setting.max_memory / 2
    run_edge_sets(setting.model, program(setting, runs), masks, _differences(setting, runs, post_norm), max_bytes=budget, done=counted)


def edge_bytes(setting: Setting, rows: int, length: int) -> int:
    """Bytes that the exact scores of a batch, the writers' activations in both runs and one chunk of edges take."""
    arch, live = setting.model.arch, setting.live[str(setting.edges)]
    written = len(setting.targets) * rows * length * max(arch.d_model, arch.n_heads * arch.d_head)
    kept = (3 + has_post_norm(setting.model)) * arch.n_layers * rows * length * arch.d_model
    return 16 * rows * live.size + itemsize(setting) * (3 * written + kept + rows * arch.vocab_size) + rows * length * token_bytes(setting, length)


def edge_record(setting: Setting, post_norm: str) -> dict[str, str]:
    """What provenance says about edges of models with norms after the attention."""
    return {} if setting.edges is None else post_norm_record(setting.model, post_norm)


def _differences(setting: Setting, runs: Runs, post_norm: str) -> Differences:
    own = {key: runs.baseline.activations[key] for key in setting.targets}
    return Differences.of(setting.model, own, runs.source, runs.batch.examples, post_norm)


def _max_tokens(setting: Setting, runs: Runs) -> int | None:
    """Rows × positions of a block call that fit into the budget; None for the engine's own choice."""
    if setting.max_memory is None:
        return None
    rows, length = runs.baseline_tokens.shape
    left = setting.max_memory - edge_bytes(setting, rows, length)
    return max(rows * length, int(left // token_bytes(setting, length)))


def _index(setting: Setting, runs: Runs) -> Int[Tensor, "row place"]:
    """The position that each place along the position axis stands for, per row."""
    axis, device = setting.axis, setting.model.device
    rows, length = runs.baseline_tokens.shape
    if axis is None or axis.names is None:
        return torch.arange(length, device=device).expand(rows, length)
    return torch.as_tensor(axis.index[runs.batch.examples.cpu().numpy()], device=device)


def _positions(setting: Setting, runs: Runs, cells: Int[np.ndarray, "edge axis"]) -> list[Int[Tensor, " row"]] | None:
    """Where each edge is read, per row; None for everywhere."""
    if cells.shape[1] < 3:
        return None
    columns = _index(setting, runs).unbind(1)  # one tensor per place, which all edges there share
    return [columns[place] for place in cells[:, 2].tolist()]


def _one_hot(where: Int[Tensor, " row"], length: int) -> Bool[Tensor, "row pos"]:
    return torch.arange(length, device=where.device) == where[:, None]


def _everywhere(setting: Setting, runs: Runs, mask: Bool[np.ndarray, "writer reader *pos"]) -> Bool[Tensor, "writer reader *where"]:
    """A mask at the positions that its places stand for, per row."""
    chosen = torch.as_tensor(mask.copy(), device=setting.model.device)
    if chosen.ndim == 2:
        return chosen
    index, length = _index(setting, runs), runs.baseline_tokens.shape[1]
    spread = torch.stack([_one_hot(index[:, place], length) for place in range(index.shape[1])])  # place, row, pos
    return (chosen[..., None, None] & spread).any(2)
