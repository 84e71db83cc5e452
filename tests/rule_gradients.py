"""Gradients at sites of a model under backward rules, through the engine."""

import copy
from dataclasses import replace
from typing import Any

from families import swap_task
from torch import Tensor

from patchlab.engine import Program, run
from patchlab.rules import Composite, get_composite


def gradients(model: Any, rules: str | Composite | None, where: tuple[tuple[str, int | None], ...], task: Any = None) -> dict[Any, Tensor]:
    """Of the metric at the corrupted prompts."""
    task = swap_task() if task is None else task
    (batch,) = task.batches()
    composite = None if rules is None else get_composite(rules)
    return dict(
        run(model, Program(batch.corrupted, batch.examples, rules=composite, gradients=where, metric=task.metric, answers=batch.answers)).gradients
    )


def with_places(model: Any, places: tuple[Any, ...]) -> Any:
    """A stand-in with other places."""
    other = copy.copy(model)
    other.arch = replace(model.arch, places=places)
    return other
