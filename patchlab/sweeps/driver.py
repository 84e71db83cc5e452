"""The driver of a sweep: which runs are left, who does them, and what is written: it alone writes to the store."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from patchlab import __version__
from patchlab.errors import SweepError
from patchlab.progress import duration, progress_bar
from patchlab.store.files import writing
from patchlab.store.runs import RunStore
from patchlab.sweeps.spec import RunSpec
from patchlab.sweeps.work import Checked, Checking, Ended, Event, Group, Kept, Started, code_digest, machine

ATTEMPTS = 3
"""Workers that a run may take with it before it counts as failed, and that may die before they begin a group while no other says anything."""
Doing = Started | Checking
"""What a worker is in the middle of."""


def doing(before: Doing | None, event: Event) -> Doing | None:
    """What a worker is in the middle of after an event: a run from its beginning to its end, or the checks of finished ones."""
    if isinstance(event, (Started, Checking)):
        return event
    return None if isinstance(event, Ended) else before


@runtime_checkable
class Executor(Protocol):
    """Who does the groups of a sweep: this process, several, or a cluster."""

    def run(self, board: "Board") -> None:
        """Do every group of the board; a worker that dies is told to the board, and what is left of its group is done by another.

        After an exception, such as Ctrl-C, workers end within seconds and what they have finished is taken.
        """
        ...


@dataclass
class Board:
    """What is to be done, and what has come of it.

    Args:
        store: results go there.
        groups: the runs to do, by group; keys of runs whose fingerprints are to be checked are in ``check``.
        check: finished runs that other code made.
        say: told, in a line, what a person should know.
        bar: moves by one with every run.
    """

    store: RunStore
    groups: Mapping[str, Sequence[RunSpec]]
    check: Mapping[str, Sequence[RunSpec]]
    say: Callable[[str], Any]
    bar: Any
    ended: set[str] = field(default_factory=set[str])
    checked: set[str] = field(default_factory=set[str])
    stale: set[str] = field(default_factory=set[str])
    warned: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    unbegun: dict[str, int] = field(default_factory=dict[str, int])

    def names(self) -> list[str]:
        """The groups, in order."""
        return list(dict.fromkeys((*self.groups, *self.check)))

    def left(self, name: str) -> Group | None:
        """What is left to do of a group, with what is finished of interrupted runs; None for nothing."""
        check = tuple(run for run in self.check.get(name, ()) if run.key not in self.checked)
        stale = [run for run in self.check.get(name, ()) if run.key in self.stale]
        runs = tuple(run for run in (*self.groups.get(name, ()), *stale) if run.key not in self.ended)
        if not runs and not check:
            return None
        kept = {run.key: path.read_bytes() for run in runs if (path := self.store.work(run.key)).exists()}
        return Group(runs, check, kept)

    def take(self, event: Event) -> None:
        """Take what a worker tells."""
        self.unbegun.clear()
        if isinstance(event, Checking):
            return
        if isinstance(event, Started):
            self.store.mark(event.key, "running")
        elif isinstance(event, Kept):
            with writing(self.store.work(event.key), overwrite=True) as temporary:
                temporary.write_bytes(event.data)
        elif isinstance(event, Ended):
            self._end(event)
        else:
            self._compare(event)

    def died(self, name: str, what: Doing | None, why: str) -> None:
        """A worker died that had a group, in the middle of something or of nothing.

        A run counts as failed after three deaths. Where fingerprints of finished runs were compared, those runs are left as they are. A death before
        the first run or between two of them counts against none; it ends the sweep only when it happens again and again and nothing else does.

        Raises:
            SweepError: three workers in a row died before they began this group, and no other told anything meanwhile.
        """
        if what is None:
            self.unbegun[name] = self.unbegun.get(name, 0) + 1
            if self.unbegun[name] == ATTEMPTS:
                raise SweepError(
                    f"{ATTEMPTS} workers died before they began a run, the last of {why}: they do not get as far as starting here. Nothing counts "
                    "against a run, and what is done is kept. Find out what ends them (the system's log; memory), or leave out --workers and --ray."
                )
            self.say(f"a worker died ({why}) while it did no run, which counts against none; another takes over")
            return
        if isinstance(what, Checking):
            self.checked |= {run.key for run in self.check.get(name, ())}
            self.say(f"a worker died ({why}) while finished runs were checked against today's code; they are used as they are")
            return
        key = what.key
        deaths = self.store.attempts(key, add=1)
        record = self.store.planned()[key]
        if deaths < ATTEMPTS:
            self.store.mark(key, "pending")
            self.say(f"the worker of {record['label']} died ({why}); the run is tried again ({deaths} of {ATTEMPTS})")
            return
        message = f"{deaths} workers died while they did this run; the last: {why}"
        error = {"type": "WorkerDied", "message": message, "traceback": message}
        self._end(Ended(key, "failed", {**record, "error": error, **machine()}))

    def _end(self, event: Ended) -> None:
        self.store.put(event.key, event.record, event.files, status=event.status)
        self.ended.add(event.key)
        self.bar.update(1)
        label, error = event.record["label"], event.record.get("error")
        if error is not None:
            self.say(f"failed: {label}: {error['type']}: {error['message'].strip().splitlines()[0] if error['message'].strip() else ''}")
        for line in event.record.get("log", ()):
            if line.startswith("warning") and (event.record["fields"]["model"], line) not in self.warned:  # methods of one task share theirs
                self.warned.add((event.record["fields"]["model"], line))
                self.say(f"{label}: {line}")

    def _compare(self, event: Checked) -> None:
        self.checked.add(event.key)
        stored = self.store.get(event.key).record
        differing = [name for name, value in event.fingerprints.items() if stored.get("fingerprints", {}).get(name) != value]
        if differing:
            version = stored["versions"]["patchlab"]
            why = f"{stored['label']}: its {' and '.join(differing)} had another fingerprint when patchlab {version} made it"
            self.store.set_stale(event.key, why)
            self.stale.add(event.key)


def run_sweep(
    runs: Iterable[RunSpec],
    out: str | Path,
    executor: Executor,
    *,
    retry_failed: bool = False,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = True,
) -> dict[str, int]:
    """Do those runs of a sweep that the folder does not hold yet.

    Args:
        runs: all runs of the sweep.
        out: its folder; a new one, or one of an earlier call.
        executor: who does them.
        retry_failed: do those again that failed.
        about: what the folder is, such as the name of the sweep and its file, and the ``shard`` whose runs these are.
        say: told, in a line, what a person should know.
        progress: show the progress over runs on stderr.

    Returns:
        The numbers of runs that are ``planned``, ``done``, ``failed``, ``pending`` and ``running``.

    Raises:
        SweepError: no runs, or a folder of another shard.
        OutputError: a folder that cannot be written to, that another runner holds, or that is damaged.
    """
    wanted = {run.key: run for run in runs}
    if not wanted:
        raise SweepError("the sweep has no runs.")
    with RunStore.create(out, {"patchlab": __version__, **(about or {})}, say=say) as store:
        _refuse_another_shard(store, (about or {}).get("shard"))
        store.plan({key: planned(run) for key, run in wanted.items()})
        fixed = store.planned()
        wanted = {key: run.model_copy(update={"batch_size": fixed[key]["batch_size"]}) for key, run in wanted.items()}
        status = store.status()
        again = ("pending", "running", "stale", *(("failed",) if retry_failed else ()))
        left = [run for key, run in wanted.items() if status[key] in again]
        done = [run for key, run in wanted.items() if status[key] == "done" and store.get(key).record.get("code") != code_digest()]
        if held := sum(status[key] == "done" for key in wanted):
            say(f"{held} of {len(wanted)} runs were done before")
        if failed := sum(status[key] == "failed" for key in wanted) * (not retry_failed):
            say(f"{failed} runs failed before and are left alone; --retry-failed runs them again")
        started = time.monotonic()
        with progress_bar("sweep", "run", len(left), show=progress and bool(left)) as bar:
            board = Board(store, _grouped(left), _grouped(done), say, bar)
            try:
                executor.run(board)
            finally:
                for key, state in store.status().items():
                    if state == "running":
                        store.mark(key, "pending")
        counts = store.counts()
        say(f"{len(board.ended)} runs in {duration(time.monotonic() - started)}")
        return counts


def _refuse_another_shard(store: RunStore, shard: str | None) -> None:
    """A folder keeps to the shard that it was made for."""
    if (had := store.about["about"].get("shard")) != shard:
        holds, got = (f"shard {one}" if one else "a whole sweep" for one in (had, shard))
        raise SweepError(f"{store.folder} was made for {holds}, and this is {got}. Give every shard a folder of its own; merge puts them together.")


def planned(run: RunSpec) -> dict[str, Any]:
    """What the plan of a folder holds of a run."""
    return {"label": run.label, "fields": run.fields(), "batch_size": run.batch_size, "spec": run.plain(), "run": run.model_dump(mode="json")}


def _grouped(runs: Iterable[RunSpec]) -> dict[str, list[RunSpec]]:
    groups: dict[str, list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups
