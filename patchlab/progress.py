"""Progress of long work on stderr: a bar on a terminal and in a notebook, a line every ten seconds anywhere else."""

import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

SECONDS = 10.0
"""Between two lines."""


def progress_bar(what: str, unit: str, total: int | None = None, *, done: int = 0, show: bool = True) -> Any:
    """Progress as a context manager with ``update(n)``.

    Args:
        what: what is going on.
        unit: what is counted, such as ``forward``.
        total: how many there are; None where that is not known.
        done: how many are finished already.
        show: say nothing if False.
    """
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    if show and not notebook and not sys.stderr.isatty():
        return Lines(what, unit, total, done=done)
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not show, leave=False)


class Lines:
    """A line every ten seconds: what, how many of how many, the time that it took and takes. Work of less than ten seconds has none."""

    def __init__(self, what: str, unit: str, total: int | None = None, *, done: int = 0) -> None:
        self.what, self.unit, self.total, self.n = what, unit, total, done
        self._initial = done
        self._ended = threading.Event()
        self._started = time.monotonic()

    def update(self, n: int | bool = 1) -> None:
        """Count."""
        self.n += n

    def __enter__(self) -> "Lines":
        self._started = time.monotonic()
        # a thread, since one step may take longer than ten seconds
        self._thread = threading.Thread(target=self._write, args=(sys.stderr,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def line(self, elapsed: float | int) -> str:
        """What is said after so many seconds."""
        unit = self.unit if self.total == 1 else f"{self.unit}s"
        count = f"{self.n:,} {unit}" if self.total is None else f"{self.n:,} of {self.total:,} {unit}"
        parts = [count, f"{duration(elapsed)} elapsed"]
        new = self.n - self._initial
        if self.total is not None and new > 0 and self.n < self.total:
            parts.append(f"about {duration(elapsed / new * (self.total - self.n))} remaining")
        return f"{self.what}: {', '.join(parts)}"

    def _write(self, file: Any) -> None:
        while not self._ended.wait(SECONDS):
            try:
                file.write(self.line(time.monotonic() - self._started) + "\n")
                file.flush()
            except (OSError, ValueError):  # nobody reads it any more, which is no failure of the work
                return


def duration(seconds: float | int) -> str:
    """Seconds as people say them, in the two largest units.

    >>> duration(12), duration(200), duration(12_000), duration(1e6)
    ('12 s', '3 min 20 s', '3 h 20 min', '11 days 13 h')
    """
    whole = round(seconds)
    if whole >= 365 * 86_400:
        return f"{whole / (365 * 86_400):,.0f} years"
    sizes = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((i for i, (_, size) in enumerate(sizes) if whole >= size), len(sizes) - 1)
    parts = []
    for name, size in sizes[first : first + 2]:
        count, whole = divmod(whole, size)
        parts += [f"{count} {'day' if name == 'days' and count == 1 else name}"] if count or not parts else []
    return " ".join(parts)
