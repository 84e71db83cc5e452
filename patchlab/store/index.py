"""The index of a store: which runs have results, as an SQLite file that can be made again from the runs at any time."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchlab.errors import OutputError

NAME = "index.sqlite"
FORMAT = 1
_TABLES = """
CREATE TABLE results (key TEXT PRIMARY KEY, status TEXT NOT NULL, stale INTEGER NOT NULL, bytes TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE notes (key TEXT PRIMARY KEY, running INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
"""
_BESIDE = ("-journal", "-wal", "-shm")
_EMPTY = "is empty"
_WAL = 2
"""What bytes 18 and 19 of an SQLite file are under write-ahead logging, where the file alone is not whole."""


@dataclass(frozen=True)
class Result:
    """A run that has a result: ``done`` or ``failed``, whether it is stale, and the sizes of its files in bytes."""

    status: str
    stale: bool
    sizes: Mapping[str, int]


class Index:
    """The index, open for the one process that writes to the store.

    It has a rollback journal (the file of a copied folder is whole) and ``synchronous=FULL``: a commit is on disk when it returns.

    Args:
        path: of the file.
        say: told, in a line, when an index that cannot be used is kept aside.

    Raises:
        OutputError: it cannot be written, or a newer patchlab wrote it.
    """

    def __init__(self, path: Path, say: Callable[[str], Any]) -> None:
        self.path = path
        self.is_new = not path.exists()
        """Whether it has to be filled from the runs."""
        with self._saying():
            if not self.is_new and (fault := _fault(path, "rw")) is not None:
                self.is_new = True
                if fault == _EMPTY:  # whoever began it was killed
                    path.unlink()
                else:
                    say(f"{path} {fault}; it is kept as {_put_aside(path).name}, and made again from the runs.")
            self._database = _connected(path, "rwc")
            for setting in ("journal_mode = DELETE", "synchronous = FULL"):
                self._database.execute(f"PRAGMA {setting}").fetchall()
            if self.is_new:
                self._database.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")

    def results(self) -> dict[str, Result]:
        """The runs that have results."""
        with self._saying():
            return _results(self._database)

    def notes(self) -> dict[str, tuple[bool, int]]:
        """Per run whether it is running, and how many workers it has killed."""
        with self._saying():
            return _notes(self._database)

    def write(self, results: Mapping[str, Result | None], *, forget: Iterable[str] = ()) -> None:
        """Replace rows in one step.

        Args:
            results: rows by key; None removes one.
            forget: runs whose notes are dropped.
        """
        rows = [(key, one.status, one.stale, json.dumps(dict(one.sizes))) for key, one in results.items() if one is not None]
        with self._changing() as database:
            database.executemany("DELETE FROM results WHERE key = ?", [(key,) for key in results])
            database.executemany("INSERT INTO results VALUES (?, ?, ?, ?)", rows)
            database.executemany("DELETE FROM notes WHERE key = ?", [(key,) for key in forget])

    def note(self, key: str, *, running: bool | None = None, attempts: int | None = None) -> None:
        """Note that a run is, or is no longer, under way, or how many workers it has killed."""
        with self._changing() as database:
            database.execute("INSERT OR IGNORE INTO notes (key) VALUES (?)", (key,))
            for column, value in (("running", running), ("attempts", attempts)):
                if value is not None:
                    database.execute(f"UPDATE notes SET {column} = ? WHERE key = ?", (value, key))

    def nothing_runs(self) -> None:
        """Note that no run is under way."""
        with self._changing() as database:
            database.execute("UPDATE notes SET running = 0 WHERE running")

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._saying():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self.commit()
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def commit(self) -> None:
        """The moment from which on a change is acknowledged."""
        self._database.execute("COMMIT")

    @contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise OutputError(
                f"cannot write {self.path}: {error}. The runs are whole without it: see that the folder can be written to and has room left, then "
                f"go on."
            ) from error


def glance(path: Path) -> tuple[dict[str, Result], dict[str, tuple[bool, int]]] | None:
    """What an index holds, without changing anything; None if it is missing, damaged or cannot be read."""
    try:
        if not path.exists() or _fault(path, "ro") is not None:
            return None
        with closing(_connected(path, "ro")) as database:
            database.execute("BEGIN")  # one moment for both tables
            return _results(database), _notes(database)
    except (sqlite3.Error, OSError, OutputError):
        return None


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None)


def _fault(path: Path, mode: str) -> str | None:
    """Why a file cannot be used as an index; None if it can.

    Raises:
        OutputError: a newer patchlab wrote it.
    """
    with path.open("rb") as stream:
        head = stream.read(20)
    if head[18:20] == bytes((_WAL, _WAL)):
        return "has a write-ahead log, without which it is not whole"
    try:
        with closing(_connected(path, mode)) as database:
            found = database.execute("PRAGMA quick_check").fetchall()
            number = database.execute("PRAGMA user_version").fetchone()[0]
            if found != [("ok",)]:
                return f"is damaged ({str(found[0][0]).splitlines()[0]})"
            if number > FORMAT:
                raise OutputError(f"{path} has the format {number} and this patchlab knows up to {FORMAT}. Update patchlab.")
            if not database.execute("SELECT * FROM sqlite_master").fetchall():
                return _EMPTY
            _results(database)
            _notes(database)
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        return f"is damaged ({error})"
    return None


def _results(database: sqlite3.Connection) -> dict[str, Result]:
    rows = database.execute("SELECT key, status, stale, bytes FROM results").fetchall()
    return {key: Result(status, bool(stale), json.loads(sizes)) for key, status, stale, sizes in rows}


def _notes(database: sqlite3.Connection) -> dict[str, tuple[bool, int]]:
    return {key: (bool(running), attempts) for key, running, attempts in database.execute("SELECT key, running, attempts FROM notes")}


def _put_aside(path: Path) -> Path:
    """Rename an index, with the files that belong to it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for ending in ("", *_BESIDE):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + ending))
    return aside
