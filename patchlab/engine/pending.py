"""Pending values: what a sweep has computed and the host has not read yet; and work that is done in halves where memory runs out."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.errors import ModelError

Item = TypeVar("Item")
Found = TypeVar("Found")
SECONDS = 5.0
"""How often values are read from a device that computes by itself: reading makes the host wait until it is done."""


@dataclass
class Pending:
    """Values on their way to the host: read at once on the CPU, elsewhere every few seconds and at the end, all in one move.

    Args:
        done: gets the numbers of cells that are finished and their values, ``[cell, row]`` on the CPU.
        problem: what to say if one of them is not finite.
    """

    done: Callable[[list[int], Tensor], Any] | None
    problem: str
    numbers: list[list[int]] = field(default_factory=list[list[int]])
    values: list[Tensor] = field(default_factory=list[Tensor])
    due: float = field(default_factory=lambda: time.perf_counter() + SECONDS)

    def add(self, numbers: list[int], values: Float[Tensor, "cell row"]) -> None:
        """Note finished cells.

        Raises:
            ModelError: a value that has been read is not finite.
        """
        self.numbers.append(numbers)
        self.values.append(values)
        if values.device.type == "cpu" or time.perf_counter() >= self.due:
            self.read()

    def read(self) -> None:
        """Read what is there.

        Raises:
            ModelError: a value is not finite.
        """
        if not self.values:
            return
        numbers, found = self.numbers, torch.cat(self.values).cpu()
        self.numbers, self.values, self.due = [], [], time.perf_counter() + SECONDS
        if not bool(torch.isfinite(found).all()):
            raise ModelError(self.problem)
        if self.done is not None:
            first = 0
            for some in numbers:
                self.done(some, found[first : first + len(some)])
                first += len(some)

    def __enter__(self) -> "Pending":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.read()
            return
        with contextlib.suppress(RuntimeError, ModelError):  # what was finished before an interruption is kept, if the device still answers
            self.read()


@dataclass
class Room:
    """How many items have room in memory at once, as far as it is known: None until it has run out."""

    most: int | None = None


def in_parts(run: Callable[[Sequence[Item]], Found], items: Sequence[Item], room: Room) -> Iterator[tuple[Sequence[Item], Found]]:
    """Items that are run together, with what came out; where memory runs out in halves, and so from then on."""
    left = [items]
    while left:
        part = left.pop()
        if room.most is not None and len(part) > room.most:
            left += [part[i : i + room.most] for i in range(0, len(part), room.most)][::-1]
            continue
        found = _tried(run, part)
        if found is None:
            room.most = len(part) // 2
            left.append(part)
            continue
        yield part, found[0]


def _tried(run: Callable[[Sequence[Item]], Found], part: Sequence[Item]) -> tuple[Found] | None:
    """What came out; None if memory ran out, once what the run held is gone."""
    try:
        return (run(part),)
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(part) < 2:
            raise
    empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device has run out of memory (Apple's GPUs say it in words alone)."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def empty_cache() -> None:
    """Give back to the device what torch holds and does not use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
