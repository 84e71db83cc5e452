"""Packs: cells that change different prompts of a batch at the same place, run together.

A feature is active in some prompts only. Prompts of a batch do not interact, so cells of one layer and position whose changes lie in different
prompts can share one run: each prompt has the change of the one cell that changes it. A prompt that a cell does not change has no effect of it.
"""

from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class Changed:
    """The prompts that a set of cells changes, ``[row]``, and the place that it has in common with those that it can share a run with."""

    place: Hashable
    rows: Bool[np.ndarray, " row"]


def packs_of(sets: Sequence[Changed | None]) -> list[list[int]]:
    """Numbers of the sets that share a run: of one place and no prompt in common, first fit; None shares with none."""
    packs: list[list[int]] = []
    taken: dict[Hashable, list[tuple[int, Bool[np.ndarray, " row"]]]] = {}
    for i, one in enumerate(sets):
        if one is None:
            packs.append([i])
            continue
        at = taken.setdefault(one.place, [])
        place = next((place for place, (_, rows) in enumerate(at) if not (rows & one.rows).any()), None)
        if place is None:
            at.append((len(packs), one.rows.copy()))
            packs.append([i])
        else:
            number, rows = at[place]
            packs[number].append(i)
            at[place] = number, rows | one.rows
    return packs


class Unpacked(MutableMapping[int, Any]):
    """Effects of packs by number, kept as those of the sets in them: the effect of a pack is the sum of theirs.

    Args:
        finished: effects of sets by number, ``[row]``.
        packs: the sets of each pack.
        sets: what each of them changes.
        more: told how many sets besides the first a finished pack holds, for the progress that counts sets.
    """

    def __init__(
        self,
        finished: MutableMapping[int, Float[np.ndarray, " row"]],
        packs: Sequence[Sequence[int]],
        sets: Sequence[Changed | None],
        more: Callable[[int], Any] | None = None,
    ) -> None:
        self.finished, self.packs, self.sets, self.more = finished, packs, sets, more

    def __setitem__(self, pack: int, effects: Float[np.ndarray, " row"]) -> None:
        for i in self.packs[pack]:
            one = self.sets[i]
            self.finished[i] = effects if one is None else np.where(one.rows, effects, 0.0)
        if self.more is not None:
            self.more(len(self.packs[pack]) - 1)

    def __getitem__(self, pack: int) -> Float[np.ndarray, " row"]:
        return np.sum([self.finished[i] for i in self.packs[pack]], 0)

    def __delitem__(self, pack: int) -> None:
        for i in self.packs[pack]:
            del self.finished[i]

    def __contains__(self, pack: object) -> bool:
        return isinstance(pack, int) and 0 <= pack < len(self.packs) and all(i in self.finished for i in self.packs[pack])

    def __iter__(self) -> Iterator[int]:
        return (pack for pack in range(len(self.packs)) if pack in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
