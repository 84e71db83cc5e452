"""run.json: written last, with checksums of the files it lists, and damaged ones named."""

import json
from pathlib import Path

import pytest

from patchlab.errors import OutputError
from patchlab.store.record import checked, finish, read


def test_a_record_lists_files_with_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    run = finish(tmp_path, {"name": "ä"}, ["a.txt", "run.json"])
    assert run == read(tmp_path) == json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run == {
        "name": "ä",
        "files": ["a.txt", "run.json"],
        "sha256": {"a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        "bytes": {"a.txt": 3},
    }
    assert checked(tmp_path, run, "a.txt", "Go on.") == tmp_path / "a.txt"
    (tmp_path / "a.txt").write_bytes(b"abd")
    with pytest.raises(OutputError, match=r"a\.txt is damaged: its SHA-256 is .* and run\.json says ba7816bf.*\. Go on\."):
        checked(tmp_path, run, "a.txt", "Go on.")


def test_a_missing_file_is_found_before_run_json_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot list .*gone\.txt"):
        finish(tmp_path, {}, ["gone.txt"])
    with pytest.raises(OutputError, match=r"run\.json cannot be written as JSON: .*finite numbers"):
        finish(tmp_path, {"x": float("nan")}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"files": []}', '{"files": ["a"], "sha256": {}, "bytes": {}}', '{"files": 3, "sha256": {}, "bytes": {}}'],
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(OutputError, match=r"run\.json is damaged \("):
        read(tmp_path)


def test_a_listed_name_outside_the_folder_is_refused(tmp_path: Path) -> None:
    text = {"files": ["../a", "run.json"], "sha256": {"../a": "0"}, "bytes": {"../a": 0}}
    (tmp_path / "run.json").write_text(json.dumps(text))
    with pytest.raises(OutputError, match=r"run\.json is damaged"):
        read(tmp_path)
