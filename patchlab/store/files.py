"""Files that are either whole or absent."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchlab.errors import OutputError


@contextmanager
def writing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on leaving, flush that file to disk and rename it to ``path``.

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
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose a folder that you may write to, with room left.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
