"""Attention patterns: what is drawn is what was given, and shapes that do not fit are refused."""

import numpy as np
import pytest

import patchlab as pl
from patchlab.errors import ScoreError
from patchlab.plots._patterns import _prepare_patterns


def test_data_and_drawing():
    given = {"a1.h2": np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None], "a0.h0": np.eye(3)}
    data = _prepare_patterns(given, ["<bos>", " cat", " sat"], ["", "SUBJECT"], title="Heads")
    assert data.title == "Heads"
    assert data.ticks == ("&lt;bos&gt;", "SUBJECT: cat", "sat")
    assert list(data.patterns) == ["a1.h2", "a0.h0"]
    figure = pl.plots.patterns(given, ["<bos>", " cat", " sat"], ["", "SUBJECT"])
    for trace, pattern in zip(figure.data, given.values(), strict=True):
        np.testing.assert_array_equal(trace.z, pattern)
        assert (trace.zmin, trace.zmax) == (0, 1)
    assert figure.data[0].hovertext[2][1] == "<b>a1.h2</b><br>sat → SUBJECT: cat: 0.33"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "the first position is above"


@pytest.mark.parametrize(
    ("given", "tokens", "problem"),
    [({}, ["a"], "no attention patterns"), ({"h": np.eye(2)}, ["a"], r"\(2, 2\).*1 tokens"), ({"h": np.ones((2, 3))}, ["a", "b"], r"\(2, 3\)")],
)
def test_what_does_not_fit_is_refused(given, tokens, problem):
    with pytest.raises(ScoreError, match=problem):
        pl.plots.patterns(given, tokens)
