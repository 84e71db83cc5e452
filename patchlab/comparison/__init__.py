"""Comparisons: how well approximations agree with a reference, and the job that makes one from names."""

from patchlab.comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
