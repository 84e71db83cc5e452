"""Sweeps in several processes: whatever is killed, nothing finished is lost and no number changes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from sweeping import SMALL, alive, command, descendants, kill_group, runs, same_tables, swept, wait_for

import patchlab as pl
from patchlab.errors import OutputError
from patchlab.store.runs import RunStore
from patchlab.sweeps.executors.processes import Processes

SCORES = """
version: 1
models: [demo-gpt2-4l, demo-llama]
tasks: [{name: ioi, n: 8}, {name: agreement, n: 8}]
runs: [{kind: score, methods: [exact, relp], sites: [resid_pre, z]}]
"""


def running(folder: Path) -> list[str]:
    """The runs that are under way."""
    try:
        return [key for key, state in RunStore.open(folder).status().items() if state == "running"]
    except OutputError:  # it is not there yet
        return []


def done(folder: Path) -> set[str]:
    """The runs that a reader sees as done, each of them whole."""
    try:
        store = RunStore.open(folder)
    except OutputError:
        return set()
    found = {key for key, state in store.status().items() if state == "done"}
    for key in found:
        stored = store.get(key)
        assert all(stored.path(name).exists() for name in stored.files)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep by two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    counts, _ = swept(runs(folder, SCORES), folder / "out", Processes(2))
    assert counts == {"planned": 8, "done": 8, "failed": 0, "pending": 0, "running": 0}
    return folder / "out"


@pytest.mark.slow
def test_killed_at_random_moments_it_loses_nothing(whole, tmp_path):
    """The driver and its workers, all at once, five times; then the same command ends with the very same table."""
    runs(tmp_path, SCORES)
    chance, out, acknowledged = random.Random(5), tmp_path / "out", set()
    for _ in range(5):
        process = command(tmp_path / "sweep.yaml", out, "--workers", "2")
        before = len(acknowledged)
        wait_for(lambda before=before, process=process: running(out) or len(done(out)) > before or process.poll() is not None)
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 4))
        kill_group(process)
        now = done(out)
        assert acknowledged <= now
        acknowledged = now
    counts, _ = swept(runs(tmp_path, SCORES), out, Processes(2))
    assert counts["done"] == 8
    same_tables(whole, out)


def test_workers_end_with_the_driver(tmp_path):
    runs(tmp_path, SCORES)
    process = command(tmp_path / "sweep.yaml", tmp_path / "out", "--workers", "2")
    wait_for(lambda: running(tmp_path / "out"))
    workers = descendants(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(alive, workers)), 30)
    assert "running" not in RunStore.open(tmp_path / "out").status().values()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "a request to end"])
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one process", "two workers"])
def test_ctrl_c_stops_it_cleanly(tmp_path, how, options):
    runs(tmp_path, SCORES.replace("n: 8", "n: 64"))
    process = command(tmp_path / "sweep.yaml", tmp_path / "out", *options)
    wait_for(lambda: running(tmp_path / "out"))
    below = descendants(process.pid)
    if how == signal.SIGINT:  # as a terminal does, to the whole group
        os.killpg(process.pid, how)
    else:
        os.kill(process.pid, how)
    text, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in text
    wait_for(lambda: not any(map(alive, below)), 10)
    assert RunStore.open(tmp_path / "out").counts()["running"] == 0


@pytest.mark.slow
def test_a_killed_worker_costs_a_retry(whole, tmp_path):
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: running(tmp_path / "out"))
        killed.append(multiprocessing.active_children()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out", Processes(2))
    killer.join()
    assert killed
    assert counts["done"] == 8
    assert any("died (SIGKILL (as the system does when memory runs out)); the run is tried again (1 of 3)" in line for line in said)
    same_tables(whole, tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_kills_its_worker_three_times_fails_and_the_others_are_done(tmp_path):
    wanted = runs(tmp_path, SCORES)
    victim, ended = wanted[0].key, threading.Event()

    def kill() -> None:
        while not ended.is_set():
            if victim in running(tmp_path / "out"):
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            ended.wait(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    counts, _ = swept(wanted, tmp_path / "out", Processes(1))
    ended.set()
    killer.join()
    assert counts == {"planned": 8, "done": 7, "failed": 1, "pending": 0, "running": 0}
    assert "3 workers died" in pl.sweeps.open(tmp_path / "out").find(victim).record["error"]["message"]


@pytest.mark.slow
def test_one_process_and_several_agree(whole, tmp_path):
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    one, several = (pl.sweeps.open(folder).table() for folder in (tmp_path / "out", whole))
    assert list(one["key"]) == list(several["key"])
    assert one["value"].to_numpy(float) == pytest.approx(several["value"].to_numpy(float), abs=1e-4, nan_ok=True)


def test_the_command_says_what_came_of_it(tmp_path):
    runs(tmp_path, SMALL.replace("seed: [0, 1]", "seed: 0"))
    process = command(tmp_path / "sweep.yaml", tmp_path / "out", "--json")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    found = json.loads(text.strip().splitlines()[-1])
    assert found == {"out": str(tmp_path / "out"), "planned": 8, "done": 8, "failed": 0, "pending": 0, "running": 0}
