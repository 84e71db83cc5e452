"""Verified patching: the strongest cells, patched exactly, with a bound on what was missed."""
