"""Sweeps on a real Ray cluster of two nodes, with a worker killed in the middle."""

import os
import signal
import subprocess
import threading

import pytest
from sweeping import runs, same_tables, swept, wait_for

import patchlab as pl
from patchlab.errors import OutputError, SweepError
from patchlab.store.runs import RunStore
from patchlab.sweeps.executors.on_ray import OnRay

SCORES = """
version: 1
models: [demo-gpt2-4l, demo-llama]
tasks: [{name: ioi, n: 8}, {name: agreement, n: 8}]
runs: [{kind: score, methods: [exact, relp], sites: [resid_pre, z]}]
"""


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    found = Cluster()
    for _ in range(2):
        found.add_node(num_cpus=1, include_dashboard=False)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def workers() -> list[int]:
    """The processes of the workers."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "ray::Actor" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_costs_a_retry_and_no_number(cluster, tmp_path):
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: begun() and workers())
        killed.append(workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    def begun() -> bool:
        try:
            return "running" in RunStore.open(tmp_path / "out").status().values()
        except OutputError:  # it is not there yet
            return False

    killer = threading.Thread(target=kill)
    killer.start()
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out", OnRay("auto"))
    killer.join()
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
