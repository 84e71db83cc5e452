"""The lock of a folder: one holder, named to others, and gone with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from patchlab.errors import OutputError
from patchlab.store.lock import Lock

HOLD = """
import sys, time
from pathlib import Path
from patchlab.store.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire(str)
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert not first.is_held()
    assert list(tmp_path.iterdir()) == [], "looking writes nothing"
    first.acquire(str)
    assert first.is_held()
    assert second.is_held()
    with pytest.raises(OutputError, match=rf"taken by process {os.getpid()} on .+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"):
        second.acquire(lambda who: f"taken by {who}")
    assert first.is_held(), "a second one that is refused takes nothing away"
    second.release()
    assert first.is_held()
    first.release()
    assert not second.is_held()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    second.acquire(str)
    second.release()
    second.release()


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lock = Lock(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock.path)], stdout=subprocess.PIPE, text=True, env=environment) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            assert lock.is_held()
            with pytest.raises(OutputError, match=f"process {other.pid} on"):
                lock.acquire(str)
        finally:
            other.kill()
    assert lock.owner.exists(), "nobody has tidied up"
    assert not lock.is_held()
    lock.acquire(str)
    assert f"process {os.getpid()} on" in lock.holder()
    lock.release()


def test_looking_keeps_nobody_from_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("looking takes no lock there")
    import fcntl

    path = tmp_path / "lock"
    path.touch()
    handle, looked = os.open(path, os.O_RDONLY), []
    fcntl.flock(handle, fcntl.LOCK_SH)  # as a reader does for a moment
    is_held = Lock.is_held

    def slow_reader(lock: Lock) -> bool:
        """Found out after each time that the lock was not to be had; the reader goes on after the third."""
        looked.append(is_held(lock))
        if len(looked) == 3:
            os.close(handle)
        return looked[-1]

    monkeypatch.setattr("patchlab.store.lock._PATIENCE", 0.01)
    monkeypatch.setattr(Lock, "is_held", slow_reader)
    lock = Lock(path)
    lock.acquire(str)
    lock.release()
    assert looked == [False] * 3, "a reader who takes long is no holder"

    first, second = Lock(path), Lock(path)
    first.acquire(str)
    with pytest.raises(OutputError):
        second.acquire(str)
    assert looked == [False] * 3 + [True], "and a holder is one at once"
    first.release()
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    monkeypatch.setattr("patchlab.store.lock._LOOKS", 4)
    with pytest.raises(OutputError, match="another process"):
        second.acquire(str)
    os.close(handle)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_that_cannot_be_read_is_another_process(tmp_path: Path, text: str) -> None:
    lock = Lock(tmp_path / "lock")
    lock.owner.write_text(text)
    assert lock.holder() == "another process"
