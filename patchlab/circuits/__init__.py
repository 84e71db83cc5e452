"""Circuits: parts of a model's graph, chosen from edge scores, exchanged as files, and evaluated."""

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.select import greedy, threshold, top_n
from patchlab.circuits.shape import kv_view

__all__ = ["Circuit", "greedy", "kv_view", "threshold", "top_n"]
