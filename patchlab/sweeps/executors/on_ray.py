"""A Ray cluster: many machines, and one worker per GPU where there are GPUs."""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

from patchlab.errors import SweepError
from patchlab.sweeps.driver import Board, Doing, doing
from patchlab.sweeps.work import Event, Group, Worker

LOCAL = "local"


class OnRay:
    """The executor that does groups on a Ray cluster; workers send what they have, and the driver alone writes.

    Args:
        address: of the cluster, ``auto`` for the one of this machine, or ``local`` to start one here for as long as it is needed.
        per_gpu: workers that share one GPU.
        workers: how many at most; default one per GPU (times ``per_gpu``), or where there are none one per CPU.

    Raises:
        SweepError: Ray is not installed, or the numbers are below 1.
    """

    def __init__(self, address: str = LOCAL, *, per_gpu: int = 1, workers: int | None = None) -> None:
        if per_gpu < 1 or (workers is not None and workers < 1):
            raise SweepError(f"at least one worker is needed, and at least one per GPU; got {workers} workers and {per_gpu} per GPU.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray as _  # noqa: F401
        except ImportError as error:
            raise SweepError("Ray is not installed: pip install 'patchlab[ray]', or use --workers on this machine.") from error
        self.address, self.per_gpu, self.workers = address, per_gpu, workers

    def run(self, board: Board) -> None:
        """Do every group; what a dead worker leaves of its group is done by another."""
        import ray

        ours = not ray.is_initialized()
        if ours:
            address = None if self.address == LOCAL else self.address
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if address is None else None)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise SweepError(f"no Ray cluster answers at {self.address}: {error}. Start one with `ray start --head`, or use local.") from error
        crew: dict[Any, _Hand] = {}
        try:
            _Crew(board, self._many(ray), self._resources(ray), self._share(ray), crew).work()
        finally:
            for hand in crew.values():
                ray.kill(hand.actor)
            if ours:
                ray.shutdown()

    def _many(self, ray: Any) -> int:
        resources = ray.cluster_resources()
        found = int(resources.get("GPU", 0)) * self.per_gpu or max(1, int(resources.get("CPU", 1)))
        return found if self.workers is None else min(found, self.workers)

    def _share(self, ray: Any) -> float:
        """Of the free memory, for one worker: of its GPU, or of its node."""
        if ray.cluster_resources().get("GPU", 0):
            return 1 / self.per_gpu
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return 1 / max(1, -(-self._many(ray) // max(1, nodes)))

    def _resources(self, ray: Any) -> dict[str, Any]:
        gpus = ray.cluster_resources().get("GPU", 0)
        return {"num_gpus": 1 / self.per_gpu, "num_cpus": 1} if gpus else {"num_cpus": 1}


class _Hand:
    """A worker on the cluster as the driver sees it: an actor, and what it streams."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.name = actor, ""
        self.doing: Doing | None = None
        self.events: Any = None

    def give(self, name: str, group: Group) -> None:
        self.name, self.doing = name, None
        self.events = self.actor.do.options(num_returns="streaming").remote(group)


class _Crew:
    """The workers and the groups that are left."""

    def __init__(self, board: Board, many: int, resources: dict[str, Any], share: float, crew: dict[Any, _Hand]) -> None:
        import ray

        self.ray, self.board, self.many, self.share, self.busy = ray, board, many, share, crew
        self.queue, self.idle = board.names(), list[_Hand]()
        self.actor = ray.remote(**resources, max_restarts=0)(Actor)

    def work(self) -> None:
        """Until nothing is left."""
        while True:
            self._give()
            if not self.busy:
                return
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, fetch_local=True)
            for events in ready:
                self._listen(self.busy.pop(events))

    def _give(self) -> None:
        while self.queue and (self.idle or len(self.busy) < self.many):
            name = self.queue.pop(0)
            if (group := self.board.left(name)) is None:
                continue
            hand = self.idle.pop() if self.idle else _Hand(self.actor.remote(self.share))
            hand.give(name, group)
            self.busy[hand.events] = hand

    def _listen(self, hand: _Hand) -> None:
        from ray.exceptions import RayActorError, RaySystemError

        try:
            event: Event = self.ray.get(next(hand.events))
        except StopIteration:
            self.queue.insert(0, hand.name)  # asked for what is left of it, which is nothing but runs found stale
            self.idle.append(hand)
            return
        except (RayActorError, RaySystemError) as error:
            self.board.died(hand.name, hand.doing, str(error).strip().splitlines()[0])
            self.queue.insert(0, hand.name)
            return
        hand.doing = doing(hand.doing, event)
        self.board.take(event)
        self.busy[hand.events] = hand


class Actor:
    """A worker on the cluster."""

    def __init__(self, share: float) -> None:
        self._worker = Worker(share=share)

    def do(self, group: Group) -> Iterator[Event]:
        """The events of a group, as they come."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self._worker.do(group, events.put)
                events.put(None)
            except BaseException as error:
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
