"""Sweeps in several processes: whatever is killed, nothing finished is lost and no number changes."""

import json
import os
import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from dying_workers import dies_after_each_run, dies_at_once, dies_once_it_waits
from sweeping import SMALL, alive, command, descendants, kill_group, runs, same_tables, swept, wait_for

import patchlab as pl
from patchlab.errors import OutputError, SweepError
from patchlab.store.runs import RunStore
from patchlab.sweeps.driver import Board
from patchlab.sweeps.executors import processes
from patchlab.sweeps.executors.processes import Processes
from patchlab.sweeps.work import Started

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


@pytest.mark.slow
def test_workers_end_with_the_driver(tmp_path):
    runs(tmp_path, SCORES)
    process = command(tmp_path / "sweep.yaml", tmp_path / "out", "--workers", "2")
    wait_for(lambda: running(tmp_path / "out"))
    workers = descendants(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(alive, workers)), 120)
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
    text, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "Traceback" not in text
    wait_for(lambda: not any(map(alive, below)), 120)
    assert RunStore.open(tmp_path / "out").counts()["running"] == 0


def kill_at_the_start_of(monkeypatch, wanted) -> list[int]:
    """Kill the worker that tells that it began a run, if the run (by its key) and the number of killed ones so far ask for it; what was killed."""
    killed: list[int] = []
    take = processes._Hand.take

    def taken(hand, board, event) -> None:
        take(hand, board, event)
        if isinstance(event, Started) and wanted(event.key):
            killed.append(hand.process.pid)
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(processes._Hand, "take", taken)
    return killed


@pytest.mark.slow
def test_a_killed_worker_costs_a_retry(whole, tmp_path, monkeypatch):
    counted: list[object] = []  # deaths in the middle of a run: one that ended before the signal came is no such death, and the next is killed
    died = Board.died
    monkeypatch.setattr(Board, "died", lambda board, name, what, why: (counted.append(what), died(board, name, what, why)))
    killed = kill_at_the_start_of(monkeypatch, lambda key: not any(isinstance(what, Started) for what in counted))
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out", Processes(2))
    assert killed
    assert counts["done"] == 8
    assert any("died (SIGKILL (as the system does when memory runs out)); the run is tried again (1 of 3)" in line for line in said)
    same_tables(whole, tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_kills_its_worker_three_times_fails_and_the_others_are_done(tmp_path, monkeypatch):
    wanted = runs(tmp_path, SCORES)
    victim = wanted[0].key  # the first of its group, told before the model is loaded: it cannot have ended when the signal comes
    killed = kill_at_the_start_of(monkeypatch, lambda key: key == victim)
    counts, _ = swept(wanted, tmp_path / "out", Processes(1))
    assert len(killed) == 3
    assert counts == {"planned": 8, "done": 7, "failed": 1, "pending": 0, "running": 0}
    assert "3 workers died" in pl.sweeps.open(tmp_path / "out").find(victim).record["error"]["message"]


@pytest.mark.parametrize("n", [1, 2])
def test_workers_that_never_begin_end_the_sweep_and_no_run(tmp_path, monkeypatch, n):
    monkeypatch.setattr(processes, "_work", dies_at_once)
    with pytest.raises(SweepError, match="3 workers died before they began a run, the last of exit status 3"):
        swept(runs(tmp_path, SCORES), tmp_path / "out", Processes(n))
    store = RunStore.open(tmp_path / "out")
    assert store.counts()["pending"] == 8
    assert not any(store.attempts(key) for key in store.planned())


@pytest.mark.slow
@pytest.mark.parametrize("how", [dies_after_each_run, dies_once_it_waits], ids=["between two runs", "between two groups"])
def test_a_worker_that_dies_while_it_does_no_run_costs_no_run_a_retry(tmp_path, monkeypatch, how):
    monkeypatch.setattr(processes, "_work", how)
    give = processes._Hand.give

    def given(hand, name, group) -> None:
        if how is dies_once_it_waits and hand.process.pid in begun:
            hand.process.join()  # dead, and the driver does not know it yet
        begun.add(hand.process.pid)
        give(hand, name, group)

    begun: set[int | None] = set()
    monkeypatch.setattr(processes._Hand, "give", given)
    text = SCORES.replace("models: [demo-gpt2-4l, demo-llama]", "models: demo-llama")
    counts, said = swept(runs(tmp_path, text), tmp_path / "out", Processes(1))
    assert counts == {"planned": 4, "done": 4, "failed": 0, "pending": 0, "running": 0}
    assert len(begun) == (4 if how is dies_after_each_run else 2)
    assert any("died (exit status 3) while it did no run" in line for line in said)
    assert not any("tried again" in line for line in said)
    store = RunStore.open(tmp_path / "out")
    assert not any(store.attempts(key) for key in store.planned())


@pytest.mark.slow
def test_one_process_and_several_agree(whole, tmp_path):
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    one, several = (pl.sweeps.open(folder).table() for folder in (tmp_path / "out", whole))
    assert list(one["key"]) == list(several["key"])
    assert one["value"].to_numpy(float) == pytest.approx(several["value"].to_numpy(float), abs=1e-4, nan_ok=True)


@pytest.mark.slow
def test_the_command_says_what_came_of_it(tmp_path):
    runs(tmp_path, SMALL.replace("seed: [0, 1]", "seed: 0"))
    process = command(tmp_path / "sweep.yaml", tmp_path / "out", "--json")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    found = json.loads(text.strip().splitlines()[-1])
    assert found == {"out": str(tmp_path / "out"), "planned": 8, "done": 8, "failed": 0, "pending": 0, "running": 0}
