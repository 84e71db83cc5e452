"""Sweeps: many runs described by one file.

:mod:`patchlab.sweeps.spec` says what one run is and gives it its key, :mod:`patchlab.sweeps.file` reads files and expands their grids,
:mod:`patchlab.sweeps.plan` says beforehand what the runs take, :mod:`patchlab.sweeps.driver` does them with one of the executors, and
:mod:`patchlab.sweeps.results` reads what came of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchlab.sweeps.results import Sweep as Sweep
    from patchlab.sweeps.results import open_sweep as open  # noqa: A004, F401 - as in pl.sweeps.open

_HOMES = {"Sweep": "Sweep", "open": "open_sweep"}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchlab.sweeps' has no attribute {name!r}")
    return getattr(importlib.import_module("patchlab.sweeps.results"), _HOMES[name])
