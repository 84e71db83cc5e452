"""The meter: what a run of a method has computed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from patchlab.engine import Program, Result, run
from patchlab.engine.pending import Room
from patchlab.models import Model


class Meter:
    """Counts what was computed, and remembers which engine did it.

    ``unit`` is what the progress bar counts: every ``forward``, or ``cell`` (then whoever runs cells moves the bar). ``cells`` are the
    finished cells of the batch under way, with their effects per example; ``keep`` is called when there are more of them.
    """

    def __init__(self, bar: Any, unit: str = "forward") -> None:
        self.engine = "literal"
        self.forwards = self.backwards = self.positions = 0
        self.bar, self.unit = bar, unit
        self.cells: dict[int, np.ndarray] = {}
        self.keep: Callable[[], None] = _nothing
        self.notes: list[str] = []

    def run(self, model: Model, program: Program, *, cache: Any = None) -> Result:
        """Run a program and count its work."""
        return self.count(run(model, program, cache=cache))

    def note_room(self, room: Room, what: str) -> None:
        """Note that memory ran out with more cells at once, if it did."""
        if room.most is not None:
            self.notes.append(f"memory ran out, so at most {room.most} {what} were patched at once")

    def count(self, result: Result) -> Result:
        """Count the work of a run."""
        forwards, backwards, positions = result.work
        self.forwards, self.backwards, self.positions = self.forwards + forwards, self.backwards + backwards, self.positions + positions
        if self.unit == "forward":
            self.bar.update(forwards)
        return result


def _nothing() -> None:
    """What is done with finished cells that nobody keeps."""
