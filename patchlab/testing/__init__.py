"""Toy models with hand-computable answers, and the contract that every method must pass.

For people who write a method of their own::

    from patchlab.testing import check_method, linear_toy, toy_task

    def test_my_method():
        model = linear_toy()
        check_method(MyMethod(), model, toy_task(model), ["resid_pre", "z"])
"""

from patchlab.testing.circuits import TOY_CIRCUITS, ToyCircuit, auc_table, induction_toy, lookup_toy
from patchlab.testing.contract import check_method
from patchlab.testing.toys import linear_toy, micro_model, micro_task, toy_task

__all__ = [
    "TOY_CIRCUITS",
    "ToyCircuit",
    "auc_table",
    "check_method",
    "induction_toy",
    "linear_toy",
    "lookup_toy",
    "micro_model",
    "micro_task",
    "toy_task",
]
