"""What a random sample of cells says about the cells that were not looked at."""

import math
from dataclasses import dataclass

from patchlab.errors import MethodError

_ROUNDING = 1e-9
"""Ties are kept, so rounding can only make the bound wider."""


def most_exceeding(population: int, sample: int, exceeding: int, confidence: float = 0.95) -> int:
    """Upper confidence bound on how many of a population exceed a threshold, from a sample drawn without replacement.

    The largest K for which seeing ``exceeding`` or fewer has a probability of at least 1 − confidence under the hypergeometric law
    (the one-sided Clopper–Pearson construction: Buonaccorsi 1987, American Statistician 41). Whatever the true K, the bound
    falls below it with a probability of at most 1 − confidence.

    >>> most_exceeding(200, 30, 0), most_exceeding(200, 59, 0), most_exceeding(200, 200, 3)
    (17, 8, 3)

    Raises:
        MethodError: numbers that no sample can give.
    """
    if not 0 <= exceeding <= sample <= population:
        raise MethodError(
            f"a sample of {sample} from {population} with {exceeding} exceeding cannot be; "
            f"the sample is at most the population, and what exceeds at most the sample."
        )
    if not 0 < confidence < 1:
        raise MethodError(f"confidence is {confidence}; it must be between 0 and 1, such as 0.95.")
    low, high = exceeding, population - sample + exceeding  # both are possible; the probability falls as K grows
    while low < high:
        middle = (low + high + 1) // 2
        if _at_most(population, middle, sample, exceeding) >= 1 - confidence - _ROUNDING:
            low = middle
        else:
            high = middle - 1
    return low


def _at_most(population: int, marked: int, sample: int, seen: int) -> float:
    """Probability of at most ``seen`` marked ones in the sample."""
    whole = _log_choose(population, sample)
    counts = range(max(0, sample - (population - marked)), min(seen, marked, sample) + 1)
    return math.fsum(math.exp(_log_choose(marked, i) + _log_choose(population - marked, sample - i) - whole) for i in counts)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@dataclass(frozen=True)
class Bound:
    """How many of the cells that the screen did not bring up may exceed a threshold that was fixed before the sample was drawn.

    It bounds a number of cells, and only that: a sample of single cells says nothing about how large a missed effect may be.

    Args:
        confidence: probability, over samples, with which the statement holds.
        population: live cells that were not verified when the sample was drawn.
        sample: how many of them were drawn at random and patched.
        exceeding: how many of those exceed the threshold.
        threshold: |effect| in metric units: of the k-th verified cell, or the target.
        unit: of the metric.
    """

    confidence: float
    population: int
    sample: int
    exceeding: int
    threshold: float
    unit: str = ""

    def __post_init__(self) -> None:
        _ = self.at_most

    @property
    def at_most(self) -> int:
        """Upper bound on the number of cells of the population that exceed the threshold, those of the sample included."""
        return most_exceeding(self.population, self.sample, self.exceeding, self.confidence)

    @property
    def unseen(self) -> int:
        """Upper bound on the number of never patched cells that exceed the threshold."""
        return self.at_most - self.exceeding

    def __str__(self) -> str:
        threshold = f"{self.threshold:.3g} {self.unit}".rstrip()
        if self.sample == self.population:
            return f"every live cell was patched; {self.exceeding} of the last {self.population} exceed {threshold}"
        seen = f"{self.exceeding} of {self.sample} drawn at random did" if self.sample else "none was drawn"
        return (
            f"with {100 * self.confidence:g} % confidence at most {self.at_most} of the {self.population} unverified cells exceed "
            f"{threshold} ({seen}); how large a missed effect may be is not bounded"
        )
