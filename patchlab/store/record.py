"""The record of a folder, ``run.json``: written last, it lists the folder's files with their checksums."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from patchlab.errors import OutputError
from patchlab.store.files import sha256_of, write_json

RECORD = "run.json"


def finish(folder: Path, record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Write ``run.json`` into a folder whose files are all there, and return what it holds.

    That is the record with ``files`` (the names, ``run.json`` among them), and ``sha256`` and ``bytes`` of each of the others.

    Raises:
        OutputError: a file is missing, the record is not plain JSON, or ``run.json`` cannot be written.
    """
    names = sorted({*names} - {RECORD})
    try:
        sums = {name: sha256_of(folder / name) for name in names}
        sizes = {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise OutputError(f"cannot list {error.filename} in {folder / RECORD}: {error.strerror}.") from error
    whole = {**record, "files": sorted([*names, RECORD]), "sha256": sums, "bytes": sizes}
    write_json(folder / RECORD, whole, overwrite=True)
    return whole


def read(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of a folder holds.

    Raises:
        OutputError: there is none, or it is damaged or not of patchlab.
    """
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        files, sums, sizes = found["files"], found["sha256"], found["bytes"]
        right = {*files} - {RECORD} == sums.keys() == sizes.keys() and all(Path(name).name == name for name in files)
    except FileNotFoundError as error:
        raise OutputError(f"there is no {path}: what is in its folder was not finished.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} is damaged ({_said(error)}).") from error
    if not right:
        raise OutputError(f"{path} is damaged (its lists of files do not agree).")
    return found


def checked(folder: Path, run: Mapping[str, Any], name: str, advice: str) -> Path:
    """The path of a file that ``run.json`` lists, after comparing its checksum.

    Args:
        folder: the folder.
        run: what :func:`read` gave.
        name: of the file.
        advice: what to do when the file is damaged, a sentence.

    Raises:
        OutputError: no such file is listed, or it is gone, cannot be read or has another checksum.
    """
    if name not in run["sha256"]:
        raise OutputError(f"{folder} has no file {name!r}; it has {', '.join(run['sha256']) or 'none'}.")
    path = folder / name
    try:
        found = sha256_of(path)
    except OSError as error:
        raise OutputError(f"cannot read {path}, which {RECORD} lists: {error.strerror}. {advice}") from error
    if found != run["sha256"][name]:
        raise OutputError(f"{path} is damaged: its SHA-256 is {found[:16]}… and {RECORD} says {run['sha256'][name][:16]}…. {advice}")
    return path


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:100] if str(error) else type(error).__name__
