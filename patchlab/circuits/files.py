"""Circuit files as EAP-IG and MIB read and write them: JSON and ``.pt``. What they have no place for stands under the key ``patchlab``."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.formats import json, nodes, pt, sparse
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.sparse import AnyCircuit, SparseCircuit
from patchlab.errors import CircuitError, OutputError, PatchlabError, unknown
from patchlab.graph import Graph
from patchlab.store.files import writing


@dataclass(frozen=True)
class Format:
    """One kind of circuit file, and how it is read and written.

    Args:
        parse: the circuit that the bytes of a file describe, on the graph that is expected, if one is.
        save: write a circuit to a path.
    """

    parse: Callable[[bytes, Graph | None], AnyCircuit]
    save: Callable[[Circuit, Path], None]


FORMATS = {".json": Format(json.parse, json.save), ".pt": Format(pt.parse, pt.save)}
"""The kinds of circuit files, by suffix."""
SUFFIXES = tuple(FORMATS)


def read(path: str | os.PathLike[str], *, graph: Graph | None = None) -> AnyCircuit:
    """Read a circuit, or edge scores, from a file of patchlab, EAP-IG or MIB; a circuit of nodes, or of edges between
    these, from a file of patchlab.

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
        circuit = FORMATS[path.suffix].parse(raw, graph)
    except PatchlabError as error:
        raise CircuitError(f"{path}: {error}") from error
    return replace(circuit, provenance=circuit.provenance | {"file": path.name})


def write(circuit: AnyCircuit, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a circuit so that EAP-IG and MIB can read it, as JSON or ``.pt`` by the suffix; whole or not at all.

    Their formats have no word for nodes such as neurons and features: a circuit of nodes, or of edges between
    these, is written as JSON of patchlab's own.

    Edges without a score get 0 there. That, provenance, key-value heads and positions, for which their formats have no place, are kept
    under keys of patchlab's own, so that :func:`read` gives the same circuit again. A position-resolved circuit looks to other tools like
    its :meth:`~Circuit.collapsed` one.

    Raises:
        CircuitError: another suffix, or a graph without MLPs or a circuit of nodes in a ``.pt`` file, which has no form for them.
        OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CircuitError(f"cannot write {path}: {unknown('kind of circuit file', path.suffix, SUFFIXES)}")
    if not isinstance(circuit, Circuit):
        of = circuit if isinstance(circuit, NodeCircuit) else circuit.nodes
        what = "a circuit of nodes" if isinstance(circuit, NodeCircuit) else "a circuit of edges between nodes"
        if path.suffix != ".json":
            raise CircuitError(
                f"cannot write {path}: it is {what} ({', '.join(of.sites)}), and the {path.suffix} format of EAP-IG has words for "
                f"edges between whole heads and MLPs only, as MIB's has. Write it as .json, in patchlab's own format."
            )
        with writing(path, overwrite=overwrite) as temporary:
            if isinstance(circuit, SparseCircuit):
                sparse.save(circuit, temporary)
            else:
                nodes.save(circuit, temporary)
        return
    with writing(path, overwrite=overwrite) as temporary:
        FORMATS[path.suffix].save(circuit, temporary)


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, suffix: str | None = None, overwrite: bool = False) -> list[Path]:
    """Convert a circuit file to the format that the suffix of ``dst`` names, or all circuit files below a folder into a new folder.

    Every file is read and checked on the way. Of a folder, files keep their names and take ``suffix``; without one, each changes from
    ``.json`` to ``.pt`` or the other way round. Returns the files written.

    Raises:
        CircuitError: a file that :func:`read` refuses, a suffix that is neither, or a folder without circuit files.
        OutputError: the destination exists (a folder is never overwritten), or it cannot be written.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        if suffix is not None:
            raise CircuitError(f"the suffix of a single file is part of its name; got {dst} and suffix={suffix!r}. Leave suffix out.")
        write(read(src), dst, overwrite=overwrite)
        return [dst]
    if suffix not in (None, *SUFFIXES):
        raise CircuitError(unknown("kind of circuit file", suffix, SUFFIXES))
    other = {".json": ".pt", ".pt": ".json"}
    paths = sorted(path for path in src.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not paths:
        raise CircuitError(f"{src} holds no circuit files ({' or '.join(SUFFIXES)}).")
    files = {path.relative_to(src).with_suffix(suffix or other[path.suffix]).as_posix(): path for path in paths}
    if len(files) < len(paths):
        raise CircuitError(f"{src} holds files that differ only in their suffix; convert them one by one.")
    return write_folder({name: read(path) for name, path in files.items()}, dst)


def write_folder(files: Mapping[str, AnyCircuit], folder: Path) -> list[Path]:
    """Write the files to a hidden folder beside the target, then rename it."""
    if folder.exists():
        raise OutputError(f"{folder} exists and is not overwritten; choose another folder.")
    if not folder.parent.is_dir():
        raise OutputError(f"cannot write {folder}: there is no folder {folder.parent}. Create it first.")
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=".patchlab-", dir=folder.parent))
        for name, circuit in files.items():
            path = staging / "whole" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(circuit, path)
        (staging / "whole").rename(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}. Choose a folder that you may write to.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return [folder / name for name in files]
