"""Induction: what followed last time follows again (Olsson et al. 2022, arXiv 2209.11895)."""

from collections.abc import Iterator
from random import Random

from patchlab.errors import TaskError
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import COMMON, OBJECTS, PLACES
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair


@generator("induction")
def induction(words: Lexicon, rng: Random, *, length: int = 8, repeat: int = 4) -> Iterator[Pair]:
    """Repeats: "wall tree door bird stone ... wall tree door" -> bird.

    ``length`` random common words, then the first ``repeat`` of them again; the answer is the word that came next. The corruption puts
    another word there, so the answer turns round. Positions: A1 is the last word's first place, B1 the answer's.
    """
    if not 1 <= repeat < length:
        raise TaskError(f"induction needs 1 <= repeat < length; got repeat={repeat} and length={length}.")
    common = words.words([*COMMON, *PLACES, *OBJECTS], "common words", at_least=length + 1)
    roles = {repeat: "A1", repeat + 1: "B1"}
    slots = [roles.get(i, f"w{i}") for i in range(1, length + repeat + 1)]
    template = "".join(f" {{{slot}}}" for slot in slots)
    while True:
        *drawn, other = rng.sample(common, length + 1)
        clean = dict(zip(slots, [*drawn, *drawn[:repeat]], strict=True))
        yield words.pair(template, clean, {"B1": other}, [" " + drawn[repeat]], [" " + other], name=f"{length}+{repeat}")
