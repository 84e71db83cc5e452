"""Resampling of examples: one set of draws, applied to everything that is compared.

Every interval in patchlab is a percentile bootstrap over examples (Efron 1979). A draw is a row of weights, so that the
resampled mean maps of all draws are one matrix product.
"""

import numpy as np
from jaxtyping import Float

TAILS = (0.025, 0.975)


def resampling_weights(n_examples: int, n_boot: int, seed: int) -> Float[np.ndarray, "draw example"]:
    """Weights of ``n_boot`` resamples with replacement; each row sums to 1.

    >>> resampling_weights(3, 2, seed=0).sum(axis=1)
    array([1., 1.])
    """
    draws = np.random.default_rng(seed).integers(n_examples, size=(n_boot, n_examples))
    counts = np.zeros((n_boot, n_examples))
    np.add.at(counts, (np.arange(n_boot)[:, None], draws), 1.0)
    return counts / n_examples


def interval(values: Float[np.ndarray, "draw ..."]) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """95 % percentile interval over the draws; draws where the statistic is undefined (NaN) are left out.

    >>> low, high = interval(np.arange(101.0))
    >>> float(low), float(high)
    (2.5, 97.5)
    """
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    bounds = np.full((2, flat.shape[1]), np.nan)
    for column in np.flatnonzero(np.isnan(flat).any(axis=0)):
        defined = flat[~np.isnan(flat[:, column]), column]
        if defined.size:
            bounds[:, column] = np.quantile(defined, TAILS)
    whole = ~np.isnan(flat).any(axis=0)
    if len(flat) and whole.any():
        bounds[:, whole] = np.quantile(flat[:, whole], TAILS, axis=0)
    bounds = bounds.reshape(2, *values.shape[1:])
    return bounds[0, ...], bounds[1, ...]
