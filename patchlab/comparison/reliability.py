"""Reliability: the cells of a linearised map that are doubtful, by their second-order terms."""

import numpy as np
import xarray as xr

from patchlab.comparison.alignment import check_alike
from patchlab.errors import ScoreError
from patchlab.scores import ScoreMap

STANDARD_ERRORS = 2.0
"""A cell is only taken as reliable if its second-order term is within the fraction by so many standard errors."""


def unreliable(first: ScoreMap, second: ScoreMap, fraction: float = 0.5) -> xr.Dataset:
    """The live cells whose second-order term may exceed ``fraction`` of the first-order score, both averaged over examples.

    May: the term plus two standard errors, over random probes, exceeds it. Where :class:`patchlab.methods.SecondOrder` patched a cell
    exactly, the term is the whole remainder, effect − AtP score, and has no error.

    Returns:
        One boolean variable per site, with the site's axes. True: the linearised score of this cell is doubtful, or its second-order term
        is not known well enough (always, if its standard error is unknown). A cell that is not flagged may be wrong all the same, by
        what the third and higher orders add.

    Raises:
        ScoreError: ``second`` is no second-order map, a fraction that is not above 0, or maps that are not alike.
    """
    if not str(second.provenance.get("method", "")).startswith("second-order"):
        raise ScoreError(f"unreliable needs a map of SecondOrder as its second; got one of {second.provenance.get('method')!r}.")
    if not fraction > 0:
        raise ScoreError(f"fraction is {fraction}; it must be above 0 (0.5 flags cells whose second order is half of the first).")
    check_alike("the first-order map", first, "the second-order map", second)
    flags = {}
    for site in first.sites:
        term = np.abs(second.mean(site)) + STANDARD_ERRORS * second.error_of_mean(site)
        flags[site] = ~(term <= fraction * np.abs(first.mean(site))) & first.live[site]  # an unknown error is no assurance
    return xr.Dataset({site: flag for site, flag in flags.items() if site not in first.not_scored})
