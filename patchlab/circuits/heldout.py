"""Selecting circuits on some examples and evaluating them on others."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from patchlab.errors import CircuitError
from patchlab.tasks.task import Task


def split(task: Task, share: float | int = 0.5, *, seed: int = 0) -> tuple[Task, Task]:
    """Cut a task into examples to select circuits on and examples to evaluate them on; equal pairs of prompts stay together.

    Args:
        task: the task.
        share: of the examples that go into the first part, between 0 and 1.
        seed: of the draw.

    Raises:
        CircuitError: a share that leaves a part empty, or fewer than two distinct pairs.

    Example:
        >>> select, held_out = split(task)  # doctest: +SKIP
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(task.pair_fingerprints):
        groups.setdefault(name, []).append(i)
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    wanted = round(share * len(task))
    first: list[int] = []
    for group in order:
        if len(first) + len(members[group]) / 2 <= wanted:
            first += members[group]
    rest = sorted(set(range(len(task))) - set(first))
    if not first or not rest:
        raise CircuitError(
            f"cannot cut {task.name} with {len(task)} examples, {len(groups)} of them distinct, at share {share}: a part would be empty. "
            f"Use more examples, or a share between 0 and 1."
        )
    return task.select(sorted(first)), task.select(rest)


def overlap(provenance: Mapping[str, Any], task: Task) -> int | None:
    """How many examples of a task are among those that scores or a circuit come from; None where that is not known."""
    if "task_pairs" in provenance:
        seen = set(provenance["task_pairs"])
        return sum(name in seen for name in task.pair_fingerprints)
    return len(task) if provenance.get("task_fingerprint") == task.fingerprint else None


def check_disjoint(provenance: Mapping[str, Any], task: Task, what: str, *, allow_overlap: bool) -> str:
    """Refuse to evaluate on the examples that were selected on; returns what is known, for the provenance.

    Raises:
        CircuitError: shared examples, unless ``allow_overlap``.
    """
    shared = overlap(provenance, task)
    if shared is None:
        return "not known"
    if shared and not allow_overlap:
        raise CircuitError(
            f"{what} comes from {shared} of the {len(task)} examples of {task.name} that it would be evaluated on, which favours it. "
            f"Select and evaluate on disjoint examples (circuits.split(task) gives two parts), or pass allow_overlap=True to accept that."
        )
    return f"{shared} of {len(task)} examples shared" if shared else "disjoint"
