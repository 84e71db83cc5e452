"""The folder a command leaves its results in: nothing is overwritten unasked, and nothing half-written stays.

Files are written to a hidden folder inside the target and moved up when all of them are there. ``run.json`` comes
last and lists them, so a folder that has one is complete.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchlab.errors import OutputError

INDEX = "run.json"
_STAGING = ".patchlab-"


@contextmanager
def result_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A fresh folder to write results into; on leaving, its files move to ``path``.

    Enter it before computing anything: a place that cannot be written to is found out at once. After an exception
    ``path`` is as it was. With ``force`` the files of the earlier run are replaced; other files stay.

    Raises:
        OutputError: the path is a file, is not writable, or holds files and ``force`` is off.

    Example:
        >>> with result_folder("out") as folder:
        ...     (folder / "comparison.csv").write_text("site,method")
    """
    target = Path(path).expanduser().resolve()
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        staging = _stage(target)
        try:
            _refuse_if_held(target, force)
            yield staging
            _refuse_if_held(target, force)  # somebody else may have been faster
            _move_in(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _stage(target: Path) -> Path:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; results go into a folder. Choose another name with --out.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
    except OSError as error:
        raise OutputError(f"cannot write to {target} ({error.strerror}); choose a folder you may write to with --out.") from error


def _refuse_if_held(target: Path, force: bool) -> None:
    held = sorted(entry.name for entry in target.iterdir() if not entry.name.startswith(_STAGING))
    if held and not force:
        what = "already holds results" if INDEX in held else f"is not empty (it holds {held[0]}{', ...' if held[1:] else ''})"
        raise OutputError(f"{target} {what}; choose another folder with --out, or replace earlier results with --force.")


def _earlier(target: Path) -> set[str]:
    """Names of the files that an earlier run wrote."""
    try:
        listed = json.loads((target / INDEX).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in map(str, listed) if Path(name).name == name and (target / name).is_file()}


def _index_last(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == INDEX, name))


def _move_in(staging: Path, target: Path) -> None:
    """Replace the earlier run's files by the staged ones; a failed move puts the earlier ones back."""
    new = {entry.name for entry in staging.iterdir()}
    old = {name for name in _earlier(target) | new if (target / name).exists()}
    kept = Path(tempfile.mkdtemp(prefix=f"{_STAGING}old-", dir=target))
    moves = [(target / name, kept / name) for name in reversed(_index_last(old))] + [(staging / name, target / name) for name in _index_last(new)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except OSError as error:
        for source, destination in reversed(done):
            destination.rename(source)
        kept.rmdir()
        raise OutputError(f"cannot write the results to {target} ({error.strerror}); what was there is untouched.") from error
    shutil.rmtree(kept)
