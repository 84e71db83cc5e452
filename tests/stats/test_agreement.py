"""Agreement: statistics by themselves, against literal twins."""

import numpy as np
import pytest
from literal_agreement import literal_cells, literal_ranks

from patchlab.stats import agreement as stats


@pytest.mark.parametrize("recall", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_cells_for_recall_equals_its_literal_twin(k, recall):
    for seed in range(20):
        exact, screen = np.random.default_rng(seed).normal(size=(2, 50))
        assert stats.cells_for_recall(exact, screen, k, recall) == literal_cells(exact, screen, k, recall)


def test_cells_that_the_screen_ties_are_all_verified():
    exact = np.array([3.0, 0.0, 0.0, -2.0, 0.0])
    assert stats.cells_for_recall(exact, np.array([9.0, 0, 0, 0, 0]), 2, 0.5) == 1
    assert stats.cells_for_recall(exact, np.array([9.0, 0, 0, 0, 0]), 2, 1.0) == 5
    # either of the cells tied at the k-th effect will do
    assert stats.cells_for_recall(np.array([2.0, 1.0, 1.0, 0.0]), np.array([4.0, 1.0, 3.0, 2.0]), 2, 1.0) == 2


def test_ranks_average_ties():
    values = np.array([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, -1.0, 0.0, 5.0]])
    for got, given in zip(stats.ranks(values), values, strict=True):
        assert got.tolist() == literal_ranks(given).tolist()
