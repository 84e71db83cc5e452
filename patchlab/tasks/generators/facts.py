"""Facts about countries."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import CAPITALS, LANGUAGES
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

RELATIONS = {"capital": ("The capital of {SUBJECT} is called", CAPITALS), "language": ("People who live in {SUBJECT} usually speak", LANGUAGES)}


@generator("facts", relation=(*RELATIONS, "mixed"))
def facts(words: Lexicon, rng: Random, *, relation: str = "capital") -> Iterator[Pair]:
    """Recall: "The capital of France is called" -> Paris.

    ``relation``: capital, language or mixed. The corruption names another country, so the answer turns round.
    """
    chosen = list(RELATIONS) if relation == "mixed" else [relation]
    known = {name: words.couples(RELATIONS[name][1], "countries") for name in chosen}
    while True:
        name = rng.choice(chosen)
        (subject, answer), (other, wrong) = rng.sample(known[name], 2)
        if answer != wrong:
            yield words.pair(RELATIONS[name][0], {"SUBJECT": subject}, {"SUBJECT": other}, [" " + answer], [" " + wrong], name=name)
