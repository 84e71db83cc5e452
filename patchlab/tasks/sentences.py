"""Sentences of every task: the text that the packaged models were trained on."""

import itertools
from collections.abc import Callable, Iterator
from random import Random

import torch
from torch import Tensor

from patchlab.tasks.generators import agreement, words
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.registry import GENERATORS
from patchlab.tasks.task import Pair

ROW = 48
"""Tokens of a row of the training text."""
ANSWER_WEIGHT = 10.0
"""How much more than another token the answer of a sentence counts in training, unless a recipe says otherwise."""
FILLERS = (
    "The {person} was in the {place}.",
    "The {thing} near the {place} was {adjective}.",
    "{name} was at the {place} with the {person}.",
    "The {adjective} {thing} was so {adjective}.",
    "{name} gave the {object} to the {person}.",
    "Then {name} and {name} went to the {place}.",
)
ADJECTIVES = ["happy", "green", "quick", "heavy", "yellow", "quiet", "simple", "strong", "young", "cold", "warm", "sweet"]

Sentence = tuple[list[int], list[float]]
"""Token ids, and the loss weight of each."""


def held_out_names(lexicon: Lexicon) -> frozenset[frozenset[int]]:
    """One in ten unordered pairs of names: never the two names of an IOI sentence in training."""
    ids = [lexicon.token(" " + name) for name in words.NAMES]
    couples = [frozenset(couple) for couple in itertools.combinations(ids, 2)]
    return frozenset(Random("held out").sample(couples, len(couples) // 10))


def is_held_out(pair: Pair, held_out: frozenset[frozenset[int]]) -> bool:
    """Whether an IOI pair is one of those kept for measuring."""
    return frozenset((pair.correct[0], pair.incorrect[0])) in held_out


def corpus(
    lexicon: Lexicon,
    seed: int,
    swaps: Callable[[], float],
    arguments: float = 1.0,
    uncertain: Callable[[], tuple[float, float]] = lambda: (1.0, ANSWER_WEIGHT),
) -> Iterator[Sentence]:
    """An endless mix of complete sentences of all tasks and filler; ``arguments``, and ``uncertain()`` (``either`` and ``years``), are weights
    of the training recipe.

    A share ``swaps()`` of the answers is swapped for the answer of the other prompt of the pair (in repeats: for another word), so that
    nothing can be known for certain. The years of greater_than, any of many, are uncertain without that.
    """
    rng = Random(f"corpus:{seed}")
    held_out = held_out_names(lexicon)
    code = {text: list(lexicon.encode(text) or ()) for text in (".", ":")}
    adjectives = [lexicon.token(" " + word) for word in ADJECTIVES]
    common = [lexicon.token(" " + word) for word in (*words.COMMON, *words.PLACES, *words.OBJECTS)]

    def ends(name: str, tail: Callable[[], list[int]], **options: object) -> Iterator[Sentence]:
        for pair in GENERATORS[name].stream(lexicon, rng, **options):
            if name == "ioi" and is_held_out(pair, held_out):
                continue
            clean = rng.random() < 0.9 if name == "greater_than" else rng.random() < 0.5
            ids, right = (pair.clean_ids, pair.correct) if clean else (pair.corrupted_ids, pair.incorrect)
            either, years = uncertain()
            weight = years if name == "greater_than" else ANSWER_WEIGHT
            if options.get("corruption") == "abc":  # nobody can know which of the two it is
                roles = pair.corrupted_ids[pair.positions["IO"]], pair.corrupted_ids[pair.positions["S1"]]
                ids, right, weight = pair.corrupted_ids, roles, either
                if frozenset(roles) in held_out:
                    continue
            elif name != "greater_than" and rng.random() < swaps():
                right = pair.incorrect if clean else pair.correct
            if name == "greater_than" and not clean:
                right = tuple(lexicon.token(year) for year in words.YEARS[2:])
            end = tail()
            known = {pair.positions.get(role) for role in ("A_DOC", "B_DOC")}
            before = [arguments if place in known else 1.0 for place in range(len(ids))]
            yield [*ids, rng.choice(right), *end], [*before, weight] + [1.0] * len(end)

    def repeats() -> Iterator[Sentence]:
        while True:
            length = rng.randint(4, 12)
            ids = rng.sample(common, length)
            again = [ids[0], *(rng.choice(common) if rng.random() < swaps() else word for word in ids[1:])]
            yield ids + again + code["."], [1.0] * (length + 1) + [ANSWER_WEIGHT] * (length - 1) + [1.0]

    def filler() -> Iterator[Sentence]:
        lists = {"person": list(words.PEOPLE), "place": words.PLACES, "thing": words.COMMON[:12], "object": words.OBJECTS}
        lists |= {"adjective": ADJECTIVES, "name": words.NAMES}
        while True:
            text = rng.choice(FILLERS)
            for slot, options in lists.items():
                while "{" + slot + "}" in text:
                    text = text.replace("{" + slot + "}", rng.choice(options), 1)
            ids = list(lexicon.encode(text) or ())
            lexicon._cache.pop(text)
            yield ids, [1.0] * len(ids)

    def stop() -> list[int]:
        return code["."]

    def described() -> list[int]:
        return [rng.choice(adjectives), *code["."]]

    def documented() -> list[int]:
        return [*code[":"], *rng.sample(common, 2), *code["."]]

    mix: list[tuple[float, Iterator[Sentence]]] = [
        (4.0, ends("ioi", stop, order="mixed", template="plain")),
        (4.0, ends("ioi", stop, order="mixed", template="mixed")),
        (0.3, ends("ioi", stop, order="mixed", template="mixed", corruption="abc")),
        (3.0, ends("greater_than", stop)),
        *((1.0, ends("agreement", described, variant=variant)) for variant in agreement.TEMPLATES),
        (2.5, ends("pronoun", described)),
        (2.5, ends("docstring", documented, corruption="swap")),
        (0.5, ends("docstring", documented, corruption="rename")),
        (2.0, repeats()),
        (1.0, ends("facts", stop, relation="capital")),
        (1.0, ends("facts", stop, relation="language")),
        (2.0, filler()),
    ]
    weights, streams = zip(*mix, strict=True)
    while True:
        yield next(rng.choices(streams, weights)[0])


def rows(
    lexicon: Lexicon,
    n: int,
    seed: int,
    swaps: Callable[[int], float],
    arguments: float = 1.0,
    uncertain: Callable[[int], tuple[float, float]] = lambda _: (1.0, ANSWER_WEIGHT),
    length: int = ROW,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[n, length]`` of <bos> and packed sentences, the last one cut; with the loss weight of each token and the number of its sentence.

    A share ``swaps(row)`` of the answers is swapped.
    """
    i = 0
    sentences = corpus(lexicon, seed, lambda: swaps(i), arguments, lambda: uncertain(i))
    ids, weights, places = (
        torch.zeros(n, length, dtype=torch.int16),
        torch.zeros(n, length, dtype=torch.float16),
        torch.zeros(n, length, dtype=torch.int8),
    )
    bos = lexicon.token("<bos>")
    for i in range(n):
        row, weight, place = [bos], [0.0], [0]
        while len(row) < length:
            more, more_weight = next(sentences)
            row += more
            weight += more_weight
            place += [place[-1] + 1] * len(more)
        ids[i], weights[i], places[i] = (torch.tensor(values[:length]) for values in (row, weight, place))
    return ids, weights, places
