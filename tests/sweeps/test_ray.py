"""Sweeps on a real Ray cluster of two nodes, with a worker killed in the middle."""

import os
import signal
import time

import pytest
from sweeping import runs, same_tables, swept, wait_for

import patchlab as pl
from patchlab.errors import SweepError
from patchlab.sweeps.driver import Board
from patchlab.sweeps.executors import on_ray
from patchlab.sweeps.executors.on_ray import OnRay
from patchlab.sweeps.work import Started

SCORES = """
version: 1
models: [demo-gpt2-4l, demo-llama]
tasks: [{name: ioi, n: 8}, {name: agreement, n: 8}]
runs: [{kind: score, methods: [exact, relp], sites: [resid_pre, z]}]
"""


class Patient:
    """The clock by which Ray waits for a node, half a minute at most: a slow one for busy machines."""

    monotonic = staticmethod(lambda: time.monotonic() / 2)

    def __getattr__(self, name):
        return getattr(time, name)


RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it ends workers where others fill the memory of the machine
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_initial_delay_ms": "600000",  # nodes that answer late are alive
    "RAY_health_check_timeout_ms": "600000",
    "RAY_gcs_server_port_wait_time_s": "600",
}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        patch.setattr("ray._private.node.time", Patient())
        for _ in range(4):  # a node ends itself when one of its own processes is not there after 15 seconds
            found = Cluster()
            try:
                for _ in range(2):
                    found.add_node(wait=False, num_cpus=1, include_dashboard=False)
                break
            except Exception as error:
                found.shutdown()
                if "timed out during startup" not in str(error):
                    raise
        else:
            pytest.skip("this machine is too busy for Ray to start on it")
        ray.init(address=found.address, log_to_driver=False)
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    yield found
    ray.shutdown()
    found.shutdown()


def process_of(actor) -> int:
    """The process of a worker."""
    from ray._private import state

    return state.actors(actor._actor_id.hex())["Pid"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_costs_a_retry_and_no_number(cluster, tmp_path, monkeypatch):
    killed: list[int] = []
    counted: list[object] = []  # deaths in the middle of a run: one that ended before the signal came is no such death, and the next is killed
    listen, died = on_ray._Crew._listen, Board.died

    def listening(crew, hand) -> None:
        listen(crew, hand)
        if isinstance(hand.doing, Started) and hand.events in crew.busy and not any(isinstance(what, Started) for what in counted):
            killed.append(process_of(hand.actor))
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(on_ray._Crew, "_listen", listening)
    monkeypatch.setattr(Board, "died", lambda board, name, what, why: (counted.append(what), died(board, name, what, why)))
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out", OnRay("auto"))
    assert killed
    assert counts == {"planned": 8, "done": 8, "failed": 0, "pending": 0, "running": 0}
    assert any("the run is tried again (1 of 3)" in line for line in said)
    swept(runs(tmp_path, SCORES), tmp_path / "whole", OnRay("auto"))
    same_tables(tmp_path / "whole", tmp_path / "out")
    hosts = {stored.record["host"]["name"] for stored, _ in pl.sweeps.open(tmp_path / "whole").done()}
    assert len(hosts) == 1, "both nodes are this machine"


def test_no_cluster_and_bad_numbers_are_refused(tmp_path):
    with pytest.raises(SweepError, match="at least one worker"):
        OnRay(workers=0)
    with pytest.raises(SweepError, match="at least one per GPU"):
        OnRay(per_gpu=0)
