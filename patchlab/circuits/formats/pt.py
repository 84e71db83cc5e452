"""Circuit files in PyTorch's format: tensors over writers and readers, loaded as tensors and plain values only."""

import io
import json
import math
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.formats.header import OWN, assemble, cfg_of, graph_from, needed, own_record, record_of
from patchlab.errors import CircuitError
from patchlab.graph import Graph

_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_in_graph", "nodes_in_graph")


def parse(raw: bytes, expected: Graph | None) -> Circuit:
    """The circuit that the bytes of a file describe.

    Raises:
        CircuitError: see :func:`patchlab.circuits.read`.
    """
    data = _load(raw)
    needed(data, _KEYS, "a circuit file")
    own = data.get(OWN, {})
    needed(own, (), f"the entry {OWN!r}")
    record = own_record(_record(own))
    graph = graph_from(data["cfg"], record, expected)
    if data.get("neurons_in_graph") is not None or data.get("neurons_scores") is not None:
        raise CircuitError("it has neurons: this is a neuron-level circuit, and patchlab's circuits are made of whole edges.")
    for key, names in (("src_nodes", graph.writers), ("dst_nodes", graph.readers)):
        if not isinstance(data[key], list | tuple) or tuple(data[key]) != names:
            raise CircuitError(f"{key} does not list the {len(names)} names of {graph} in their order; its cfg is wrong, or the file damaged.")
    shape = graph.allowed.shape
    marked = _mask(data["nodes_in_graph"], "nodes_in_graph", shape[:1])
    if "edges" in own:
        shape = (*shape, record.get("n_positions"))
        edges, scores = _mask(own["edges"], f"{OWN}.edges", shape), _floats(own.get("scores"), f"{OWN}.scores", shape)
    else:
        edges, scores = _mask(data["edges_in_graph"], "edges_in_graph", shape), _floats(data.get("edges_scores"), "edges_scores", shape)
        scored = graph.allowed & (_mask(own["scored"], f"{OWN}.scored", shape) if "scored" in own else True)
        if np.isnan(scores[scored]).any() and "edges_scores" in data:
            writer, reader = np.argwhere(scored & np.isnan(scores))[0].tolist()
            raise CircuitError(f"the score of {graph.name(writer, reader)} is not a number (NaN). Compute the scores again.")
        scores = np.where(scored, scores, np.nan)
    values = _floats(data.get("nodes_scores"), "nodes_scores", (len(graph.writers),)).tolist()
    node_scores = {name: value for name, value in zip(graph.writers, values, strict=True) if not math.isnan(value)}
    names = {name for name, kept in zip(graph.writers, marked, strict=True) if kept}
    return assemble(graph, edges, scores, names, node_scores, record)


def save(circuit: Circuit, path: Path) -> None:
    """Write the circuit with the keys and the order of EAP-IG.

    Raises:
        CircuitError: a graph without MLPs.
    """
    graph, flat = circuit.graph, circuit.collapsed()
    if not graph.mlps:
        raise CircuitError(f".pt files have an MLP in every block, and this circuit belongs to {graph}. Write a .json file.")
    scores = np.full(graph.allowed.shape, np.nan) if flat.scores is None else flat.scores
    scored = ~np.isnan(scores)
    data: dict[str, Any] = {
        "cfg": cfg_of(graph),
        "src_nodes": list(graph.writers),
        "dst_nodes": list(graph.readers),
        "edges_scores": torch.from_numpy(np.where(scored, scores, 0)),
        "edges_in_graph": torch.from_numpy(flat.edges.copy()),
        "nodes_in_graph": torch.from_numpy(circuit.node_mask[:-1].copy()),
    }
    if node_scores := circuit.provenance.get("node_scores"):
        data["nodes_scores"] = torch.tensor([node_scores.get(name, math.nan) for name in graph.writers], dtype=torch.float64)
    own: dict[str, Any] = {}
    if (record := record_of(circuit)) is not None:
        own["record"] = json.dumps(record)
    if not scored[graph.allowed].all():
        own["scored"] = torch.from_numpy(scored)
    if circuit.n_positions is not None:
        own["edges"] = torch.from_numpy(circuit.edges.copy())
        if circuit.scores is not None:
            own["scores"] = torch.from_numpy(circuit.scores.copy())
    torch.save(data | ({OWN: own} if own else {}), path)


def _load(raw: bytes) -> Any:
    """Never with ``weights_only=False``: such a file may run any code when it is loaded."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that are refused in a moment
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(io.BytesIO(raw)):
            raise CircuitError(
                "it holds Python objects other than tensors and plain values, which could run code when loaded; refused. "
                "Save a dict of tensors, lists, numbers and strings, as EAP-IG's Graph.to_pt does."
            ) from error
        raise CircuitError("not a file of torch.save, or damaged. Get or write the file again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CircuitError("not a file of torch.save, or damaged. Get or write the file again.") from error


def _record(own: dict[str, Any]) -> Any:
    try:
        return json.loads(own["record"]) if "record" in own else None
    except (TypeError, ValueError) as error:
        raise CircuitError(f"the entry {OWN!r} is damaged: {error}. Write the file again.") from error


def _mask(values: Any, what: str, shape: tuple[Any, ...]) -> Bool[np.ndarray, "..."]:
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != shape:
        raise CircuitError(f"{what} must be a tensor of shape {list(shape)}; got {_described(values)}.")
    if not ((values == 0) | (values == 1)).all():
        raise CircuitError(f"{what} says what is in the circuit, so it holds true and false (or 1 and 0) only; it holds other values.")
    return values.bool().numpy()


def _floats(values: Any, what: str, shape: tuple[Any, ...]) -> Float[np.ndarray, "..."]:
    """Scores, NaN where there are none."""
    if values is None:
        return np.full(shape, np.nan)
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != shape or not values.is_floating_point():
        raise CircuitError(f"{what} must be floats of shape {list(shape)}; got {_described(values)}.")
    return values.detach().to(torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else values.dtype).numpy()


def _described(values: Any) -> str:
    return f"{values.dtype} of shape {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
