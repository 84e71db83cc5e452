"""Greater-than (Hanna et al. 2023, arXiv 2305.00586)."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import CENTURIES, EVENTS, YEARS
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

TEMPLATE = "The {EVENT} lasted from the year {XX}{YY} to the year {xx}"


@generator("greater_than", metric="prob_diff")
def greater_than(words: Lexicon, rng: Random) -> Iterator[Pair]:
    """Years: "The war lasted from the year 1732 to the year 17" -> any two digits above 32.

    Correct are all two-digit years above the first one, incorrect the others; the corruption makes the first year end in 01.
    Metric: probability of the correct years minus that of the incorrect ones.
    """
    events, centuries = words.words(EVENTS, "events", at_least=1), words.words(CENTURIES, "centuries", at_least=1)
    years = words.words(YEARS, "two-digit years", at_least=len(YEARS), prefix="")
    while True:
        start = rng.randrange(2, 99)
        century = rng.choice(centuries)
        clean = {"EVENT": rng.choice(events), "XX": century, "YY": years[start], "xx": century}
        yield words.pair(TEMPLATE, clean, {"YY": "01"}, years[start + 1 :], years[: start + 1], name="years")
