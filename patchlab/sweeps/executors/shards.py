"""Shards of a sweep: parts that the jobs of an array do, each in a folder of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from patchlab.errors import SweepError
from patchlab.sweeps.spec import RunSpec


@dataclass(frozen=True)
class Shard:
    """One of several parts of a sweep, which begin at 1: ``str()`` and :meth:`parse` write it ``2/8``.

    >>> Shard.parse("2/8")
    Shard(number=2, of=8)
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise SweepError(f"shards are numbered from 1 to their number, such as 1/8 to 8/8; got {self}.")

    @staticmethod
    def parse(text: str) -> "Shard":
        """The shard of a text.

        Raises:
            SweepError: it is not of the form i/n, or i is not from 1 to n.
        """
        if not (found := re.fullmatch(r"([0-9]+)/([0-9]+)", text)):
            raise SweepError(f"a shard is i/n, such as 2/8 for the second of eight; got {text!r}.")
        return Shard(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def part(self, runs: Sequence[RunSpec]) -> list[RunSpec]:
        """The runs of this shard, in their order.

        Raises:
            SweepError: more shards than groups of runs that share work.
        """
        return split(runs, self.of)[self.number - 1]


def split(runs: Sequence[RunSpec], n: int) -> list[list[RunSpec]]:
    """The runs of each of ``n`` shards: runs that share work stay together, and the shards have about as many runs each.

    Groups go, the largest first, to the shard that has the fewest runs so far; among groups of one size those with the same sites and the same model
    follow one another, so that every shard gets about as many of them. The order of the runs does not matter for what a shard gets.

    Raises:
        SweepError: more shards than groups, or fewer than one.
    """
    groups: dict[str, list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    if not 1 <= n <= len(groups):
        raise SweepError(f"{len(runs)} runs in {len(groups)} groups that share work cannot be cut into {n} shards; take 1 to {len(groups)}.")

    def place(name: str) -> tuple[int, tuple[str, ...], str, str]:
        first = groups[name][0]
        return -len(groups[name]), first.what.sites, first.model.model_dump_json(include={"content", "dtype"}), name

    home: dict[str, int] = {}
    sizes = [0] * n
    for name in sorted(groups, key=place):
        home[name] = sizes.index(min(sizes))
        sizes[home[name]] += len(groups[name])
    return [[run for run in runs if home[run.group] == i] for i in range(n)]
