"""The contract that every store of runs must pass: a class whose tests a store's test file inherits."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from patchlab.errors import OutputError
from patchlab.store.runs import RunStore

KEYS = ("c1", "a2", "b3", "d4")


class Opening(Protocol):
    """How a store is made and opened, as :class:`patchlab.store.RunStore` does it."""

    def create(self, path: Path, about: Mapping[str, Any], *, say: Callable[[str], Any] = ...) -> RunStore: ...
    def open(self, path: Path, *, write: bool = False, say: Callable[[str], Any] = ...) -> RunStore: ...


class StoreContract:
    """Tests of a store. A test class that inherits them sets ``store``, by which stores are made and opened.

    Example:
        >>> class TestMine(StoreContract):  # doctest: +SKIP
        ...     store = MyStore
    """

    store: Opening

    def made(self, path: Path) -> RunStore:
        """A new store with four planned runs."""
        store = self.store.create(path / "store", {"what": "a test"})
        store.plan({key: {"number": number, "name": "ä"} for number, key in enumerate(KEYS)})
        return store

    def test_the_plan_keeps_its_order_and_what_is_planned(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.plan({"e5": {"number": 9}, "c1": {"number": 77}})
            expected = {key: {"number": number, "name": "ä"} for number, key in enumerate(KEYS)} | {"e5": {"number": 9}}
            _equal(list(store.planned().items()), list(expected.items()), "planned runs")
        for write in (False, True):
            with self.store.open(tmp_path / "store", write=write) as again:
                _equal(list(again.planned().items()), list(expected.items()), "planned runs of a store that is opened again")
                _equal(again.counts(), {"planned": 5, "done": 0, "failed": 0, "pending": 5, "running": 0}, "counts")
                _equal(again.about["about"], {"what": "a test"}, "what the store is for")

    def test_a_result_is_read_as_it_was_put(self, tmp_path: Path) -> None:
        record = {"seconds": 1.5, "name": "ä", "none": None, "list": [1, "2"]}
        with self.made(tmp_path) as store:
            store.put("a2", record, {"a.bin": b"\x00\xff", "b.txt": lambda path: path.write_text("text")})
            for reader in (store, self.store.open(tmp_path / "store")):
                found = reader.get("a2")
                _equal((found.key, found.status, found.record), ("a2", "done", record), "the result")
                _equal(sorted(found.files), ["a.bin", "b.txt"], "its files")
                _equal(found.path("a.bin").read_bytes(), b"\x00\xff", "bytes")
                _equal(found.path("b.txt").read_text(), "text", "what a function wrote")
                _refused(lambda found=found: found.path("c.txt"), "has no file 'c.txt'; it has a.bin, b.txt")
                _refused(lambda reader=reader: reader.get("c1"), "has no result .*pending")
                _refused(lambda reader=reader: reader.get("zz"), "not among the 4 planned")
                _equal(list(reader.status().values()), ["pending", "done", "pending", "pending"], "status")

    def test_failed_results_are_replaced_and_done_ones_are_not(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.put("c1", {"error": "out of memory"}, {"log.txt": b"1"}, status="failed")
            _equal(store.get("c1").status, "failed", "status of a failed run")
            _equal(store.counts(), {"planned": 4, "done": 0, "failed": 1, "pending": 3, "running": 0}, "counts")
            store.put("c1", {"error": "again"}, {}, status="failed")
            store.put("c1", {"fine": True}, {"new.txt": b"2"})
            _equal((store.get("c1").status, store.get("c1").files), ("done", ("new.txt",)), "the newer result")
            for status in ("done", "failed"):
                _refused(lambda status=status: store.put("c1", {}, {}, status=status), "c1 is done, and a result is never replaced")
            _equal(store.get("c1").record, {"fine": True}, "the result after a refused one")

    def test_stale_results_are_pending_and_never_given(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.put("a2", {"old": True}, {"a": b"1"})
            store.set_stale("a2", "another model")
            for reader in (store, self.store.open(tmp_path / "store")):
                _equal(reader.status()["a2"], "stale", "status")
                _equal(reader.counts()["pending"], 4, "pending runs")
                _refused(lambda reader=reader: reader.get("a2"), "stale: another model")
            store.rebuild()
            _equal(store.status()["a2"], "stale", "status after the index was made again")
            store.put("a2", {"old": False}, {"a": b"2"})
            _equal((store.status()["a2"], store.get("a2").record), ("done", {"old": False}), "the newer result")
            _refused(lambda: store.set_stale("b3", "x"), "has no result")

    def test_notes_on_runs_under_way(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.mark("a2", "running")
            store.mark("b3", "running")
            store.mark("b3", "pending")
            _equal(store.attempts("a2", add=2), 2, "workers killed")
            for reader in (store, self.store.open(tmp_path / "store")):
                _equal(reader.counts(), {"planned": 4, "done": 0, "failed": 0, "pending": 3, "running": 1}, "counts")
                _equal((reader.attempts("a2"), reader.attempts("b3")), (2, 0), "workers killed")
            _refused(lambda: store.mark("zz", "running"), "not planned")
            _refused(lambda: store.mark("a2", "done"), "unknown status")
        with self.store.open(tmp_path / "store", write=True) as again:
            _equal(again.counts()["running"], 0, "runs under way after their runner has ended")
            _equal(again.attempts("a2"), 2, "workers killed")
            again.put("a2", {}, {}, status="failed")
            _equal(again.attempts("a2"), 0, "workers killed since the run was put")

    def test_a_checkpoint_is_removed_with_the_result(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.work("a2").write_bytes(b"1")
            store.work("b3").write_bytes(b"1")
            store.put("a2", {}, {})
            _equal((store.work("a2").exists(), store.work("b3").exists()), (False, True), "checkpoints")

    def test_one_writer(self, tmp_path: Path) -> None:
        with self.made(tmp_path):
            for second in (lambda: self.store.open(tmp_path / "store", write=True), lambda: self.store.create(tmp_path / "store", {})):
                _refused(second, r"is in use by process \d+ on .* since \d{4}-\d\d-\d\d \d\d:\d\d")
        self.store.open(tmp_path / "store", write=True).close()

    def test_readers_change_nothing(self, tmp_path: Path) -> None:
        self.made(tmp_path).close()
        reader = self.store.open(tmp_path / "store")
        for act in (
            lambda: reader.put("a2", {}, {}),
            lambda: reader.plan({"e5": {}}),
            lambda: reader.mark("a2", "running"),
            lambda: reader.attempts("a2", add=1),
            lambda: reader.set_stale("a2", "x"),
            lambda: reader.unplan({"a2"}),
            reader.rebuild,
        ):
            _refused(act, "open for reading only")
        reader.close()

    def test_what_cannot_be_stored_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        with self.made(tmp_path) as store:
            store.put("a2", {"kept": 1}, {}, status="failed")
            for act, message in (
                (lambda: store.put("zz", {}, {}), "no run 'zz' is planned"),
                (lambda: store.put("a2", {"x": float("nan")}, {}), "cannot be written as JSON"),
                (lambda: store.put("a2", {"x": object()}, {}), "cannot be written as JSON"),
                (lambda: store.put("a2", {}, {"../a": b""}), "cannot be called '../a'"),
                (lambda: store.put("a2", {}, {"run.json": b""}), "cannot be called 'run.json'"),
                (lambda: store.put("a2", {}, {}, status="fine"), "unknown status of a result 'fine'"),
                (lambda: store.plan({"../a": {}}), "no key"),
                (lambda: store.plan({"ok": {}, "A": {}}), "no key"),
                (lambda: store.plan({"ok": {"x": float("inf")}}), "cannot be written as JSON"),
                (lambda: store.get("../a"), "no key"),
            ):
                _refused(act, message)
            _equal(store.get("a2").record, {"kept": 1}, "the result after refused ones")
            _equal(list(store.planned()), list(KEYS), "planned runs after refused ones")

    def test_a_function_that_fails_leaves_no_result(self, tmp_path: Path) -> None:
        def failing(path: Path) -> None:
            path.write_text("half")
            raise ZeroDivisionError

        with self.made(tmp_path) as store:
            try:
                store.put("a2", {}, {"a": b"1", "b": failing})
            except ZeroDivisionError:
                pass
            else:
                raise AssertionError("the exception of a function that writes a file is swallowed")
            _equal(store.status()["a2"], "pending", "status")
            _refused(lambda: store.get("a2"), "has no result")
            store.put("a2", {}, {"a": b"1"})
            _equal(store.get("a2").files, ("a",), "the files of the next one")


def _equal(got: object, expected: object, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def _refused(act: Callable[[], Any], message: str) -> None:
    try:
        found = act()
    except OutputError as error:
        if not re.search(message, str(error)):
            raise AssertionError(f"the message {str(error)!r} does not say {message!r}") from error
        return
    raise AssertionError(f"expected an OutputError that says {message!r}; got {found!r}")
