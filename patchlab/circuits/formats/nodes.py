"""Files of circuits of nodes, in JSON: patchlab's own format, for other tools have none. Each node stands there by its address.

``nodes`` maps addresses to ``in_graph`` and ``score``, as files of edges do; what they were chosen from stands under ``patchlab``.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from patchlab.circuits.formats.header import OWN, needed
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.errors import CircuitError, SiteError
from patchlab.graph import Graph
from patchlab.sites import Site

FORMAT = 2
"""Format number of files of nodes; files of edges have 1."""
HOLDS = "nodes"
_KEYS = ("candidates", "all_but", "provenance")


def holds_nodes(record: Mapping[str, Any]) -> bool:
    """Whether a file with this entry of patchlab's own holds nodes."""
    return record.get("holds") == HOLDS


def parse(data: Mapping[str, Any], record: Mapping[str, Any], expected: Graph | None) -> NodeCircuit:
    """The circuit of nodes that a file describes.

    Raises:
        CircuitError: parts that are missing or do not fit together; layers or heads of another model than expected.
        SiteError: an address that is none.
    """
    needed(record, _KEYS, f"the entry {OWN!r} of a circuit of nodes")
    if not isinstance(record["candidates"], list) or not isinstance(record["all_but"], bool) or not isinstance(record["provenance"], dict):
        raise CircuitError(f"the entry {OWN!r} is damaged: candidates, all_but and provenance are a list, true or false, and a mapping.")
    universe = tuple(_candidates(one) for one in record["candidates"])
    for one in universe if expected is not None else ():
        own = {"layer": expected.n_layers, "head": expected.n_heads} if expected is not None else {}
        for axis, size in zip(one.site.axes, one.shape, strict=True):
            if own.get(axis, size) != size:
                raise CircuitError(f"its {one.name} has {size} along {axis}, and the model {own[axis]}; circuits go with models of their own shape.")
    by_kind = {one.site.kind: one for one in universe}
    if not isinstance(data["nodes"], dict):
        raise CircuitError(f"nodes must map each node to in_graph and score; got {type(data['nodes']).__name__}.")
    positions, found = record["provenance"].get("positions"), {one.name: list[tuple[tuple[int, ...], float]]() for one in universe}
    for name, entry in data["nodes"].items():
        if not isinstance(entry, dict) or entry.get("in_graph") is not (not record["all_but"]):
            raise CircuitError(f"the node {name} must have in_graph {str(not record['all_but']).lower()}, as all that are listed; got {entry!r}.")
        score = entry.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)):
            raise CircuitError(f"the score of {name} must be a finite number; got {score!r}.")
        site = Site.parse(name)
        if site.kind not in by_kind:
            raise CircuitError(f"{name} is of the site {site.kind}, and the candidates are of {', '.join(by_kind)}.")
        one = by_kind[site.kind]
        found[one.name].append((one.cell(site, positions), math.nan if score is None else float(score)))
    listed = {name: np.array([cell for cell, _ in nodes], dtype=np.int64) for name, nodes in found.items() if nodes}
    scores = {name: np.array([score for _, score in nodes]) for name, nodes in found.items() if nodes}
    known = any(np.isfinite(values).any() for values in scores.values())
    return NodeCircuit(universe, listed, record["all_but"], scores if known else None, record["provenance"])


def save(circuit: NodeCircuit, path: Path) -> None:
    """Write the listed nodes with their scores, what they were chosen from, and where they come from."""
    nodes, record = described(circuit)
    # the keys of files of edges, so that an older patchlab says that it is too old
    path.write_text(json.dumps({"cfg": {}, "nodes": nodes, "edges": {}, OWN: record}, allow_nan=False), encoding="utf-8")


def described(circuit: NodeCircuit) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The listed nodes of a circuit by address, and the entry of patchlab's own."""
    nodes: dict[str, dict[str, Any]] = {}
    for one in circuit.universe:
        cells = circuit.listed[one.name]
        scores = [math.nan] * len(cells) if circuit.scores is None else circuit.scores[one.name].tolist()
        for cell, score in zip(cells.tolist(), scores, strict=True):
            entry: dict[str, Any] = {"in_graph": not circuit.all_but}
            nodes[one.address(cell, circuit.positions)] = entry | ({} if math.isnan(score) else {"score": score})
    universe = [
        {"site": f"{one.site.kind}[{','.join(one.site.axes)}]", "shape": one.shape, "layers": one.layers, "units": one.units}
        for one in circuit.universe
    ]
    provenance = {key: value for key, value in circuit.provenance.items() if key != "file"}
    return nodes, {"format": FORMAT, "holds": HOLDS, "candidates": universe, "all_but": circuit.all_but, "provenance": provenance}


def _candidates(entry: Any) -> Candidates:
    needed(entry, ("site", "shape", "layers"), "candidates")
    try:
        units = entry.get("units")
        return Candidates(Site.parse(entry["site"]), tuple(entry["shape"]), tuple(entry["layers"]), None if units is None else tuple(units))
    except (TypeError, SiteError) as error:
        raise CircuitError(f"the candidates {entry!r} are damaged: {error} Write the file again.") from error
