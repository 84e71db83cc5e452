"""One way to run a model: a :class:`Program` says what, :func:`run` does it, :func:`sweep` does many that share a baseline."""

from patchlab.engine.blocks import Baseline, empty_cache
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result, Target
from patchlab.engine.rest import continues, run_rest
from patchlab.engine.support import Support, support
from patchlab.engine.waves import Cell, Work, sweep

__all__ = [
    "Baseline",
    "Cell",
    "Program",
    "Result",
    "Support",
    "Target",
    "Work",
    "continues",
    "empty_cache",
    "run",
    "run_rest",
    "support",
    "sweep",
]
