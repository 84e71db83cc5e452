"""Statistics of agreement between two maps, one value per row (a row is one resample of the examples).

An undefined statistic (the correlation of a constant map, the sign where nothing is large enough) is NaN, never 0.
"""

import numpy as np
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


def ranks(values: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, "draw cell"]:
    """Ranks within each row, from 0; ties share their mean rank, and a row that is constant up to rounding is one tie.

    >>> ranks(np.array([[5.0, 1.0, 5.0]]))
    array([[1.5, 0. , 1.5]])
    """
    values = np.where(_centred(values).any(1, keepdims=True), values, 0.0)
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    places = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    step = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((len(values), 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, step]), places, 0), axis=1)
    after = np.where(np.hstack([step, edge]), places, values.shape[1])
    last = np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]
    result = np.empty(values.shape)
    np.put_along_axis(result, order, (first + last) / 2, axis=1)
    return result


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
    """How many cells must be verified in the order of |screen| to have that share of the k cells with the largest |exact|.

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
    centred = values - values.mean(1, keepdims=True)
    size = np.abs(values).max(1, keepdims=True)
    return np.where(np.abs(centred).max(1, keepdims=True) > CONSTANT * size, centred, 0.0)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
