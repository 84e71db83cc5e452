"""Attention patterns and their statistics by hand."""

import numpy as np
import pytest
from families import HEADS, LAYERS, mixed_task, model_of, swap_task

from patchlab import lenses
from patchlab.errors import LensError, SiteError
from patchlab.lenses import Attention
from patchlab.testing.zoo import zoo_model


def test_patterns_are_those_of_the_run():
    model, task = model_of("llama"), swap_task()
    found = lenses.attention(model, task, side="corrupted", batch_size=2)
    kept = model.run(task.prompts("corrupted"), keep="pattern")
    for layer in range(LAYERS):
        np.testing.assert_allclose(found.patterns.sel(layer=layer), kept[f"L{layer}.pattern"], atol=1e-6)
    np.testing.assert_array_equal(found.pattern("a1.h2", 1), found.pattern("L1.H2", 1))
    np.testing.assert_allclose(found.pattern("a1.h2", None), kept["L1.pattern"][:, 2].mean(0), atol=1e-6)
    assert list(found.patterns["src_token"].to_numpy()[2]) == [f"[{token}]" for token in task.pairs[2].corrupted_ids]


def made(rows, mass=0.9):
    """Attention of one head of one layer on one example."""
    import xarray as xr

    patterns = np.array(rows, dtype=float)[None, None, None]
    texts = np.array([["a", "b", "c", "d"]], dtype=object)
    coords = {"layer": [0], "token": (("example", "dest"), texts), "src_token": (("example", "src"), texts)}
    return Attention("made", xr.DataArray(patterns, dims=("example", "layer", "head", "dest", "src"), coords=coords), {"END": np.array([3])}, mass)


def test_statistics_by_hand():
    rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0.6, 0.3, 0.1, 0]]
    found = {name: part[0, 0, 0] for name, part in made(rows).statistics().items()}
    np.testing.assert_allclose(found["entropy"], [0, np.log(2), 0, -(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1))])
    np.testing.assert_allclose(found["effective"][:3], [1, 2, 1])
    np.testing.assert_array_equal(found["count"], [1, 2, 1, 2])
    np.testing.assert_allclose(found["share"], [1, 1, 1 / 3, 0.5])
    np.testing.assert_array_equal(made(rows, 0.95).statistics()["count"][0, 0, 0], [1, 2, 1, 3])


def test_means_at_a_position():
    model, task = model_of("gpt2"), mixed_task().select([0, 2])
    found = lenses.attention(model, task)
    statistics = found.statistics()["effective"].to_numpy()
    np.testing.assert_allclose(found.at("effective", "A"), (statistics[0, :, :, 1] + statistics[1, :, :, 3]) / 2)
    np.testing.assert_allclose(found.at("effective", -1), found.at("effective"))
    table = found.table()
    assert list(table["head"][:5]) == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"]
    assert len(table) == LAYERS * HEADS


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda found: found.pattern("a9.h0"), "no head 'a9.h0'"),
        (lambda found: found.pattern("x"), "no head 'x'"),
        (lambda found: found.pattern("a0.h0", 7), "example is 7"),
        (lambda found: found.at("spread"), "unknown statistic"),
        (lambda found: found.at("entropy", "S9"), "position 'S9'"),
        (lambda found: found.at("entropy", 5), "outside"),
    ],
)
def test_what_is_not_there_is_refused(ask, says):
    with pytest.raises(LensError, match=says):
        ask(lenses.attention(model_of("gpt2"), swap_task()))


def test_patterns_that_do_not_line_up_or_do_not_exist_are_refused():
    with pytest.raises(LensError, match="do not line up"):
        lenses.attention(model_of("gpt2"), mixed_task())
    with pytest.raises(SiteError, match="pattern"):
        lenses.attention(zoo_model("gpt-j"), swap_task())
    with pytest.raises(LensError, match="mass is 1"):
        lenses.attention(model_of("gpt2"), swap_task(), mass=1.0)
