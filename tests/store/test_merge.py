"""Stores that are made into one: the first of several results, done before failed, all or nothing."""

from pathlib import Path
from typing import Any

import pytest

from patchlab.errors import OutputError
from patchlab.store import RunStore, Stored, merge


def made(path: Path, results: dict[str, tuple[str, Any]], *, planned: str = "abc") -> RunStore:
    store = RunStore.create(path, {})
    store.plan({key: {"of": path.name} for key in planned})
    for key, (status, value) in results.items():
        store.put(key, {"value": value}, {"value.txt": str(value).encode()}, status=status)
    return store


def close(first: Stored, second: Stored) -> str | None:
    apart = abs(first.record["value"] - second.record["value"])
    return None if apart < 0.01 else f"{first.record['value']} and {second.record['value']}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("index", "."))}


def test_done_beats_failed_and_the_first_the_others(tmp_path: Path) -> None:
    target = made(tmp_path / "t", {"a": ("failed", 0), "b": ("done", 2.0), "c": ("failed", 7)})
    one = made(tmp_path / "one", {"a": ("done", 1.0), "b": ("done", 2.001), "c": ("failed", 8)}, planned="abcd")
    two = made(tmp_path / "two", {"a": ("done", 1.001), "d": ("failed", 9), "e": ("done", 5.0)}, planned="edab")
    assert merge(target, [one, two], same=close) == ["a", "d", "e"]
    assert list(target.planned()) == ["a", "b", "c", "d", "e"]
    assert target.status() == {"a": "done", "b": "done", "c": "failed", "d": "failed", "e": "done"}
    assert {key: target.get(key).record["value"] for key in target.planned()} == {"a": 1.0, "b": 2.0, "c": 7, "d": 9, "e": 5.0}
    assert target.get("a").path("value.txt").read_bytes() == b"1.0"
    assert merge(target, [one, two], same=close) == [], "again changes nothing"
    assert target.planned()["d"] == {"of": "one"}
    assert target.planned()["a"] == {"of": "t"}


def test_disagreement_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    target = made(tmp_path / "t", {"a": ("done", 1.0)})
    one = made(tmp_path / "one", {"a": ("done", 3.0), "b": ("done", 2.0)})
    two = made(tmp_path / "two", {"b": ("done", 4.0), "c": ("done", 5.0)}, planned="abcd")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="nothing was written") as caught:
        merge(target, [one, two], same=close)
    assert "a: " in str(caught.value)
    assert "differ: 1.0 and 3.0" in str(caught.value)
    assert "differ: 2.0 and 4.0" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_damaged_file_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    target, one = made(tmp_path / "t", {}), made(tmp_path / "one", {"a": ("done", 3.0), "b": ("done", 2.0)})
    (tmp_path / "one" / "runs" / "a" / "value.txt").write_text("4.0")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"a: .*one/runs/a/value\.txt is damaged"):
        merge(target, [one], same=close)
    assert contents(tmp_path) == before


def test_stale_and_unplanned_results_are_left_behind_and_counted(tmp_path: Path) -> None:
    target, said = made(tmp_path / "t", {"b": ("done", 2.0)}), list[str]()
    one = made(tmp_path / "one", {"a": ("done", 3.0), "b": ("done", 9.0), "c": ("done", 1.0), "x": ("done", 1.0)}, planned="abcx")
    one.set_stale("b", "another model")
    one.unplan(["x"])
    target.set_stale("b", "another model")
    assert merge(target, [one], same=close, say=said.append) == ["a", "c"]
    assert said == ["2 results are left behind: they are stale, or their runs are not planned."]
    assert target.status() == {"a": "done", "b": "stale", "c": "done"}


def test_a_store_is_not_merged_with_itself_or_into_one_for_reading(tmp_path: Path) -> None:
    target, one = made(tmp_path / "t", {}), made(tmp_path / "one", {"a": ("done", 3.0)})
    with pytest.raises(OutputError, match="cannot be merged with itself"):
        merge(target, [one, RunStore.open(tmp_path / "t")], same=close)
    target.close()
    with pytest.raises(OutputError, match="open for reading only"):
        merge(RunStore.open(tmp_path / "t"), [one], same=close)
