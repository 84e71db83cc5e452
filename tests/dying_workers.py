"""Worker processes that die at a chosen moment; a file of its own, which a process imports in no time."""

import os
from multiprocessing.connection import Connection
from typing import Any


def dies_at_once(connection: Connection, life: Connection, n: int) -> None:
    """A worker process that does not get as far as taking work."""
    os._exit(3)


def dies_after_each_run(connection: Connection, life: Connection, n: int) -> None:
    """A worker process that ends after the first run of a group, before it begins the next."""
    for event in _pretended(connection.recv().runs[:1]):
        connection.send(event)
    os._exit(3)


def dies_once_it_waits(connection: Connection, life: Connection, n: int) -> None:
    """A worker process that does one group, and ends while it waits for the next."""
    for event in _pretended(connection.recv().runs):
        connection.send(event)
    connection.send(None)
    os._exit(3)


def _pretended(wanted: tuple[Any, ...]) -> list[Any]:
    from patchlab.sweeps.work import Ended, Started

    return [event for run in wanted for event in (Started(run.key), Ended(run.key, "done", {"label": run.label, "fields": run.fields()}))]
