"""Tasks: prompt pairs from generators and files, and the registry that names them.

Each generator is one file; importing it here registers it.
"""

from patchlab.tasks import agreement, docstring, facts, greater_than, induction, ioi, pronoun
from patchlab.tasks.base import END, Batch, Pair, PositionAxis, Task, TaskModel
from patchlab.tasks.load import load_task
from patchlab.tasks.registry import GENERATORS, generator

TASKS: dict[str, str] = {name: one.description for name, one in sorted(GENERATORS.items())}
"""Name and one-line description of every task generator."""

__all__ = ["END", "GENERATORS", "TASKS", "Batch", "Pair", "PositionAxis", "Task", "TaskModel", "generator", "load_task"]
__all__ += [module.__name__.rpartition(".")[2] for module in (agreement, docstring, facts, greater_than, induction, ioi, pronoun)]
