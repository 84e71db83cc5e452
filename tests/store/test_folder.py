"""The result folder: refused before computing, whole or absent, and never at the cost of earlier results."""

import json
import re
from pathlib import Path

import pytest
from store_steps import Steps, no_space

from patchlab.errors import OutputError
from patchlab.store.folder import result_folder


def write(folder: Path, **files: str) -> None:
    names = {name.replace("__", "."): text for name, text in files.items()}
    for name, text in names.items():
        (folder / name).write_text(text)
    (folder / "run.json").write_text(json.dumps({"files": sorted([*names, "run.json"])}))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "run.json"}


def test_results_appear_in_a_new_folder_and_in_an_empty_one(tmp_path):
    for target in (tmp_path / "new" / "deep", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        with result_folder(target) as folder:
            write(folder, a__txt="1")
            assert not (target / "a.txt").exists(), "files show up only when all are there"
        assert contents(target) == {"a.txt": "1"}


def test_an_exception_leaves_everything_as_it_was(tmp_path):
    with pytest.raises(ZeroDivisionError), result_folder(tmp_path / "new" / "deep") as folder:
        write(folder, a__txt="1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with result_folder(tmp_path / "out") as folder:
        write(folder, a__txt="old")
    with pytest.raises(ZeroDivisionError), result_folder(tmp_path / "out", force=True) as folder:
        write(folder, a__txt="new")
        raise ZeroDivisionError
    assert contents(tmp_path / "out") == {"a.txt": "old"}


def test_earlier_results_are_kept_without_force(tmp_path):
    with result_folder(tmp_path) as folder:
        write(folder, a__txt="old")
    with pytest.raises(OutputError, match=r"already holds results; choose another folder with --out, or .* --force"), result_folder(tmp_path):
        pytest.fail("must be refused before anything is computed")
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_folder_with_other_files_is_refused_too(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"is not empty \(it holds thesis.tex\)"), result_folder(tmp_path):
        pytest.fail("must be refused")


def test_force_replaces_all_earlier_results_and_nothing_else(tmp_path):
    with result_folder(tmp_path) as folder:
        write(folder, a__txt="old", b__txt="old")
    (tmp_path / "notes.md").write_text("mine")
    with result_folder(tmp_path, force=True) as folder:
        write(folder, a__txt="new", c__txt="new")
    assert contents(tmp_path) == {"a.txt": "new", "c.txt": "new", "notes.md": "mine"}


def test_a_listed_name_outside_the_folder_is_not_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"files": ["../precious.txt", "run.json"]}))
    with result_folder(out, force=True) as folder:
        write(folder, a__txt="new")
    assert (tmp_path / "precious.txt").exists()


def test_a_second_run_into_the_folder_is_refused_at_once(tmp_path):
    with result_folder(tmp_path) as folder:
        with pytest.raises(OutputError, match="another run is writing to .*; wait until it has ended"), result_folder(tmp_path, force=True):
            pytest.fail("must be refused before anything is computed")
        write(folder, a__txt="first")
    assert contents(tmp_path) == {"a.txt": "first"}


def test_results_that_appear_in_the_meantime_win(tmp_path):
    with pytest.raises(OutputError, match="already holds results"), result_folder(tmp_path) as folder:
        write(folder, a__txt="second")
        write(tmp_path, a__txt="first")
    assert contents(tmp_path) == {"a.txt": "first"}


def test_force_does_not_replace_files_that_no_run_wrote(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"has a\.txt, which no earlier run lists"), result_folder(tmp_path, force=True) as folder:
        write(folder, a__txt="new")
    assert contents(tmp_path) == {"a.txt": "mine"}


def test_unfinished_work_is_kept_for_the_same_job_and_refused_for_another(tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt), result_folder(tmp_path / "out", job={"n": 1}, say=said.append) as folder:
        (folder / "a.txt").write_text("1")
        raise KeyboardInterrupt
    kept = tmp_path / "out" / ".patchlab-unfinished"
    assert said == [f"what is finished is kept in {kept}: a.txt. The same command goes on from there."]
    with pytest.raises(OutputError, match=r"holds what another command has finished \(a\.txt\)"), result_folder(tmp_path / "out", job={"n": 2}):
        pytest.fail("must be refused")
    with pytest.raises(OutputError, match="holds what another command has finished"), result_folder(tmp_path / "out"):
        pytest.fail("must be refused")
    with result_folder(tmp_path / "out", job={"n": 1}, say=said.append) as folder:
        assert (folder / "a.txt").read_text() == "1"
        write(folder, b__txt="2")
    assert said[-1] == f"going on from {kept}: a.txt"
    assert contents(tmp_path / "out") == {"a.txt": "1", "b.txt": "2"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt", "run.json"]


def test_force_drops_unfinished_work_of_another_job_and_nothing_is_kept_without_files(tmp_path):
    for job in ({"n": 1}, {"n": 2}):
        with pytest.raises(ZeroDivisionError), result_folder(tmp_path / "out", job=job, force=True) as folder:
            assert [path.name for path in folder.iterdir()] == ["job.json"]
            (folder / "a.txt").write_text("1")
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), result_folder(tmp_path / "new", job={"n": 1}) as folder:
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_left_is_put_right(tmp_path):
    with result_folder(tmp_path) as folder:
        write(folder, a__txt="old")
    left = tmp_path / ".patchlab-old-1"  # it was killed between taking the earlier results out and putting its own in
    left.mkdir()
    for name in ("a.txt", "run.json"):
        (tmp_path / name).rename(left / name)
    (tmp_path / ".patchlab-x8").mkdir()
    with pytest.raises(OutputError, match="already holds results"), result_folder(tmp_path):
        pytest.fail("must be refused")
    assert contents(tmp_path) == {"a.txt": "old"}
    assert not list(tmp_path.glob(".patchlab-*"))


def test_a_failed_move_puts_the_earlier_results_back(tmp_path, monkeypatch):
    with result_folder(tmp_path) as folder:
        write(folder, a__txt="old", b__txt="old")
    rename = Path.rename

    def failing(self, target):
        if Path(target) == tmp_path / "b.txt" and self.read_text() == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with pytest.raises(OutputError, match=r"No space left on device\); what was there is untouched"), result_folder(tmp_path, force=True) as folder:
        write(folder, a__txt="new", b__txt="new")
        monkeypatch.setattr(Path, "rename", failing)
    assert contents(tmp_path) == {"a.txt": "old", "b.txt": "old"}
    assert json.loads((tmp_path / "run.json").read_text())["files"] == ["a.txt", "b.txt", "run.json"]


def test_a_file_and_an_unwritable_place_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place, message in ((tmp_path / "file", "is a file; results go into a folder"), (Path("/proc/patchlab"), "cannot write to /proc/patchlab")):
        with pytest.raises(OutputError, match=message), result_folder(place):
            pytest.fail("must be refused")


def test_what_is_staged_is_on_disk_before_it_moves_and_run_json_moves_last(tmp_path):
    with result_folder(tmp_path / "out") as folder:
        write(folder, a__txt="old", b__txt="old")
    steps = Steps(tmp_path / "out")
    with steps.watched(), result_folder(tmp_path / "out", force=True) as folder:
        write(folder, a__txt="new", c__txt="new")
        steps.taken.clear()
    staged = ".patchlab-unfinished"
    taken = [(what, re.sub(r"old-\w+", "old", name)) for what, name in steps.taken if what in ("flush", "rename")]
    assert sorted(taken[:4]) == [("flush", staged), *(("flush", f"{staged}/{name}") for name in ("a.txt", "c.txt", "run.json"))]
    assert taken[4:] == [
        *(("rename", f".patchlab-old/{name}") for name in ("run.json", "b.txt", "a.txt")),
        *(("rename", name) for name in ("a.txt", "c.txt")),
        ("flush", ".patchlab-old"),
        ("flush", "."),
        ("rename", "run.json"),
        ("flush", "."),
    ]


@pytest.mark.parametrize("at", range(14))
def test_a_full_disk_while_results_move_leaves_the_earlier_ones(tmp_path, at):
    with result_folder(tmp_path / "out") as folder:
        write(folder, a__txt="old", b__txt="old")
    steps = Steps(tmp_path / "out")
    with pytest.raises(OutputError, match="No space left on device"), steps.watched(), result_folder(tmp_path / "out", force=True) as folder:
        write(folder, a__txt="new", c__txt="new")
        steps.taken.clear()
        steps.before = no_space(at)
    assert contents(tmp_path / "out") == {"a.txt": "old", "b.txt": "old"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["files"] == ["a.txt", "b.txt", "run.json"]
