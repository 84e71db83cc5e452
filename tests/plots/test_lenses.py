"""Figures of lenses: the prepared data is what was read, what is drawn is the prepared data, and what does not fit is refused."""

import numpy as np
import pytest
import xarray as xr
from families import mixed_task, model_of, swap_task

import patchlab as pl
from patchlab import lenses
from patchlab.errors import LensError
from patchlab.plots._attention import _prepare_head_grid, _prepare_thumbnails
from patchlab.plots._conservation import _prepare_conservation
from patchlab.plots._qk import _prepare_qk
from patchlab.plots._token_strip import _prepare_token_strip
from patchlab.plots._token_table import _prepare_token_table
from patchlab.plots._trajectories import _prepare_trajectories


@pytest.fixture(scope="module")
def read():
    return lenses.logit_lens().read(model_of("gpt2"), swap_task())


@pytest.fixture(scope="module")
def seen():
    return lenses.attention(model_of("gpt2"), swap_task())


def test_the_token_table_shows_the_most_likely_tokens(read):
    data = _prepare_token_table(read, 1, [0, -1])
    np.testing.assert_array_equal(data.texts, read.top(1)[:, [0, 4]])
    np.testing.assert_allclose(data.probability, read.data["top_probability"][1, :, [0, 4], 0])
    assert data.layers == (0, 1, 2)
    assert data.ticks[1] == f"END: {read.data['token'].to_numpy()[1][4]}"
    assert "2 of 5 positions" in data.subtitle
    assert data.hover[2, 1].startswith(f"<b>layer 2, position 4 ({data.ticks[1]})</b><br>{float(read.data['top_probability'][1, 2, 4, 0]):.3f} ")
    figure = pl.plots.token_table(read, 1, positions=[0, -1])
    table, texts = figure.data
    np.testing.assert_array_equal(table.z, data.probability)
    assert list(texts.text) == list(data.texts.ravel())
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "layer 0 is above"


def test_only_the_last_positions_of_long_prompts_are_drawn(monkeypatch, read):
    monkeypatch.setattr("patchlab.plots._token_table.MOST", 3)
    data = _prepare_token_table(read, 0, None)
    assert data.texts.shape == (3, 3)
    assert "3 of 5 positions" in data.subtitle
    with pytest.raises(LensError, match="example is 3"):
        pl.plots.token_table(read, 3)
    with pytest.raises(LensError, match="no positions"):
        pl.plots.token_table(read, positions=[])


def test_trajectories_are_means_with_intervals(read):
    other = lenses.logit_lens().read(model_of("gpt2"), swap_task(), side="corrupted")
    data = _prepare_trajectories({"clean": read, "corrupted": other}, "probability")
    assert [line.name for line in data.lines] == ["clean: correct", "clean: incorrect", "corrupted: correct", "corrupted: incorrect"]
    assert [line.dashed for line in data.lines] == [False, True, False, True]
    assert data.lines[0].colour == data.lines[1].colour != data.lines[2].colour
    np.testing.assert_allclose(data.lines[0].mean, read.data["correct"].mean("example"))
    (line,) = _prepare_trajectories(read, "metric").lines
    np.testing.assert_allclose(line.mean, read.trajectory()["metric"])
    assert (line.low <= line.mean).all()
    assert (line.mean <= line.high).all()
    figure = pl.plots.trajectories(read, "rank")
    np.testing.assert_allclose(figure.data[1].y, read.data["rank"].mean("example"))
    with pytest.raises(LensError, match="unknown value 'logit'"):
        pl.plots.trajectories(read, "logit")
    with pytest.raises(LensError, match="no answers"):
        pl.plots.trajectories(lenses.logit_lens().read(model_of("gpt2"), [[1, 2, 3]]))


def test_strips_share_a_scale_that_is_centred():
    model, task = model_of("gpt2"), swap_task()
    given = {rules: lenses.relevance(model, task, "input", rules=rules) for rules in ("gradient", "relp")}
    data = _prepare_token_strip(given, 1)
    np.testing.assert_allclose(data.values, [given["gradient"][1], given["relp"][1]])
    assert data.limit == pytest.approx(np.abs(data.values).max())
    assert data.names == ("gradient", "relp")
    figure = pl.plots.token_strip(given, 1)
    assert {(trace.zmin, trace.zmid, trace.zmax) for trace in figure.data} == {(-data.limit, 0, data.limit)}
    assert figure.data[0].text[0][2] == f"{data.tokens[2]}<br>{data.values[0, 2]:+.2f}"
    np.testing.assert_allclose(_prepare_token_strip(given["relp"], None).values[0], given["relp"].mean("example"))
    named = _prepare_token_strip(lenses.relevance(model, mixed_task(), "input"), None)
    assert named.tokens == ("A", "B", "END")
    with pytest.raises(LensError, match="axes"):
        pl.plots.token_strip(given["relp"].isel(example=0))
    with pytest.raises(LensError, match="at least one"):
        pl.plots.token_strip({})


def test_long_strips_go_on_below():
    values = xr.DataArray(np.linspace(-1, 1, 60)[None], dims=("example", "pos"), coords={"token": (("example", "pos"), [["word"] * 60])})
    figure = pl.plots.token_strip(values)
    assert sum(trace.z.shape[1] if hasattr(trace.z, "shape") else len(trace.z[0]) for trace in figure.data) == 60
    assert len(figure.data) > 1
    assert figure.layout.width <= 1400


def test_thumbnails_are_all_patterns(seen):
    data = _prepare_thumbnails(seen, 1)
    own = seen.pattern("a2.h1", 1)
    part = data.image[2 * 6 : 2 * 6 + 5, 6 : 6 + 5]
    np.testing.assert_array_equal(part[np.tril_indices(5)], own[np.tril_indices(5)])
    assert np.isnan(part[np.triu_indices(5, 1)]).all()
    assert np.isnan(data.image[5]).all(), "a gap between heads"
    assert data.hover[12 + 3, 6 + 1].startswith("<b>a2.h1</b><br>")
    np.testing.assert_array_equal(pl.plots.attention(seen, example=1).data[0].z, data.image)


def test_chosen_heads_have_their_tokens(seen):
    figure = pl.plots.attention(seen, ["a0.h3", "a2.h1"], None)
    np.testing.assert_allclose(figure.data[1].z, seen.pattern("a2.h1", None))
    assert figure.layout.xaxis.ticktext[4].startswith("END: ")
    with pytest.raises(LensError, match="no heads"):
        pl.plots.attention(seen, [])


def test_one_number_per_head(seen):
    data = _prepare_head_grid(seen.at("effective"), "")
    assert (data.title, data.signed) == ("Effective", False)
    np.testing.assert_allclose(data.values, seen.at("effective"))
    found = lenses.logit_lens().attribute(model_of("gpt2"), swap_task(), by="head").of("head")
    signed = _prepare_head_grid(found, "Direct attribution")
    np.testing.assert_allclose(signed.values, found.mean("example"))
    figure = pl.plots.head_grid(found)
    assert figure.data[0].zmin == -figure.data[0].zmax
    grid = xr.DataArray([[-0.001, -1.5]], dims=("layer", "head"))
    assert pl.plots.head_grid(grid).data[0].text.tolist() == [["0.00", "−1.50"]]
    with pytest.raises(LensError, match="axes"):
        pl.plots.head_grid(seen.statistics()["entropy"])


def test_conservation_stacks_the_biases_on_the_stream():
    found = lenses.conservation(model_of("gpt2"), swap_task(1), ["gradient", "relp-ah"])
    data = _prepare_conservation(found)
    table = found.table()
    for panel in data.panels:
        part = table[table["rules"] == panel.rules]
        np.testing.assert_allclose(panel.stream, part["stream"])
        np.testing.assert_allclose(panel.biases, part["biases"])
        assert data.span[0] < min(0, panel.stream.min())
        assert data.span[1] > max(1, panel.stream.max())
    figure = pl.plots.conservation(found)
    assert figure.layout.barmode == "relative"
    stream, biases, total, one = figure.data[4:8]
    np.testing.assert_allclose(np.add(stream.y, biases.y), total.y)
    np.testing.assert_allclose(total.y, 1, atol=1e-4)
    assert list(one.y) == [1, 1]


def test_pairs_of_components_are_drawn_with_all_others_together():
    found = lenses.qk_attribution(model_of("gpt2"), swap_task(), "L2.H1.pattern@END<1")
    data = _prepare_qk(found, 3)
    grid = found.grid(3)
    np.testing.assert_array_equal(data.values, grid)
    assert data.queries[-1] == data.keys[-1] == "others"
    assert list(data.keys) == list(grid["key"].to_numpy())
    (drawn,) = pl.plots.qk_pairs(found, 3).data
    np.testing.assert_array_equal(drawn.z, data.values)
    assert drawn.zmax == -drawn.zmin == np.abs(data.values).max()
    assert drawn.hovertext[0][1].startswith(f"<b>{data.queries[0]} × {data.keys[1]}</b>")
    assert len(_prepare_qk(found, 100).queries) == len(found.queries.names), "nothing is left for others"
    with pytest.raises(LensError, match="n is 0"):
        pl.plots.qk_pairs(found, 0)
