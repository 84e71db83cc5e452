"""The steps by which something reaches the disk, in order, each of which can be made to fail or to be the last one of its process."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchlab.store import RunStore
from patchlab.store.files import is_temporary
from patchlab.store.index import Index

FILES = {"a.bin": b"a" * 1000, "b.txt": b"text"}
EXIT = 77


class Steps:
    """Records folders made, files written, flushed and renamed under ``root``, and commits of the index.

    ``before`` is called with the number of each step before it is taken.
    """

    def __init__(self, root: Path, before: Callable[[int], Any] = lambda _: None) -> None:
        self.root, self.before, self.taken = root, before, list[tuple[str, str]]()
        self.handles: dict[int, Path] = {}

    @contextmanager
    def watched(self) -> Iterator["Steps"]:
        replaced: list[tuple[Any, str, Any]] = []

        def wrap(owner: Any, name: str, what: str, where: Callable[..., Any]) -> None:
            right = getattr(owner, name)
            replaced.append((owner, name, right))

            def stepped(*arguments: Any, **options: Any) -> Any:
                self._step(what, where(*arguments))
                return right(*arguments, **options)

            setattr(owner, name, stepped)

        right_open = os.open

        def opened(path: Any, *arguments: Any, **options: Any) -> int:
            handle = right_open(path, *arguments, **options)
            self.handles[handle] = Path(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else Path()
            return handle

        replaced.append((os, "open", right_open))
        os.open = opened
        wrap(os, "fsync", "flush", lambda handle: self.handles[handle])
        wrap(os, "replace", "rename", lambda _, target: target)
        wrap(os, "rename", "rename", lambda _, target: target)
        wrap(os, "mkdir", "make", lambda path, *_: path)
        wrap(Path, "write_bytes", "write", lambda path, *_: path)
        wrap(Path, "write_text", "write", lambda path, *_: path)
        wrap(Index, "commit", "commit", lambda index: index.path)
        try:
            yield self
        finally:
            for owner, name, right in reversed(replaced):
                setattr(owner, name, right)

    def _step(self, what: str, path: Any) -> None:
        path = Path(path)
        if not path.is_relative_to(self.root):
            return
        name = path.relative_to(self.root)
        if is_temporary(name.name):
            name = name.with_name(f"{name.name[1:].rpartition('.')[0].rpartition('.')[0]}~")
        self.before(len(self.taken))
        self.taken.append((what, name.as_posix()))


def no_space(at: int) -> Callable[[int], None]:
    """A disk that is full at one step, for once."""
    left = [at]

    def fail(number: int) -> None:
        if number in left:
            left.clear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


def leave(at: int) -> Callable[[int], None]:
    """A process that ends before a step."""

    def end(number: int) -> None:
        if number == at:
            os._exit(EXIT)

    return end


def main() -> None:
    """Put one result, and end before the given step."""
    folder, at = Path(sys.argv[1]), int(sys.argv[2])
    store = RunStore.open(folder, write=True)
    with Steps(folder, leave(at)).watched():
        store.put("k2", {"number": 2}, FILES)
    os._exit(0)


if __name__ == "__main__":
    main()
