"""Subject-verb agreement (after Finlayson et al. 2021, arXiv 2106.06087, and Marks et al. 2024, arXiv 2403.19647)."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import ADVERBS, PEOPLE, PREPOSITIONS, RELATIVE_VERBS, VERBS
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

# SUBJECT is the noun the verb agrees with, OTHER a noun it does not; the adverb keeps the verb from following a noun directly
TEMPLATES = {
    "simple": "The {SUBJECT} {adverb}",
    "within_rc": "The {OTHER} that the {SUBJECT} {adverb}",
    "across_rc": "The {SUBJECT} that the {OTHER} {RC_VERB} {adverb}",
    "across_pp": "The {SUBJECT} {PREP} the {OTHER} {adverb}",
}


@generator("agreement", variant=TEMPLATES)
def agreement(words: Lexicon, rng: Random, *, variant: str = "across_rc") -> Iterator[Pair]:
    """Number: "The teachers that the boy likes often" -> are, not is.

    ``variant``: simple, within_rc (the verb agrees with the noun inside the relative clause), across_rc (with the noun before
    it) or across_pp (with the noun before a prepositional phrase). The corruption changes the number of the subject, so the
    answer turns round.
    """
    nouns, verbs = words.couples(PEOPLE, "people"), words.couples(VERBS, "verbs", at_least=1)
    fillers = {"adverb": words.words(ADVERBS, "adverbs", at_least=1)}
    if variant == "across_pp":
        fillers["PREP"] = words.words(PREPOSITIONS, "prepositions", at_least=1)
    rc_verbs = words.couples(RELATIVE_VERBS, "verbs", at_least=1) if variant == "across_rc" else [("", "")]
    while True:
        (subject, other), number, other_number = rng.sample(nouns, 2), rng.randrange(2), rng.randrange(2)
        verb = rng.choice(verbs)
        fills = {key: rng.choice(values) for key, values in fillers.items()}
        fills |= {"SUBJECT": subject[number], "OTHER": other[other_number], "RC_VERB": rng.choice(rc_verbs)[other_number]}
        right, wrong = [" " + verb[number]], [" " + verb[1 - number]]
        yield words.pair(TEMPLATES[variant], fills, {"SUBJECT": subject[1 - number]}, right, wrong, name=variant)
