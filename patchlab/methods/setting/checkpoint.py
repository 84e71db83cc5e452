"""The finished work of a run, kept so that an interrupted run goes on where it stopped."""

import io
import json
import os
import time
import zipfile
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from patchlab.errors import MethodError, PatchlabError
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.unpatched import Scored
from patchlab.scores.arrays import Effects, Sparse, values_of
from patchlab.store.keeper import Keeper, keeper_of

FORMAT = 2
SECONDS = 5.0
"""A checkpoint is written at most so often, and never for more than a twentieth of the time."""
KEPT = 4
"""Unfinished runs that a model remembers at most."""


@dataclass(frozen=True)
class Finished:
    """One finished batch: effects, noise and errors per site, the metric of its clean and corrupted runs, and the method's notes."""

    scored: Scored
    clean: Float[np.ndarray, " batch"]
    corrupted: Float[np.ndarray, " batch"]
    notes: dict[str, Any]


@dataclass
class Checkpoint:
    """The finished part of a run: whole batches, single cells of the batch under way, and what they cost.

    ``identity`` says what the run is, part by part; None stands for a part that cannot be told from another. ``cells`` holds
    the number of the batch under way and the effects per example of its finished cells; ``before`` the forwards,
    backwards, positions and seconds of earlier parts of the run.
    """

    identity: dict[str, str | None]
    keeper: Keeper | None = None
    batches: list[Finished] = field(default_factory=list[Finished])
    cells: tuple[int, dict[int, np.ndarray]] = field(default_factory=lambda: (0, {}))
    before: tuple[int, int, int, float] = (0, 0, 0, 0.0)
    engine: str | None = None
    meter: Meter | None = None
    started: float = field(default_factory=time.perf_counter)
    due: float = 0.0

    def begin(self, meter: Meter) -> None:
        """Count with a meter from now on."""
        self.meter, self.started, self.due = meter, time.perf_counter(), time.perf_counter() + SECONDS
        meter.keep = self.save_if_due
        meter.engine = self.engine or meter.engine

    def cells_of(self, number: int) -> dict[int, np.ndarray]:
        """The finished cells of a batch, to be added to."""
        if self.cells[0] != number:
            self.cells = (number, {})
        return self.cells[1]

    def sizes(self) -> list[int]:
        """Examples of the finished batches, and of the one under way if it has finished cells."""
        number, cells = self.cells
        return [len(one.clean) for one in self.batches] + [len(values) for values in list(cells.values())[:1] if number == len(self.batches)]

    def add(self, finished: Finished) -> None:
        """Note a finished batch."""
        self.batches.append(finished)
        self.save_if_due()

    def spent(self) -> tuple[int, int, int, float]:
        """Forwards, backwards, positions and seconds of all parts of the run."""
        if self.meter is None:
            return self.before
        forwards, backwards, positions, seconds = self.before
        now = time.perf_counter() - self.started
        return forwards + self.meter.forwards, backwards + self.meter.backwards, positions + self.meter.positions, seconds + now

    def __str__(self) -> str:
        cells = self.cells[1] if self.cells[0] == len(self.batches) else {}
        parts = [f"{len(self.batches)} of {self.identity['batches']}"] if self.batches else []
        parts += [f"{len(cells)} cells of a batch"] if cells else []
        return " and ".join(parts)

    def save_if_due(self) -> None:
        """Write the checkpoint, if there is one and the last writing is long enough ago."""
        if self.keeper is not None and time.perf_counter() >= self.due:
            self.save()

    def save(self) -> None:
        """Write the checkpoint: the old one is replaced in one step."""
        if self.keeper is None:
            return
        began = time.perf_counter()
        number, cells = self.cells
        arrays = {
            f"{i}/{part.name}/{name}": values
            for i, one in enumerate(self.batches)
            for part in fields(Scored)
            for name, values in _plain(getattr(one.scored, part.name)).items()
        }
        arrays |= {f"{i}/{side}": getattr(one, side) for i, one in enumerate(self.batches) for side in ("clean", "corrupted")}
        arrays |= {"cells": np.array(list(cells), dtype=np.int64), "effects": np.array(list(cells.values()), dtype=np.float64)}
        about = {
            "patchlab_checkpoint": FORMAT,
            "identity": self.identity,
            "notes": [one.notes for one in self.batches],
            "batch": number,
            "spent": self.spent(),
            "engine": self.engine if self.meter is None else self.meter.engine,
        }
        stream = io.BytesIO()
        np.savez(stream, about=np.array(json.dumps(about)), **arrays)  # pyright: ignore[reportArgumentType]
        self.keeper.write(stream.getvalue())
        now = time.perf_counter()
        self.due = now + max(SECONDS, 20 * (now - began))


def joined(parts: Sequence[Finished]) -> dict[str, dict[str, list[Any]]]:
    """The notes of several batches, one after the other."""
    notes: dict[str, dict[str, list[Any]]] = {}
    for part in parts:
        for name, groups in part.notes.items():
            for group, values in groups.items():
                notes.setdefault(name, {}).setdefault(group, []).extend(values)
    return notes


@contextmanager
def keeping(
    unfinished: dict[str, Checkpoint], identity: Mapping[str, str | None], checkpoint: str | os.PathLike[str] | Keeper | None
) -> Generator[Checkpoint, None, None]:
    """Give the work of a run: what an interrupted run of the same identity left, or none yet.

    After an exception the work is kept, in the checkpoint or, without one, in ``unfinished``; a note on the exception
    says how to go on. When the run ends normally, what was kept is removed. A new checkpoint begins with what is in ``unfinished``.

    Raises:
        MethodError: the checkpoint is of another run, damaged, or no checkpoint, or the run has a part that cannot be compared.
        OutputError: the checkpoint cannot be written.
    """
    vague = [name for name, value in identity.items() if value is None]
    if vague and checkpoint is not None:
        raise MethodError(f"this run cannot have a checkpoint: its {vague[0]} cannot be compared with that of a later call. {_WHY[vague[0]]}")
    key = json.dumps(identity, sort_keys=True)
    keeper = None if checkpoint is None else keeper_of(checkpoint)
    work = None if keeper is None else _opened(keeper, identity)
    if work is None:
        work = Checkpoint(dict(identity)) if vague or key not in unfinished else unfinished[key]
        work.keeper = keeper
        work.save()  # whether it can be written shows now, not hours later
    unfinished.pop(key, None)
    try:
        yield work
    except BaseException as error:
        _stopped(work, error, vague)
        if work.keeper is None and not vague and str(work):
            while len(unfinished) >= KEPT:
                unfinished.pop(next(iter(unfinished)))
            unfinished[key] = work
        raise
    if work.keeper is not None:
        work.keeper.remove()


_WHY = {
    "metric": "Use a named metric or a plain function of values that can be written down.",
    "surroundings": "Surround it with edits whose sources are runs, tensors or numbers, or give no checkpoint.",
}


def batch_rows(
    unfinished: Mapping[str, Checkpoint], identity: Mapping[str, str | None], checkpoint: str | os.PathLike[str] | Keeper | None
) -> int | None:
    """Examples per batch of an unfinished run that differs in nothing but its batches: their default follows the free memory."""
    known = [work.identity for work in unfinished.values()]
    if checkpoint is not None and (kept := _read(keeper_of(checkpoint))) is not None:
        known = [kept.identity]
    for other in known:
        if other != dict(identity) and {**other, "batches": None} == {**identity, "batches": None}:
            return int(str(other["batches"]).split()[-2])
    return None


def described(sizes: list[int]) -> str:
    """The batches of a run in words."""
    return f"{len(sizes)} batches of at most {max(sizes)} examples"


def _stopped(work: Checkpoint, error: BaseException, vague: list[str]) -> None:
    """Account for an exception: cost so far, a last writing, and a note."""
    if work.meter is not None:
        work.before, work.engine, work.meter = work.spent(), work.meter.engine, None
    if not str(work):
        if work.keeper is not None:
            work.keeper.remove()
        return
    if vague:
        error.add_note(f"patchlab: the finished work ({work}) is not kept: the {vague[0]} cannot be compared with that of a later call.")
        return
    where = "on the model" if work.keeper is None else f"in {work.keeper}"
    note = f"patchlab: the finished work ({work}) is kept {where}; the same call again goes on from there."
    try:
        work.save()
    except PatchlabError as problem:
        note = f"patchlab: the finished work ({work}) could not be kept: {problem}"
    error.add_note(note)


def _opened(keeper: Keeper, identity: Mapping[str, str | None]) -> Checkpoint | None:
    """The work in a checkpoint, which must be of the same run; None if there is none."""
    work = _read(keeper)
    if work is None:
        return None
    differing = [
        f"{name} is {work.identity.get(name)!r} there and {identity.get(name)!r} here"
        for name in dict.fromkeys((*identity, *work.identity))
        if work.identity.get(name) != identity.get(name)
    ]
    if differing:
        raise MethodError(
            f"the checkpoint {keeper} is of another run: {'; '.join(differing)}. It is left as it is: repeat the call that made it, "
            f"give another path, or remove the file."
        )
    return work


_INDEX = "/cells of "
"""Before the name of a site whose effects are sparse: the array of their cells."""


def _plain(effects: Mapping[str, Effects]) -> dict[str, np.ndarray]:
    """Effects as arrays by name."""
    return values_of(effects) | {f"{_INDEX}{name}": one.index for name, one in effects.items() if isinstance(one, Sparse)}


def _effects(arrays: Mapping[str, np.ndarray]) -> dict[str, Effects]:
    """Effects from their arrays."""
    return {
        name: Sparse(arrays[f"{_INDEX}{name}"], values) if f"{_INDEX}{name}" in arrays else values
        for name, values in arrays.items()
        if not name.startswith(_INDEX)
    }


def _read(keeper: Keeper) -> Checkpoint | None:
    try:
        if (data := keeper.read()) is None:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays["about"]))
        if about["patchlab_checkpoint"] != FORMAT:
            raise ValueError(f"format {about['patchlab_checkpoint']}")
        batches: list[Finished] = []
        for i, notes in enumerate(about["notes"]):
            found: dict[str, dict[str, np.ndarray]] = {part.name: {} for part in fields(Scored)}
            for key, values in arrays.items():
                number, _, rest = key.partition("/")
                part, _, name = rest.partition("/")
                if number == str(i) and part in found:
                    found[part][name] = values
            batches.append(
                Finished(Scored(**{name: _effects(values) for name, values in found.items()}), arrays[f"{i}/clean"], arrays[f"{i}/corrupted"], notes)
            )
        cells = dict(zip(arrays["cells"].tolist(), arrays["effects"], strict=True))
        forwards, backwards, positions, seconds = about["spent"]
        spent = (forwards, backwards, positions, float(seconds))
        return Checkpoint(about["identity"], keeper, batches, (about["batch"], cells), spent, about["engine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MethodError(
            f"{keeper} is no checkpoint of patchlab, or it is damaged ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__}). "
            f"It is left as it is: give another path, or remove the file."
        ) from error
