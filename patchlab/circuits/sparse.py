"""SparseCircuit: nodes of sites (features, errors, neurons, heads) with the edges between them that were chosen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.engine.segments import ORDER
from patchlab.errors import CircuitError, unknown
from patchlab.scores.arrays import plain
from patchlab.sites import KINDS, Site

LOGITS = "logits"
"""What the last edges lead to: the metric, by way of the logits."""
ARROW = "->"


@dataclass(frozen=True, eq=False)
class SparseCircuit:
    """Edges between nodes of sites, as sparse feature circuits have them (Marks et al. 2024, arXiv 2403.19647). An edge is direct: it leads from a
    node to another, or to the logits, past no other candidate.

    A node that an edge leads to is computed from the nodes that edges lead from; all other candidates carry the ablation's value there. What is no
    candidate is free: it is what the clean prompt and these nodes make of it. Of nodes alone is :class:`patchlab.circuits.NodeCircuit`.

    Args:
        nodes: the nodes that edges join, listed, and the candidates that they were chosen from.
        source: per edge the number of the node that it leads from, in the order of ``nodes.nodes``.
        target: per edge the number of the node that it leads to; one past the last node is the logits.
        all_but: the listed edges are those outside, and all others between candidates are in.
        scores: per edge its mean effect, in metric units; None where edges were not chosen by scores.
        provenance: where it comes from: method, task, model, how it was chosen, ``positions`` (names), notes; JSON-able.

    Raises:
        CircuitError: nodes by what is not in, numbers of no node, an edge twice or not forward, or scores that do not fit.

    Example:
        >>> universe = (Candidates(Site.parse("mlp_post"), (2, 3)),)
        >>> circuit = SparseCircuit.of(universe, ["L0.N1.mlp_post->L1.N2.mlp_post", "L1.N2.mlp_post->logits"])
        >>> circuit.n_edges, circuit.nodes.nodes
        (2, ('L0.N1.mlp_post', 'L1.N2.mlp_post'))
    """

    nodes: NodeCircuit
    source: Int[np.ndarray, " edge"]
    target: Int[np.ndarray, " edge"]
    all_but: bool = False
    scores: Float[np.ndarray, " edge"] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nodes.all_but:
            raise CircuitError("edges join nodes that are listed; these are all but the listed ones. Choose nodes (top_n, threshold) first.")
        n = self.nodes.n_nodes
        source, target = np.asarray(self.source, dtype=np.int64), np.asarray(self.target, dtype=np.int64)
        if source.ndim != 1 or source.shape != target.shape or (self.scores is not None and np.shape(self.scores) != source.shape):
            raise CircuitError(f"an edge has a source, a target and a score; got {list(source.shape)} sources and {list(target.shape)} targets.")
        if len(source) and (source.min() < 0 or source.max() >= n or target.min() < 0 or target.max() > n):
            raise CircuitError(f"edges lead from one of {n:,} nodes (0 to {n - 1:,}) to one of them, or to {n:,}, the logits.")
        order = np.lexsort((source, target))
        source, target = source[order], target[order]
        if len(source) > 1 and bool(((source[1:] == source[:-1]) & (target[1:] == target[:-1])).any()):
            raise CircuitError("an edge is listed twice; list each once.")
        stages = np.append(self.stages, np.iinfo(np.int64).max)
        if len(back := np.flatnonzero(stages[source] >= stages[target])):
            raise CircuitError(f"{self._name(int(source[back[0]]), int(target[back[0]]))} does not lead forward: its target is computed first.")
        object.__setattr__(self, "source", _frozen(source))
        object.__setattr__(self, "target", _frozen(target))
        if self.scores is not None:
            object.__setattr__(self, "scores", _frozen(np.asarray(self.scores, dtype=np.float64)[order]))
        object.__setattr__(self, "provenance", plain(self.provenance))

    @staticmethod
    def of(universe: Sequence[Candidates], edges: Iterable[str], provenance: Mapping[str, Any] | None = None) -> "SparseCircuit":
        """A circuit of named edges, ``L1.F5.resid_post->L2.F9.resid_post`` or ``L2.F9.resid_post->logits``, with the nodes that they join.

        Raises:
            SiteError: a text that is no address.
            CircuitError: a name that is no edge, or a node that is no candidate.
        """
        pairs = [_pair(name) for name in ([edges] if isinstance(edges, str) else edges)]
        about = dict(provenance or {})
        names = dict.fromkeys(name for pair in pairs for name in pair if name != LOGITS)
        nodes = NodeCircuit.of(universe, names, about)
        number = NodeTable.of(nodes).numbers([name for pair in pairs for name in pair])
        return SparseCircuit(nodes, number[::2], number[1::2], provenance=about)

    @property
    def n_edges(self) -> int:
        """Number of edges that are listed."""
        return len(self.source)

    @property
    def n_nodes(self) -> int:
        """Number of nodes that listed edges join."""
        return len(self.joined)

    @property
    def joined(self) -> Int[np.ndarray, " node"]:
        """The nodes that listed edges join, without the logits."""
        found = np.union1d(self.source, self.target)
        return found[found < self.nodes.n_nodes]

    @cached_property
    def table_of_nodes(self) -> "NodeTable":
        """The nodes by number."""
        return NodeTable.of(self.nodes)

    @property
    def stages(self) -> Int[np.ndarray, " node"]:
        """Per node when it is computed, compared with others."""
        return self.table_of_nodes.stage

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the listed edges."""
        return tuple(self._name(*pair) for pair in zip(self.source.tolist(), self.target.tolist(), strict=True))

    @property
    def positions(self) -> tuple[str, ...] | None:
        """Names of the positions, where they have names."""
        return self.nodes.positions

    def pruned(self) -> "SparseCircuit":
        """Without edges from which no other edges lead on to the logits; they change nothing. What edges lead from needs none that leads to it.

        Raises:
            CircuitError: the listed edges are those outside.
        """
        self._check_inside()
        alive = {self.nodes.n_nodes}
        kept = np.zeros(len(self.source), dtype=bool)
        while True:
            more = np.isin(self.target, list(alive)) & ~kept
            if not more.any():
                break
            kept |= more
            alive |= set(self.source[more].tolist())
        return replace(self, source=self.source[kept], target=self.target[kept], scores=None if self.scores is None else self.scores[kept])

    def emptied(self) -> "SparseCircuit":
        """The circuit without edges, among the same nodes."""
        none = np.zeros(0, dtype=np.int64)
        return SparseCircuit(self.nodes, none, none, provenance=self.provenance | {"how": "no edges"})

    def without(self, edge: int) -> "SparseCircuit":
        """The circuit without one of its edges, by its place among them.

        Raises:
            CircuitError: the listed edges are those outside.
        """
        return self._taken(np.arange(len(self.source)) != edge)

    def without_node(self, node: int) -> "SparseCircuit":
        """The circuit without the edges of one node.

        Raises:
            CircuitError: the listed edges are those outside.
        """
        return self._taken((self.source != node) & (self.target != node))

    def _check_inside(self) -> None:
        if self.all_but:
            raise CircuitError(
                f"the {self.n_edges:,} listed edges are those outside, so none can be taken out of the circuit: it would come in. Take edges "
                f"out of its complement (~circuit), or list those that are in."
            )

    def _taken(self, kept: Bool[np.ndarray, " edge"]) -> "SparseCircuit":
        self._check_inside()
        scores = None if self.scores is None else self.scores[kept]
        return replace(self, source=self.source[kept], target=self.target[kept], scores=scores)

    def equals(self, other: "SparseCircuit") -> bool:
        """Whether nodes, edges and scores are the same; provenance may differ."""
        same = np.array_equal(self.source, other.source) and np.array_equal(self.target, other.target) and self.all_but == other.all_but
        if self.scores is None or other.scores is None:
            return same and self.scores is other.scores and self.nodes.equals(other.nodes)
        return same and np.array_equal(self.scores, other.scores, equal_nan=True) and self.nodes.equals(other.nodes)

    def key(self) -> bytes:
        """Bytes that tell which edges are in, among the same nodes."""
        return b"|".join([bytes([self.all_but]), self.nodes.key(), self.source.tobytes(), self.target.tobytes()])

    def __invert__(self) -> "SparseCircuit":
        return replace(self, all_but=not self.all_but, provenance=self.provenance | {"how": "complement"})

    def table(self) -> pd.DataFrame:
        """The listed edges: ``edge`` (name), ``source``, ``target`` (addresses), ``score`` (mean effect; NaN where unknown), the largest first."""
        names = (*self.table_of_nodes.names, LOGITS)
        source, target = ([names[i] for i in ends.tolist()] for ends in (self.source, self.target))
        scores = np.full(len(source), np.nan) if self.scores is None else self.scores
        columns = {"edge": self.edges, "source": source, "target": target, "score": scores}
        order = np.argsort(-np.abs(np.nan_to_num(scores)), kind="stable")
        return pd.DataFrame(columns).iloc[order].reset_index(drop=True)

    def summary(self, top: int = 10) -> str:
        """The circuit as text: its size, and the ``top`` edges by absolute score."""
        table = self.table().dropna(subset="score").head(top)
        lines = [repr(self), *([f"Largest {len(table)} of its edges by |effect|:"] if len(table) else [])]
        wide = max(map(len, table["edge"]), default=0)
        return "\n".join([*lines, *(f"  {row['edge']:<{wide}} {row['score']:+.4g}" for row in table.to_dict("records"))])

    def __repr__(self) -> str:
        about = self.provenance
        who = ", ".join(str(about[key]) for key in ("method", "direction", "metric", "how", "file") if about.get(key))
        what = " × ".join(str(about[key]) for key in ("model", "task") if about.get(key))
        notes = "".join(f"; note: {note}" for note in about.get("notes", ()))
        size = f"all but {self.n_edges:,} edges" if self.all_but else f"{self.n_edges:,} edges, {self.n_nodes:,} of {self.nodes.size:,} nodes"
        return f"SparseCircuit({'; '.join(filter(None, [who, what]))}) {size}: {', '.join(map(str, self.nodes.universe))}{notes}"

    def _name(self, source: int, target: int) -> str:
        names = self.table_of_nodes.names
        return f"{names[source]}{ARROW}{LOGITS if target == len(names) else names[target]}"


@dataclass(frozen=True, eq=False)
class NodeTable:
    """The nodes of a circuit by number, site by site.

    Args:
        names: addresses.
        which: the site of each node, as its place among the candidates.
        layer: its layer; -1 where the site has none.
        pos: its position along the position axis; -1 for all positions.
        unit: its head, neuron or feature; -1 for the whole.
        stage: when it is computed: larger is later, and nodes of one activation are equal.
    """

    names: tuple[str, ...]
    which: Int[np.ndarray, " node"]
    layer: Int[np.ndarray, " node"]
    pos: Int[np.ndarray, " node"]
    unit: Int[np.ndarray, " node"]
    stage: Int[np.ndarray, " node"]

    @staticmethod
    def of(circuit: NodeCircuit) -> "NodeTable":
        """Of the nodes that are in."""
        parts: list[np.ndarray] = []
        for place, one in enumerate(circuit.universe):
            cells, kind = one.cells(circuit.ids(one.name)), KINDS[one.site.kind]
            nothing = np.full(len(cells), -1)
            axes = {axis: cells[:, i] for i, axis in enumerate(one.site.axes)}
            layer = axes.get("layer", nothing)
            stage = (layer + 1) * len(ORDER) + ORDER.index(point_of(one.site.kind))
            parts.append(np.stack([nothing + 1 + place, layer, axes.get("pos", nothing), axes.get(kind.unit or "", nothing), stage], 1))
        which, layer, pos, unit, stage = np.concatenate(parts).T
        return NodeTable(circuit.nodes, which, layer, pos, unit, stage)

    def numbers(self, names: Sequence[str]) -> Int[np.ndarray, " name"]:
        """The numbers of nodes by name; that of the logits is one past the last.

        Raises:
            CircuitError: no such node.
        """
        known = {name: number for number, name in enumerate((*self.names, LOGITS))}
        if missing := [name for name in names if name not in known]:
            raise CircuitError(unknown("node of this circuit", missing[0], list(known)[:20]))
        return np.array([known[name] for name in names], dtype=np.int64)


def point_of(kind: str) -> str:
    """The activation that a site is a part of.

    >>> point_of("features.mlp_out"), point_of("z")
    ('mlp_out', 'z')
    """
    return KINDS[kind].of or kind


AnyCircuit = Circuit | NodeCircuit | SparseCircuit
"""A circuit of edges of a model's graph, of nodes of sites, or of edges between these."""


def with_edges(circuit: AnyCircuit, what: str) -> Circuit:
    """A circuit of a model's graph, for what cannot be said of nodes of sites.

    Raises:
        CircuitError: a circuit of nodes, or of edges between them.
    """
    if isinstance(circuit, Circuit):
        return circuit
    nodes = circuit if isinstance(circuit, NodeCircuit) else circuit.nodes
    kind = "of nodes" if isinstance(circuit, NodeCircuit) else "of edges between nodes"
    raise CircuitError(f"{what} is of edges between whole heads and MLPs; got a circuit {kind} ({', '.join(nodes.sites)}).")


def _pair(name: str) -> tuple[str, str]:
    source, arrow, target = str(name).partition(ARROW)
    if not arrow or not source or not target or source == LOGITS:
        raise CircuitError(f"{name!r} is no edge; write one as 'L1.F5.resid_post{ARROW}L2.F9.resid_post' or 'L2.F9.resid_post{ARROW}{LOGITS}'.")
    return str(Site.parse(source)), target if target == LOGITS else str(Site.parse(target))


def _frozen(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values.setflags(write=False)
    return values
