"""The folder a command leaves its results in: nothing is overwritten unasked, nothing half-written shows, and nothing finished is lost.

Files are written to a hidden folder inside the target and moved up when all of them are there. ``run.json`` comes
last and lists them, so a folder that has one is complete. What an interrupted run finished stays in the hidden folder, and the
same command goes on from there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from patchlab.errors import OutputError
from patchlab.store.files import flush, write_json
from patchlab.store.lock import Lock
from patchlab.store.record import RECORD

JOB = "job.json"
_HIDDEN = ".patchlab-"
UNFINISHED, _LOCK, _OLD = f"{_HIDDEN}unfinished", f"{_HIDDEN}lock", f"{_HIDDEN}old-"


@contextmanager
def result_folder(
    path: str | os.PathLike[str], *, force: bool = False, job: Mapping[str, Any] | None = None, say: Callable[[str], Any] = lambda _: None
) -> Iterator[Path]:
    """A folder to write results into; on leaving, its files move to ``path``.

    Enter it before computing anything: a place that cannot be written to, or that another run is writing to, is found out at once.
    After an exception the results in ``path`` are as they were. With ``force`` the files of the earlier run are replaced; other files stay.

    Args:
        path: where the results shall be.
        force: replace the files that an earlier run wrote.
        job: what is run, as JSON. After an exception the files written so far stay in ``path/.patchlab-unfinished``, and entering with the same
            job again finds them there. None: nothing is kept.
        say: told, in a line, where unfinished work is kept and when it is found.

    Raises:
        OutputError: the path is a file, is not writable, holds files or unfinished work of another job and ``force`` is off, or
            another run is writing there.

    Example:
        >>> with result_folder("out") as folder:  # doctest: +SKIP
        ...     (folder / "comparison.csv").write_text("site,method")
    """
    target = Path(path).expanduser().resolve()
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    _make(target)
    try:
        with _alone(target):
            _clean(target)
            _refuse_if_held(target, force)
            staging = target / UNFINISHED
            _begin(staging, job, force, say)
            try:
                yield staging
                _refuse_if_held(target, force)  # somebody else may have put something there
                (staging / JOB).unlink(missing_ok=True)
                _move_in(staging, target)
            except BaseException:
                _keep_or_drop(staging, job, say)
                raise
    finally:
        with suppress(OSError):
            (target / _LOCK).unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()  # empty ones only


def _make(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; results go into a folder. Choose another name with --out.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(_unwritable(target, error)) from error


def _unwritable(target: Path, error: OSError) -> str:
    return f"cannot write to {target} ({error.strerror}); choose a folder you may write to with --out."


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    lock = Lock(target / _LOCK)
    try:
        lock.acquire(lambda who: f"another run is writing to {target}; wait until it has ended, or choose another folder with --out. It is {who}.")
    except OSError as error:
        raise OutputError(_unwritable(target, error)) from error
    try:
        yield
    finally:
        lock.release()


def _clean(target: Path) -> None:
    """Put right what runs that were killed left: nobody else is writing here."""
    for left in target.glob(f"{_HIDDEN}*"):
        if not left.is_dir() or left.name == UNFINISHED:
            continue
        if left.name.startswith(_OLD) and not (target / RECORD).exists():  # it was killed while it replaced earlier results
            for old in left.iterdir():
                old.replace(target / old.name)
        shutil.rmtree(left)


def _refuse_if_held(target: Path, force: bool) -> None:
    held = sorted(entry.name for entry in target.iterdir() if not entry.name.startswith(_HIDDEN))
    if held and not force:
        what = "already holds results" if RECORD in held else f"is not empty (it holds {held[0]}{', ...' if held[1:] else ''})"
        raise OutputError(f"{target} {what}; choose another folder with --out, or replace earlier results with --force.")


def _begin(staging: Path, job: Mapping[str, Any] | None, force: bool, say: Callable[[str], Any]) -> None:
    """A folder to write to: that of the same job, or a new one."""
    record = None if job is None else json.loads(json.dumps(job))
    earlier = _read(staging / JOB)
    if record is not None and earlier == record:
        if found := _finished(staging):
            say(f"going on from {staging}: {', '.join(found)}")
        return
    if earlier is not None and not force:
        raise OutputError(
            f"{staging} holds what another command has finished ({', '.join(_finished(staging))}). Give that command again to go on, choose "
            f"another folder with --out, or drop it with --force."
        )
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        if record is not None:
            write_json(staging / JOB, record)
    except OSError as error:
        raise OutputError(_unwritable(staging.parent, error)) from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _finished(staging: Path) -> list[str]:
    return sorted(entry.name for entry in staging.iterdir() if entry.name != JOB and not entry.name.startswith("."))


def listed(staging: Path, *more: str) -> list[str]:
    """Names for ``run.json``: the files that are there, ``run.json`` itself, and more that are still to be written."""
    return sorted({RECORD, *more, *_finished(staging)})


def _keep_or_drop(staging: Path, job: Mapping[str, Any] | None, say: Callable[[str], Any]) -> None:
    if job is not None and (found := _finished(staging)):
        say(f"what is finished is kept in {staging}: {', '.join(found)}. The same command goes on from there.")
    else:
        shutil.rmtree(staging, ignore_errors=True)


def _earlier(target: Path) -> set[str]:
    """Names of the files that an earlier run wrote."""
    try:
        listed = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in map(str, listed) if Path(name).name == name and (target / name).is_file()}


def _index_last(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == RECORD, name))


def _move_in(staging: Path, target: Path) -> None:
    """Replace the earlier run's files by the staged ones; a failed move puts the earlier ones back.

    What is staged is on disk before it moves, and all other names are before that of ``run.json``.
    """
    new = {entry.name for entry in staging.iterdir()}
    earlier = _earlier(target)
    if foreign := sorted(name for name in new - earlier if (target / name).exists()):
        raise OutputError(
            f"{target} has {foreign[0]}, which no earlier run lists among its files, and it would be replaced; move it away or choose another folder "
            f"with --out."
        )
    old = {name for name in earlier | new if (target / name).exists()}
    try:
        kept = Path(tempfile.mkdtemp(prefix=_OLD, dir=target))
    except OSError as error:
        raise OutputError(_unwritable(target, error)) from error
    moves = [(target / name, kept / name) for name in reversed(_index_last(old))] + [(staging / name, target / name) for name in _index_last(new)]
    done: list[tuple[Path, Path]] = []
    try:
        for path in (*(staging / name for name in new), staging):
            flush(path)
        for source, destination in moves:
            if source == staging / RECORD:
                flush(kept)
                flush(target)
            source.rename(destination)
            done.append((source, destination))
        flush(target)
    except OSError as error:
        for source, destination in reversed(done):
            destination.rename(source)
        kept.rmdir()
        raise OutputError(f"cannot write the results to {target} ({error.strerror}); what was there is untouched.") from error
    shutil.rmtree(kept)
    staging.rmdir()
