"""Circuit: a part of a model's graph, as a mask over its edges, with the scores it was chosen by and where it comes from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from patchlab.errors import CircuitError, SiteError
from patchlab.graph import READERS, Graph
from patchlab.scores.arrays import plain
from patchlab.stats.jaccard import sentence

_SHAPE = ("n_layers", "n_heads", "d_model", "parallel", "mlps")


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph. A node is in the circuit if one of its edges is.

    The arrays are copied and read-only. With a third axis the circuit is position-resolved: an edge is then kept at some token
    positions of the residual stream (the writer writes and the reader reads at one position; attention crosses positions inside a head).

    Args:
        graph: the graph of the model.
        edges: which edges are kept; only edges of the graph may be.
        scores: mean effects the edges were chosen by, in metric units; NaN where there is no edge, or it was not scored,
            or its score was not stored.
        provenance: where it comes from: method, task, model, direction, how it was chosen, ``positions`` (names); JSON-able.

    Raises:
        CircuitError: arrays of another shape, or a kept pair that is no edge.

    Example:
        >>> circuit = Circuit.of(Graph(2, 2, 8), ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"])
        >>> circuit.n_edges, circuit.nodes
        (3, ('input', 'a0.h1', 'm1', 'logits'))
        >>> (circuit - Circuit.of(circuit.graph, ["a0.h1->m1"])).pruned().n_edges
        0
    """

    graph: Graph
    edges: Bool[np.ndarray, "writer reader *pos"]
    scores: Float[np.ndarray, "_writer _reader *_pos"] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.graph.allowed.shape
        if self.edges.dtype != bool or self.edges.ndim not in (2, 3) or self.edges.shape[:2] != shape:
            raise CircuitError(
                f"the mask of a circuit is bool [writer {shape[0]}, reader {shape[1]}] or [writer, reader, pos] for {self.graph}; "
                f"got {self.edges.dtype} {list(self.edges.shape)}."
            )
        if self.scores is not None and self.scores.shape != self.edges.shape:
            raise CircuitError(
                f"scores have the shape {list(self.scores.shape)} and edges {list(self.edges.shape)}; give one score per cell of the mask."
            )
        outside = self.edges & ~_over_positions(self.graph.allowed, self.edges.ndim)
        if outside.any():
            _refuse_pair(self.graph, *np.argwhere(outside)[0, :2].tolist())
        object.__setattr__(self, "edges", _frozen(self.edges))
        if self.scores is not None:
            object.__setattr__(self, "scores", _frozen(np.where(_over_positions(self.graph.allowed, self.edges.ndim), self.scores, np.nan)))
        object.__setattr__(self, "provenance", plain(self.provenance))
        if len(self.positions or range(self.n_positions or 0)) != (self.n_positions or 0):
            raise CircuitError(
                f"provenance['positions'] names {len(self.positions or ())} positions and the mask has {self.n_positions or 'none'}; name each once."
            )

    @staticmethod
    def of(
        graph: Graph,
        edges: Iterable[str] | Bool[np.ndarray, "writer reader *pos"],
        scores: Float[np.ndarray, "writer reader *pos"] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """A circuit of named edges or of a mask.

        Raises:
            SiteError: a name that is no edge of the graph.
            CircuitError: as for the class.
        """
        if isinstance(edges, str):
            edges = [edges]
        mask = edges if isinstance(edges, np.ndarray) else graph.mask(edges)
        return Circuit(graph, mask, scores, dict(provenance or {}))

    @staticmethod
    def full(graph: Graph) -> "Circuit":
        """All edges."""
        return Circuit(graph, graph.allowed, provenance={"how": "all edges"})

    @staticmethod
    def empty(graph: Graph) -> "Circuit":
        """No edges."""
        return Circuit(graph, np.zeros_like(graph.allowed), provenance={"how": "no edges"})

    @property
    def n_edges(self) -> int:
        """Number of kept edges; in a position-resolved circuit each position of an edge counts."""
        return int(self.edges.sum())

    @property
    def n_positions(self) -> int | None:
        """Number of positions; None if the circuit is not position-resolved."""
        return self.edges.shape[2] if self.edges.ndim == 3 else None

    @property
    def positions(self) -> tuple[str, ...] | None:
        """Names of the positions, where they have names."""
        return tuple(self.provenance["positions"]) if "positions" in self.provenance else None

    @cached_property
    def node_mask(self) -> Bool[np.ndarray, " node"]:
        """The nodes of ``graph.nodes`` that are in: those with a kept edge."""
        flat = self._flat
        mask = np.zeros(len(self.graph.nodes), dtype=bool)
        mask[:-1] = flat.any(1)
        mask[self.graph.reader_node[flat.any(0)]] = True
        return mask

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that are in, in the order of the graph."""
        return tuple(name for name, kept in zip(self.graph.nodes, self.node_mask, strict=True) if kept)

    @property
    def edge_names(self) -> list[str]:
        """Names of the kept edges (at any position), in the order of the graph."""
        return self.graph.names(self._flat)

    def pruned(self) -> "Circuit":
        """Without dangling nodes: what has no kept incoming or no kept outgoing edge goes with its edges, until nothing more goes.

        ``input`` needs no incoming edge and ``logits`` no outgoing one. A position-resolved circuit is pruned as if each edge were
        kept at all positions or at none, because keys and values carry information from one position to another.
        """
        flat = self._flat.copy()
        while True:
            into = np.zeros(len(self.graph.nodes), dtype=bool)
            into[self.graph.reader_node[flat.any(0)]] = True
            into[0] = True
            keep = into & np.append(flat.any(1), True)
            rest = flat & keep[:-1, None] & keep[self.graph.reader_node][None, :]
            if rest.sum() == flat.sum():
                edges = self.edges & _over_positions(flat, self.edges.ndim)
                about = self.provenance if np.array_equal(edges, self.edges) else _without(self.provenance, "stability")
                return replace(self, edges=edges, provenance=about | {"pruned": True})
            flat = rest

    def collapsed(self) -> "Circuit":
        """Without positions: an edge is kept if it is at any position, and its score is the sum over positions."""
        if self.n_positions is None:
            return self
        scores = None if self.scores is None else self.scores.sum(2)
        return Circuit(self.graph, self._flat, scores, _without(self.provenance, "positions", "stability"))

    def on(self, graph: Graph) -> "Circuit":
        """The same circuit on the graph of a model, which also knows its key-value heads (files of EAP-IG do not name them).

        Raises:
            CircuitError: the graph has another shape; the message names both.
        """
        common_graph(self.graph, graph, "this circuit", "the model")
        return replace(self, graph=graph)

    def kv_view(self) -> xr.Dataset:
        """The edges into keys and values per key-value head: ``score`` (sum over the query-head copies), ``kept`` (any copy), ``copies`` (how many).

        See :func:`patchlab.circuits.kv_view`.
        """
        flat = self.collapsed()
        return kv_view(flat.graph, flat.edges, flat.scores)

    def equals(self, other: "Circuit") -> bool:
        """Whether graph, edges and scores are the same (NaN equals NaN); provenance may differ."""
        if self.graph != other.graph or not np.array_equal(self.edges, other.edges):
            return False
        if self.scores is None or other.scores is None:
            return self.scores is other.scores
        return np.array_equal(self.scores, other.scores, equal_nan=True)

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._combined(other, "union", np.logical_or)

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._combined(other, "intersection", np.logical_and)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._combined(other, "difference", lambda mine, theirs: mine & ~theirs)

    def __xor__(self, other: "Circuit") -> "Circuit":
        return self._combined(other, "symmetric difference", np.logical_xor)

    def __invert__(self) -> "Circuit":
        mask = _over_positions(self.graph.allowed, self.edges.ndim) & ~self.edges
        return replace(self, edges=mask, provenance=_without_choice(self.provenance) | {"how": "complement"})

    def diff(self, other: "Circuit") -> pd.DataFrame:
        """The edges that only one of the two has, as a table; the largest scores first.

        Columns: ``edge``, ``kept_by`` (``first`` or ``second``), ``score_first`` and ``score_second`` (mean effects; NaN where unknown).
        Positions are collapsed.

        Raises:
            CircuitError: circuits of graphs of unlike shape.
        """
        common_graph(self.graph, other.graph, "the first circuit", "the second circuit")
        one, two = self.collapsed(), other.collapsed()
        pairs = np.argwhere(one.edges ^ two.edges)
        at = tuple(pairs.T)
        table = pd.DataFrame({"edge": self.graph.names(one.edges ^ two.edges), "kept_by": np.where(one.edges[at], "first", "second")})
        for name, circuit in (("score_first", one), ("score_second", two)):
            table[name] = np.nan if circuit.scores is None else circuit.scores[at]
        size = table[["score_first", "score_second"]].abs().max(axis=1)
        return table.loc[size.sort_values(ascending=False, kind="stable", na_position="last").index].reset_index(drop=True)

    def summary(self, top: int = 10) -> str:
        """The circuit as text: its size, its stability if measured, where its edges end, the nodes per layer, the ``top`` edges by absolute score."""
        kinds = np.array(self.graph.reader_kind)
        into = self._flat.sum(0)
        counts = [f"{letter} {into[kinds == letter].sum():,}" for letter in READERS if into[kinds == letter].any()]
        lines = [repr(self), *([f"Stability: {sentence(self.provenance['stability'])}."] if "stability" in self.provenance else [])]
        lines.append(f"Edges into: {', '.join(counts) or 'nothing'}.")
        for layer in range(self.graph.n_layers):
            if names := [node.name for node, kept in zip(self.graph.node_table, self.node_mask, strict=True) if kept and node.layer == layer]:
                lines.append(f"Layer {layer}: {' '.join(names)}")
        return "\n".join([*lines, *self._largest(top)])

    def __repr__(self) -> str:
        about = self.provenance
        who = [str(about[key]) for key in ("method", "direction", "metric", "how", "file") if about.get(key)] + ["pruned"] * bool(about.get("pruned"))
        what = " × ".join(str(about[key]) for key in ("model", "task") if about.get(key))
        head = "; ".join(filter(None, [", ".join(who), what]))
        at = "" if self.n_positions is None else f" at {self.n_positions} positions"
        return (
            f"Circuit({head or self.graph}) {self._flat.sum():,} of {self.graph.n_edges:,} edges{at}, "
            f"{self.node_mask.sum():,} of {len(self.graph.nodes):,} nodes"
        )

    @property
    def _flat(self) -> Bool[np.ndarray, "writer reader"]:
        return self.edges if self.edges.ndim == 2 else np.any(self.edges, axis=2)

    def _largest(self, top: int) -> list[str]:
        if self.scores is None or not self.n_edges or top < 1:
            return []
        flat = self.collapsed()
        pairs = np.argwhere(flat.edges)
        values = np.asarray(flat.scores)[tuple(pairs.T)]
        order = np.argsort(-np.abs(values), kind="stable")[:top]
        names = [self.graph.name(*pairs[i].tolist()) for i in order]
        return [f"Largest {len(names)} of its edges by |effect|:", *(f"  {name:<24} {values[i]:+.4g}" for name, i in zip(names, order, strict=True))]

    def _combined(self, other: "Circuit", how: str, operation: Callable[..., np.ndarray]) -> "Circuit":
        graph = common_graph(self.graph, other.graph, "the first circuit", "the second circuit")
        if self.edges.shape != other.edges.shape or self.positions != other.positions:
            raise CircuitError(
                f"one circuit has {_positions_text(self)} and the other {_positions_text(other)}; "
                f"compare like with like, or drop the positions with .collapsed()."
            )
        known = self.scores is not None and other.scores is not None and np.array_equal(self.scores, other.scores, equal_nan=True)
        shared = {key: value for key, value in _without_choice(self.provenance).items() if other.provenance.get(key) == value}
        return Circuit(graph, operation(self.edges, other.edges), self.scores if known else None, shared | {"how": how})


def common_graph(one: Graph, two: Graph, what_one: str, what_two: str) -> Graph:
    """The graph that two circuits share; of two that differ only in knowing their key-value heads, the one that does.

    Raises:
        CircuitError: graphs of unlike shape; the message names both and where they differ.
    """
    unlike = [f"{name} {getattr(one, name)} and {getattr(two, name)}" for name in _SHAPE if getattr(one, name) != getattr(two, name)]
    if one.n_kv_heads and two.n_kv_heads and one.n_kv_heads != two.n_kv_heads:
        unlike.append(f"n_kv_heads {one.n_kv_heads} and {two.n_kv_heads}")
    if unlike:
        raise CircuitError(
            f"{what_one} belongs to {one} and {what_two} to {two} ({', '.join(unlike)}); circuits go with models of their own shape only."
        )
    return one if one.n_kv_heads else two


def kv_view(graph: Graph, edges: Bool[np.ndarray, "writer reader"], scores: Float[np.ndarray, "writer reader"] | None = None) -> xr.Dataset:
    """Edges into the keys and values, per key-value head instead of per query head.

    Under grouped-query attention several query heads share one key and value, and ``<k>``, ``<v>`` index its query-head copies. The score of
    the key-value head is the sum over its copies (to first order, the effect of patching what it reads); the exact effect is another run.

    Returns:
        A Dataset with dims ``writer``, ``kv_reader``: ``score`` (sum over copies in metric units; NaN if any copy is not scored), ``kept``
        (any copy is), ``copies`` (how many are), and the coordinates ``writer_name`` and ``kv_reader_name`` (``a3.kv1<k>``).

    Example:
        >>> graph = Graph(1, 4, 8, n_kv_heads=2)
        >>> kv_view(graph, graph.mask(["input->a0.h2<k>", "input->a0.h3<k>"]))["copies"].values[0].tolist()
        [0, 2, 0, 0]
    """
    copies = np.flatnonzero(np.isin(graph.reader_kind, ("k", "v"))).reshape(-1, graph.copies)
    names = [graph.kv_name(first) for first in copies[:, 0].tolist()]
    values = np.full(edges.shape, np.nan) if scores is None else scores
    dims = ("writer", "kv_reader")
    return xr.Dataset(
        {
            "score": (dims, values[:, copies].sum(2)),
            "kept": (dims, edges[:, copies].any(2)),
            "copies": (dims, edges[:, copies].sum(2)),
        },
        coords={"writer_name": ("writer", np.array(graph.writers)), "kv_reader_name": ("kv_reader", np.array(names))},
    )


def _refuse_pair(graph: Graph, writer: int, reader: int) -> None:
    try:
        graph.edge(graph.name(writer, reader))
    except SiteError as error:
        raise CircuitError(f"a pair is kept that is no edge of {graph}: {error}") from error


def _without_choice(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance without what says how the edges were chosen, which no longer holds for a combination."""
    return _without(provenance, "how", "pruned", "n_requested", "stability")


def _without(provenance: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key not in keys}


def _positions_text(circuit: Circuit) -> str:
    if circuit.n_positions is None:
        return "no positions"
    return f"{circuit.n_positions} positions" + (f" ({', '.join(circuit.positions)})" if circuit.positions else "")


def _over_positions(mask: Bool[np.ndarray, "writer reader"], ndim: int) -> Bool[np.ndarray, "writer reader *one"]:
    return mask if ndim == 2 else mask[:, :, None]


def _frozen(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values.setflags(write=False)
    return values
