"""Subset bounds: what random subsets of cells, each patched jointly, say about the cells in them, if effects add up.

Single cells that were not patched can only be bounded in number (:mod:`patchlab.methods.verified.bound`). A joint patch says something
about every cell in it, at the price of one assumption, which every statement here names: the effect of a set is the sum of the effects of its cells.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from patchlab.errors import MethodError
from patchlab.stats.distributions import t_quantile

FEWEST = 8
"""Fewer subsets say nothing."""
_MEMBERSHIPS = 4
"""Each cell is in at least so many subsets, and not in so many: a spread needs a few values."""


@dataclass(frozen=True)
class SubsetBound:
    """An upper bound on the largest |effect| of any unverified cell, which holds if the effects of cells add up.

    *Assumption.* The effect of patching a subset is the sum of the effects of its cells. Where one cell undoes another (backup
    heads, saturation, a residual stream patched after what feeds it), joint patches hide effects and the bound says too little; the
    patched subsets alone cannot show that. ``largest_seen``, from single cells drawn at random, can.

    Args:
        confidence: probability, over subsets, with which each of its statements holds if effects add up.
        unverified: live cells that were not verified.
        subsets: how many were patched.
        share: of the unverified cells that a subset has, on average.
        at_most: the bound, in metric units.
        largest_seen: the largest |effect| among the cells that were also patched singly, in metric units.
        unit: of the metric.
        threshold: |effect| in metric units that a missed cell would exceed: of the k-th verified cell, or the target.
        exceeding: most cells that exceed it; None where the subsets cannot say so.
        exceeding_seen: how many of the cells that were also patched singly do.
        k: how many cells were asked for, where that makes a recall of it; None otherwise.
    """

    confidence: float
    unverified: int
    subsets: int
    share: float
    at_most: float
    largest_seen: float
    unit: str = ""
    threshold: float = 0.0
    exceeding: int | None = None
    exceeding_seen: int = 0
    k: int | None = None

    @property
    def recall(self) -> int | None:
        """The smallest number of the true top k among those returned, if effects add up; None where the subsets cannot say."""
        if self.k is None or self.exceeding is None or self.contradicted:
            return None
        return max(0, self.k - (self.exceeding - self.exceeding_seen))

    @property
    def contradicted(self) -> bool:
        """Whether cells that were patched singly exceed a bound."""
        return self.largest_seen > self.at_most or (self.exceeding is not None and self.exceeding_seen > self.exceeding)

    def __str__(self) -> str:
        seen, threshold = (f"{value:.3g} {self.unit}".rstrip() for value in (self.largest_seen, self.threshold))
        check = f"a single cell drawn at random has {seen}, which contradicts this" if self.contradicted else "that they add up is assumed, not shown"
        number = "" if self.exceeding is None else f", and at most {self.exceeding} exceed {threshold}"
        number += "" if self.recall is None else f", so at least {self.recall} of the true top {self.k} are among those returned"
        return (
            f"if the effects of cells add up, then with {100 * self.confidence:g} % confidence no |effect| of the {self.unverified} unverified "
            f"cells exceeds {f'{self.at_most:.3g} {self.unit}'.rstrip()}{number} "
            f"({self.subsets} random subsets with {100 * self.share:.2g} % of them each; {check})"
        )


def memberships(unverified: int, subsets: int, seed: int) -> Bool[np.ndarray, "cell subset"]:
    """Memberships of cells in subsets: each in the same number of them (an eighth, at least 4), chosen at random."""
    if subsets < FEWEST:
        raise MethodError(f"subsets is {subsets}; give 0 for none, or at least {FEWEST}.")
    count = max(_MEMBERSHIPS, round(subsets / 8))
    rank = np.random.default_rng([seed, 1]).random((unverified, subsets)).argsort(1)
    return rank < count


def largest_effect(members: Bool[np.ndarray, "cell subset"], joint: Float[np.ndarray, " subset"], confidence: float) -> float:
    """Upper confidence bound on the largest |effect| of any cell, from joint effects, if effects add up.

    A cell's effect is estimated by the mean of the subsets with it minus the mean of those without it, to which all other
    cells add the same on average. Its upper bound is |estimate| + t · standard error, one-sided (unequal variances; as many degrees of
    freedom as the smaller group has). The largest of these bounds covers the largest effect, because the bound of that very cell
    does: no correction for the number of cells is needed. The idea of patching random subsets to bound false negatives is that of
    Kramár et al. 2024 (arXiv 2403.00745, on diagnostics); the equal memberships and the form of the interval are ours.
    """
    return float(_upper(members, joint, confidence).max())


def most_exceeding_additive(
    members: Bool[np.ndarray, "cell subset"], joint: Float[np.ndarray, " subset"], threshold: float, confidence: float, start: int = 0
) -> int | None:
    """Upper confidence bound on how many cells exceed a threshold, if effects add up; None where not even ``start`` can be claimed.

    "At most m exceed" is claimed where no more than m cells' upper bounds at confidence 1 − δ / (m + 1) exceed the threshold. If j > m cells do
    exceed it, at least j − m of their bounds must have missed, which has a probability of at most j δ / ((m + 1) (j − m)) ≤ δ (Markov).
    The claims are tried in the order start, start − 1, ..., 0, up to the first that fails: in an order that is fixed in advance, each claim may
    be tried at the full level (Maurer, Hothorn & Lehmacher 1995), as the first false one must pass for any false one to be made.
    """
    claimed = None
    for m in range(start, -1, -1):
        if int((_upper(members, joint, 1 - (1 - confidence) / (m + 1)) > threshold).sum()) > m:
            break
        claimed = m
    return claimed


def _upper(members: Bool[np.ndarray, "cell subset"], joint: Float[np.ndarray, " subset"], confidence: float) -> Float[np.ndarray, " cell"]:
    """Each cell's one-sided upper bound."""
    weights = members.astype(np.float64)
    inside, outside = weights.sum(1), (1 - weights).sum(1)
    means = [weights @ joint / inside, (1 - weights) @ joint / outside]
    spread = [
        (weights * (joint - means[0][:, None]) ** 2).sum(1) / (inside - 1) / inside,
        ((1 - weights) * (joint - means[1][:, None]) ** 2).sum(1) / (outside - 1) / outside,
    ]
    freedom = int(np.minimum(inside, outside).min()) - 1
    return np.abs(means[0] - means[1]) + t_quantile(confidence, freedom) * np.sqrt(spread[0] + spread[1])
