"""Statistics of agreement, slowly and literally."""

import numpy as np


def literal_cells(exact: np.ndarray, screen: np.ndarray, k: int, recall: float) -> int:
    """Verify cell after cell in the screen's order until enough of the top k are there."""
    top = set(np.argsort(-np.abs(exact), kind="stable")[:k].tolist())
    found = 0
    for count, cell in enumerate(np.argsort(-np.abs(screen), kind="stable").tolist(), start=1):
        found += cell in top
        if found >= recall * k:
            return count
    raise ValueError("never")


def literal_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([np.mean([place for place, other in enumerate(sorted(values)) if other == value]) for value in values])
