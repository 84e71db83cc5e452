"""Circuit files as EAP-IG and MIB read and write them: JSON and ``.pt``. What they have no place for stands under the key ``patchlab``."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.formats import json, pt
from patchlab.errors import CircuitError, PatchlabError, unknown
from patchlab.graph import Graph
from patchlab.store.files import writing

SUFFIXES = (".json", ".pt")


def read(path: str | os.PathLike[str], *, graph: Graph | None = None) -> Circuit:
    """Read a circuit, or edge scores, from a file of patchlab, EAP-IG or MIB.

    Files of all versions of the format are read: nodes as ``true`` or as ``{"in_graph": true}``, edges with a score, with ``null``, or without.
    A ``.pt`` file is only ever loaded as tensors and plain values, never as code. The edges are what counts; where a file marks other nodes
    than those of its edges, ``provenance["notes"]`` says so. Scores of nodes are kept in ``provenance["node_scores"]``.

    Args:
        path: a ``.json`` or ``.pt`` file.
        graph: the graph that the circuit must belong to (``model.arch.graph``); it also tells the key-value heads, which EAP-IG does not store.

    Raises:
        CircuitError: no such file, a damaged one, one that holds something else, an edge that does not exist in its graph or is missing,
            a score that is not finite, neuron-level circuits, or a graph of another shape than ``graph``. The message names the file.

    Example:
        >>> read("circuits/ioi-eap-ig.json")  # doctest: +SKIP
        Circuit(ioi-eap-ig.json) 756 of 32,491 edges, 81 of 158 nodes
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CircuitError(f"{path} ends in {path.suffix!r}; {unknown('kind of circuit file', path.suffix, SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CircuitError(f"cannot read the circuit file {path}: {error.strerror or error}. Check the path.") from error
    try:
        circuit = json.parse(raw, graph) if path.suffix == ".json" else pt.parse(raw, graph)
    except PatchlabError as error:
        raise CircuitError(f"{path}: {error}") from error
    return replace(circuit, provenance=circuit.provenance | {"file": path.name})


def write(circuit: Circuit, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a circuit so that EAP-IG and MIB can read it, as JSON or ``.pt`` by the suffix; whole or not at all.

    Edges without a score get 0 there. That, provenance, key-value heads and positions, for which their formats have no place, are kept
    under keys of patchlab's own, so that :func:`read` gives the same circuit again. A position-resolved circuit looks to other tools like
    its :meth:`~Circuit.collapsed` one.

    Raises:
        CircuitError: another suffix, or a graph without MLPs in a ``.pt`` file, which has no form for it.
        OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CircuitError(f"cannot write {path}: {unknown('kind of circuit file', path.suffix, SUFFIXES)}")
    save: Callable[[Circuit, Path], None] = json.save if path.suffix == ".json" else pt.save
    with writing(path, overwrite=overwrite) as temporary:
        save(circuit, temporary)
