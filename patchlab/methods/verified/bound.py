r"""Bounds on the cells that were not looked at, from a random sample of them, their price, and intervals for other prompts than those that were run.

*From a sample to a number of misses.* Of N unverified cells an unknown number K exceeds a threshold T that was fixed before. Of s cells
drawn uniformly without replacement, X exceed it: hypergeometric, whatever the effects are. K is refuted when so few exceeding cells have
a probability of at most δ = 1 − confidence under K; the largest K that is not refuted bounds K from above
(:func:`most_exceeding`; one-sided Clopper–Pearson: Buonaccorsi 1987, American Statistician 41). Without exceeding cells the probability is

    P(X = 0) = C(N − K, s) / C(N, s)  ≈  (1 − s/N)^K,

so it takes s/N ≈ 1 − δ^(1/K) to refute K misses: 53 % of the cells for K = 4 and δ = 0.05, and a tenth of the cells refutes 29 and no
fewer. No way of drawing single cells does better without an assumption: the missed cells may be any.

*From misses to recall.* T is the k-th largest verified |effect|. A cell of the true top k that was not patched exceeds T; a patched one is
among the k largest that are returned. So with at most U exceeding cells left unpatched, at least k − U of the true top k are returned.
Where all cells above a target are wanted, F found ones are at least F of F + U.

*Samples that grow.* Looking again and again until the numbers please would refute true K's too often. Here the sizes of the sample at which
one may stop are fixed by the recall that is asked for: n_0 if no cell exceeds, n_1 if one does, and so on (:func:`look_sizes`). Stopping at
n_j with j exceeding cells leaves at most U_j behind, which is wrong if K ≥ K_j = j + U_j + 1. n_j is the smallest size with

    P_{K_j}(X(n_i) ≤ i for some i ≤ j) ≤ δ,

where X(n) counts along one random order of the cells: all earlier looks are inside the event, so δ is spent once over all of them. It holds
for every K: one more exceeding cell can only make X(n) larger along the same order, so the probability falls as K grows, and for
K_j ≤ K < K_{j+1} only the looks up to j can be wrong. n_0 pays nothing for the right to go on. Where the budget ends
before the next look, K is refuted by P_K(X(n_i) ≤ i for some look made, or X(s) ≤ x) ≤ δ, by the same argument. The probabilities
are exact: a first stop at n_i has i exceeding cells up to n_(i−1) and none from there on, so orders are counted by their first stop.
(A confidence sequence as that of Waudby-Smith & Ramdas 2020, arXiv 2006.04347, allows stopping at any time, and is wider at the sizes
that are needed here.)

*From these prompts to others.* On the prompts that were run, a patched cell's effect is known, and nothing about it is uncertain. For the
mean over prompts such as these, an interval around a cell that was chosen because its effect came out large misses too often: the
winner's luck is part of why it won. :func:`half_widths` therefore makes all live cells' intervals, patched or not, hold together
(Bonferroni), so they hold for those that were chosen, however they were chosen. Student's t would do for normal effects and not for skewed
ones: where every cell's effects are exponential, all intervals of the 20 selected of 300 cells hold in 17 % of runs with 16 prompts and in 54 %
with 64. So the width in standard errors is that of a bootstrap-t, one for the cells that are patched at a time (:func:`critical_value`): how
often it is exceeded, on average over cells, is what Bonferroni asks for, and cells together tell the shape of their effects better than each by
itself. In simulations at 95 % (20 selected of 300 cells; 8, 16, 32 and 64 prompts; effects normal, Student's with 4 degrees of freedom, exponential,
lognormal, one cell in ten lognormal, of one lognormal scale per prompt) all 20 hold together in 92 % or more. The price: intervals of
normal effects are 1.2 times as wide as Student's with 16 prompts and 1.02 times with 64, those of exponential ones 2.5 and 1.4 times.

Few prompts can say nothing about effects that few prompts carry: where an effect is zero on half of the prompts, resamples of 16 consist of zeros
alone too often for 300 intervals at once, and the width is infinite; 32 prompts are enough (100 and 95 % with 32 and 64). What no prompt
shows at all, nothing can tell: a cell with the same effect on all n prompts although a share p of all prompts has another, which comes about
with probability (1 − p)^n. (A percentile bootstrap of the selected cells alone: below 50 % each, also for normal effects.)
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from patchlab.errors import MethodError
from patchlab.stats.distributions import hypergeometric, t_quantile

FEWEST_DRAWS, IN_TAIL = 2000, 40
"""Resamples of the prompts: at least so many, and so many that this number of values is expected beyond a critical value."""
_ROUNDING = 1e-9
"""Ties are kept, so rounding can only make the bound wider."""


def most_exceeding(unverified: int, sample: int, exceeding: int, confidence: float = 0.95, looks: Sequence[int] = ()) -> int:
    """Upper confidence bound on how many of the unverified cells exceed a threshold, from a sample drawn without replacement.

    Whatever the true number, the bound falls below it with a probability of at most 1 − confidence.

    Args:
        unverified: cells that the sample was drawn from.
        sample: its size.
        exceeding: how many of the sample exceed the threshold.
        confidence: of the bound.
        looks: sizes at which the sample would have stopped growing before (with at most 0, 1, ... exceeding); see the module's text.

    >>> most_exceeding(200, 30, 0), most_exceeding(200, 59, 0), most_exceeding(200, 200, 3)
    (17, 8, 3)

    Raises:
        MethodError: numbers that no sample can give.
    """
    if not 0 <= exceeding <= sample <= unverified:
        raise MethodError(
            f"a sample of {sample} from {unverified} with {exceeding} exceeding cannot be; "
            f"the sample is at most the unverified cells, and what exceeds at most the sample."
        )
    if len(looks) > exceeding or any(a > b for a, b in itertools.pairwise((*looks, sample))):
        raise MethodError(f"looks at {tuple(looks)} cannot have come before a sample of {sample} with {exceeding} exceeding.")
    if not 0 < confidence < 1:
        raise MethodError(f"confidence is {confidence}; it must be between 0 and 1, such as 0.95.")
    stops = _stops(looks)
    ends = [*enumerate(looks), *((seen, sample) for seen in range(len(looks), exceeding + 1))]
    ways = [*stops, *(_going(sample, seen, looks, stops) for seen in range(len(looks), exceeding + 1))]
    shares = [_share(count, *end) for end, count in zip(ends, ways, strict=True)]
    low, high = exceeding, unverified - sample + exceeding  # both are possible; the probability falls as K grows
    while low < high:
        middle = (low + high + 1) // 2
        if _refuted(_probability(unverified, middle, ends, shares), confidence):
            high = middle - 1
        else:
            low = middle
    return low


def look_sizes(unverified: int, allowed: Callable[[int], int], confidence: float = 0.95) -> Iterator[int]:
    """Sizes of a growing sample at which it may stop: the j-th if at most j of its cells exceed the threshold.

    Args:
        unverified: cells that the sample is drawn from.
        allowed: how many exceeding cells may stay unpatched where j were found; j + allowed(j) must not fall as j grows.
            Where it is negative no sample is enough, and the size is that of all cells.
        confidence: that no more than that stay unpatched, over all looks.

    >>> [size for size, _ in zip(look_sizes(360, lambda found: 3), range(3))]
    [189, 246, 267]
    """
    looks: list[int] = []
    ways: list[int] = []
    shares: list[float] = []
    for found in itertools.count():
        low = max([found, *looks[-1:]])
        high = max(low, unverified - max(0, allowed(found)))  # as many as are allowed are left
        ways.append(_going(looks[-1] if looks else 0, found, looks, ways))
        while low < high and allowed(found) >= 0:
            middle = (low + high) // 2
            own = _share(ways[-1], found, middle)
            if _refuted(_probability(unverified, found + allowed(found) + 1, [*enumerate(looks), (found, middle)], [*shares, own]), confidence):
                high = middle
            else:
                low = middle + 1
        looks.append(high)
        shares.append(_share(ways[-1], found, high))
        yield high


def _refuted(probability: float, confidence: float) -> bool:
    return probability < 1 - confidence - _ROUNDING


def _stops(looks: Sequence[int]) -> list[int]:
    """In how many ways a sample can first stop at each look: at the i-th with i exceeding cells, all found up to the look before."""
    ways: list[int] = []
    for number in range(len(looks)):
        ways.append(_going(looks[number - 1] if number else 0, number, looks[:number], ways))
    return ways


def _going(size: int, seen: int, looks: Sequence[int], stops: Sequence[int]) -> int:
    """In how many ways so many of the first ``size`` cells can exceed without a stop at a look: all ways but those after a first stop."""
    after = (ways * math.comb(size - look, seen - number) for number, (look, ways) in enumerate(zip(looks, stops, strict=True)) if number <= seen)
    return math.comb(size, seen) - sum(after)


def _share(ways: int, seen: int, size: int) -> float:
    """The share of all orders with so many exceeding cells among the first ``size`` that end there."""
    return ways / max(1, math.comb(size, seen))


def _probability(unverified: int, marked: int, ends: Sequence[tuple[int, int]], shares: Sequence[float]) -> float:
    """Probability that a random order ends in one of the ways, each with so many of its first cells exceeding, if ``marked`` cells do."""
    seen, sizes = zip(*ends, strict=True)
    return math.fsum(shares * hypergeometric(seen, sizes, marked, unverified))


def critical_value(effects: Float[np.ndarray, "cell example"], family: int, confidence: float = 0.95, seed: int = 0) -> float:
    """By how many standard errors, at most, the mean of n prompts is off, for all cells of a family together, at a confidence.

    Bootstrap-t (Efron 1979; Hall 1988) with Bonferroni's correction (Miller 1981, Simultaneous Statistical Inference, ch. 2): of resamples of the
    prompts, the value that |mean* − mean| / (s* / √n) exceeds in a share (1 − confidence) / family, over all cells and resamples; at least
    Student's t, which is what it is for normal effects and many prompts. Infinite where n prompts say nothing that far out: so many
    resamples consist of one value alone. Cells whose effects are all the same say nothing about the others, and are left out.

    Args:
        effects: of cells of the family, in metric units.
        family: how many cells could have been chosen.
        confidence: probability, over prompts, that no interval of the family misses.
        seed: of the resamples.
    """
    n, level = effects.shape[1], (1 - confidence) / family
    student = t_quantile(1 - level / 2, n - 1)
    centred = effects[effects.std(1) > _ROUNDING * np.abs(effects).max(1)]
    if not len(centred):
        return student
    centred = centred - centred.mean(1, keepdims=True)
    draws = max(FEWEST_DRAWS, math.ceil(IN_TAIL / (level * len(centred))))
    wanted, largest = max(1, int(level * draws * len(centred))), np.zeros(0)
    generator, step = np.random.default_rng(seed), max(1, 2**21 // max(n, len(centred)))
    for first in range(0, draws, step):
        count = min(step, draws - first)
        drawn = generator.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).T / n
        mean, square = centred @ weights, centred**2 @ weights
        variance = (square - mean**2) * n / (n - 1)
        with np.errstate(divide="ignore"):
            off = np.abs(mean) * np.sqrt(n / np.where(variance > _ROUNDING * square, variance, 0.0))
        largest = np.concatenate([largest, off.ravel()])
        if len(largest) > wanted:
            largest = np.partition(largest, len(largest) - wanted)[-wanted:]
    return max(student, float(largest.min()))


def prompts_needed(effects: Float[np.ndarray, "cell example"], family: int, confidence: float = 0.95) -> int:
    """The number of prompts such as these with a finite :func:`critical_value`: so many that hardly any resample consists of one value alone."""
    level, n = (1 - confidence) / family, effects.shape[1]
    counts = [np.unique(cell, return_counts=True)[1] for cell in effects]
    shares = np.array([count.max() / n for count in counts if len(count) > 1] or [1 / n])
    repeated = shares[shares > 1.5 / n]
    return next(m for m in itertools.count(2) if (float(m) ** (1 - m) + (repeated**m).sum() / len(shares)) < level / 2)


def half_widths(effects: Float[np.ndarray, "cell example"], family: int, confidence: float = 0.95) -> Float[np.ndarray, " cell"]:
    """Half the widths of intervals for mean effects over prompts such as these, which hold together for all cells of a family.

    c · s / √n with s the standard deviation over n prompts and c the :func:`critical_value` of these cells. The family is everything that
    could have been chosen, so the choice may depend on the same prompts in any way. Infinite for all cells where c is; else zero for a cell with
    the same effect on every prompt.

    Args:
        effects: of the cells that were patched, in metric units.
        family: how many cells could have been chosen.
        confidence: probability, over prompts, that no interval of the family misses.

    Raises:
        MethodError: fewer than two prompts.
    """
    n_examples = effects.shape[1]
    if n_examples < 2:
        raise MethodError("one prompt pair says nothing about other prompts; give at least 2 pairs, or speak of this one (population=False).")
    critical = critical_value(effects, family, confidence)
    return np.full(len(effects), np.inf) if math.isinf(critical) else critical * effects.std(1, ddof=1) / math.sqrt(n_examples)


@dataclass(frozen=True)
class Bound:
    """A bound on the number of cells, among those that the screen did not bring up, that exceed a threshold fixed before the sample was drawn.

    It bounds a number of cells, and only that: a sample of single cells says nothing about how large a missed effect may be.

    Args:
        confidence: probability, over samples, with which the statement holds.
        unverified: live cells that were not verified when the sample was drawn.
        sample: how many of them were drawn at random and patched.
        exceeding: how many of those exceed the threshold. Of the population of prompts: may exceed it (the upper end of |effect| does).
        threshold: |effect| in metric units: of the k-th verified cell (of the population: of the k-th largest lower end), or the target.
        unit: of the metric.
        looks: sizes at which a growing sample would have stopped before.
        population: whether it speaks of prompts such as these, rather than of these.
    """

    confidence: float
    unverified: int
    sample: int
    exceeding: int
    threshold: float
    unit: str = ""
    looks: tuple[int, ...] = ()
    population: bool = False

    def __post_init__(self) -> None:
        _ = self.at_most

    @cached_property
    def at_most(self) -> int:
        """Upper bound on the number of unverified cells that exceed the threshold, those of the sample included."""
        return most_exceeding(self.unverified, self.sample, self.exceeding, self.confidence, self.looks)

    @property
    def unseen(self) -> int:
        """Upper bound on the number of never patched cells that exceed the threshold."""
        return self.at_most - self.exceeding

    def __str__(self) -> str:
        threshold = f"{self.threshold:.3g} {self.unit}".rstrip()
        exceed = "may exceed" if self.population else "exceed"
        if self.sample == self.unverified:
            return f"every live cell was patched; {self.exceeding} of the last {self.unverified} {exceed} {threshold}"
        did = "may" if self.population else "did"
        seen = f"{self.exceeding} of {self.sample} drawn at random {did}" if self.sample else "none was drawn"
        return (
            f"with {100 * self.confidence:g} % confidence at most {self.at_most} of the {self.unverified} unverified cells {exceed} "
            f"{threshold} ({seen}); how large a missed effect may be is not bounded"
        )


@dataclass(frozen=True)
class Recall:
    """Recall: the cells that were asked for and are certainly among those that were returned.

    Args:
        at_least: so many of them are returned.
        of: so many there are: k, or (``at_most``) no more than that where all cells above a target are wanted.
        confidence: probability with which that holds; 1 where nothing is left to chance.
        k: how many were asked for; None with a target.
        population: whether it speaks of prompts such as these, rather than of these.
        asked: the share that was to be reached, if any.
    """

    at_least: int
    of: int
    confidence: float
    k: int | None
    population: bool = False
    asked: float | int | None = None

    @property
    def share(self) -> float:
        """The recall: ``at_least`` / ``of`` (1 where there is nothing to find)."""
        return self.at_least / self.of if self.of else 1.0

    @property
    def reached(self) -> bool:
        """Whether the share that was asked for is reached (true where none was)."""
        return self.asked is None or self.at_least >= self.of - missable(self.asked, self.of)

    def __str__(self) -> str:
        where = "over prompts such as these" if self.population else "on these prompts"
        sure = "for certain" if self.confidence == 1 else f"with {100 * self.confidence:g} % confidence"
        number = f"all {self.of}" if self.at_least == self.of else f"at least {self.at_least}"
        whole = f"the true top {self.of}" if self.k is not None else f"at most {self.of} cells above the target"
        text = f"{sure} {number} of {whole} {where} are among those returned" if self.of else f"{sure} no cell is above the target {where}"
        if self.asked is None:
            return text
        return f"{text}; a recall of {100 * self.asked:g} % was asked for and is {'reached' if self.reached else 'not reached'}"


def missable(recall: float | int, of: int) -> int:
    """The number of so many cells that may be missed at a recall: the whole number below (1 − recall) · of."""
    return of - math.ceil(recall * of - _ROUNDING)


@dataclass(frozen=True)
class Price:
    """The price of verified patching, and the recall that it buys, before anything is patched.

    Rows are whole forward passes per prompt (a backward pass counts as two), as in :class:`patchlab.methods.verified.result.VerifiedResult`.

    Args:
        n_live: live cells; a sweep patches as many rows.
        k: how many are wanted; None with a target.
        confidence: with which the recall holds, as far as the sample of cells is concerned.
        screen: rows of the screen, at most about.
        verified: fewest cells that are patched in the screen's order.
        sample: cells that are drawn at random if none of them exceeds the threshold.
        joint: fewest joint patches of groups and subsets.
        recall: the share of the top k that is asked for, if any.
    """

    n_live: int
    k: int | None
    confidence: float
    screen: float
    verified: int
    sample: int
    joint: int = 0
    recall: float | int | None = None

    @property
    def unverified(self) -> int:
        """Cells that are left when the fewest are verified."""
        return self.n_live - self.verified

    @property
    def rows(self) -> float:
        """Everything together, in rows."""
        return self.screen + self.verified + self.sample + self.joint

    @property
    def dearer(self) -> bool:
        """Whether a sweep takes no more than that, or has no more cells than are asked for."""
        return self.rows >= self.n_live or (self.k is not None and self.k >= self.n_live)

    def sample_for(self, missed: int) -> int:
        """Cells to draw so that, if none of them exceeds the threshold, no more than so many of the others do."""
        return next(look_sizes(self.unverified, lambda found: missed, self.confidence))

    def __str__(self) -> str:
        sure = f"With {100 * self.confidence:g} % confidence"
        if self.dearer:
            few = self.k is not None and self.k >= self.n_live
            why = f"{self.k} are wanted" if few else f"verified patching would take about {self.rows:.4g} patched rows per prompt or more"
            return f"Price: {why}, and a full sweep takes {self.n_live} (one for each live cell), so the sweep is run."
        parts = [
            f"at most about {self.screen:.3g} for the screen",
            f"at least {self.verified} for cells in its order",
            f"{self.sample} for cells at random",
            *([f"{self.joint} or more for joint patches"] if self.joint else []),
        ]
        misses = most_exceeding(self.unverified, self.sample, 0, self.confidence)
        of_top = "" if self.k is None else f", which makes sure of {max(0, self.k - misses)} of the top {self.k}"
        lines = [
            f"Price: about {self.rows:.4g} patched rows per prompt ({100 * self.rows / self.n_live:.0f} % of the {self.n_live} of a full sweep): "
            f"{', '.join(parts)}."
        ]
        beyond = "the target" if self.k is None else f"the smallest of the top {self.k} found before"
        drawn = f"if none of the {self.sample} at random ({100 * self.sample / self.unverified:.0f} % of {self.unverified} unverified cells)"
        if self.sample:
            lines.append(f"{sure}, {drawn} exceeds {beyond}, at most {misses} of the others do{of_top}.")
        shares = (0.85, 0.95, 1.0, *([] if self.recall is None else [self.recall]))
        wanted = {missable(share, self.k) for share in shares} if self.k is not None else {3, 1, 0}
        for missed in sorted(wanted, reverse=True):
            size = self.sample_for(missed)
            rows = 100 * (self.rows - self.sample + size) / self.n_live
            what = f"{self.k - missed} of the top {self.k}" if self.k is not None else f"At most {missed} missed"
            lines.append(
                f"{what} would take {size} at random, none of them above "
                f"({100 * size / self.unverified:.0f} % of the unverified; {rows:.0f} % in all)."
            )
        return "\n".join(lines)
