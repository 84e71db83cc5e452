"""One way to run a model: a :class:`Program` says what, :func:`run` does it, :func:`sweep` does many that share a baseline."""

from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result, Target
from patchlab.engine.support import Support, support
from patchlab.engine.waves import Cell, Work, sweep

__all__ = ["Cell", "Program", "Result", "Support", "Target", "Work", "run", "support", "sweep"]
