"""Cells, which are what is scored: one protocol (:mod:`patchlab.methods.cells.kind`) and one file for each kind of cells."""

from patchlab.methods.cells import edges, features, nodes
from patchlab.methods.cells.kind import CELLS, CellKind, Exactly, Linear, Linearly, add_cells, cells_of, parts

__all__ = ["CELLS", "CellKind", "Exactly", "Linear", "Linearly", "add_cells", "cells_of", "edges", "features", "nodes", "parts"]
