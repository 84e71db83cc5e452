"""Which cells of a linearised map are doubtful, by their second-order terms."""

import numpy as np
import xarray as xr

from patchlab.alignment import check_alike
from patchlab.errors import ScoreError
from patchlab.scores import ScoreMap


def unreliable(first: ScoreMap, second: ScoreMap, fraction: float = 0.5) -> xr.Dataset:
    """The live cells whose second-order term exceeds ``fraction`` of the first-order score, both averaged over examples.

    Returns:
        One boolean variable per site, with the site's axes. True: the linearised score of this cell is doubtful. A cell that is not
        flagged may be wrong all the same, by what the third and higher orders add.

    Raises:
        ScoreError: ``second`` is no second-order map, a fraction that is not above 0, or maps that are not alike.
    """
    if not str(second.provenance.get("method", "")).startswith("second-order"):
        raise ScoreError(f"unreliable needs a map of SecondOrder as its second; got one of {second.provenance.get('method')!r}.")
    if not fraction > 0:
        raise ScoreError(f"fraction is {fraction}; it must be above 0 (0.5 flags cells whose second order is half of the first).")
    check_alike("the first-order map", first, "the second-order map", second)
    flags = {site: (np.abs(second.mean(site)) > fraction * np.abs(first.mean(site))) & first.live[site] for site in first.sites}
    return xr.Dataset({site: flag for site, flag in flags.items() if site not in first.not_scored})
