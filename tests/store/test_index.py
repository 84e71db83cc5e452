"""The index: a damaged, missing or foreign one is made again from the runs, and never believed."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from patchlab.errors import OutputError
from patchlab.store import RunStore
from patchlab.store.index import Index

STATUS = {"k0": "done", "k1": "failed", "k2": "stale", "k3": "pending"}


def made(path: Path) -> None:
    with RunStore.create(path, {}) as store:
        store.plan({key: {} for key in STATUS})
        for key, status in (("k0", "done"), ("k1", "failed"), ("k2", "done")):
            store.put(key, {"key": key}, {"a": b"1"}, status=status)
        store.set_stale("k2", "another model")


def statement(path: Path, text: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(text)


def write_ahead(path: Path) -> None:
    """As of a store whose index was in WAL mode, copied without its log."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("DELETE FROM results")
        database.commit()
        alone = path.read_bytes()
    path.write_bytes(alone)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


def garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:6000] = b"\xff" * (6000 - 4096)
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "wal": (write_ahead, "has a write-ahead log"),
    "malformed": (garbled, "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged"),
    "text": (lambda path: path.write_text("my notes, which are longer than the head of a database" * 10), "is damaged"),
    "no table": (lambda path: statement(path, "DROP TABLE notes"), "is damaged"),
    "another table": (lambda path: statement(path, "DROP TABLE results; CREATE TABLE results (key TEXT, mine TEXT)"), "is damaged"),
    "no json": (lambda path: statement(path, "UPDATE results SET bytes = '{'"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_kept_aside_and_made_again(tmp_path: Path, damage: str) -> None:
    made(tmp_path / "s")
    spoil, message = DAMAGES[damage]
    path, said = tmp_path / "s" / "index.sqlite", list[str]()
    spoil(path)
    spoilt = path.read_bytes()
    files = sorted((tmp_path / "s").rglob("*"))
    reader = RunStore.open(tmp_path / "s")
    assert reader.status() == STATUS
    assert reader.get("k0").path("a").read_bytes() == b"1"
    assert sorted((tmp_path / "s").rglob("*")) == files, "a reader changes nothing"
    assert path.read_bytes() == spoilt
    with RunStore.open(tmp_path / "s", write=True, say=said.append) as store:
        assert store.status() == STATUS
        assert len(said) == 1
        assert message in said[0]
        assert "it is kept as index.sqlite.damaged-1, and made again from the runs" in said[0]
        assert (tmp_path / "s" / "index.sqlite.damaged-1").read_bytes() == spoilt
    said.clear()
    spoil(path)
    RunStore.open(tmp_path / "s", write=True, say=said.append).close()
    assert "index.sqlite.damaged-2" in said[0]
    RunStore.open(tmp_path / "s", write=True, say=said.append).close()
    assert len(said) == 1


@pytest.mark.parametrize("left", [None, b""])
def test_a_missing_index_is_made_again(tmp_path: Path, left: bytes | None) -> None:
    made(tmp_path / "s")
    path, said = tmp_path / "s" / "index.sqlite", list[str]()
    path.unlink()
    if left is not None:  # whoever began it was killed
        path.write_bytes(left)
    reader = RunStore.open(tmp_path / "s")
    assert reader.status() == STATUS
    with RunStore.open(tmp_path / "s", write=True, say=said.append) as store:
        assert store.status() == reader.status() == STATUS
    assert said == []
    assert sorted(one.name for one in (tmp_path / "s").glob("index*")) == ["index.sqlite"]


@pytest.mark.parametrize(
    "wrong",
    [
        "DELETE FROM results",
        "UPDATE results SET status = 'done', stale = 0 WHERE key = 'k2'",
        "INSERT INTO results VALUES ('k3', 'done', 0, '{\"run.json\": 5}')",
        "UPDATE notes SET running = 1; INSERT OR REPLACE INTO notes VALUES ('k3', 1, 0)",
    ],
)
def test_the_files_are_believed_and_not_the_index(tmp_path: Path, wrong: str) -> None:
    made(tmp_path / "s")
    statement(tmp_path / "s" / "index.sqlite", wrong)
    with RunStore.open(tmp_path / "s", write=True) as store:
        assert store.status() == STATUS
        store.rebuild()
        assert store.status() == STATUS
    assert RunStore.open(tmp_path / "s").status() == STATUS


def test_a_journal_that_a_killed_writer_left_is_rolled_back(tmp_path: Path) -> None:
    """The main file half changed, its journal on disk: as after a power failure in the middle of a commit."""
    made(tmp_path / "s")
    path = tmp_path / "s" / "index.sqlite"
    whole = path.read_bytes()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size = 1")  # pages are written before the commit
        database.execute("BEGIN")
        database.executemany("INSERT INTO results VALUES (?, 'done', 0, ?)", [(f"x{number}", "{}" + " " * 3000) for number in range(200)])
        journal = path.with_name("index.sqlite-journal").read_bytes()
        half = path.read_bytes()
        database.execute("ROLLBACK")
    assert half != whole
    path.write_bytes(half)
    path.with_name("index.sqlite-journal").write_bytes(journal)
    reader = RunStore.open(tmp_path / "s")
    assert reader.status() == STATUS
    assert path.read_bytes() == half, "a reader does not even roll back"
    with RunStore.open(tmp_path / "s", write=True) as store:
        assert store.status() == STATUS
    assert not path.with_name("index.sqlite-journal").exists()


def test_how_the_index_is_written(tmp_path: Path) -> None:
    made(tmp_path / "s")
    with RunStore.open(tmp_path / "s", write=True) as store:
        assert store._index is not None
        database = store._index._database
        settings = {name: database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "user_version")}
    assert settings == {"journal_mode": "delete", "synchronous": 2, "user_version": 1}


def test_the_index_of_a_newer_patchlab_is_left_alone(tmp_path: Path) -> None:
    made(tmp_path / "s")
    path = tmp_path / "s" / "index.sqlite"
    statement(path, "PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"index\.sqlite has the format 2 and this patchlab knows up to 1\. Update patchlab"):
        RunStore.open(tmp_path / "s", write=True)
    assert path.read_bytes() == before
    assert RunStore.open(tmp_path / "s").status() == STATUS, "the files have a format that is known"
    with pytest.raises(OutputError, match="Update patchlab"):  # and the lock is free
        RunStore.open(tmp_path / "s", write=True)


def test_attempts_survive_a_rebuild(tmp_path: Path) -> None:
    made(tmp_path / "s")
    with RunStore.open(tmp_path / "s", write=True) as store:
        store.attempts("k3", add=2)
        store.rebuild()
        assert store.attempts("k3") == 2


def test_a_change_that_fails_leaves_the_index_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "s")

    def fail(index: Index) -> None:
        raise KeyboardInterrupt

    with RunStore.open(tmp_path / "s", write=True) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Index, "commit", fail)
            with pytest.raises(KeyboardInterrupt):
                store.put("k3", {}, {})
        assert store.status() == STATUS
        store.put("k3", {}, {})
        assert store.status() == {**STATUS, "k3": "done"}
