"""Figures over many runs: ranks are by hand, differences have the sign they say, and what is missing is left out and told."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import patchlab as pl
from patchlab.errors import ScoreError
from patchlab.plots._costs import _prepare_costs
from patchlab.plots._ranking import _prepare_ranking, rank_methods

COLUMNS = ["site", "setting", "method", "other", "value", "lo", "hi"]


def values(rows: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Per site and method the values in settings s0, s1, ..."""
    found = [
        {"site": site, "setting": f"s{i}", "method": method, "value": value}
        for site, methods in rows.items()
        for method, numbers in methods.items()
        for i, value in enumerate(numbers)
    ]
    return pd.DataFrame(found)


def differences(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=COLUMNS)


THREE = values({"z": {"atp": [0.5, 0.9, 0.7], "relp": [0.8, 0.8, 0.8], "gim": [0.1, 0.8, 0.9]}})


def test_mean_ranks_and_how_often_each_is_best():
    [site] = rank_methods(THREE, differences())
    assert (site.site, site.complete, site.settings, site.absent) == ("z", 3, 3, ())
    found = {one.method: (one.mean_rank, one.best, one.ranks.tolist()) for one in site.methods}
    assert found == {
        "relp": (pytest.approx(5.5 / 3), 1, [1, 2.5, 2]),
        "atp": (pytest.approx(2), 1, [2, 1, 3]),
        "gim": (pytest.approx(6.5 / 3), 1, [3, 2.5, 1]),
    }
    assert [one.method for one in site.methods] == ["relp", "atp", "gim"]
    assert all(len(one.value) == 0 for one in site.methods), "no differences were given"


def test_methods_that_are_equally_good_are_both_best():
    [site] = rank_methods(values({"z": {"a": [1.0, 0.5], "b": [1.0, 0.5], "c": [0.5, 0.4]}}), differences())
    assert [(one.method, one.mean_rank, one.best) for one in site.methods] == [("a", 1.5, 2), ("b", 1.5, 2), ("c", 3.0, 0)]


def test_settings_in_which_a_method_has_no_value_do_not_count_and_absent_methods_are_named():
    frame = values({"z": {"a": [0.1, 0.2, 0.9], "b": [0.3, np.nan, 0.4], "no": [np.nan] * 3}, "q": {"a": [0.1], "no": [0.9]}})
    first, second = rank_methods(frame, differences())
    assert (first.complete, first.settings, first.absent, first.names) == (2, 3, ("no",), ("s0", "s2"))
    assert [(one.method, one.mean_rank) for one in first.methods] == [("a", 1.5), ("b", 1.5)]
    assert (second.site, second.complete, second.absent) == ("q", 1, ("b",))
    [none] = rank_methods(values({"z": {"a": [0.1, np.nan], "b": [np.nan, 0.2]}}), differences())
    assert none.complete == 0
    assert all(np.isnan(one.mean_rank) and one.best == 0 for one in none.methods)
    assert "none is ranked" in pl.plots.ranking(values({"z": {"a": [0.1, np.nan], "b": [np.nan, 0.2]}}), differences()).to_json()


def test_differences_are_from_the_first_method_whichever_way_they_are_listed():
    given_ = differences(
        ("z", "s0", "atp", "relp", -0.3, -0.4, -0.2),
        ("z", "s1", "relp", "atp", -0.1, -0.2, -0.05),
        ("z", "s2", "atp", "relp", -0.1, -0.2, 0.1),
        ("z", "s0", "atp", "gim", 9.0, 8.0, 10.0),  # neither is the first
        ("q", "s0", "atp", "relp", 9.0, 8.0, 10.0),  # another site
        ("z", "s3", "atp", "relp", 0.2, None, None),  # one prompt has no interval
    )
    [site] = rank_methods(THREE, given_)
    atp = next(one for one in site.methods if one.method == "atp")
    np.testing.assert_allclose(atp.value, [-0.3, 0.1, -0.1, 0.2])
    np.testing.assert_allclose(atp.low[:3], [-0.4, 0.05, -0.2])
    np.testing.assert_allclose(atp.high[:3], [-0.2, 0.2, 0.1])
    assert (atp.worse, atp.better, atp.open) == (1, 1, 2)
    assert atp.settings == ("s0", "s1", "s2", "s3")
    figure = pl.plots.ranking(THREE, given_)
    text = figure.to_json()
    assert "1 below, 1 above, 2 open" in text
    assert "5.5" not in text
    assert "1.83, best in 1" in text
    assert "no pairs" in text, "gim was set against atp alone"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_ranks_share_out_the_places(table):
    frame = values({"z": {f"m{j}": [float(row[j]) for row in table] for j in range(3)}})
    [site] = rank_methods(frame, differences())
    assert sum(one.mean_rank for one in site.methods) == pytest.approx(6)
    assert sum(one.best for one in site.methods) == sum(row.count(max(row)) for row in table)
    assert [one.mean_rank for one in site.methods] == sorted(one.mean_rank for one in site.methods)


def test_bad_tables_are_refused():
    with pytest.raises(ScoreError, match="no column 'value'"):
        rank_methods(THREE.drop(columns="value"), differences())
    with pytest.raises(ScoreError, match="no column 'hi'"):
        rank_methods(THREE, differences().drop(columns="hi"))
    with pytest.raises(ScoreError, match="atp has two values at z in s0"):
        rank_methods(pd.concat([THREE, THREE.head(1)]), differences())
    with pytest.raises(ScoreError, match="no method has a value"):
        _prepare_ranking(THREE.assign(value=np.nan), differences(), "r")
    with pytest.raises(ScoreError, match="no column 'passes'"):
        pl.plots.costs(THREE, THREE)


def test_costs_have_a_point_per_run_and_say_what_is_left_out():
    frame = THREE.assign(passes=[4.0, 4, 4, 8, 8, np.nan, 4, 4, 4])
    exact = pd.DataFrame([{"site": "z", "setting": "s0", "method": "exact", "passes": 1000.0}])
    data = _prepare_costs(frame, exact, "r")
    assert data.sites == ("z",)
    [panel] = data.panels
    assert {one.method: one.passes.tolist() for one in panel} == {"atp": [4, 4, 4], "relp": [8, 8], "gim": [4, 4, 4]}
    assert panel[1].value.tolist() == [0.8, 0.8]
    assert panel[1].settings == ("s0", "s1")
    assert data.reference[0].passes.tolist() == [1000]
    assert data.reference[0].value.tolist() == [1]
    assert data.missing == 1
    assert "1 runs without a value are left out" in data.subtitle
    assert data.across[0] < np.log10(4) < 3 < data.across[1]
    assert data.down[0] < 0.1 < 1 < data.down[1]
    assert "exact patching itself" in pl.plots.costs(frame, exact).to_json()
    assert "exact patching itself" not in pl.plots.costs(frame, exact.head(0)).to_json()
    with pytest.raises(ScoreError, match="no run has an agreement"):
        pl.plots.costs(frame.assign(value=np.nan), exact)


def test_names_are_shown_as_they_are():
    frame = values({"<i>z</i>": {"<b>a</b>": [0.1, 0.2], "b": [0.3, 0.1]}})
    for figure in (
        pl.plots.ranking(frame, differences(("<i>z</i>", "s0", "b", "<b>a</b>", 0.1, 0.0, 0.2))),
        pl.plots.costs(frame.assign(passes=4.0), frame.assign(passes=9.0)),
    ):
        texts = [note.text for note in figure.layout.annotations]
        texts += [text for trace in figure.data for text in (*(trace.text or ()), *(trace.hovertext or ()))]
        assert not any("<i>z" in text or "<b><b>" in text for text in texts)
        assert any("&lt;i&gt;z" in text for text in texts)
