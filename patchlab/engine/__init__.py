"""One way to run a model: a :class:`Program` says what, :func:`run` does it."""

from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result, Target

__all__ = ["Program", "Result", "Target", "run"]
