"""The store of runs: what is acknowledged is never lost, what is not is never half there."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from store_steps import EXIT, FILES, Steps, no_space

from patchlab.errors import OutputError
from patchlab.store import RunStore, runs
from patchlab.store.record import finish
from patchlab.testing.stores import StoreContract

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


class TestRunStore(StoreContract):
    store = RunStore


def made(path: Path, *, failed: bool = False) -> RunStore:
    """A store with two results; ``failed``: the third run has failed."""
    store = RunStore.create(path, {})
    store.plan({f"k{number}": {"number": number} for number in range(5)})
    for number in range(2):
        store.put(f"k{number}", {"number": number}, FILES)
    if failed:
        store.put("k2", {"error": 1}, {"log.txt": b"log"}, status="failed")
    return store


def whole(store: RunStore, key: str) -> bool:
    """Whether a run has its result; one that is half there fails the test."""
    try:
        found = store.get(key)
    except OutputError as error:
        if f"the run {key} has no result in {store.folder}: it is pending." not in str(error):
            raise
        return False
    if found.status == "failed":
        assert found.record == {"error": 1}
        assert found.path("log.txt").read_bytes() == b"log"
        return False
    assert found.record == {"number": int(key[1:])}
    assert {name: found.path(name).read_bytes() for name in found.files} == FILES
    return True


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


NEW = [
    ("make", "runs/k2"),
    ("write", "runs/k2/a.bin~"),
    ("flush", "runs/k2/a.bin~"),
    ("rename", "runs/k2/a.bin"),
    ("flush", "runs/k2"),
    ("write", "runs/k2/b.txt~"),
    ("flush", "runs/k2/b.txt~"),
    ("rename", "runs/k2/b.txt"),
    ("flush", "runs/k2"),
    ("write", "runs/k2/run.json~"),
    ("flush", "runs/k2/run.json~"),
    ("rename", "runs/k2/run.json"),
    ("flush", "runs/k2"),
    ("flush", "runs"),
    ("commit", "index.sqlite"),
]
REPLACING = [("commit", "index.sqlite"), ("rename", "stale/k2.1"), ("flush", "stale"), ("flush", "runs"), *NEW]
CASES = [(False, at) for at in range(len(NEW))] + [(True, at) for at in range(len(REPLACING))]


@pytest.mark.parametrize("failed", [False, True])
def test_the_steps_of_a_write(tmp_path: Path, failed: bool) -> None:
    with made(tmp_path / "s", failed=failed) as store, Steps(tmp_path / "s").watched() as steps:
        store.put("k2", {"number": 2}, FILES)
    assert steps.taken == (REPLACING if failed else NEW)


@pytest.mark.parametrize(("failed", "at"), CASES)
def test_a_process_that_ends_before_a_step(tmp_path: Path, failed: bool, at: int) -> None:
    made(tmp_path / "s", failed=failed).close()
    steps = REPLACING if failed else NEW
    command = [sys.executable, str(ROOT / "tests" / "store_steps.py"), str(tmp_path / "s"), str(at)]
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == EXIT
    written = at > steps.index(("rename", "runs/k2/run.json"))
    before = sorted(tmp_path.rglob("*"))
    reader = RunStore.open(tmp_path / "s")
    assert [whole(reader, f"k{number}") for number in range(4)] == [True, True, written, False]
    assert reader.counts()["running"] == 0
    assert sorted(tmp_path.rglob("*")) == before, "a reader changes nothing"
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    for folder in ("s", "copy"):
        with RunStore.open(tmp_path / folder, write=True) as store:
            kept = [(tmp_path / folder / place).exists() for place in ("runs/k2/log.txt", "stale/k2.1/log.txt")]
            assert sum(kept) == failed, "the failed result is there, and once"
            assert store.status()["k2"] == ("done" if written else "failed" if kept[0] else "pending")
            assert not leftovers(tmp_path / folder)
            if not written:
                store.put("k2", {"number": 2}, FILES)
            assert all(whole(store, f"k{number}") for number in range(3))
            assert store.counts() == {"planned": 5, "done": 3, "failed": 0, "pending": 2, "running": 0}


@pytest.mark.parametrize(("failed", "at"), CASES)
def test_a_disk_that_is_full_at_a_step(tmp_path: Path, failed: bool, at: int) -> None:
    with made(tmp_path / "s", failed=failed) as store:
        with pytest.raises(OutputError, match="No space left on device"), Steps(tmp_path / "s", no_space(at)).watched():
            store.put("k2", {"number": 2}, FILES)
        assert not leftovers(tmp_path / "s")
        reader = RunStore.open(tmp_path / "s")
        assert [whole(reader, key) for key in ("k0", "k1", "k3")] == [True, True, False]
        whole(reader, "k2")
        store.put("k3", {"number": 3}, FILES)
        store.put("k2", {"number": 2}, FILES)
        assert all(whole(RunStore.open(tmp_path / "s"), f"k{number}") for number in range(4))
        assert store.counts()["done"] == 4


@pytest.mark.parametrize("at", range(3))
def test_a_disk_that_is_full_while_planning(tmp_path: Path, at: int) -> None:
    with made(tmp_path / "s") as store:
        before = store.planned()
        with pytest.raises(OutputError, match="No space left on device"), Steps(tmp_path / "s", no_space(at)).watched():
            store.plan({"new": {}})
        assert store.planned() == before
        assert RunStore.open(tmp_path / "s").planned() == before
        store.plan({"new": {}})
        assert list(RunStore.open(tmp_path / "s").planned()) == [*before, "new"]


def test_the_commit_fails_as_sqlite_does_when_there_is_no_room(tmp_path: Path) -> None:
    with made(tmp_path / "s") as store:
        assert store._index is not None
        pages = store._index._database.execute("PRAGMA page_count").fetchone()[0]
        store._index._database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        store.plan({"x" * 100 + str(number): {} for number in range(100)})
        with pytest.raises(OutputError, match=r"cannot write .*index\.sqlite: database or disk is full.* has room left"):
            for key in list(store.planned())[5:]:
                store.put(key, {}, {})
        assert key not in store.results()
        store._index._database.execute("PRAGMA max_page_count = 100000").fetchall()
        store.put(key, {}, {})
        assert store.status()[key] == "done"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("making a small file system needs rights that are not given here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no command to make a small file system with")
def test_a_disk_that_is_full(small_disk: Path) -> None:
    folder, done = small_disk / "s", []
    with RunStore.create(folder, {}) as store:
        store.plan({f"k{number:02}": {} for number in range(60)})
        with pytest.raises(OutputError, match=r"cannot write .*: (No space left on device|database or disk is full)"):
            for key in store.planned():
                store.put(key, {"key": key}, {"a": os.urandom(5000)})
                done.append(key)
        assert len(done) > 5
        assert [key for key, status in RunStore.open(folder).status().items() if status == "done"] == done
    with pytest.raises(OutputError, match="No space left on device"):
        (small_disk / "more").write_bytes(b"0" * 3000)
        RunStore.create(small_disk / "t", {})
    for key in done:
        assert len(RunStore.open(folder).get(key).path("a").read_bytes()) == 5000
    (small_disk / "more").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    with RunStore.open(folder, write=True) as store:
        for key, status in store.status().items():
            if status != "done":
                store.put(key, {"key": key}, {"a": os.urandom(5000)})
        assert store.counts()["done"] == 60


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kill_store.py"), "--kills", "5", "--runs", "40", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 5
    assert found["acknowledged"] > 0
    assert (found["lost"], found["unreadable"], found["same_table"]) == (0, 0, True)


HOLDING = """
import sys, time
from patchlab.store import RunStore, runs
store = RunStore.open(sys.argv[1], write=True)
store.mark("k3", "running")
print("held", flush=True)
for number in range(10**6):
    store.plan({f"n{number}": {}})
    store.put(f"n{number}", {"number": number}, {"a": b"1" * 1000})
    print(number, flush=True)
    time.sleep(0.001)
"""


def test_one_process_writes_and_others_read(tmp_path: Path) -> None:
    made(tmp_path / "s").close()
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "s")], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(OutputError, match=rf"is in use by process {other.pid} on .* Wait until that one has ended, or stop it"):
                RunStore.open(tmp_path / "s", write=True)
            reader, seen = RunStore.open(tmp_path / "s"), 0
            while seen < 20:
                seen = int(other.stdout.readline())
                assert whole(reader, "k1")
                assert reader.get(f"n{seen}").path("a").read_bytes() == b"1" * 1000
                assert reader.status()[f"n{seen}"] == "done"
            assert reader.status()["k3"] == "running"
        finally:
            other.kill()
    assert reader.status()["k3"] == "pending", "nothing runs once the runner has ended"
    with RunStore.open(tmp_path / "s", write=True) as store:
        assert store.counts()["running"] == 0
        assert store.counts()["done"] >= 22
    assert list(reader.status()) == list(RunStore.open(tmp_path / "s").planned())


def test_a_copy_made_while_writing_is_usable(tmp_path: Path) -> None:
    folder, copies = tmp_path / "s", []

    def copy(number: int) -> None:
        copies.append(tmp_path / f"copy{number}")
        shutil.copytree(folder, copies[-1])

    with made(folder) as store, Steps(folder, copy).watched():
        store.put("k2", {"number": 2}, FILES)
    assert len(copies) == len(NEW)
    for one in copies:
        assert all(whole(RunStore.open(one), key) for key in ("k0", "k1"))
        with RunStore.open(one, write=True) as store:
            assert store.counts()["done"] in (2, 3)
            assert all(whole(store, key) == (status == "done") for key, status in store.status().items())


def test_a_renamed_folder_is_the_same_store(tmp_path: Path) -> None:
    made(tmp_path / "s").close()
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with RunStore.open(tmp_path / "elsewhere", write=True) as store:
        store.put("k2", {"number": 2}, FILES)
        assert all(whole(store, f"k{number}") for number in range(3))


READING = """
import os, sys
from pathlib import Path
from patchlab import __version__
from patchlab.store import RunStore, runs
from patchlab.errors import OutputError
if os.getuid() == 0:  # who may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store = RunStore.open(sys.argv[1])
assert store.counts() == {"planned": 5, "done": 2, "failed": 0, "pending": 3, "running": 0}, store.counts()
assert store.get("k1").path("a.bin").read_bytes() == b"a" * 1000
try:
    Path(sys.argv[1], "x").write_text("x")
except OSError:
    pass
else:
    sys.exit("the folder can be written to")
try:
    RunStore.open(sys.argv[1], write=True)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such rights on Windows")
@pytest.mark.parametrize("index", [True, False])
def test_a_folder_that_cannot_be_written_to_is_read(index: bool) -> None:
    with tempfile.TemporaryDirectory() as place:  # where another user may look
        folder = Path(place) / "s"
        made(folder).close()
        if not index:
            (folder / "index.sqlite").unlink()
        Path(place).chmod(0o755)
        inside = [folder, *folder.rglob("*")]
        for path in inside:
            path.chmod(0o555 if path.is_dir() else 0o444)
        run = subprocess.run([sys.executable, "-c", READING, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        for path in inside:
            path.chmod(0o755)
        assert run.returncode == 0, run.stderr
        assert "cannot write to" in run.stdout
        assert "choose a folder that you may write to" in run.stdout


def damage_record(folder: Path) -> None:
    path = folder / "runs" / "k1" / "run.json"
    path.write_bytes(path.read_bytes()[:-20])


def damage_file(folder: Path) -> None:
    (folder / "runs" / "k1" / "a.bin").write_bytes(b"short")


def remove_file(folder: Path) -> None:
    (folder / "runs" / "k1" / "a.bin").unlink()


def remove_record(folder: Path) -> None:
    (folder / "runs" / "k1" / "run.json").unlink()


def swap_record(folder: Path) -> None:
    text = (folder / "runs" / "k1" / "run.json").read_text().replace('"key": "k1"', '"key": "k0__"')
    (folder / "runs" / "k1" / "run.json").write_text(text)


def remove_run(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "k1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_record, r"run\.json is damaged"),
        (damage_file, r"a\.bin is cut off or changed"),
        (remove_file, r"a\.bin is gone"),
        (remove_record, r"there is no .*run\.json"),
        (swap_record, "it is not that of run k1"),
        (remove_run, "the result of run k1 is gone"),
    ],
)
@pytest.mark.parametrize("index", [True, False])
def test_a_damaged_result_is_pending_again_and_kept(tmp_path: Path, damage: Callable[[Path], None], message: str, index: bool) -> None:
    folder, said = tmp_path / "s", list[str]()
    made(folder).close()
    damage(folder)
    if not index:
        (folder / "index.sqlite").unlink()
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    with RunStore.open(folder, write=True, say=said.append) as store:
        if index or damage not in (remove_run, remove_record):  # of which nothing says then that there was a result
            assert len(said) == 1
            assert re.search(message, said[0])
            assert "pending again" in said[0]
        assert store.status()["k1"] == "pending"
        assert store.counts()["done"] == 1
        assert {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()} == before, "left as it is"
        store.put("k1", {"number": 1}, FILES)
        assert whole(store, "k1")
    assert (folder / "stale" / "k1.1" / "b.txt").exists() == (damage is not remove_run)


def test_a_file_that_changed_is_named_when_it_is_wanted(tmp_path: Path) -> None:
    made(tmp_path / "s").close()
    (tmp_path / "s" / "runs" / "k1" / "a.bin").write_bytes(b"b" + b"a" * 999)
    found = RunStore.open(tmp_path / "s").get("k1")
    assert found.path("b.txt").read_bytes() == b"text"
    with pytest.raises(OutputError, match=r"runs/k1/a\.bin is damaged: its SHA-256 is .* Remove the folder of that run, and run the sweep again"):
        found.path("a.bin")
    (tmp_path / "s" / "runs" / "k1" / "a.bin").unlink()
    with pytest.raises(OutputError, match=r"cannot read .*runs/k1/a\.bin, which run\.json lists: No such file"):
        found.path("a.bin")


HEADERS: list[tuple[dict[str, Any] | str, str]] = [
    ({"format": 2}, r"has the format 2 \(patchlab 9\.9 made it\) and this patchlab knows 1\. Update patchlab"),
    ({"format": 0}, r"has the format 0 .* Use the patchlab that made it"),
    ({"format": "x"}, r"has the format 'x' .* Use the patchlab that made it"),
    ("{", r"sweep\.json is damaged or cannot be read .* put that file back from a copy"),
    ("[]", r"sweep\.json is damaged"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_a_store_of_another_format_is_left_alone(tmp_path: Path, header: dict[str, Any] | str, message: str) -> None:
    folder = tmp_path / "s"
    made(folder).close()
    text = header if isinstance(header, str) else json.dumps({**json.loads((folder / "sweep.json").read_text()), "patchlab": "9.9", **header})
    (folder / "sweep.json").write_text(text)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for opening in (
        lambda: RunStore.open(folder),
        lambda: RunStore.open(folder, write=True),
        lambda: RunStore.create(folder, {}),
    ):
        with pytest.raises(OutputError, match=message):
            opening()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_plan_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    made(folder).close()
    (folder / "plan.json").write_text("{")
    for write in (False, True):
        with pytest.raises(OutputError, match=r"plan\.json is damaged .* move it away and run the sweep again, which plans the runs anew"):
            RunStore.open(folder, write=write)
    (folder / "plan.json").rename(tmp_path / "plan.json")
    with RunStore.open(folder, write=True) as store:
        assert store.counts()["planned"] == 0
        assert store.results() == {"k0": "done", "k1": "done"}
        store.plan({"k1": {}, "k5": {}})
        assert store.status() == {"k1": "done", "k5": "pending"}


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    for place in ("nowhere", "file", "thesis"):
        with pytest.raises(OutputError, match=f"there is no store of runs in .*{place}"):
            RunStore.open(tmp_path / place)
    with pytest.raises(OutputError, match="file is a file; results go into a folder"):
        RunStore.create(tmp_path / "file", {})
    with pytest.raises(OutputError, match=r"is not empty \(it holds a\.tex\) and has no sweep\.json"):
        RunStore.create(tmp_path / "thesis", {})
    with pytest.raises(OutputError, match="cannot write to /proc/patchlab"):
        RunStore.create("/proc/patchlab", {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tex", "file", "thesis"]


def test_opening_and_listing_hundreds_of_runs_reads_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with RunStore.create(folder, {}) as store:
        store.plan({f"k{number}": {} for number in range(500)})
        for key in store.planned():
            (folder / "runs" / key).mkdir()
            (folder / "runs" / key / "a").write_bytes(b"1")
            finish(folder / "runs" / key, {"key": key, "status": "done", "record": {}}, ["a"])
        store.rebuild()
    read, right = list[str](), io.open
    monkeypatch.setattr(io, "open", lambda file, *arguments, **options: (read.append(str(file)), right(file, *arguments, **options))[1])
    for write in (False, True):
        read.clear()
        with RunStore.open(folder, write=write) as store:
            assert store.counts()["done"] == 500
            assert len(store.results()) == 500
        assert 2 <= len(read) < 12, read


def test_a_reader_reads_the_plan_again_only_where_it_was_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(tmp_path / "s") as store:
        reader, read, right = RunStore.open(tmp_path / "s"), list[Path](), runs._read_plan
        monkeypatch.setattr(runs, "_read_plan", lambda folder: (read.append(folder), right(folder))[1])
        for _ in range(5):
            assert len(reader.planned()) == 5
            assert whole(reader, "k1")
        assert not read
        store.plan({"k9": {"number": 9}})
        read.clear()
        assert [*reader.planned()][-1] == "k9"
        assert len(reader.planned()) == 6
        assert len(read) == 1
