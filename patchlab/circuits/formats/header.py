"""Headers of circuit files, which say besides the edges whose graph it is (``cfg``), and the entry of patchlab's own."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from patchlab.circuits.circuit import Circuit, common_graph
from patchlab.errors import CircuitError, SiteError
from patchlab.graph import Graph

FORMAT, NEWEST = 1, 3
"""Format number of files of edges, and the largest that is read: that of edges between nodes of sites; files of nodes have 2."""
OWN = "patchlab"
_CFG = {"n_layers": "n_layers", "n_heads": "n_heads", "d_model": "d_model", "parallel_attn_mlp": "parallel"}
_ELSEWHERE = ("file", "node_scores")
"""Provenance that is not written with the rest: the name of the file read, and what has a place of its own."""


def needed(data: Any, keys: tuple[str, ...], what: str) -> None:
    """Refuse what is not a mapping with these keys."""
    if not isinstance(data, dict) or (missing := [key for key in keys if key not in data]):
        got = ", ".join(map(str, list(data)[:8])) or "nothing" if isinstance(data, dict) else type(data).__name__
        lacking = f" without {', '.join(missing)}" if isinstance(data, dict) else ""
        raise CircuitError(f"not {what}{lacking}: it has {got}; expected {', '.join(keys)}. Write it with EAP-IG, or with patchlab.circuits.write.")


def own_record(record: Any) -> dict[str, Any]:
    """The entry of patchlab's own, or nothing."""
    if record is None:
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise CircuitError(f"the entry {OWN!r} is damaged: it has no format number. Write the file again.")
    if record["format"] > NEWEST:
        raise CircuitError(f"it has the format {record['format']} and this patchlab reads up to {NEWEST}. Update patchlab.")
    return record


def graph_from(cfg: Any, record: Mapping[str, Any], expected: Graph | None) -> Graph:
    """The graph that a file describes; what it leaves out is taken from the graph that is expected."""
    if not isinstance(cfg, dict):
        raise CircuitError(f"cfg must be a mapping with n_layers, n_heads, d_model and parallel_attn_mlp; got {type(cfg).__name__}.")
    fields: dict[str, Any] = {}
    for key, field in _CFG.items():
        value = cfg.get(key, None if expected is None else getattr(expected, field))
        if value is None:
            raise CircuitError(f"cfg has no {key}, so the file does not say whose circuit it is. Pass graph=model.arch.graph.")
        if not isinstance(value, bool if field == "parallel" else int) or (field != "parallel" and (isinstance(value, bool) or value < 1)):
            want = "true or false" if field == "parallel" else "a whole number of at least 1"
            raise CircuitError(f"cfg has {key} {value!r}; it must be {want}.")
        fields[field] = value
    graph = Graph(**fields)
    try:
        own = Graph(**record["graph"]) if "graph" in record else graph
    except (TypeError, SiteError) as error:
        raise CircuitError(f"the graph under {OWN!r} is damaged: {error} Write the file again.") from error
    graph = common_graph(own, replace(graph, mlps=own.mlps), f"its {OWN!r} entry", "its cfg")
    return graph if expected is None else common_graph(graph, expected, "the file", "the model")


def cfg_of(graph: Graph) -> dict[str, Any]:
    """The shape as EAP-IG writes it."""
    return {key: getattr(graph, _CFG[key]) for key in ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")}


def record_of(circuit: Circuit) -> dict[str, Any] | None:
    """The entry of patchlab's own; None where the file says everything without it."""
    provenance = {key: value for key, value in circuit.provenance.items() if key not in _ELSEWHERE}
    graph = circuit.graph
    if not provenance and graph.mlps and graph.n_kv_heads is None and circuit.n_positions is None:
        return None
    record = {"format": FORMAT, "graph": graph.as_dict(), "provenance": provenance}
    return record if circuit.n_positions is None else record | {"n_positions": circuit.n_positions}


def check_scores(graph: Graph, scores: Float[np.ndarray, "writer reader *pos"]) -> None:
    """Refuse infinite scores, naming an edge."""
    if np.isinf(scores).any():
        writer, reader = np.argwhere(np.isinf(scores))[0, :2].tolist()
        raise CircuitError(f"the score of {graph.name(writer, reader)} is not finite. Compute the scores again.")


def assemble(
    graph: Graph,
    edges: Bool[np.ndarray, "writer reader *pos"],
    scores: Float[np.ndarray, "writer reader *pos"],
    marked: set[str],
    node_scores: Mapping[str, float],
    record: Mapping[str, Any],
) -> Circuit:
    """The circuit of a file's parts."""
    check_scores(graph, scores)
    if bad := [name for name, score in node_scores.items() if not math.isfinite(score)]:
        raise CircuitError(f"the score of the node {bad[0]} is not finite. Compute the scores again.")
    provenance = dict(record.get("provenance", {}))
    if node_scores:
        provenance["node_scores"] = dict(node_scores)
    circuit = Circuit(graph, edges, None if np.isnan(scores).all() else scores, provenance)
    unlike = (set(circuit.nodes) ^ marked) - {"logits"}
    if not unlike:
        return circuit
    first = min(unlike, key=graph.nodes.index)
    note = f"{len(unlike)} nodes ({first}, ...) are marked otherwise than their edges; the edges are what counts"
    return replace(circuit, provenance=provenance | {"notes": [*provenance.get("notes", []), note]})
