"""The work of a sweep: what a worker does with a group of runs, and what it tells the driver."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchlab import __version__
from patchlab.sweeps.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    from patchlab.models import Model
    from patchlab.sweeps.kinds import Desk


@dataclass(frozen=True)
class Started:
    """A run was begun."""

    key: str


@dataclass(frozen=True)
class Checking:
    """The fingerprints of finished runs are about to be computed, in a group that has nothing else left."""


@dataclass(frozen=True)
class Kept:
    """The finished part of a run that is under way."""

    key: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Ended:
    """A run ended, ``done`` or ``failed``: its record and its files."""

    key: str
    status: str
    record: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes], repr=False)


@dataclass(frozen=True)
class Checked:
    """The fingerprints that the model and the prompts of a finished run have today."""

    key: str
    fingerprints: Mapping[str, str]


Event = Started | Checking | Kept | Ended | Checked
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Group:
    """Runs that share work: one worker does them, one after the other.

    Args:
        runs: those to do, in order; all of one model, task, direction and sites.
        check: finished runs that other code made, whose model and prompts are compared with today's.
        kept: what is finished of runs that were interrupted, by key.
    """

    runs: tuple[RunSpec, ...]
    check: tuple[RunSpec, ...] = ()
    kept: Mapping[str, bytes] = field(default_factory=dict[str, bytes], repr=False)

    @property
    def first(self) -> RunSpec:
        """A run that tells the model and the task."""
        return (*self.runs, *self.check)[0]


class Worker:
    """A worker does groups of runs, and keeps the last model that it loaded.

    Args:
        share: of this machine's free memory, for one run: what is predicted to need more fails.
        progress: show the progress of cells on stderr.
        loaded: a model that is in memory already, and what it is.
    """

    def __init__(self, *, share: float = 1.0, progress: bool = False, loaded: "tuple[ModelSpec, Model] | None" = None) -> None:
        self.share, self.progress = share, progress
        self.model: Model | None = None if loaded is None else loaded[1]
        self._loaded = "" if loaded is None else loaded[0].model_dump_json()

    def do(self, group: Group, tell: Tell) -> None:
        """Do the runs of a group, and tell what comes of each. An exception is a run's result; only what ends the work goes through."""
        from patchlab.methods.setting.shared import sharing_runs
        from patchlab.sweeps.kinds import Desk

        tell(Started(group.runs[0].key) if group.runs else Checking())  # where loading ends the worker, this is what did it
        try:
            model = self._load(group.first)
            task = group.first.task.load(model)
        except Exception as error:
            for run in group.runs:
                tell(Ended(run.key, "failed", _record(run, error=error)))
            return
        for run in group.check:
            tell(Checked(run.key, {"model": model.fingerprint, "task": task.fingerprint}))
        desk = Desk(model, task, group.first.task.seed, self.share, self.progress)
        with sharing_runs(model):
            for i, run in enumerate(group.runs):
                if i:
                    tell(Started(run.key))
                tell(_ended(run, desk, _Sent(run.key, group.kept.get(run.key), tell)))

    def _load(self, run: RunSpec) -> "Model":
        wanted = run.model.model_dump_json()
        if self.model is None or self._loaded != wanted:
            self.model = None  # there may be no room for two
            self.model, self._loaded = run.model.load(), wanted
        return self.model


class _Sent:
    """A keeper of unfinished work that sends it to the driver, which alone writes."""

    def __init__(self, key: str, data: bytes | None, tell: Tell) -> None:
        self._key, self._data, self._tell = key, data, tell

    def read(self) -> bytes | None:
        return self._data

    def write(self, data: bytes) -> None:
        self._data = data
        self._tell(Kept(self._key, data))

    def remove(self) -> None:
        self._data = None  # the driver drops it with the result

    def __str__(self) -> str:
        return "the folder of the sweep"


def _ended(run: RunSpec, desk: "Desk", keeper: _Sent) -> Ended:
    from patchlab.sweeps.kinds import compute, plain_cost

    started, log = time.perf_counter(), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome = compute(run, desk, keeper=keeper, say=log.append)
        except Exception as error:
            about = {"log": log, "warnings": _texts(caught), "seconds": time.perf_counter() - started}
            return Ended(run.key, "failed", _record(run, desk, error=error, **about))
    about = {"log": log, "warnings": _texts(caught), "seconds": time.perf_counter() - started}
    about |= {"cost": plain_cost(outcome.cost), "statistics": outcome.statistics}
    return Ended(run.key, "done", _record(run, desk, **about), outcome.files)


def _texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return list(dict.fromkeys(f"{one.category.__name__}: {one.message}" for one in caught))


def _record(run: RunSpec, desk: "Desk | None" = None, *, error: Exception | None = None, **about: Any) -> dict[str, Any]:
    """What is known about a run, as plain values."""
    found: dict[str, Any] = {"spec": run.plain(), "label": run.label, "fields": run.fields(), "batch_size": run.batch_size}
    if desk is not None:
        found["fingerprints"] = {"model": desk.model.fingerprint, "task": desk.task.fingerprint}
        found["device"] = str(desk.model.device)
    if error is not None:
        kind = type(error).__name__
        found["error"] = {"type": kind, "message": str(error), "traceback": "".join(traceback.format_exception(error))}
    return {**found, "ended": datetime.now(UTC).isoformat(timespec="seconds"), **machine(), **about}


@cache
def machine() -> dict[str, Any]:
    """What code runs where: versions, commit and host, as plain values."""
    packages = ("torch", "transformer-lens", "transformers", "numpy")
    host = {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    versions = {"patchlab": __version__, **{name: importlib.metadata.version(name) for name in packages}}
    return {"versions": versions, "code": code_digest(), "commit": _commit(), "host": host}


@cache
def code_digest() -> str:
    """A digest of the package's source files: what has another may give other numbers, and is looked at again."""
    package, state = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        state.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def _commit() -> str | None:
    """The commit of the repository that the command is given in; None outside of one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
