"""Files that are either whole or absent."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchlab.errors import OutputError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def writing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on leaving, flush that file to disk, rename it to ``path`` and flush the folder.

    Readers never see half a file, and after an exception the old file is untouched and the temporary one gone.

    Args:
        path: where the result shall be; its folder must exist.
        overwrite: replace an existing file.

    Raises:
        OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.

    Example:
        >>> with writing("notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("done")
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder. Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists and is not overwritten. Choose another name, or pass overwrite=True.")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}. Create it first.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose a folder that you may write to, with room left.") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file has a name that :func:`writing` gives while it writes.

    >>> is_temporary(".run.json.0123abcd.tmp"), is_temporary("run.json")
    (True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None


def write_json(path: Path, value: Any, *, overwrite: bool = False) -> None:
    """Write a value as JSON, whole or not at all.

    Raises:
        OutputError: the value is not plain JSON (NaN and infinities are not), the file exists and ``overwrite`` is False, or it cannot be
            written there.
    """
    text = json_text(value, str(path))
    with writing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, what: str) -> str:
    """The JSON of a value, indented.

    Raises:
        OutputError: the value is not plain JSON; ``what`` names it.
    """
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise OutputError(f"{what} cannot be written as JSON: {error}. Use texts, finite numbers, True, False, None, lists and dicts.") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
