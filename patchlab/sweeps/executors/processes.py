"""Several processes on this machine."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from patchlab.errors import SweepError
from patchlab.sweeps.driver import Board, Doing, doing
from patchlab.sweeps.work import Event, Group, Worker

GRACE = 5.0
"""Seconds that workers have, after Ctrl-C, to send what they have finished."""


class Processes:
    """The executor that does groups in ``n`` processes; memory and threads are divided among them."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise SweepError(f"{n} workers cannot do anything; give at least 1.")
        self.n = n

    def run(self, board: Board) -> None:
        """Do every group; one that loses its worker goes to the next, which starts where the driver's store is."""
        queue = board.names()
        crew: list[_Hand] = []
        try:
            while queue or any(hand.name for hand in crew):
                self._give(board, queue, crew)
                self._listen(board, queue, crew)
        except BaseException:
            _stop(board, crew)
            raise
        finally:
            for hand in crew:
                hand.end()

    def _give(self, board: Board, queue: list[str], crew: list["_Hand"]) -> None:
        idle = [hand for hand in crew if hand.name is None]
        while queue and (idle or len(crew) < self.n):
            name = queue.pop(0)
            if (group := board.left(name)) is None:
                continue
            if not idle:
                crew.append(_Hand.start(self.n))
                idle = [crew[-1]]
            hand = idle.pop(0)
            try:
                hand.give(name, group)
            except OSError:  # it died while it waited for work
                _bury(board, queue, crew, hand)

    def _listen(self, board: Board, queue: list[str], crew: list["_Hand"]) -> None:
        busy = {hand.connection: hand for hand in crew if hand.name is not None}
        for connection in wait(list(busy), timeout=1.0):
            hand = busy[connection]  # type: ignore[index]
            try:
                event = hand.connection.recv()
            except (EOFError, OSError):
                _bury(board, queue, crew, hand)
                continue
            if event is None:
                queue.insert(0, str(hand.name))  # asked for what is left of it, which is nothing but runs found stale
                hand.name = hand.doing = None
            else:
                hand.take(board, event)


@dataclass
class _Hand:
    """A worker process as the driver sees it."""

    process: BaseProcess
    connection: Connection
    life: Connection
    name: str | None = None
    doing: Doing | None = None

    @staticmethod
    def start(n: int) -> "_Hand":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        life, death = context.Pipe()
        process = context.Process(target=_work, args=(theirs, death, n), daemon=True)
        process.start()
        theirs.close()
        death.close()
        return _Hand(process, ours, life)

    def give(self, name: str, group: Group) -> None:
        self.name = name
        self.connection.send(group)

    def take(self, board: Board, event: Event) -> None:
        self.doing = doing(self.doing, event)
        board.take(event)

    def end(self) -> None:
        """End the worker: by itself where it waits for work, else at once."""
        self.connection.close()
        self.process.join(GRACE if self.name is None else 0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.life.close()


def _bury(board: Board, queue: list[str], crew: list[_Hand], hand: _Hand) -> None:
    """Take a worker that died out of the crew, and put what it was given back to the front."""
    hand.process.join(GRACE)
    hand.end()
    crew.remove(hand)
    queue.insert(0, str(hand.name))
    board.died(str(hand.name), hand.doing, _how(hand.process))


def _stop(board: Board, crew: list[_Hand]) -> None:
    """Ask workers to stop, and take what they have finished."""
    for hand in crew:
        if hand.name is not None and hand.process.pid is not None and hand.process.is_alive():
            os.kill(hand.process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    open_ = {hand.connection: hand for hand in crew if hand.name is not None}
    while open_ and (left := until - time.monotonic()) > 0:
        for connection in wait(list(open_), timeout=left):
            try:
                event = open_[connection].connection.recv()  # type: ignore[index]
            except (EOFError, OSError):
                event = None
            if event is None:
                del open_[connection]  # type: ignore[arg-type]
            else:
                board.take(event)


def _how(process: BaseProcess) -> str:
    """How a process ended, in words."""
    code = process.exitcode or 0
    if code >= 0:
        return f"exit status {code}"
    killed = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{killed}"


def _work(connection: Connection, life: Connection, n: int) -> None:
    """What a worker process does: groups until there are no more, events as they come, None after each group."""
    import torch

    threading.Thread(target=_end_with_the_driver, args=(life,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the driver says when to stop
    line = _Line(connection)
    signal.signal(signal.SIGTERM, line.stop)
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    worker = Worker(share=1 / n)
    try:
        while True:
            group: Any = connection.recv()
            worker.do(group, line.send)
            line.send(None)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return


class _Line:
    """The line to the driver. A request to stop waits until the message under way is sent: half of one would be the end of all others."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending, self._stopped = connection, False, False

    def send(self, event: Event | None) -> None:
        """Send a message."""
        self._sending = True
        try:
            self._connection.send(event)
        finally:
            self._sending = False
        if self._stopped:
            self._stopped = False
            raise KeyboardInterrupt

    def stop(self, number: int, frame: Any) -> None:
        """Stop the work, as Ctrl-C does; once is enough, as what is finished is then on its way."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._sending:
            self._stopped = True
        else:
            raise KeyboardInterrupt


def _end_with_the_driver(life: Connection) -> None:
    """End this process when the driver's end of a pipe is gone, however it went."""
    try:
        life.recv()
    except (EOFError, OSError):
        os._exit(1)
