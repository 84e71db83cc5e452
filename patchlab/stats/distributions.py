"""Distributions that bounds and intervals rest on, as scipy has them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    >>> round(t_quantile(0.95, 10), 3)
    1.812
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def hypergeometric(seen: Sequence[int], drawn: Sequence[int], marked: int, population: int) -> Float[np.ndarray, " sample"]:
    """Probabilities that ``seen`` of the ``drawn`` members are marked ones, for samples without replacement; 0 where that cannot be.

    From scipy's log beta function: ``scipy.stats.hypergeom`` takes up to 30 times as long for a few samples, and a search asks for thousands.

    >>> hypergeometric([0, 1, 2], [2, 2, 2], 1, 4).round(12)
    array([0.5, 0.5, 0. ])
    """
    from scipy.special import betaln

    few, size = np.asarray(seen, dtype=np.float64), np.asarray(drawn, dtype=np.float64)
    possible = (few <= marked) & (size - few <= population - marked)
    total = np.array([[marked], [population - marked], [population]], dtype=np.float64)
    part = np.where(possible, np.stack([few, size - few, size]), 0.0)
    chosen, rest, whole = -np.log1p(total) - betaln(total - part + 1, part + 1)
    return np.where(possible, np.exp(chosen + rest - whole), 0.0)
