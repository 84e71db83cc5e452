"""Files of edges between nodes of sites, in JSON of patchlab's own: nodes as :mod:`patchlab.circuits.formats.nodes` has them, edges by name."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from patchlab.circuits.formats import nodes as of_nodes
from patchlab.circuits.formats.header import OWN, needed
from patchlab.circuits.sparse import ARROW, SparseCircuit
from patchlab.errors import CircuitError
from patchlab.graph import Graph

FORMAT = 3
"""Format number of these files."""
HOLDS = "edges between nodes"


def holds_edges(record: Mapping[str, Any]) -> bool:
    """Whether a file with this entry of patchlab's own holds edges between nodes."""
    return record.get("holds") == HOLDS


def parse(data: Mapping[str, Any], record: Mapping[str, Any], expected: Graph | None) -> SparseCircuit:
    """The circuit that a file describes.

    Raises:
        CircuitError: parts that are missing or do not fit together; layers or heads of another model than expected.
        SiteError: an address that is none.
    """
    needed(record, ("candidates", "all_but", "provenance", "nodes"), f"the entry {OWN!r} of a circuit of edges between nodes")
    if not isinstance(record["all_but"], bool) or not isinstance(record["provenance"], dict) or not isinstance(record["nodes"], dict):
        raise CircuitError(f"the entry {OWN!r} is damaged: all_but is true or false, provenance and nodes are mappings. Write the file again.")
    nodes = of_nodes.parse(data, {**record, "all_but": False, "provenance": record["nodes"]}, expected)
    if not isinstance(data["edges"], dict):
        raise CircuitError(f"edges must map each edge to in_graph and score; got {type(data['edges']).__name__}.")
    scores: list[float] = []
    for name, entry in data["edges"].items():
        if not isinstance(entry, dict) or entry.get("in_graph") is not (not record["all_but"]):
            raise CircuitError(f"the edge {name} must have in_graph {str(not record['all_but']).lower()}, as all that are listed; got {entry!r}.")
        score = entry.get("score", math.nan)
        if isinstance(score, bool) or not isinstance(score, int | float) or math.isinf(score):
            raise CircuitError(f"the score of {name} must be a finite number; got {score!r}.")
        if name.count(ARROW) != 1:
            raise CircuitError(f"{name!r} is no edge; expected two nodes with {ARROW!r} between them.")
        scores.append(float(score))
    table = SparseCircuit(nodes, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).table_of_nodes
    ends = table.numbers([end for name in data["edges"] for end in name.split(ARROW)]).reshape(-1, 2)
    known = np.array(scores) if np.isfinite(scores).any() else None
    return SparseCircuit(nodes, ends[:, 0], ends[:, 1], record["all_but"], known, record["provenance"])


def save(circuit: SparseCircuit, path: Path) -> None:
    """Write the listed edges with their scores, their nodes, what those were chosen from, and where they come from."""
    nodes, record = of_nodes.described(circuit.nodes)
    edges: dict[str, dict[str, Any]] = {}
    scores = [math.nan] * circuit.n_edges if circuit.scores is None else circuit.scores.tolist()
    for name, score in zip(circuit.edges, scores, strict=True):
        edges[name] = {"in_graph": not circuit.all_but} | ({} if math.isnan(score) else {"score": score})
    provenance = {key: value for key, value in circuit.provenance.items() if key != "file"}
    record |= {"format": FORMAT, "holds": HOLDS, "nodes": record["provenance"], "all_but": circuit.all_but, "provenance": provenance}
    path.write_text(json.dumps({"cfg": {}, "nodes": nodes, "edges": edges, OWN: record}, allow_nan=False), encoding="utf-8")
