"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import NAMES, OBJECTS, PLACES
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

TEMPLATES = {
    "plain": "When {FIRST} and {SECOND} went to the {PLACE}, {S2} gave a {OBJECT} to",
    "after": "After {FIRST} and {SECOND} came to the {PLACE}, {S2} gave a {OBJECT} to",
    "then": "Then, {FIRST} and {SECOND} were working at the {PLACE}. Later {S2} gave a {OBJECT} to",
    "story": "When {FIRST} and {SECOND} went to the {PLACE}, the music was quiet and the water was cold. Then {S2} gave a {OBJECT} to",
    "people": "While {FIRST} and {SECOND} were at the {PLACE}, the other students were happy, so {S2} gave a {OBJECT} to",
}
ORDERS = {"ABBA": {"FIRST": "IO", "SECOND": "S1"}, "BABA": {"FIRST": "S1", "SECOND": "IO"}}


def _ordered(template: str, order: str) -> str:
    for slot, role in ORDERS[order].items():
        template = template.replace(f"{{{slot}}}", f"{{{role}}}")
    return template


@generator("ioi", order=("ABBA", "BABA", "mixed"), corruption=("s2_io", "abc"), template=(*TEMPLATES, "mixed"))
def ioi(words: Lexicon, rng: Random, *, order: str = "ABBA", corruption: str = "s2_io", template: str = "plain") -> Iterator[Pair]:
    """Indirect object: "When Mary and John went to the store, John gave a drink to" -> Mary.

    ``order``: ABBA (the indirect object first), BABA or mixed. ``corruption``: s2_io puts the indirect object in the place of the
    second subject, so that the answer turns round; abc puts three other names, so that nothing is to be known. ``template``:
    one of ``TEMPLATES`` or mixed (then positions line up by name only).
    """
    names = words.words(NAMES, "names", at_least=5)
    places, objects = words.words(PLACES, "places", at_least=1), words.words(OBJECTS, "objects", at_least=1)
    while True:
        this = rng.choice(list(ORDERS)) if order == "mixed" else order
        which = rng.choice(list(TEMPLATES)) if template == "mixed" else template
        io, s, *others = rng.sample(names, 5)
        clean = {"IO": io, "S1": s, "S2": s, "PLACE": rng.choice(places), "OBJECT": rng.choice(objects)}
        corrupted = {"S2": io} if corruption == "s2_io" else {"IO": others[0], "S1": others[1], "S2": others[2]}
        text = _ordered(TEMPLATES[which], this)
        yield words.pair(text, clean, corrupted, [" " + io], [" " + s], name=f"{which}.{this}", after={"AFTER_S1": "S1"})
