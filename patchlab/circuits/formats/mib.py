"""Folders as the MIB circuit track takes them: one per task and model, with edge importances or with a circuit per size."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.files import SUFFIXES, read, write_folder
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.sparse import AnyCircuit, SparseCircuit, with_edges
from patchlab.errors import CircuitError, unknown

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which MIB evaluates; a submission of circuits has one for each but the last, which is the whole graph."""
_SIZES = MIB_FRACTIONS[:-1]
Submission = Mapping[str, AnyCircuit | Sequence[AnyCircuit]]


def read_submission(folder: str | os.PathLike[str]) -> dict[str, tuple[Circuit, ...]]:
    """Read a folder with one folder per task and model, ``ioi_gpt2``, ``arc-easy_llama3``.

    Each holds one file with importances (its scores count) or nine with circuits of MIB's sizes. Returns the circuits by folder name,
    small ones first.

    Raises:
        CircuitError: no such folder, no circuits in it, a folder with another name or another number of files, circuits of unlike shapes in
            one, circuits larger than their size allows, or a file that :func:`read` refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CircuitError(f"there is no folder {folder}. Give the folder that holds one folder per task and model.")
    found: dict[str, tuple[Circuit, ...]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            _check_name(entry.name)
            files = sorted(path for path in entry.iterdir() if path.suffix in SUFFIXES)
            read_files = (with_edges(read(path), f"{path}: an MIB submission") for path in files)
            found[entry.name] = tuple(sorted(read_files, key=lambda circuit: circuit.n_edges))
            _check_entry(f"{entry}", found[entry.name])
    if not found:
        raise CircuitError(f"{folder} has no folders in it; a submission has one per task and model, such as ioi_gpt2, with .json or .pt files.")
    return found


def write_submission(circuits: Submission, folder: str | os.PathLike[str], *, suffix: str = ".pt") -> list[Path]:
    """Write a new submission folder, whole or not at all; returns its files.

    Args:
        circuits: by ``"<task>_<model>"`` (task names with hyphens): one circuit with scores, written as importances, or nine circuits of
            at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges.
        folder: must not exist yet.
        suffix: ``.pt`` or ``.json``.

    Raises:
        CircuitError: names, numbers or sizes that MIB does not take; importances without scores; another suffix.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> write_submission({"ioi_gpt2": top_n(scores, 800)}, "my-method")  # doctest: +SKIP
    """
    if suffix not in SUFFIXES:
        raise CircuitError(unknown("kind of circuit file", suffix, SUFFIXES))
    files: dict[str, Circuit] = {}
    for name, given in circuits.items():
        _check_name(name)
        several = [given] if isinstance(given, Circuit | NodeCircuit | SparseCircuit) else given
        entry = tuple(sorted((with_edges(one, "an MIB submission") for one in several), key=lambda circuit: circuit.n_edges))
        _check_entry(f"the entry {name}", entry)
        names = ["importances"] if len(entry) == 1 else [f"edges-{fraction:g}" for fraction in _SIZES]
        files |= {f"{name}/{stem}{suffix}": circuit for stem, circuit in zip(names, entry, strict=True)}
    if not files:
        raise CircuitError("there is nothing to submit; give circuits by '<task>_<model>'.")
    return write_folder(files, Path(folder))


def _check_name(name: str) -> None:
    task, _, model = name.partition("_")
    if not task or not model or "/" in name or name.startswith("."):
        raise CircuitError(
            f"{name!r} does not name a task and a model; MIB writes them with an underscore between, as in ioi_gpt2 or arc-easy_llama3."
        )


def _check_entry(where: str, circuits: Sequence[Circuit]) -> None:
    if len(circuits) not in (1, len(_SIZES)):
        raise CircuitError(f"{where} has {len(circuits)} circuits; MIB takes one with importances, or {len(_SIZES)}, one per size.")
    if len(circuits) == 1:
        if circuits[0].scores is None:
            raise CircuitError(f"{where} has one circuit without scores; MIB takes one with importances, or {len(_SIZES)} circuits, one per size.")
        return
    graph = circuits[0].graph
    for circuit, fraction in zip(circuits, _SIZES, strict=True):
        if circuit.graph != graph:
            raise CircuitError(f"{where} has circuits of {graph} and of {circuit.graph}; they must belong to one model.")
        if circuit.n_edges > fraction * graph.n_edges:
            raise CircuitError(
                f"{where}: the circuit for {100 * fraction:g} % of the edges has {circuit.n_edges:,} of {graph.n_edges:,}, "
                f"more than {int(fraction * graph.n_edges):,}. Choose a smaller one."
            )
