"""Held-out evaluation: circuits are selected on some examples and evaluated on others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchlab.errors import CircuitError
from patchlab.tasks.task import Task


@dataclass(frozen=True)
class Sets:
    """Three parts of a task that share no pair of prompts.

    Args:
        choosing: half of the pairs: edges are scored, and circuits of each size chosen, on these.
        finding: a quarter: the smallest faithful size is found on these.
        reporting: the other quarter: the faithfulness at that size is measured on these.
    """

    choosing: Task
    finding: Task
    reporting: Task

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Per set its number of pairs and their fingerprints, as plain values."""
        return {name: {"n": len(part), "pairs": list(part.pair_fingerprints)} for name, part in vars(self).items()}

    def __repr__(self) -> str:
        return f"{len(self.choosing)} pairs for choosing, {len(self.finding)} for finding the size, {len(self.reporting)} for reporting"


def three_sets(task: Task, *, seed: int = 0) -> Sets:
    """Cut a task into pairs for choosing circuits, for finding the smallest faithful one, and for reporting how faithful it is.

    The first is the first part of :meth:`patchlab.Task.split`; its second part is cut once more. What is found smallest on some pairs is lucky on
    them, so its faithfulness is reported on others.

    Args:
        task: the task.
        seed: of the draw.

    Raises:
        CircuitError: too few pairs: each set needs two that differ, the least that an interval can be had from.

    Example:
        >>> sets = three_sets(task)  # doctest: +SKIP
    """
    distinct = len(set(task.pair_fingerprints))
    if distinct >= _LEAST:
        choosing, rest = task.split(seed=seed)
        if len(set(rest.pair_fingerprints)) > 1:
            sets = Sets(choosing, *rest.split(seed=seed))
            if all(len(set(part.pair_fingerprints)) > 1 for part in vars(sets).values()):
                return sets
    raise CircuitError(
        f"cannot cut {task.name} with {len(task)} pairs, {distinct} of them distinct, into three sets, for choosing circuits, for finding the "
        f"smallest faithful one and for reporting: each needs two distinct pairs. Use at least {_LEAST} distinct pairs."
    )


_LEAST = 8
"""Distinct pairs that give a half and two quarters of two each."""


def shared_examples(provenance: Mapping[str, Any], task: Task) -> int | None:
    """The number of examples of a task that are among those that scores or a circuit come from; None where that is not known."""
    if "task_pairs" in provenance:
        seen = set(provenance["task_pairs"])
        return sum(name in seen for name in task.pair_fingerprints)
    return len(task) if provenance.get("task_fingerprint") == task.fingerprint else None


def check_disjoint(provenance: Mapping[str, Any], task: Task, what: str, *, allow_overlap: bool) -> str:
    """Refuse to evaluate on the examples that were selected on; returns what is known, for the provenance.

    Raises:
        CircuitError: shared examples, unless ``allow_overlap``.
    """
    shared = shared_examples(provenance, task)
    if shared is None:
        return "not known"
    if shared and not allow_overlap:
        raise CircuitError(
            f"{what} comes from {shared} of the {len(task)} examples of {task.name} that it would be evaluated on, which favours it. "
            f"Select and evaluate on disjoint examples (task.split() gives two parts), or pass allow_overlap=True to accept that."
        )
    return f"{shared} of {len(task)} examples shared" if shared else "disjoint"
