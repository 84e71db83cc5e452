"""Statistics of agreement between two maps, one value per row (a row is one resample of the examples, or one prompt).

An undefined statistic (the correlation of a constant map, the sign where nothing is large enough) is NaN, never 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from einops import einsum
from jaxtyping import Bool, Float

CONSTANT = 1e-12
"""A map whose cells differ by less than this share of their size is constant: the rest is rounding."""


def pearson(a: Float[np.ndarray, "draw cell"], b: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, " draw"]:
    """Pearson correlation of each row of ``a`` with the same row of ``b``; NaN where a row is constant.

    >>> pearson(np.array([[0.0, 1.0, 2.0]]), np.array([[1.0, 3.0, 5.0]])).round(6)
    array([1.])
    """
    a, b = _centred(a), _centred(b)
    return _ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


@dataclass(frozen=True)
class Moments:
    """Sums over the cells of each prompt, from which correlations of raw effects within prompts and across prompts follow.

    ``aa``, ``bb`` and ``ab`` are sums of products of deviations from the prompt's own mean (exactly 0 where a prompt is constant),
    ``size_a`` and ``size_b`` its largest |effect|.
    """

    cells: Float[np.ndarray, " prompt"]
    mean_a: Float[np.ndarray, " prompt"]
    mean_b: Float[np.ndarray, " prompt"]
    aa: Float[np.ndarray, " prompt"]
    bb: Float[np.ndarray, " prompt"]
    ab: Float[np.ndarray, " prompt"]
    size_a: Float[np.ndarray, " prompt"]
    size_b: Float[np.ndarray, " prompt"]

    @staticmethod
    def of(
        a: Float[np.ndarray, "prompt cell"], b: Float[np.ndarray, "prompt cell"], chosen: Bool[np.ndarray, "prompt cell"] | None = None
    ) -> "Moments":
        """Moments over the chosen cells of each prompt (None: over all); the other cells may hold anything finite."""
        chosen = np.ones(a.shape, dtype=bool) if chosen is None else chosen
        cells = chosen.sum(1).astype(float)
        (mean_a, a, size_a), (mean_b, b, size_b) = (_deviations(values, chosen, cells) for values in (a, b))
        aa, bb, ab = (einsum(x, y, "prompt cell, prompt cell -> prompt") for x, y in ((a, a), (b, b), (a, b)))
        return Moments(cells, mean_a, mean_b, aa, bb, ab, size_a, size_b)

    @staticmethod
    def joined(parts: Sequence["Moments"]) -> "Moments":
        """Moments of several groups of prompts, one after the other."""
        return Moments(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Moments)))

    def per_prompt(self) -> Float[np.ndarray, " prompt"]:
        """Pearson correlation of each prompt's raw effects; NaN where one of the two is constant.

        >>> Moments.of(np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), np.array([[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]])).per_prompt().round(6)
        array([ 1., nan])
        """
        return _ratio(self.ab, np.sqrt(self.aa) * np.sqrt(self.bb))

    def pooled(self, weights: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, " draw"]:
        """Pearson correlation of the raw effects of all prompts concatenated, each prompt as often as its weight says; NaN where one is constant.

        Sums within prompts plus sums between their means: nothing cancels, so that a constant is told from a small effect.

        >>> Moments.of(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 3.0], [5.0, 7.0]])).pooled(np.array([[0.5, 0.5], [1.0, 0.0]])).round(6)
        array([1., 1.])
        """
        counts = weights * self.cells
        total = np.where(counts.any(1), counts.sum(1), 1.0)
        between_a, between_b = (
            _clean(np.where(counts > 0, mean - (counts @ mean / total)[:, None], 0.0), ((counts > 0) * size).max(1, initial=0.0))
            for mean, size in ((self.mean_a, self.size_a), (self.mean_b, self.size_b))
        )
        within = weights @ np.stack([self.aa, self.bb, self.ab], axis=1)
        pairs = ((between_a, between_a), (between_b, between_b), (between_a, between_b))
        aa, bb, ab = (within[:, i] + einsum(counts, x, y, "draw prompt, draw prompt, draw prompt -> draw") for i, (x, y) in enumerate(pairs))
        return _ratio(ab, np.sqrt(aa) * np.sqrt(bb))


def mean_of_defined(values: Float[np.ndarray, " prompt"], weights: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, " draw"]:
    """Weighted mean of the values that are defined; NaN where a draw has none.

    >>> mean_of_defined(np.array([1.0, np.nan, 0.0]), np.array([[0.2, 0.4, 0.4], [0.0, 1.0, 0.0]])).round(6)
    array([0.333333,      nan])
    """
    defined = ~np.isnan(values)
    return _ratio(weights @ np.where(defined, values, 0.0), weights @ defined.astype(float))


def ranks(values: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, "draw cell"]:
    """Ranks within each row, from 0; ties share their mean rank, and a row that is constant up to rounding is one tie.

    >>> ranks(np.array([[5.0, 1.0, 5.0]]))
    array([[1.5, 0. , 1.5]])
    """
    from scipy.stats import rankdata

    return rankdata(np.where(_centred(values).any(1, keepdims=True), values, 0.0), axis=1) - 1


def spearman(a: Float[np.ndarray, "draw cell"], b: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, " draw"]:
    """Spearman correlation: Pearson of the ranks; NaN where a row is constant.

    >>> spearman(np.array([[0.0, 1.0, 2.0]]), np.array([[1.0, 10.0, 100.0]])).round(6)
    array([1.])
    """
    return pearson(ranks(a), ranks(b))


def slope(exact: Float[np.ndarray, "draw cell"], approximation: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, " draw"]:
    """Least-squares s of approximation = s · exact (through the origin); 1 means the right size on average, NaN where exact is 0.

    >>> slope(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]))
    array([2.])
    """
    return _ratio((exact * approximation).sum(1), (exact * exact).sum(1))


def sign_agreement(
    exact: Float[np.ndarray, "draw cell"], approximation: Float[np.ndarray, "draw cell"], floor: Float[np.ndarray, " draw"]
) -> Float[np.ndarray, " draw"]:
    """Share of the cells with |exact| > floor where the approximation has the same sign (0 has neither); NaN where there is none.

    >>> sign_agreement(np.array([[2.0, -2.0, 0.1]]), np.array([[1.0, 1.0, -1.0]]), np.array([0.5]))
    array([0.5])
    """
    counted = np.abs(exact) > floor[:, None]
    return _ratio((counted & (np.sign(exact) == np.sign(approximation))).sum(1), counted.sum(1))


def topk_recall(exact: Float[np.ndarray, "draw cell"], approximation: Float[np.ndarray, "draw cell"], k: int) -> Float[np.ndarray, " draw"]:
    """Share of the k cells with the largest |exact| that are among the k largest of the approximation.

    Cells tied at the k-th place share the places left over, so the value is what random tie-breaking gives on average.

    >>> topk_recall(np.array([[3.0, -2.0, 1.0]]), np.array([[3.0, 1.0, 2.0]]), 2)
    array([0.5])
    """
    return (_top(np.abs(exact), k) * _top(np.abs(approximation), k)).sum(1) / k


def cells_for_recall(exact: Float[np.ndarray, " cell"], screen: Float[np.ndarray, " cell"], k: int, recall: float) -> int:
    """Number of cells that must be verified in the order of |screen| to have that share of the k cells with the largest |exact|.

    Of cells tied at the k-th |exact| the easiest to find count; cells tied in the screen are all verified.

    >>> cells_for_recall(np.array([3.0, -2.0, 1.0, 0.0]), np.array([1.0, 0.1, 2.0, 0.5]), 2, 1.0)
    4
    """
    size = np.abs(screen)
    top = np.abs(exact) >= np.partition(np.abs(exact), len(exact) - k)[len(exact) - k]
    last = np.sort(size[top])[::-1][int(np.ceil(recall * k - 1e-9)) - 1]
    return int((size >= last).sum())


def _top(size: Float[np.ndarray, "draw cell"], k: int) -> Float[np.ndarray, "draw cell"]:
    threshold = np.partition(size, size.shape[1] - k, axis=1)[:, [size.shape[1] - k]]
    above, tied = size > threshold, size == threshold
    return above + tied * ((k - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True))


def split_half(effects: Float[np.ndarray, "example cell"], in_first: Bool[np.ndarray, "split example"]) -> Float[np.ndarray, " split"]:
    """Per split, the Pearson correlation between the mean maps of the two halves of the examples.

    >>> split_half(np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[True, False]]))
    array([1.])
    """
    first, second = (half / half.sum(1, keepdims=True) @ effects for half in (in_first.astype(float), (~in_first).astype(float)))
    return pearson(first, second)


def spearman_brown(half: float) -> float:
    """Reliability of the whole from the correlation of its halves, 2r / (1 + r) (Spearman 1910, Brown 1910).

    >>> round(spearman_brown(0.5), 4)
    0.6667
    """
    return 2 * half / (1 + half) if half > -1 else float("nan")


def _centred(values: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, "draw cell"]:
    """Deviation from the row's mean, with rows that are constant up to rounding set to 0."""
    return _clean(values - values.mean(1, keepdims=True), np.abs(values).max(1))


def _deviations(
    values: Float[np.ndarray, "prompt cell"], chosen: Bool[np.ndarray, "prompt cell"], cells: Float[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, "prompt cell"], Float[np.ndarray, " prompt"]]:
    """Mean of each row's chosen cells, their deviations from it (0 in other cells and in constant rows), and their largest size."""
    values = np.where(chosen, values, 0.0)
    mean, size = values.sum(1) / np.maximum(cells, 1.0), np.abs(values).max(1, initial=0.0)
    return mean, _clean(np.where(chosen, values - mean[:, None], 0.0), size), size


def _clean(deviations: Float[np.ndarray, "row column"], size: Float[np.ndarray, " row"]) -> Float[np.ndarray, "row column"]:
    """Deviations, with rows of nothing but rounding set to 0."""
    return np.where(np.abs(deviations).max(1, keepdims=True, initial=0.0) > CONSTANT * size[:, None], deviations, 0.0)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
