"""Circuits: parts of a model's graph, chosen from edge scores, exchanged as files, and evaluated."""

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.files import read, write
from patchlab.circuits.select import greedy, threshold, top_n
from patchlab.circuits.shape import kv_view
from patchlab.circuits.submission import MIB_FRACTIONS, convert, read_submission, write_submission

__all__ = [
    "MIB_FRACTIONS",
    "Circuit",
    "convert",
    "greedy",
    "kv_view",
    "read",
    "read_submission",
    "threshold",
    "top_n",
    "write",
    "write_submission",
]
