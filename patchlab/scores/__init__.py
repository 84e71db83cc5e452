"""Score maps: what every method returns."""

from patchlab.scores.cost import Cost
from patchlab.scores.score_map import NO_EDGE, NO_PATH, SAME, Normalised, ScoreMap

__all__ = ["NO_EDGE", "NO_PATH", "SAME", "Cost", "Normalised", "ScoreMap"]
