"""What differs between architectures: which hook carries a site, and which modules backward rules apply to."""

from patchlab.adapters.architecture import Architecture, describe
from patchlab.adapters.lenses import Lens
from patchlab.adapters.places import AttentionPlace, LinearPlace, MLPPlace, NormPlace, Place, find_places
from patchlab.adapters.points import points_of

__all__ = ["Architecture", "AttentionPlace", "Lens", "LinearPlace", "MLPPlace", "NormPlace", "Place", "describe", "find_places", "points_of"]
