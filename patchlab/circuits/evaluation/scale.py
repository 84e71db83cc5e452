"""The scale of faithfulness, how much of the behaviour circuits keep: ratios of means over examples, with bootstrap intervals."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from patchlab.errors import ScoreError
from patchlab.stats.bootstrap import interval, resampling_weights


@dataclass(frozen=True, eq=False)
class Scale:
    """The metric of the full and of the empty circuit on the same examples, and the resamples of them that every interval uses.

    ``f = (mean m − mean m(∅)) / (mean m(M) − mean m(∅))``: a ratio of batch means, resampled jointly, never a mean of ratios.

    Raises:
        ScoreError: the 95 % interval of mean m(M) − mean m(∅) contains 0.
    """

    full: Float[np.ndarray, " example"]
    empty: Float[np.ndarray, " example"]
    n_boot: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        gap = self.full - self.empty
        low, high = map(float, interval(self.draws @ gap))
        if low <= 0 <= high or gap.mean() == 0:
            where = f"95 % CI [{low:.3g}, {high:.3g}]" if np.isfinite(low) else "one example, no CI"
            raise ScoreError(
                f"faithfulness is not defined: full and fully ablated model differ by {gap.mean():.3g} in the metric on average ({where}), "
                f"not distinguishable from 0 over {len(gap)} examples. Use another ablation, more examples, or pairs that the model solves."
            )

    @property
    def draws(self) -> Float[np.ndarray, "draw example"]:
        """Resamples of the examples, as weights; none for a single example."""
        return resampling_weights(len(self.full), self.n_boot if len(self.full) > 1 else 0, self.seed)

    def value(self, metric: Float[np.ndarray, "*circuit example"]) -> Float[np.ndarray, "*circuit"]:
        """Faithfulness of each circuit."""
        return np.asarray((metric - self.empty).mean(-1) / (self.full - self.empty).mean())

    def resampled(self, metric: Float[np.ndarray, "*circuit example"]) -> Float[np.ndarray, "draw *circuit"]:
        """Faithfulness of each circuit on each resample of the examples."""
        weights = self.draws
        return np.moveaxis((metric - self.empty) @ weights.T / (weights @ (self.full - self.empty)), -1, 0)


def areas(value: Float[np.ndarray, " size"], resampled: Float[np.ndarray, "draw size"], shares: Float[np.ndarray, " size"]) -> dict[str, float]:
    """CPR, the area under f, and CMD, that between f and 1: trapezoids over shares of the graph, with 95 % intervals (``cpr_lo``, ...)."""
    found: dict[str, float] = {}
    for name, of in (("cpr", lambda f: f), ("cmd", lambda f: np.abs(1 - f))):
        found[name] = float(np.trapezoid(of(value), shares))
        found[f"{name}_lo"], found[f"{name}_hi"] = map(float, interval(np.trapezoid(of(resampled), shares)))
    return found
