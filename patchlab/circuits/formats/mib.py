"""Folders as the MIB circuit track takes them: one per task and model, with edge importances or with a circuit per size; conversion."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.formats.files import SUFFIXES, read, write
from patchlab.errors import CircuitError, OutputError, unknown

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which MIB evaluates; a submission of circuits has one for each but the last, which is the whole graph."""
_SIZES = MIB_FRACTIONS[:-1]
Submission = Mapping[str, Circuit | Sequence[Circuit]]


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
            found[entry.name] = tuple(sorted((read(path) for path in files), key=lambda circuit: circuit.n_edges))
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
        entry = (given,) if isinstance(given, Circuit) else tuple(sorted(given, key=lambda circuit: circuit.n_edges))
        _check_entry(f"the entry {name}", entry)
        names = ["importances"] if len(entry) == 1 else [f"edges-{fraction:g}" for fraction in _SIZES]
        files |= {f"{name}/{stem}{suffix}": circuit for stem, circuit in zip(names, entry, strict=True)}
    if not files:
        raise CircuitError("there is nothing to submit; give circuits by '<task>_<model>'.")
    return _write_folder(files, Path(folder))


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
    return _write_folder({name: read(path) for name, path in files.items()}, dst)


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


def _write_folder(files: Mapping[str, Circuit], folder: Path) -> list[Path]:
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
