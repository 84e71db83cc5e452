"""Batches of a run: cut as its finished work was cut, and halved where memory runs out."""

from collections.abc import Iterable, Sequence

import numpy as np

from patchlab.tasks.task import Batch


def cut_as(batches: Sequence[Batch], sizes: Iterable[int]) -> list[Batch]:
    """The same examples in the same order, the first batches of these sizes: what a run has finished in smaller batches is not done again."""
    left, found = list(batches), list[Batch]()
    for size in sizes:
        first = left.pop(0)
        found += _split(first, size)[:1]
        left = [*_split(first, size)[1:], *left]
    return [*found, *left]


def halved(batches: Sequence[Batch], number: int) -> list[Batch]:
    """The same with no batch from ``number`` on larger than half of that one."""
    size = (len(batches[number]) + 1) // 2
    parts = [batch.rows(np.arange(first, min(first + size, len(batch)))) for batch in batches[number:] for first in range(0, len(batch), size)]
    return [*batches[:number], *parts]


def _split(batch: Batch, size: int) -> list[Batch]:
    if size >= len(batch):
        return [batch]
    return [batch.rows(np.arange(size)), batch.rows(np.arange(size, len(batch)))]
