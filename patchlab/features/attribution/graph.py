"""Attribution graphs: what every feature, error, token and logit of one prompt gives to every other, with everything else held.

The order of nodes, the influence, pruning and both scores are those of circuit-tracer (Anthropic's circuit-tracing, Ameisen et al. 2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import sparse

from patchlab.errors import CircuitError
from patchlab.features.attribution.neuronpedia import save_json
from patchlab.features.attribution.nodes import EMBEDDING, ERROR, FEATURE, LOGIT, NODE_KINDS, Nodes

_SMALL = 1e-10


class GraphScores(NamedTuple):
    """How much of a graph is explained by features; both lie between 0 and 1, and 1 is all of it.

    Attributes:
        replacement: of the influence that starts at tokens or errors, the share that starts at tokens: T / (T + E).
        completeness: of what enters the nodes, weighted by their influence, the share that does not come from errors.
    """

    replacement: float
    completeness: float


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """The attribution graph of one prompt: ``adjacency[target, source]`` is what the source gives to the target's value, linearly.

    Of every target ``value = Σ_source adjacency + left_out + constant``, exactly, with attention patterns, norm denominators and features'
    activations held at what they are in the run. Only features and logits are targets.

    Args:
        nodes: the table of nodes; both axes of ``adjacency`` follow it.
        adjacency: edges, sparse; the weights are in units of the target's value.
        tokens: ids of the prompt.
        strings: its tokens as text.
        n_layers: blocks of the model.
        cumulative: of every node the share of all influence that nodes of at least its own have; None before pruning.
        provenance: model, transcoders, settings.

    Example:
        >>> graph = pl.features.attribution_graph(model, "When Mary and John went to the store, John gave a drink to", transcoders)  # doctest: +SKIP
        >>> graph.scores(), graph.prune().save_json("graph.json", slug="ioi", scan="gpt2")  # doctest: +SKIP
    """

    nodes: Nodes
    adjacency: sparse.csr_array
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    n_layers: int
    cumulative: Float[np.ndarray, " node"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.adjacency.shape != (len(self.nodes), len(self.nodes)):
            raise CircuitError(f"an adjacency of {len(self.nodes)} nodes is square of that size; got {self.adjacency.shape}.")
        self.adjacency.data.setflags(write=False)

    @property
    def n_edges(self) -> int:
        """Number of edges that are not zero."""
        return int(self.adjacency.nnz)

    def name(self, node: int) -> str:
        """A node's name: ``L3.F512@4``, ``L3.error@4``, ``input@4`` with the token, ``logit`` with it.

        The first two are patchlab's addresses without their site; positions count from 0.
        """
        kind, layer, pos, unit = (int(column[node]) for column in (self.nodes.kind, self.nodes.layer, self.nodes.pos, self.nodes.unit))
        if kind == 0:
            return f"L{layer}.F{unit}@{pos}"
        if kind == 1:
            return f"L{layer}.error@{pos}"
        return f"input@{pos} {self.strings[pos]!r}" if kind == 2 else f"logit {self.token_of(node)!r}"

    def token_of(self, node: int) -> str:
        """The token of a node as text: the one at its position; of a logit the one that it is about."""
        if NODE_KINDS[self.nodes.kind[node]] == LOGIT:
            return str(dict(self.provenance.get("logit_tokens", ())).get(int(self.nodes.unit[node]), f"#{self.nodes.unit[node]}"))
        return self.strings[int(self.nodes.pos[node])]

    def edge(self, source: int, target: int) -> float:
        """What a node gives to another one."""
        return float(self.adjacency[target, source])

    def table(self) -> pd.DataFrame:
        """The nodes with their names, tokens and influence on the logits, one a row."""
        columns = {name: getattr(self.nodes, name) for name in ("layer", "pos", "unit", "activation", "probability", "value", "constant", "left_out")}
        kinds = np.array(NODE_KINDS)[self.nodes.kind]
        names = [self.name(i) for i in range(len(self.nodes))]
        tokens = [self.token_of(i) for i in range(len(self.nodes))]
        return pd.DataFrame({"node": names, "kind": kinds, "token": tokens, **columns, "influence": self.influence()})

    def influence(self) -> Float[np.ndarray, " node"]:
        """Influence of every node on the logits over all paths: ``Σ_k w Âᵏ``, k ≥ 1.

        w are the probabilities of the logits, and Â is |A| with rows that are scaled to a sum of 1.
        """
        return _influence(_normalised(self.adjacency), self.nodes.probability)

    def scores(self) -> GraphScores:
        """Replacement and completeness of the graph as it is.

        Raises:
            CircuitError: nothing reaches the logits.
        """
        normalised = _normalised(self.adjacency)
        influence = _influence(normalised, self.nodes.probability)
        error, token = self.nodes.of(ERROR), self.nodes.of(EMBEDDING)
        start, reached = influence[token].sum() + influence[error].sum(), influence + self.nodes.probability
        if not start > 0:
            raise CircuitError("no edge leads from a token or an error to the logits, so there is nothing to score.")
        explained = 1 - normalised[:, np.flatnonzero(error)].sum(1)
        return GraphScores(float(influence[token].sum() / start), float((explained * reached).sum() / reached.sum()))

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """The graph of the nodes, and of the edges among them, that together have these shares of the influence.

        Tokens and logits stay. Features that nothing enters, and features and errors that nothing leaves, are dropped until there are none.

        Raises:
            CircuitError: a share outside of 0 to 1.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 <= share <= 1:
                raise CircuitError(f"{name} is the share of the influence that is kept, from 0 to 1; got {share}.")
        weights, influence = self.nodes.probability, self.influence()
        ends = self.nodes.of(EMBEDDING) | self.nodes.of(LOGIT)
        kept = (influence >= _cut(influence, nodes)) & (influence > 0) | ends
        among = _restricted(self.adjacency, kept).tocoo()
        normalised = _normalised(among.tocsr())
        reached = _influence(normalised, weights) + weights
        worth = normalised.tocoo()
        of_edge = worth.data * reached[worth.row]
        strong = (of_edge >= _cut(of_edge, edges)) & (of_edge > 0)
        target, source = worth.row[strong], worth.col[strong]
        feature = self.nodes.of(FEATURE)
        while True:
            held = kept[target] & kept[source]
            target, source = target[held], source[held]
            entered, left = np.zeros_like(kept), np.zeros_like(kept)
            entered[target], left[source] = True, True
            new = kept & (left | ends) & (entered | ~feature)
            if (new == kept).all():
                break
            kept = new
        mask = sparse.csr_array((np.ones(len(target), dtype=bool), (target, source)), shape=self.adjacency.shape)
        places = np.flatnonzero(kept)
        order = np.argsort(-influence, kind="stable")
        cumulative = np.empty_like(influence)
        cumulative[order] = np.cumsum(influence[order]) / max(influence.sum(), _SMALL)
        return replace(
            self,
            nodes=self.nodes.take(places),
            adjacency=sparse.csr_array(self.adjacency.multiply(mask))[places][:, places],
            cumulative=cumulative[places],
            provenance={**self.provenance, "pruning": {"nodes": nodes, "edges": edges, "of_nodes": len(self.nodes), "of_edges": self.n_edges}},
        )

    def save_json(self, path: str | Path, *, slug: str, scan: str, labels: Mapping[tuple[int, int], str] | None = None, **options: Any) -> Path:
        """Write the graph as Neuronpedia's graph JSON; see :func:`patchlab.features.attribution.neuronpedia.save_json`."""
        return save_json(self, path, slug=slug, scan=scan, labels=labels, **options)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int(self.nodes.of(kind).sum()):,} {kind}s" for kind in NODE_KINDS)
        pruned = "" if self.cumulative is None else ", pruned"
        return f"AttributionGraph({counts}; {self.n_edges:,} edges{pruned}; {len(self.tokens)} tokens, {self.provenance.get('model', '?')})"


def _restricted(matrix: sparse.csr_array, kept: Bool[np.ndarray, " node"]) -> sparse.csr_array:
    """The same with the rows and columns of other nodes empty."""
    found = matrix.tocoo()
    both = kept[found.row] & kept[found.col]
    return sparse.csr_array((found.data[both], (found.row[both], found.col[both])), shape=matrix.shape)


def _normalised(matrix: sparse.csr_array) -> sparse.csr_array:
    """Rows of absolute values, scaled to a sum of 1."""
    size = abs(matrix.astype(np.float64))
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(size.sum(1), _SMALL)) @ size)


def _influence(normalised: sparse.csr_array, weights: Float[np.ndarray, " node"]) -> Float[np.ndarray, " node"]:
    """``Σ_k w Âᵏ``, k ≥ 1.

    Raises:
        CircuitError: a circle of edges.
    """
    back = sparse.csr_array(normalised.T)
    current = back @ weights.astype(np.float64)
    total = current.copy()
    for _ in range(len(weights)):
        if not current.any():
            return total
        current = back @ current
        total += current
    raise CircuitError("the edges of the graph run in a circle, so influence has no end; targets must come after their sources.")


def _cut(scores: Float[np.ndarray, " some"], share: float) -> float:
    """The score that the largest ones, which sum to a share of all, have at least; infinity where there are none."""
    ordered = np.sort(scores)[::-1]
    if not len(ordered) or not ordered[0] > 0:
        return np.inf
    place = int(np.searchsorted(np.cumsum(ordered) / ordered.sum(), share))
    return float(ordered[min(place, int((ordered > 0).sum()) - 1)])
