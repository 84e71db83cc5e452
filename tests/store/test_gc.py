"""What can be removed from a store: listed first, and nothing else is touched."""

from pathlib import Path

import pytest

from patchlab.errors import OutputError
from patchlab.store import RunStore, gc, remove


def made(path: Path) -> RunStore:
    """A store with one of everything that is garbage."""
    store = RunStore.create(path, {})
    store.plan({key: {} for key in ("done", "replaced", "stale", "pending", "failed")})
    store.put("done", {}, {"a": b"1" * 100})
    store.put("failed", {}, {}, status="failed")
    store.put("replaced", {}, {"log": b"log"}, status="failed")
    store.put("replaced", {}, {"a": b"1"})
    store.put("stale", {}, {"a": b"1"})
    store.set_stale("stale", "another model")
    for key in ("done", "pending", "failed", "gone"):
        store.work(key).write_bytes(b"checkpoint")
    (path / "runs" / "pending").mkdir()
    (path / "runs" / "pending" / "a").write_bytes(b"half")
    (path / "runs" / "done" / ".stale.json.0123abcd.tmp").write_bytes(b"half")
    (path / "index.sqlite.damaged-1").write_bytes(b"bad")
    return store


EXPECTED = {
    "stale/replaced.1": "it was replaced",
    "runs/stale": "it is stale",
    "runs/pending": "it was not finished",
    "runs/done/.stale.json.0123abcd.tmp": "it was not finished",
    "work/done.checkpoint": "its run is done",
    "work/gone.checkpoint": "its run is not planned",
    "index.sqlite.damaged-1": "it was damaged, and made again",
}


def test_garbage_is_listed_and_then_removed(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    before = sorted(tmp_path.rglob("*"))
    for one in (store, RunStore.open(tmp_path / "s")):
        found = gc(one)
        assert {item.path.relative_to(tmp_path / "s").as_posix(): item.why for item in found} == EXPECTED
    assert next(item.bytes for item in found if item.path.name == "done.checkpoint") == len("checkpoint")
    assert sorted(tmp_path.rglob("*")) == before
    remove(store, found)
    assert not any(item.path.exists() for item in found)
    assert gc(store) == []
    assert store.status() == {"done": "done", "replaced": "done", "stale": "pending", "pending": "pending", "failed": "failed"}
    assert store.get("done").path("a").read_bytes() == b"1" * 100
    assert store.work("pending").exists()
    assert store.work("failed").exists()


def test_runs_that_are_not_wanted_go_only_when_it_is_asked(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    remove(store, gc(store))
    wanted = {"replaced", "pending"}
    found = gc(store, wanted)
    assert {item.path.relative_to(tmp_path / "s").as_posix() for item in found} == {"runs/done", "runs/failed", "work/failed.checkpoint"}
    remove(store, found, wanted)
    assert store.status() == {"replaced": "done", "pending": "pending"}
    assert store.results() == {"replaced": "done"}
    store.close()
    said: list[str] = []
    RunStore.open(tmp_path / "s", write=True, say=said.append).close()
    assert said == []


def test_what_is_no_garbage_any_more_is_kept(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    found = gc(store)
    store.put("pending", {}, {"a": b"2"})
    store.put("stale", {}, {"a": b"2"})
    remove(store, found)
    assert store.get("pending").path("a").read_bytes() == store.get("stale").path("a").read_bytes() == b"2"


def test_a_store_that_is_open_for_reading_removes_nothing(tmp_path: Path) -> None:
    made(tmp_path / "s").close()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="open for reading only"):
        remove(RunStore.open(tmp_path / "s"), gc(RunStore.open(tmp_path / "s")))
    assert sorted(tmp_path.rglob("*")) == before
