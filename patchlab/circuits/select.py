"""Selection of a circuit from scores: the n most important edges or nodes, those above a level, or greedily from the logits upwards."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.select_nodes import nodes_above, of_nodes, top_nodes
from patchlab.circuits.select_sparse import edges_above, top_edges
from patchlab.circuits.sparse import SparseCircuit
from patchlab.errors import CircuitError, unknown
from patchlab.graph import Graph
from patchlab.methods.setting.setting import DIRECTIONS
from patchlab.scores import ScoreMap
from patchlab.sites import Site

BY = ("abs", "signed")
"""Importance of an edge: the size of its effect, or the effect with its sign (turned for noising, where what helps has a negative effect)."""

Scores = ScoreMap | Float[np.ndarray, "writer reader *pos"]


def top_n(
    scores: Scores | SparseCircuit,
    n: int,
    *,
    by: str = "abs",
    prune: bool = True,
    graph: Graph | None = None,
    direction: str | None = None,
    sites: str | Iterable[str | Site] | None = None,
) -> Circuit | NodeCircuit | SparseCircuit:
    """The ``n`` most important edges or nodes. Of equally important ones the first in the order of the graph (by writer, then reader) are taken.

    Scores of nodes (``z``, ``mlp_out``, ``mlp_post``, features, errors, ...) give a :class:`patchlab.circuits.NodeCircuit` among all nodes of
    their sites, which are ranked together. Edges between nodes (:func:`patchlab.circuits.node_edges`) give a
    :class:`patchlab.circuits.SparseCircuit`.

    Args:
        scores: a map with ``edges`` or ``edges[writer,reader,pos]``, or of nodes (the mean over its examples counts); edges between nodes; or
            effects of edges ``[writer, reader]``, ``[writer, reader, pos]`` in metric units, NaN where an edge is not scored. With positions each
            position of an edge or node is chosen for itself.
        n: edges (before pruning) or nodes to choose.
        by: ``abs`` (as MIB does) or ``signed`` importance.
        prune: drop edges that dangle afterwards (:meth:`Circuit.pruned`), so that fewer than ``n`` may be left; nodes don't.
        graph: the graph of an array of effects; a map knows its own.
        direction: what an array of effects estimates, for ``signed`` importance; a map knows that, too.
        sites: which sites of a map of nodes; None for all that were scored.

    Raises:
        CircuitError: ``n`` below 1 or beyond the edges or nodes that are scored or that there are, or scores of something else.

    Example:
        >>> graph = Graph(1, 1, 4)
        >>> effects = np.where(graph.mask(["input->m0", "m0->logits"]), -1.0, 0.5)
        >>> top_n(effects, 2, graph=graph).edge_names
        ['input->m0', 'm0->logits']
    """
    if isinstance(scores, SparseCircuit):
        return top_edges(_alone(scores, graph, direction, sites), n, by=by, prune=prune)
    if of_nodes(scores, sites):
        direction_of(scores, direction)
        return top_nodes(scores, n, by=by, sites=sites)
    ranked = _Ranked.of(scores, by, graph, direction)
    ranked.check(n)
    order = np.argsort(-ranked.importance.ravel(), kind="stable")
    mask = np.zeros(ranked.importance.size, dtype=bool)
    mask[order[:n]] = True
    return ranked.circuit(mask.reshape(ranked.importance.shape), f"top {n:,} by {_NAMES[by]}", prune, n_requested=n, by=by)


def threshold(
    scores: Scores | SparseCircuit,
    level: float | int,
    *,
    by: str = "abs",
    prune: bool = True,
    graph: Graph | None = None,
    direction: str | None = None,
    sites: str | Iterable[str | Site] | None = None,
) -> Circuit | NodeCircuit | SparseCircuit:
    """The edges, or nodes, whose importance is at least ``level``, in metric units. What was not scored stays outside.

    Takes the arguments of :func:`top_n`.

    Raises:
        CircuitError: a level that is no number, or below 0 for ``abs``; or scores of something else.
    """
    if isinstance(scores, SparseCircuit):
        return edges_above(_alone(scores, graph, direction, sites), level, by=by, prune=prune)
    if of_nodes(scores, sites):
        direction_of(scores, direction)
        return nodes_above(scores, level, by=by, sites=sites)
    ranked = _Ranked.of(scores, by, graph, direction)
    if not np.isfinite(level) or (by == "abs" and level < 0):
        raise CircuitError(f"the level of a threshold is a finite number, at least 0 for importance 'abs'; got {level}.")
    return ranked.circuit(ranked.importance >= level, f"{_NAMES[by]} at least {level:g}", prune, level=float(level), by=by)


def greedy(
    scores: Scores,
    n: int,
    *,
    by: str = "abs",
    prune: bool = True,
    graph: Graph | None = None,
    direction: str | None = None,
) -> Circuit:
    """``n`` edges from the logits upwards: always the most important edge into a node that is already in; its writer is then in, too.

    As ``apply_greedy`` of EAP-IG (hannamw/EAP-IG). Of equally important edges those into the node that came in first are taken, then the first
    in the order of the graph. Takes the arguments of :func:`top_n`.

    Raises:
        CircuitError: as for :func:`top_n`; scores with positions; or no scored edges are left into the nodes that are in.
    """
    if of_nodes(scores) or isinstance(scores, SparseCircuit):
        raise CircuitError(
            "greedy selection goes from edge to edge of a model's graph; these are scores of nodes, or of edges between them. Use top_n or threshold."
        )
    ranked = _Ranked.of(scores, by, graph, direction)
    ranked.check(n)
    if ranked.importance.ndim > 2:
        raise CircuitError("greedy selection follows nodes, which positions do not have; use top_n, or scores of whole edges (site 'edges').")
    mask = np.zeros(ranked.importance.shape, dtype=bool)
    taken = 0
    for writer, reader in _upwards(ranked.graph, ranked.importance):
        mask[writer, reader] = True
        taken += 1
        if taken == n:
            return ranked.circuit(mask, f"greedy {n:,} by {_NAMES[by]}", prune, n_requested=n, by=by)
    raise CircuitError(
        f"only {taken:,} scored edges lead to the logits through nodes that came in before; {n:,} were asked for.{ranked.reasons()} "
        f"Ask for fewer, or use top_n."
    )


_NAMES = {"abs": "|effect|", "signed": "signed importance"}


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Edge effects with their importance: -inf where there is no edge or no score."""

    graph: Graph
    effects: Float[np.ndarray, "writer reader *pos"]
    importance: Float[np.ndarray, "writer reader *pos"]
    provenance: dict[str, Any]

    @staticmethod
    def of(scores: Scores, by: str, graph: Graph | None, direction: str | None) -> "_Ranked":
        if by not in BY:
            raise CircuitError(unknown("importance", by, BY))
        if isinstance(scores, ScoreMap):
            effects, provenance = mean_effects(scores)
            graph, direction = scores.graph, direction_of(scores, direction)
        else:
            effects, provenance = scores, {} if direction is None else {"direction": direction}
        if graph is None:
            raise CircuitError("an array of edge effects does not say whose edges they are; pass graph=model.arch.graph, or a ScoreMap.")
        if effects.shape[:2] != graph.allowed.shape or effects.ndim > 3:
            raise CircuitError(
                f"the effects have the shape {list(effects.shape)} and {graph} the edges {list(graph.allowed.shape)} [writer, reader]."
            )
        check_direction(direction, by)
        edges = np.broadcast_to(graph.allowed if effects.ndim == 2 else graph.allowed[:, :, None], effects.shape)
        if np.isinf(effects[edges]).any():
            raise CircuitError(
                f"{np.isinf(effects[edges]).sum()} edge effects are infinite; an effect is a number, or NaN where an edge was not scored."
            )
        importance = np.abs(effects) if by == "abs" else effects if direction == "denoising" else -effects
        return _Ranked(graph, effects, np.where(edges & ~np.isnan(effects), importance, -np.inf), provenance)

    def check(self, n: int) -> None:
        scored, there = int((self.importance > -np.inf).sum()), self.graph.n_edges * self.importance[0, 0].size
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise CircuitError(
                f"n is the number of edges to choose, a whole number of at least 1; got {n}. Circuit.empty(graph) is the circuit without edges."
            )
        if n > there:
            raise CircuitError(f"{n:,} edges were asked for; {self.graph} has {there:,}.")
        if n > scored:
            raise CircuitError(
                f"{n:,} edges were asked for and {scored:,} of {there:,} are scored.{self.reasons()} "
                f"A curve takes sizes=[...] up to that, and all edges. Ask for at most {scored:,}."
            )

    def reasons(self) -> str:
        """Why some edges have no score, as sentences with a space in front."""
        why = {f"edges into {kind}": reason for kind, reason in self.provenance.get("readers_not_scored", {}).items()}
        return "".join(f" Not scored: {what} ({reason})." for what, reason in {**why, **self.provenance.get("not_scored", {})}.items())

    def circuit(self, mask: Bool[np.ndarray, "writer reader *pos"], how: str, prune: bool, **choice: Any) -> Circuit:
        made = Circuit(self.graph, mask, self.effects, self.provenance | {"how": how} | choice)
        return made.pruned() if prune else made


def _alone(scores: SparseCircuit, graph: Graph | None, direction: str | None, sites: Any) -> SparseCircuit:
    """Edges between nodes, which know all about themselves.

    Raises:
        CircuitError: something is said about them that they know.
    """
    if graph is not None or sites is not None or direction not in (None, scores.provenance.get("direction")):
        raise CircuitError("graph=, direction= and sites= are for arrays and maps; edges between nodes know theirs. Leave them out.")
    return scores


def direction_of(scores: ScoreMap, given: str | None) -> str:
    """The direction that a map's effects have.

    Raises:
        CircuitError: another one is given.
    """
    own = str(scores.provenance.get("direction"))
    if given not in (None, own):
        raise CircuitError(f"the scores are of {own}; got direction={given!r}. Leave it out, or score the edges in that direction.")
    return own


def check_direction(direction: str | None, by: str) -> None:
    """Check that it is known in which direction importance is signed.

    Raises:
        CircuitError: signed importance without a direction, or an unknown one.
    """
    if direction is None and by == "signed":
        raise CircuitError(
            "signed importance depends on the direction, and an array of effects does not say it; pass direction='denoising' or 'noising'."
        )
    if direction is not None and direction not in DIRECTIONS:
        raise CircuitError(unknown("direction", direction, DIRECTIONS))


def mean_effects(scores: ScoreMap) -> tuple[Float[np.ndarray, "writer reader *pos"], dict[str, Any]]:
    """Mean effects of the edges of a map, and its provenance with the names of the positions.

    Raises:
        CircuitError: a map without edge scores, or with more than one site of them.
    """
    names = [name for name in scores.sites if Site.parse(name).kind == "edges"]
    usable = [name for name in names if Site.parse(name).axes in (("writer", "reader"), ("writer", "reader", "pos"))]
    if len(usable) != 1:
        raise CircuitError(
            f"a circuit is chosen from one site of edges, 'edges' or 'edges[writer,reader,pos]'; this map has {', '.join(usable or scores.sites)}. "
            f"Score the edges with method.run(model, task, 'edges')."
        )
    mean = scores.mean(usable[0])
    provenance = {key: value for key, value in scores.provenance.items() if key != "graph"}
    provenance["examples"] = scores.data["example"].to_numpy().tolist()
    if "pos" in mean.dims:
        names = mean["position"].to_numpy().tolist() if "position" in mean.coords else [""] * mean.sizes["pos"]
        provenance["positions"] = [name or str(i) for i, name in enumerate(names)]
    return mean.to_numpy(), provenance


def _upwards(graph: Graph, importance: Float[np.ndarray, "writer reader"]) -> Iterator[tuple[int, int]]:
    """Edges in the order of greedy selection. The heap holds the best edge left into each node that is in."""
    incoming: list[tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]] = []
    heap: list[tuple[float, int, int]] = []
    inside: set[int] = set()

    def enter(node: int) -> None:
        readers = np.flatnonzero(graph.reader_node == node)
        values = importance[:, readers]
        rows, columns = np.nonzero(values > -np.inf)
        order = np.argsort(-values[rows, columns], kind="stable")
        incoming.append((rows[order], readers[columns[order]], values[rows, columns][order]))
        inside.add(node)
        offer(len(incoming) - 1, 0)

    def offer(which: int, place: int) -> None:
        if place < len(incoming[which][0]):
            heapq.heappush(heap, (-incoming[which][2][place], which, place))

    enter(len(graph.nodes) - 1)
    while heap:
        _, which, place = heapq.heappop(heap)
        writer, reader = int(incoming[which][0][place]), int(incoming[which][1][place])
        yield writer, reader
        offer(which, place + 1)
        if writer not in inside:
            enter(writer)
