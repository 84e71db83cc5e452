"""Selection of edges between nodes from their effects: the n most important, or those above a level."""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from patchlab.circuits.select_nodes import BY
from patchlab.circuits.sparse import SparseCircuit
from patchlab.errors import CircuitError, unknown


def top_edges(edges: SparseCircuit, n: int, *, by: str = "abs", prune: bool = True) -> SparseCircuit:
    """The ``n`` most important edges; of equally important ones the first by target, then source. See :func:`patchlab.circuits.top_n`.

    Raises:
        CircuitError: ``n`` below 1 or beyond the edges that there are, an unknown importance, or edges without effects.
    """
    importance = _importance(edges, by)
    if not isinstance(n, (int, np.integer)) or not 1 <= n <= len(importance):
        raise CircuitError(f"n is a number of edges to choose, from 1 to the {len(importance):,} that are not zero; got {n}.")
    chosen = np.argsort(-importance, kind="stable")[:n]
    return _chosen(edges, chosen, prune, how=f"top {n:,} edges by {BY[by]}", n_requested=int(n), by=by)


def edges_above(edges: SparseCircuit, level: float | int, *, by: str = "abs", prune: bool = True) -> SparseCircuit:
    """The edges whose importance is at least ``level``, in metric units; see :func:`patchlab.circuits.threshold`.

    Raises:
        CircuitError: a level that is no number, or below 0 for ``abs``; edges without effects.
    """
    importance = _importance(edges, by)
    if not np.isfinite(level) or (by == "abs" and level < 0):
        raise CircuitError(f"the level of a threshold is a finite number, at least 0 for importance 'abs'; got {level}.")
    return _chosen(edges, np.flatnonzero(importance >= level), prune, how=f"edges with {BY[by]} at least {level:g}", level=float(level), by=by)


def _importance(edges: SparseCircuit, by: str) -> Float[np.ndarray, " edge"]:
    if by not in BY:
        raise CircuitError(unknown("importance", by, BY))
    if edges.scores is None or edges.all_but or np.isnan(edges.scores).any():
        raise CircuitError("edges are chosen by their effects, and these have none; find them with patchlab.circuits.node_edges.")
    if by == "abs":
        return np.abs(edges.scores)
    direction = edges.provenance.get("direction")
    if direction not in ("denoising", "noising"):
        raise CircuitError("signed importance depends on the direction, and these edges do not say theirs; use by='abs'.")
    return edges.scores if direction == "denoising" else -edges.scores


def _chosen(edges: SparseCircuit, chosen: Int[np.ndarray, " edge"], prune: bool, **choice: Any) -> SparseCircuit:
    scores = None if edges.scores is None else edges.scores[chosen]
    found = replace(edges, source=edges.source[chosen], target=edges.target[chosen], scores=scores, provenance=edges.provenance | choice)
    if not prune:
        return found
    pruned = found.pruned()
    return pruned if pruned.n_edges == found.n_edges else replace(pruned, provenance={**pruned.provenance, "how": f"{choice['how']}, pruned"})
