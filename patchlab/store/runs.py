"""A folder with the results of many runs, planned or finished, that survives whatever ends the process writing to it.

The files are the truth, and what is said of them elsewhere can be made again from them::

    DIR/sweep.json        the format, the version that made the store, and what it was made for
    DIR/plan.json         the planned runs in order
    DIR/runs/<key>/       the files of one result, then run.json with their checksums, and stale.json if it may not be used any more
    DIR/work/             checkpoints of unfinished runs
    DIR/stale/            results that were replaced
    DIR/derived/          what readers computed from results and keep; it can be computed again at any time
    DIR/index.sqlite      which runs have results

A result is acknowledged when each of its files, then ``run.json``, then the name of its folder, then the row of the index is on disk. What a
killed process had not acknowledged is either whole, and found when the store is opened the next time, or no result at all. Nothing but temporary
files is ever deleted, unless :func:`patchlab.store.gc` is asked to.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from patchlab.errors import OutputError, unknown
from patchlab.store.files import flush, is_temporary, json_text, write_json, writing
from patchlab.store.index import NAME, Index, Result, glance
from patchlab.store.lock import Lock
from patchlab.store.record import RECORD, checked, finish, read

FORMAT = 1
HEADER, PLAN, STALE = "sweep.json", "plan.json", "stale.json"
RUNS, WORK, OLD, DERIVED = "runs", "work", "stale", "derived"
STATUSES = ("done", "failed")
_LOCK = ".lock"
_KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_AGAIN = "Remove the folder of that run, and run the sweep again to compute it anew."


@dataclass(frozen=True)
class Stored:
    """A result in a store: ``status`` is ``done`` or ``failed``, ``record`` what was put with it, ``files`` the names of its files."""

    key: str
    status: str
    record: dict[str, Any]
    files: tuple[str, ...]
    folder: Path
    _run: Mapping[str, Any]

    @property
    def sums(self) -> Mapping[str, str]:
        """The SHA-256 of each file."""
        return self._run["sha256"]

    def path(self, name: str) -> Path:
        """The path of a file, after comparing its checksum.

        Raises:
            OutputError: the result has no such file, or it is damaged or gone.
        """
        return checked(self.folder, self._run, name, _AGAIN)

    def __repr__(self) -> str:
        return f"Stored({self.key[:12]}, {self.status}: {', '.join(self.files) or 'no files'})"


class RunStore:
    """The results of many runs in one folder. It knows bytes, paths and JSON, nothing of models.

    :meth:`create` and :meth:`open` give one. One process at a time writes; any number read, also meanwhile, from a copy, or where nothing may be
    written. Keys are made of lower-case letters, digits, ``-`` and ``_``.

    Example:
        >>> with RunStore.create("out", {}) as store:  # doctest: +SKIP
        ...     store.plan({"a1": {"model": "demo-gpt2"}})
        ...     store.put("a1", {"seconds": 1.5}, {"scores.nc": scores.save})
    """

    def __init__(self, folder: Path, lock: Lock, say: Callable[[str], Any], *, write: bool) -> None:
        """Use :meth:`create` or :meth:`open`. ``lock`` is held if ``write``."""
        self.folder, self._lock, self._say = folder, lock, say
        self._index: Index | None = None
        self.about: dict[str, Any] = _header(folder)
        """What ``sweep.json`` holds: ``format``, ``created``, ``patchlab`` (the version), and ``about``, which was given to :meth:`create`."""
        self._plan_seen = _version(folder / PLAN)
        self._plan = _read_plan(folder)
        if write:
            with _saying(folder):
                for name in (RUNS, WORK, OLD):
                    (folder / name).mkdir(exist_ok=True)
                for path in (*folder.iterdir(), *(folder / RUNS).glob("*/.*"), *(folder / WORK).iterdir()):
                    if is_temporary(path.name):
                        path.unlink()
            self._index = Index(folder / NAME, say)
            self._settle(self._index.is_new)

    @staticmethod
    def create(path: str | os.PathLike[str], about: Mapping[str, Any], *, say: Callable[[str], Any] = lambda _: None) -> "RunStore":
        """Make a store, or open the one that is there, for writing.

        Args:
            path: a folder that is empty, not there yet, or a store.
            about: what a new store is noted to be for, as JSON. An older store keeps its own.
            say: told, in a line, what was put right.

        Raises:
            OutputError: the folder holds something else, cannot be written to, is in use by another process, or is a store that is damaged or
                of another format.
        """
        from patchlab import __version__

        folder = Path(path).expanduser().absolute()
        made = {"format": FORMAT, "patchlab": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds"), "about": dict(about)}
        json_text(made, "what the store is for")
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; results go into a folder. Choose another name.")
        with _saying(folder):
            held = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.exists() else []
            if held and HEADER not in held:
                raise OutputError(
                    f"{folder} is not empty (it holds {held[0]}{', ...' if held[1:] else ''}) and has no {HEADER}. Choose another folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as lock:
            if not (folder / HEADER).exists():
                write_json(folder / HEADER, made)
            return RunStore(folder, lock, say, write=True)

    @staticmethod
    def open(path: str | os.PathLike[str], *, write: bool = False, say: Callable[[str], Any] = lambda _: None) -> "RunStore":
        """Open a store: for reading, which needs no lock and changes nothing, or for writing.

        Args:
            path: its folder.
            write: take the lock, and put right what a killed process left.
            say: told, in a line, what was put right.

        Raises:
            OutputError: there is no store, or it is damaged or of another format; for writing also as :meth:`create`.
        """
        folder = Path(path).expanduser().absolute()
        _header(folder)  # before anything is written
        if not write:
            return RunStore(folder, Lock(folder / _LOCK), say, write=False)
        with _locked(folder) as lock:
            return RunStore(folder, lock, say, write=True)

    # planning

    def plan(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """Add runs to what is planned; those that are planned already keep their record and their place.

        Args:
            runs: plain records (as JSON) by key, kept in this order.

        Raises:
            OutputError: a key or a record is not usable, or the plan cannot be written.
        """
        self._writable()
        for key in runs:
            _check_key(key)
        if new := {key: dict(record) for key, record in runs.items() if key not in self._plan}:
            self._write_plan({**self._plan, **new})

    def planned(self) -> dict[str, dict[str, Any]]:
        """The planned runs in order: records by key. A reader reads them again only where another process wrote them anew."""
        if self._index is None and (seen := _version(self.folder / PLAN)) != self._plan_seen:
            self._plan, self._plan_seen = _read_plan(self.folder), seen
        return dict(self._plan)

    def unplan(self, keys: Iterable[str]) -> None:
        """Take runs out of the plan; results that they have stay until they are removed."""
        self._writable()
        if gone := set(keys) & self._plan.keys():
            self._write_plan({key: record for key, record in self._plan.items() if key not in gone})

    def _write_plan(self, runs: dict[str, dict[str, Any]]) -> None:
        write_json(self.folder / PLAN, {"format": FORMAT, "runs": runs}, overwrite=True)
        self._plan = _read_plan(self.folder)  # as every reader sees it

    # results

    def put(self, key: str, record: Mapping[str, Any], files: Mapping[str, bytes | Callable[[Path], Any]], *, status: str = "done") -> None:
        """Store a result. When this returns it is on disk, and nothing that ends the process loses it.

        A failed or stale result of the run goes to ``stale/``; the run's checkpoint is removed.

        Args:
            key: of a planned run.
            record: what is known of the run, as JSON.
            files: what each file holds, or a function that writes it to a path.
            status: ``done`` or ``failed``.

        Raises:
            OutputError: the run is not planned or is done, a name or the record is not usable, or something cannot be written: then the run has
                no result yet, and can be put again.
        """
        index = self._writable()
        if status not in STATUSES:
            raise OutputError(unknown("status of a result", status, STATUSES))
        if key not in self._plan:
            raise OutputError(f"no run {key!r} is planned in {self.folder}. Plan it first.")
        known = index.results().get(key)
        if known is not None and known.status == "done" and not known.stale:
            raise OutputError(f"the run {key} is done, and a result is never replaced unless it failed or is stale.")
        for name in files:
            if not _NAME.fullmatch(name) or name in (RECORD, STALE):
                raise OutputError(f"a file of a result cannot be called {name!r}. Use letters, digits and . _ + -, and neither {RECORD} nor {STALE}.")
        json_text(dict(record), f"the record of run {key}")
        folder = self.folder / RUNS / key
        if known is not None:
            index.write({key: None})  # readers look for it no more
        with _saying(folder):
            if folder.exists():
                self._take_away(key)
            folder.mkdir()
        try:
            for name, content in files.items():
                with writing(folder / name) as temporary:
                    if isinstance(content, bytes):
                        temporary.write_bytes(content)
                    else:
                        content(temporary)
            run = finish(folder, {"key": key, "status": status, "record": dict(record)}, files)
            with _saying(folder):
                flush(folder.parent)
        except BaseException:
            if not (folder / RECORD).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        index.write({key: _result(folder, run)}, forget=[key])
        with _saying(folder):
            self.work(key).unlink(missing_ok=True)

    def get(self, key: str) -> Stored:
        """The result of a run.

        Raises:
            OutputError: it has none, or a stale or a damaged one.
        """
        _check_key(key)
        folder = self.folder / RUNS / key
        if not (folder / RECORD).exists():
            known = f"it is {self.status()[key]}" if key in self.planned() else f"it is not among the {len(self._plan)} planned ones"
            raise OutputError(f"the run {key} has no result in {self.folder}: {known}.")
        if (folder / STALE).exists():
            raise OutputError(f"the result of run {key} is stale: {_why_stale(folder)}. Run the sweep again to compute it anew.")
        try:
            run = _run(folder, key)
        except OutputError as error:
            raise OutputError(f"{error} {_AGAIN}") from error
        return Stored(key, run["status"], run["record"], tuple(run["sha256"]), folder, run)

    def set_stale(self, key: str, why: str) -> None:
        """Note that a result may not be used any more: its run is pending again.

        Args:
            key: of a run that has a result.
            why: a reason, as part of a sentence.

        Raises:
            OutputError: the run has no result, or the note cannot be written.
        """
        index = self._writable()
        known = index.results().get(key)
        if known is None:
            raise OutputError(f"the run {key} has no result that could be stale.")
        if not known.stale:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(self.folder / RUNS / key / STALE, {"why": why, "when": now})
            index.write({key: Result(known.status, True, known.sizes)})
            self._say(f"the result of run {key[:12]} is stale: {why}. It is not used, and its run is pending again.")

    def _take_away(self, key: str) -> None:
        """Move what a run's folder holds to ``stale/``."""
        folder, number = self.folder / RUNS / key, 1
        if not any(folder.iterdir()):
            folder.rmdir()
            return
        while (away := self.folder / OLD / f"{key}.{number}").exists():
            number += 1
        folder.rename(away)
        flush(away.parent)
        flush(folder.parent)

    # how far the runs are

    def status(self) -> dict[str, str]:
        """Per planned run ``done``, ``failed``, ``pending``, ``running`` or ``stale``, in the order of the plan."""
        results, notes = self._seen()
        alive = self._index is not None or self._lock.is_held()
        found: dict[str, str] = {}
        for key in self.planned():
            result = results.get(key)
            found[key] = "pending" if result is None else "stale" if result.stale else result.status
            if found[key] != "done" and alive and notes.get(key, (False, 0))[0]:
                found[key] = "running"
        return found

    def counts(self) -> dict[str, int]:
        """How many runs are planned, done, failed, pending (stale ones are) and running."""
        found = ["pending" if one == "stale" else one for one in self.status().values()]
        return {"planned": len(found)} | {status: found.count(status) for status in ("done", "failed", "pending", "running")}

    def results(self) -> dict[str, str]:
        """Per run that has a result, also one that is not planned: ``done``, ``failed`` or ``stale``; in the order of the plan, others last."""
        found = {key: "stale" if one.stale else one.status for key, one in self._seen()[0].items()}
        order = [*(key for key in self.planned() if key in found), *sorted(found.keys() - self._plan.keys())]
        return {key: found[key] for key in order}

    def mark(self, key: str, status: str) -> None:
        """Note that a run is ``running``, or that it is not any more (``pending``): for readers, and gone when the store is closed.

        Raises:
            OutputError: another status, or the run is not planned or is done.
        """
        index = self._writable()
        if status not in ("running", "pending"):
            raise OutputError(unknown("status to mark a run with", status, ("running", "pending")))
        if (now := self.status().get(key)) in (None, "done"):
            raise OutputError(f"the run {key} cannot be marked as {status}: it is {now or 'not planned'}.")
        index.note(key, running=status == "running")

    def attempts(self, key: str, add: int = 0) -> int:
        """How many workers a run has killed since it was last put, after adding some. An index that is lost takes the number with it."""
        number = self._seen()[1].get(key, (False, 0))[1]
        if add:
            self._writable().note(key, attempts=number + add)
        return number + add

    def work(self, key: str) -> Path:
        """Where the checkpoint of an unfinished run lies."""
        _check_key(key)
        return self.folder / WORK / f"{key}.checkpoint"

    def derived(self, name: str) -> Path:
        """Where a reader keeps what it computed from results, as JSON whose ``keys`` are those of their runs; the folder may not be there."""
        return self.folder / DERIVED / f"{name}.json"

    # the index

    def rebuild(self) -> None:
        """Make the index again from the runs.

        Raises:
            OutputError: the store is open for reading, or the index cannot be written.
        """
        self._writable()
        self._settle(anew=True)

    def _seen(self) -> tuple[dict[str, Result], dict[str, tuple[bool, int]]]:
        """Results and notes: as the index has them, or the files where a reader cannot use it."""
        if self._index is not None:
            return self._index.results(), self._index.notes()
        found = glance(self.folder / NAME)
        return (_scanned(self.folder / RUNS, {}, lambda _: None), {}) if found is None else found

    def _settle(self, anew: bool) -> None:
        """Make the index say what the files say."""
        index = self._writable()
        before = index.results()
        found = _scanned(self.folder / RUNS, {} if anew else before, self._say)
        changes: dict[str, Result | None] = {key: one for key, one in found.items() if before.get(key) != one}
        if changes := changes | dict.fromkeys(before.keys() - found.keys()):
            index.write(changes)
        index.nothing_runs()

    def _writable(self) -> Index:
        if self._index is None:
            raise OutputError(f"{self.folder} is open for reading only. Open it with write=True.")
        return self._index

    # the end

    def close(self) -> None:
        """Let others write. Nothing can be written from then on, and closing again does nothing."""
        if self._index is not None:
            index, self._index = self._index, None
            try:
                with suppress(OutputError):  # the next one to open it does the same
                    index.nothing_runs()
            finally:
                index.close()
                self._lock.release()

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunStore({self.folder}): " + ", ".join(f"{number} {name}" for name, number in self.counts().items())


def derived_from(path: Path, keys: Iterable[str]) -> bool:
    """Whether everything that a file of :meth:`RunStore.derived` was computed from is among the results of these runs."""
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["keys"]) <= {*keys}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise OutputError(f"{key!r} is no key of a run. Use lower-case letters, digits, - and _, at most 128.")


@contextmanager
def _saying(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write to {where} ({error.strerror or error}); choose a folder that you may write to, with room left.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[Lock]:
    """Take the lock, and give it back after an exception only."""
    lock = Lock(folder / _LOCK)
    with _saying(folder):
        lock.acquire(
            lambda who: (
                f"{folder} is in use by {who}: one runner at a time writes to it. Wait until that one has ended, or stop it; the results can "
                f"be read meanwhile."
            )
        )
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _header(folder: Path) -> dict[str, Any]:
    """What ``sweep.json`` holds, if this patchlab knows the format."""
    path = folder / HEADER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        number, made = found["format"], (found["about"], found["created"], found["patchlab"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OutputError(f"there is no store of runs in {folder} (it has no {HEADER}). Give the folder that a sweep was run into.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged or cannot be read ({error}). The store is left as it is: put that file back from a copy.") from error
    if number != FORMAT:
        what = "Update patchlab." if isinstance(number, int) and number > FORMAT else "Use the patchlab that made it."
        raise OutputError(f"{folder} has the format {number!r} (patchlab {made[-1]} made it) and this patchlab knows {FORMAT}. {what}")
    return found


def _version(path: Path) -> tuple[int, int, int] | None:
    """What tells one version of a file from another, as each is written under a temporary name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_plan(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / PLAN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {**record} for key, record in found["runs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} is damaged or cannot be read ({error}). It is left as it is, and so are the results: move it away and run the sweep again, "
            f"which plans the runs anew and finds their results."
        ) from error


def _why_stale(folder: Path) -> str:
    try:
        return str(json.loads((folder / STALE).read_text(encoding="utf-8"))["why"])
    except (OSError, ValueError, KeyError, TypeError):
        return "it was noted as such"


def _run(folder: Path, key: str) -> dict[str, Any]:
    """What ``run.json`` holds, if it is that of this run."""
    run = read(folder)
    if run.get("key") != key or run.get("status") not in STATUSES or not isinstance(run.get("record"), dict):
        raise OutputError(f"{folder / RECORD} is damaged (it is not that of run {key}).")
    return run


def _result(folder: Path, run: Mapping[str, Any], stale: bool = False) -> Result:
    return Result(run["status"], stale, {**run["bytes"], RECORD: (folder / RECORD).stat().st_size})


def _scanned(runs: Path, known: Mapping[str, Result], say: Callable[[str], Any]) -> dict[str, Result]:
    """The results in a folder of runs. Where the files have the sizes that are known, none is read."""
    found: dict[str, Result] = {}
    for folder in sorted(path for path in runs.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()) if runs.is_dir() else ():
        key, row = folder.name, known.get(folder.name)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        stale = STALE in sizes
        if row is not None and row.sizes.items() <= sizes.items():
            found[key] = Result(row.status, stale, row.sizes)
        elif row is not None or RECORD in sizes:
            try:
                one = _result(folder, _run(folder, key), stale)
                if differing := sorted(one.sizes.items() - sizes.items()):
                    raise OutputError(f"{folder / differing[0][0]} is {'gone' if differing[0][0] not in sizes else 'cut off or changed'}.")
                found[key] = one
            except OutputError as error:
                say(f"the result of run {key[:12]} cannot be used: {error} The run is pending again, and what is there is kept.")
    for key in sorted(known.keys() - found.keys()):
        if not (runs / key).is_dir():
            say(f"the result of run {key[:12]} is gone. The run is pending again.")
    return found
