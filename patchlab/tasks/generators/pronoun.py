"""Gendered pronouns (after Mathwin et al. 2023, who read GPT-2's "he" and "she" from a name)."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import MEN, OBJECTS, PLACES, WOMEN
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

TEMPLATE = "Because {NAME} was at the {PLACE} with a {OBJECT},"


@generator("pronoun")
def pronoun(words: Lexicon, rng: Random) -> Iterator[Pair]:
    """Gender of a name: "Because Mary was at the store with a book," -> she, not he.

    The corruption puts a name of the other gender, so the answer turns round.
    """
    names = words.words(WOMEN, "women's names", at_least=1), words.words(MEN, "men's names", at_least=1)
    places, objects = words.words(PLACES, "places", at_least=1), words.words(OBJECTS, "objects", at_least=1)
    pronouns = " she", " he"
    while True:
        gender = rng.randrange(2)
        clean = {"NAME": rng.choice(names[gender]), "PLACE": rng.choice(places), "OBJECT": rng.choice(objects)}
        other = rng.choice(names[1 - gender])
        yield words.pair(TEMPLATE, clean, {"NAME": other}, [pronouns[gender]], [pronouns[1 - gender]], name="because")
