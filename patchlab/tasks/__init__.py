"""Tasks: prompt pairs from generators and files, and the registry that names them.

Each generator is one file in ``generators/``.
"""

from patchlab.tasks import generators as generators
from patchlab.tasks.load import load_task
from patchlab.tasks.registry import GENERATORS, generator
from patchlab.tasks.task import END, Batch, Pair, PositionAxis, Task, TaskModel

TASKS: dict[str, str] = {name: one.description for name, one in sorted(GENERATORS.items())}
"""Name and one-line description of every task generator."""

__all__ = ["END", "GENERATORS", "TASKS", "Batch", "Pair", "PositionAxis", "Task", "TaskModel", "generator", "generators", "load_task"]
