"""The keeper of a checkpoint: where its bytes are, in a file or wherever else."""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from patchlab.store.files import writing


@runtime_checkable
class Keeper(Protocol):
    """A place that keeps the bytes of one checkpoint. ``str()`` says where that is, as words after "in"."""

    def read(self) -> bytes | None:
        """What was written last; None if nothing was, or it was removed.

        Raises:
            OSError: it is there and cannot be read.
        """
        ...

    def write(self, data: bytes) -> None:
        """Keep these bytes instead of earlier ones, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        ...

    def remove(self) -> None:
        """Keep nothing, also where nothing is kept."""
        ...


class FileKeeper:
    """A keeper with a file.

    >>> FileKeeper("no such file").read() is None
    True
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None

    def write(self, data: bytes) -> None:
        with writing(self.path, overwrite=True) as temporary:
            temporary.write_bytes(data)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def __str__(self) -> str:
        return str(self.path)


def keeper_of(place: str | os.PathLike[str] | Keeper) -> Keeper:
    """The keeper of a place: a path has a file."""
    return FileKeeper(place) if isinstance(place, (str, os.PathLike)) else place
