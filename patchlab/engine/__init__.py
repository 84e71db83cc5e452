"""The engine, one way to run a model: a :class:`Program` says what, :func:`run` does it, :func:`sweep` does many that share a baseline."""

from patchlab.engine.literal import run
from patchlab.engine.node_sweep import Cell, Work, in_blocks, sweep
from patchlab.engine.program import Program, Result, Target
from patchlab.engine.replay import Baseline, empty_cache
from patchlab.engine.resume import run_rest
from patchlab.engine.session import Session, intervene, session_of
from patchlab.engine.trust.nodes import Support, support
from patchlab.engine.trust.rest import continues

__all__ = [
    "Baseline",
    "Cell",
    "Program",
    "Result",
    "Session",
    "Support",
    "Target",
    "Work",
    "continues",
    "empty_cache",
    "in_blocks",
    "intervene",
    "run",
    "run_rest",
    "session_of",
    "support",
    "sweep",
]
