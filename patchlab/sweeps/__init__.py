"""Sweeps: many runs described by one file.

:mod:`patchlab.sweeps.spec` says what one run is and gives it its key, :mod:`patchlab.sweeps.file` reads files and expands their grids,
:mod:`patchlab.sweeps.plan` says beforehand what the runs take, :mod:`patchlab.sweeps.driver` does them with one of the executors, and
:mod:`patchlab.sweeps.results` reads what came of them.
"""

from patchlab.sweeps.results import Sweep
from patchlab.sweeps.results import open_sweep as open  # noqa: A004 - as in pl.sweeps.open

__all__ = ["Sweep", "open"]
