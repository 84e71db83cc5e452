"""Score maps: what every method returns."""

from patchlab.scores.score_map import NO_EDGE, NO_PATH, SAME, Cost, Normalised, ScoreMap

__all__ = ["NO_EDGE", "NO_PATH", "SAME", "Cost", "Normalised", "ScoreMap"]
