"""Circuits: edges of a model's graph, or nodes of its sites and edges between these, chosen from scores, exchanged as files, and evaluated."""

from patchlab.circuits.acdc import acdc
from patchlab.circuits.circuit import Circuit, kv_view
from patchlab.circuits.evaluation.ablations import ABLATIONS, OptimalFit
from patchlab.circuits.evaluation.curve import FaithfulnessCurve, faithfulness_curve, random_circuit
from patchlab.circuits.evaluation.evaluate import Evaluation, evaluate
from patchlab.circuits.evaluation.mib import mib_areas
from patchlab.circuits.evaluation.node_ablations import NODE_ABLATIONS
from patchlab.circuits.evaluation.node_runner import ERRORS
from patchlab.circuits.files import convert, read, write
from patchlab.circuits.formats.dot import to_dot
from patchlab.circuits.formats.mib import (
    MIB_FRACTIONS,
    MIB_MODELS,
    MIB_TASKS,
    check_submission,
    importances,
    read_submission,
    sized,
    write_submission,
)
from patchlab.circuits.heldout import Sets, three_sets
from patchlab.circuits.node_edges import node_edges
from patchlab.circuits.nodes import Candidates, NodeCircuit, candidates
from patchlab.circuits.roc import ROC, overlap, roc
from patchlab.circuits.select import greedy, threshold, top_n
from patchlab.circuits.smallest import SmallestFaithful, size_grid, smallest_faithful
from patchlab.circuits.sparse import SparseCircuit
from patchlab.circuits.stability import Stability, consistent, stability

__all__ = [
    "ABLATIONS",
    "ERRORS",
    "MIB_FRACTIONS",
    "MIB_MODELS",
    "MIB_TASKS",
    "NODE_ABLATIONS",
    "ROC",
    "Candidates",
    "Circuit",
    "Evaluation",
    "FaithfulnessCurve",
    "NodeCircuit",
    "OptimalFit",
    "Sets",
    "SmallestFaithful",
    "SparseCircuit",
    "Stability",
    "acdc",
    "candidates",
    "check_submission",
    "consistent",
    "convert",
    "evaluate",
    "faithfulness_curve",
    "greedy",
    "importances",
    "kv_view",
    "mib_areas",
    "node_edges",
    "overlap",
    "random_circuit",
    "read",
    "read_submission",
    "roc",
    "size_grid",
    "sized",
    "smallest_faithful",
    "stability",
    "three_sets",
    "threshold",
    "to_dot",
    "top_n",
    "write",
    "write_submission",
]
