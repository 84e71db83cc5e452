"""Tasks: prompt pairs from generators and files, and the registry that names them."""

from patchlab.tasks import agreement, docstring, facts, greater_than, induction, ioi, pronoun
