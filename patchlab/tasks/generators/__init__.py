"""Generated tasks, one file each; importing them here registers them."""

from patchlab.tasks.generators import agreement, arithmetic, coloured_objects, docstring, facts, greater_than, induction, ioi, pronoun

__all__ = ["agreement", "arithmetic", "coloured_objects", "docstring", "facts", "greater_than", "induction", "ioi", "pronoun"]
