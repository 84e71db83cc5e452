"""Jaccard index of choices: how alike sets are that were chosen on resamples of the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from patchlab.stats.bootstrap import TAILS

BAR, ENOUGH = 0.8, 100
"""What the literature asks of a circuit: a mean Jaccard index of at least .8, over at least 100 prompts (arXiv 2510.00845)."""
NUMBERS = ("jaccard", "jaccard_lo", "jaccard_hi", "jaccard_sd", "jaccard_to_choice", "jaccard_chance")
"""Names of the numbers of :func:`likeness`."""


def likeness(chosen: Sequence[Int[np.ndarray, " _part"]], choice: Int[np.ndarray, " _part"], total: int) -> dict[str, float]:
    """How alike the choices of resamples are: ``J = |A ∩ B| / |A ∪ B|`` of every pair of them.

    Two choices of nothing, whose index is not defined, count as 0: no part was found again.

    Args:
        chosen: per resample the parts that it chose, as numbers, each once; at least two.
        choice: the parts chosen on all prompts.
        total: the parts that there are to choose from.

    Returns:
        ``jaccard`` (mean over pairs), ``jaccard_lo`` and ``jaccard_hi`` (the 2.5th and 97.5th percentile of single pairs, not an interval of the
        mean), ``jaccard_sd`` (over pairs), ``jaccard_to_choice`` (mean over resamples of their index with the choice on all prompts), and
        ``jaccard_chance``, about what random choices of the same sizes would share: of ``a`` and ``b`` of ``n`` parts, ``ab / n`` are in both.

    Example:
        >>> likeness([np.array([0, 1]), np.array([1, 2])], np.array([1]), 4)["jaccard"]
        0.3333333333333333
    """
    columns = np.unique(np.concatenate([choice, *chosen]))
    inside = np.stack([np.isin(columns, one) for one in (choice, *chosen)]).astype(np.float64)
    sizes, both = inside.sum(1), inside @ inside.T
    alike = _index(both, sizes[:, None] + sizes[None, :] - both)
    first, second = np.triu_indices(len(chosen), 1)
    single, (a, b) = alike[1:, 1:][first, second], (sizes[1:][first], sizes[1:][second])
    low, high = np.quantile(single, TAILS)
    values = (single.mean(), low, high, single.std(), alike[0, 1:].mean(), _index(a * b / total, a + b - a * b / total).mean())
    return dict(zip(NUMBERS, map(float, values), strict=True))


def sentence(record: Mapping[str, Any]) -> str:
    """The numbers of :func:`likeness`, with ``draws``, ``prompts`` and ``reaches_bar`` (None: not asked of so few), in words.

    >>> numbers = {"jaccard": 0.61, "jaccard_lo": 0.4, "jaccard_hi": 0.8, "jaccard_chance": 0.01}
    >>> sentence({**numbers, "draws": 100, "prompts": 48, "reaches_bar": None})
    'Jaccard .61 between resamples (95 % of pairs in .40 to .80, chance .01; 100 resamples of 48 prompts; the bar of .8 asks for 100)'
    """
    mean, low, high, chance = (f"{record[name]:.2f}".removeprefix("0") for name in ("jaccard", "jaccard_lo", "jaccard_hi", "jaccard_chance"))
    bar = {True: f"the bar of {BAR:g} is reached", False: f"the bar of {BAR:g} is not reached", None: f"the bar of {BAR:g} asks for {ENOUGH}"}
    told = f"{record['draws']:,} resamples of {record['prompts']:,} prompts; {bar[record['reaches_bar']].replace('0.', '.')}"
    return f"Jaccard {mean} between resamples (95 % of pairs in {low} to {high}, chance {chance}; {told})"


def _index(both: Float[np.ndarray, "*pair"], either: Float[np.ndarray, "*pair"]) -> Float[np.ndarray, "*pair"]:
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)
