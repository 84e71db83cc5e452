"""The lock of a folder: one process writes to it at a time, and others are told which."""

import json
import os
import platform
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from patchlab.errors import OutputError

_PATIENCE = 0.2
"""Seconds in which a lock that was only looked at is free again, as a rule."""
_LOOKS = 100
"""How often so long: on a busy machine whoever looks may have to wait in the middle of it."""
_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()
"""Locks that this process holds. Looking at the file of one would release it where the system keeps locks per process (NFS)."""


class Lock:
    """A kernel lock on a file, with a second file that says who holds it: it is free as soon as the holder
    has ended, however that was.

    >>> Lock(Path("out/.lock")).acquire(lambda who: f"out is in use by {who}.")  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path, timeout=_PATIENCE, poll_interval=_PATIENCE / 8, thread_local=False)
        self._id: tuple[int, int] | None = None

    @property
    def owner(self) -> Path:
        """The file that says who holds the lock; it means nothing while the lock is free."""
        return self.path.with_name(f"{self.path.name}-owner")

    def acquire(self, taken: Callable[[str], str]) -> None:
        """Take the lock, or raise at once.

        Args:
            taken: makes the message from the words for the holder.

        Raises:
            OutputError: another process, or another part of this one, holds it.
            OSError: the lock file cannot be written.
        """
        for left in reversed(range(_LOOKS)):
            try:
                self._lock.acquire()
                break
            except Timeout as error:
                if not left or self.is_held():
                    raise OutputError(taken(self.holder())) from error
        try:
            found = self.path.stat()
            self._id = (found.st_dev, found.st_ino)
            _held.add(self)
            now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
            self.owner.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": f"{now[:19]} UTC"}), encoding="utf-8")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back; nothing happens without it."""
        if self._lock.is_locked:
            with suppress(OSError):
                self.owner.unlink(missing_ok=True)
            self._lock.release()
        _held.discard(self)
        self._id = None

    def holder(self) -> str:
        """Who holds the lock, in words."""
        try:
            found: dict[str, Any] = json.loads(self.owner.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def is_held(self) -> bool:
        """Whether anybody holds it, found out without writing anything."""
        try:
            found = self.path.stat()
            if any(lock._id == (found.st_dev, found.st_ino) for lock in _held):
                return True
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return _is_locked(handle, self.path)
        finally:
            os.close(handle)


def _is_locked(handle: int, path: Path) -> bool:
    if sys.platform == "win32":
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            return True
        lock.release()
        return False
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the handle gives it back
    except OSError:
        return True
    return False
