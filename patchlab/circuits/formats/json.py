"""Circuit files in JSON: an entry per node and per edge, by name; circuits of nodes, and of edges between these, have their own forms."""

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.formats import nodes as of_nodes
from patchlab.circuits.formats import sparse as of_sparse
from patchlab.circuits.formats.header import OWN, assemble, cfg_of, graph_from, needed, own_record, record_of
from patchlab.circuits.sparse import AnyCircuit
from patchlab.errors import CircuitError
from patchlab.graph import Graph

_KEYS = ("cfg", "nodes", "edges")
NOT_A_NUMBER = "NaN"


def parse(raw: bytes, expected: Graph | None) -> AnyCircuit:
    """The circuit that the bytes of a file describe, of edges, of nodes, or of edges between these.

    Raises:
        CircuitError: see :func:`patchlab.circuits.read`.
        SiteError: a name that is no edge of the file's graph.
    """
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"not JSON, or cut off: {error}. Get or write the file again.") from error
    needed(data, _KEYS, "a circuit file")
    record = own_record(data.get(OWN))
    if of_nodes.holds_nodes(record):
        return of_nodes.parse(data, record, expected)
    if of_sparse.holds_edges(record):
        return of_sparse.parse(data, record, expected)
    graph = graph_from(data["cfg"], record, expected)
    marked, node_scores = _nodes(data["nodes"], graph)
    edges, scores = _edges(data["edges"], graph, record.get("n_positions"))
    return assemble(graph, edges, scores, marked, node_scores, record)


def save(circuit: Circuit, path: Path) -> None:
    """Write the circuit; nodes and edges in EAP-IG's order."""
    graph, flat = circuit.graph, circuit.collapsed()
    inside, node_scores = {*circuit.nodes, "logits"}, circuit.provenance.get("node_scores", {})
    nodes = {name: {"in_graph": name in inside} | ({"score": node_scores[name]} if name in node_scores else {}) for name in graph.nodes}
    pairs = _order(graph)
    at = tuple(np.array(pairs).T)
    scores = [math.nan] * len(pairs) if flat.scores is None else flat.scores[at].tolist()
    edges: dict[str, dict[str, Any]] = {}
    for (writer, reader), score, kept in zip(pairs, scores, flat.edges[at].tolist(), strict=True):
        entry: dict[str, Any] = {"score": score, "in_graph": kept}
        if math.isnan(score):
            entry |= {"score": 0.0, "scored": False}
        if circuit.n_positions is not None:
            entry["positions"] = np.flatnonzero(circuit.edges[writer, reader]).tolist()
            if circuit.scores is not None:
                entry["position_scores"] = [None if math.isnan(value) else value for value in circuit.scores[writer, reader].tolist()]
        edges[graph.name(writer, reader)] = entry
    record = record_of(circuit)
    data = {"cfg": cfg_of(graph), "nodes": nodes, "edges": edges} | ({} if record is None else {OWN: record})
    path.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")


def _order(graph: Graph) -> list[tuple[int, int]]:
    """Edges by block, then writer, then head, then q, k, v, as EAP-IG lists them."""
    layer, head, before = graph.reader_layer, graph.reader_head, graph.writers_before
    readers = sorted(range(len(graph.readers)), key=lambda reader: (layer[reader], head[reader] < 0, head[reader]))
    pairs: list[tuple[int, int]] = []
    for (_, n), group in groupby(readers, key=lambda reader: (layer[reader], before[reader])):
        alike = list(group)
        pairs += [(writer, reader) for writer in range(n) for reader in alike]
    return pairs


def _no_constant(name: str) -> str:
    """NaN is what EAP-IG writes as the score of a node that has none; an edge's score is refused where it is read."""
    if name != NOT_A_NUMBER:
        raise ValueError(f"it holds {name}, which is no number")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return made


def _flag(value: Any, what: str) -> bool:
    if value is True or value is False:
        return value
    if value not in (1, 0):
        raise CircuitError(f"in_graph of {what} must be true or false; got {value!r}.")
    return bool(value)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CircuitError(f"the score of {what} must be a number; got {value!r}.")
    return float(value) if abs(value) < 1e300 else math.inf


def _nodes(entries: Any, graph: Graph) -> tuple[set[str], dict[str, float]]:
    if not isinstance(entries, dict):
        raise CircuitError(f"nodes must map each node to whether it is in the circuit; got {type(entries).__name__}.")
    known = set(graph.nodes)
    if unknown := [name for name in entries if name not in known]:
        raise CircuitError(f"there is no node {unknown[0]!r} in {graph}; the file belongs to another model, or its cfg is wrong.")
    if missing := [name for name in graph.nodes if name not in entries and name != "logits"]:
        raise CircuitError(
            f"{len(missing)} of {len(known)} nodes are missing, the first is {missing[0]}. The file is not whole, or its cfg is wrong."
        )
    marked, scores = set(), {}
    for name, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {"in_graph": entry}
        if "neurons" in fields or "neurons_scores" in fields:
            raise CircuitError(f"{name} has neurons: this is a neuron-level circuit, and patchlab's circuits are made of whole edges.")
        if _flag(fields.get("in_graph"), name):
            marked.add(name)
        if fields.get("score") is not None and fields["score"] != NOT_A_NUMBER:
            scores[name] = _number(fields["score"], name)
    return marked, scores


def _edges(
    entries: Any, graph: Graph, n_positions: int | None
) -> tuple[Bool[np.ndarray, "writer reader *pos"], Float[np.ndarray, "writer reader *pos"]]:
    if not isinstance(entries, dict):
        raise CircuitError(f"edges must map each edge to its score and whether it is in the circuit; got {type(entries).__name__}.")
    writers, readers = ({name: i for i, name in enumerate(names)} for names in (graph.writers, graph.readers))
    allowed = graph.allowed.tolist()
    places: dict[tuple[int, int], Any] = {}
    for name, entry in entries.items():
        writer, _, reader = name.partition("->")
        pair = writers.get(writer, -1), readers.get(reader, -1)
        if min(pair) < 0 or not allowed[pair[0]][pair[1]]:
            pair = graph.edge(name)  # says what is wrong with the name
        if not isinstance(entry, dict):
            raise CircuitError(f"the edge {name} must have in_graph and score; got {entry!r}.")
        kept, score = _flag(entry.get("in_graph"), name), entry.get("score")
        value = math.nan if score is None or entry.get("scored") is False else _number(score, name)
        places[pair] = (kept, value) if n_positions is None else _positions(name, entry, kept, n_positions)
    if len(places) < graph.n_edges:
        missing = [pair for pair in np.argwhere(graph.allowed).tolist() if tuple(pair) not in places]
        raise CircuitError(
            f"{len(missing):,} of {graph.n_edges:,} edges are missing, the first is {graph.name(*missing[0])}. "
            f"The file is not whole, or its cfg is wrong."
        )
    if len(places) < len(entries):
        raise CircuitError(f"{len(entries) - len(places)} edges stand there twice, written differently. Write each edge once, as 'input->m0'.")
    at = tuple(np.array(list(places)).T)
    shape = graph.allowed.shape if n_positions is None else (*graph.allowed.shape, n_positions)
    mask, scores = np.zeros(shape, dtype=bool), np.full(shape, np.nan)
    mask[at], scores[at] = [kept for kept, _ in places.values()], [score for _, score in places.values()]
    return mask, scores


def _positions(name: str, entry: dict[str, Any], kept: bool, n: int) -> tuple[Bool[np.ndarray, " pos"], Float[np.ndarray, " pos"]]:
    places, values = entry.get("positions"), entry.get("position_scores", [None] * n)
    fits = isinstance(places, list) and all(isinstance(i, int) and 0 <= i < n for i in places) and isinstance(values, list) and len(values) == n
    if not fits or bool(places) != kept:
        raise CircuitError(f"the positions of the edge {name} do not fit {n} positions and in_graph {str(kept).lower()}. Write the file again.")
    mask = np.zeros(n, dtype=bool)
    mask[places] = True
    return mask, np.array([math.nan if value is None else _number(value, name) for value in values])
