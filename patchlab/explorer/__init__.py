"""The explorer: score maps to click through, in a notebook or as one page without a network."""

from patchlab.explorer.explorer import Explorer, explore

__all__ = ["Explorer", "explore"]
