"""Plans: what a run will compute, known before it starts, and how long that takes here."""

import time
from dataclasses import dataclass

from patchlab.engine import Program, run
from patchlab.methods.setting.unpatched import required
from patchlab.models import Model
from patchlab.tasks.task import Task

LONG = 60.0
"""Seconds from which on a run is announced."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run: what it will compute.

    Args:
        forwards: forward passes of a batch; of exact patching the cells, of which several may share one.
        backwards: backward passes of a batch.
        work: all of it, in forward passes of every prompt of one side: a backward pass counts as two, an exactly patched cell as the share of the
            model that is computed again.
        uncounted: sites whose cells only the unpatched runs show; patching them comes on top.
    """

    forwards: int
    backwards: int
    work: float
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        backwards = f" and {self.backwards:,} backward" if self.backwards else ""
        more = (
            f", and one for each cell of {', '.join(self.uncounted)}, of which the unpatched runs show how many there are" if self.uncounted else ""
        )
        return f"{self.forwards:,} forward{backwards} passes{more}"


def forward_seconds(model: Model, task: Task, rows: int = 32) -> float:
    """Seconds that a forward pass of every prompt of one side takes, measured on one batch of at most so many rows."""
    batch = max(task.batches(rows, model.device), key=lambda one: one.clean.numel())
    started = time.perf_counter()
    logits = run(model, Program(batch.clean, batch.examples, positions=batch.positions, logits="answer")).logits
    required(logits).sum().item()  # waits for a device that computes on its own
    seconds = time.perf_counter() - started
    return seconds * sum(map(len, task.pairs)) / batch.clean.numel()
