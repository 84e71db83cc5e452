"""Sweeps: many runs described by one file.

:mod:`patchlab.sweeps.spec` says what one run is and gives it its key, :mod:`patchlab.sweeps.file` reads files and expands their grids,
:mod:`patchlab.sweeps.plan` says beforehand what the runs take.
"""
