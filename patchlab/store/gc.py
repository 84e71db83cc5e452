"""What a store holds that nobody needs: replaced results, leftovers of writes, checkpoints of finished runs."""

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from patchlab.errors import OutputError
from patchlab.store.files import is_temporary
from patchlab.store.index import NAME
from patchlab.store.record import RECORD
from patchlab.store.runs import DERIVED, OLD, RUNS, WORK, RunStore, derived_from


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be removed, why, and its size in bytes."""

    path: Path
    why: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.path} ({self.bytes:,} bytes): {self.why}"


def gc(store: RunStore, wanted: Collection[str] | None = None) -> list[Garbage]:
    """What can be removed from a store: results that were replaced or are stale, what writes left that were cut off, checkpoints of runs that are
    done or not planned, what was computed from results that are gone, and indexes that were kept aside because they were damaged.

    Args:
        store: open for reading or writing; nothing is removed. While a runner writes to it, what it is writing is listed too.
        wanted: keys of the runs that are still wanted: results of others are listed too. None: all are.
    """
    folder, results, found = store.folder, store.results(), list[tuple[Path, str]]()
    planned = store.planned()
    unwanted = set[str]() if wanted is None else (results.keys() | planned.keys()) - {*wanted}
    found += [(path, "it was replaced") for path in _inside(folder / OLD)]
    for path in _inside(folder / RUNS):
        if path.name in unwanted:
            found.append((path, "its run is not wanted any more"))
        elif results.get(path.name) == "stale":
            found.append((path, "it is stale"))
        elif not (path / RECORD).exists():
            found.append((path, "it was not finished"))
        else:
            found += [(inside, "it was not finished") for inside in _inside(path) if is_temporary(inside.name)]
    for path in _inside(folder / WORK):
        key = path.name.removesuffix(".checkpoint")
        if is_temporary(path.name):
            found.append((path, "it was not finished"))
        elif key not in planned or key in unwanted or results.get(key) == "done":
            found.append((path, "its run is " + ("done" if results.get(key) == "done" else "not planned")))
    used = [key for key, status in results.items() if status == "done" and key not in unwanted]
    for path in _inside(folder / DERIVED):
        if is_temporary(path.name):
            found.append((path, "it was not finished"))
        elif not derived_from(path, used):
            found.append((path, "it was computed from results that are gone"))
    for path in _inside(folder):
        if is_temporary(path.name):
            found.append((path, "it was not finished"))
        elif path.name.startswith(f"{NAME}.damaged-"):
            found.append((path, "it was damaged, and made again"))
    return [Garbage(path, why, _size(path)) for path, why in found]


def remove(store: RunStore, garbage: Iterable[Garbage], wanted: Collection[str] | None = None) -> None:
    """Remove what :func:`gc` listed, and take runs that are not wanted out of the plan.

    Args:
        store: open for writing.
        garbage: of :func:`gc`.
        wanted: as it was given there.

    Raises:
        OutputError: the store is open for reading only, or something cannot be removed.
    """
    store.unplan(() if wanted is None else store.planned().keys() - {*wanted})
    now = {one.path for one in gc(store, wanted)}
    for one in garbage:
        if one.path not in now:
            continue
        try:
            shutil.rmtree(one.path) if one.path.is_dir() else one.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {one.path} ({error.strerror}); see that it may be written to.") from error
    store.rebuild()


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())
