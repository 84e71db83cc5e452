"""Small sweeps for tests: files, folders, and tables that can be compared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from paths import ROOT

from patchlab.sweeps import Sweep
from patchlab.sweeps.driver import Executor, run_sweep
from patchlab.sweeps.executors.local import Local
from patchlab.sweeps.file import read, runs_of
from patchlab.sweeps.spec import RunSpec

SMALL = """
version: 1
name: small
models: demo-gpt2-4l
tasks:
  - {name: ioi, n: 8, seed: [0, 1]}
runs:
  - {kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}
  - {kind: verify, screen: relp, sites: z, k: 2, sample: 0}
  - {kind: circuit, methods: [atp, relp], ablation: [zero, mean], sizes: [100, 300], random: 1, smallest: false}
"""


def runs(folder: Path, text: str = SMALL) -> list[RunSpec]:
    """The runs of a file."""
    file = folder / "sweep.yaml"
    file.write_text(text)
    return runs_of(read(file))


def swept(wanted: list[RunSpec], out: Path, executor: Executor | None = None, **options) -> tuple[dict[str, int], list[str]]:
    """The counts after a sweep, and what was said."""
    said: list[str] = []
    counts = run_sweep(wanted, out, executor or Local(), say=said.append, progress=False, **options)
    return counts, said


def same_tables(one: Path, other: Path) -> None:
    """Two folders hold the same numbers, to the last bit; what they took may differ."""
    tables = [Sweep(folder).table() for folder in (one, other)]
    assert len(tables[0])
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def command(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The command line, in a process group of its own."""
    # where the tests run in the background of a shell, Ctrl-C is ignored, and what they start would do so too
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from patchlab.cli import main; main()"
    words = [sys.executable, "-c", code, "sweep", "run", str(file), "--out", str(out), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    parents = {int(child): int(parent) for child, parent in map(str.split, lines)}
    return [one for one in parents if _is_below(one, pid, parents)]


def _is_below(one: int, pid: int, parents: dict[int, int]) -> bool:
    while one in parents:
        one = parents[one]
        if one == pid:
            return True
    return False


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a command and everything in its process group, at once."""
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(what: Callable[[], Any], seconds: float = 600.0) -> Any:
    """What a function gives, as soon as that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "this takes too long"
        time.sleep(0.02)
    return found
