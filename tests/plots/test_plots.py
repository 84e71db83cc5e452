"""What the figures show: the prepared data, and that drawing keeps it apart, labelled and offline."""

import re

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
from families import model_of, swap_task
from score_maps import COST, Labels, altered, make_map, random_map

from patchlab import plots
from patchlab.comparison.compare import FORMS, STATISTICS, compare
from patchlab.errors import OutputError, ScoreError
from patchlab.methods import patch_edges
from patchlab.plots import _save
from patchlab.plots._agreement import STRUCTURAL, _prepare_agreement
from patchlab.plots._comparison import _prepare_comparison
from patchlab.plots._differences import _prepare_differences
from patchlab.plots._heatmaps import _prepare_heatmaps
from patchlab.plots._save import save
from patchlab.plots._style import _METHODS, _OTHERS, OPPOSES, SUPPORTS, flow, method_colours, shown, sparse_ticks
from patchlab.scores import ScoreMap

SITES = ("resid_pre", "z")


def only(data):
    """The one panel of a prepared figure."""
    assert len(data.rows) == len(data.rows[0]) == 1
    return data.rows[0][0]


def half(site: str, values: np.ndarray) -> np.ndarray:
    return 0.5 * values


def without_z(scores: ScoreMap, **changes: object) -> ScoreMap:
    return altered(scores, lambda site, v: np.full_like(v, np.nan) if site == "z" else v, not_scored={"z": "pattern is constant"}, **changes)


# heatmaps


def test_layer_by_position_and_layer_by_head():
    scores = random_map(*SITES)
    data = _prepare_heatmaps(scores)
    resid, z = (row[0] for row in data.rows)
    assert (resid.site, z.site) == SITES
    np.testing.assert_array_equal(resid.values, scores.mean("resid_pre"))
    np.testing.assert_array_equal(resid.live, scores.live["resid_pre"])
    np.testing.assert_array_equal(z.values, scores.mean("z"))
    assert (resid.rows.title, resid.columns.title, z.columns.title) == ("layer", "position", "head")
    assert z.columns.texts == ("0", "1", "2", "3")
    assert data.value_label == "effect (logits)"
    assert data.title == "Effect of patching on logit_diff: exact"
    assert data.subtitle == "tiny × toy[8], denoising"


def test_repeated_tokens_stay_separate_columns():
    columns = only(_prepare_heatmaps(random_map("resid_pre"))).columns
    assert columns.texts == ("&lt;bos&gt;", "the", "cat", "saw", "the", "pos 5")
    assert columns.places == (0, 1, 2, 3, 4, 5)
    axis = plots.heatmaps(random_map("resid_pre")).layout.xaxis
    assert axis.type == "linear"
    assert list(axis.tickvals) == [0, 1, 2, 3, 4, 5]
    assert list(axis.ticktext).count("the") == 2


def test_a_position_whose_token_varies_is_headed_by_its_name_or_index_and_lists_its_tokens():
    by_index, by_name = (only(_prepare_heatmaps(random_map("resid_pre", named=named))) for named in (False, True))
    assert by_index.columns.texts[-1] == "pos 5"
    assert by_name.columns.texts[-2:] == ("P4: the", "P5")
    assert "“dog” 4×, “cow” 4×" in by_index.hover[2, 5]
    assert "layer 2<br>position 5" in by_index.hover[2, 5]
    assert "“cat”" in by_index.hover[0, 2]
    assert f"effect {by_index.values[2, 5]:.3g} logits" in by_index.hover[2, 5]
    assert "same in both prompts" in by_index.hover[1, 0]
    assert "same in both prompts" not in by_index.hover[1, 1]


def test_a_map_without_tokens_is_headed_by_indices():
    data = _prepare_heatmaps(make_map({"resid_pre": np.ones((2, 1, 3))}))
    assert only(data).columns.texts == ("pos 0", "pos 1", "pos 2")


def test_layer_0_is_at_the_top_and_colours_are_centred_at_0():
    scores = make_map({"z": np.array([[[1.0, -3.0], [0.5, 0.0]]] * 3)})
    figure = plots.heatmaps(scores)
    assert figure.layout.yaxis.range == (1.5, -0.5)
    scale = figure.layout.coloraxis1
    assert (scale.cmin, scale.cmax) == (-3, 3)
    low, middle, high = scale.colorscale[0][1], scale.colorscale[5][1], scale.colorscale[-1][1]
    assert (low, middle, high) == ("rgb(103,0,31)", "rgb(247,247,247)", "rgb(5,48,97)")
    assert any(note.text == "effect (logits)" for note in figure.layout.annotations)


def test_structural_zeros_do_not_look_like_measured_zeros_and_say_of_which_kind_they_are():
    no_path = {"z": np.array([[False, False, False, True]])}
    scores = make_map({"z": np.zeros((2, 1, 4))}, live={"z": np.array([[True, False, True, False]])}, no_path=no_path)
    assert only(_prepare_heatmaps(scores)).zero.tolist() == [["", "same in both prompts", "", "no path"]]
    measured, cut, hatching, same, dots = plots.heatmaps(scores).data
    assert np.array_equal(measured.z, [[0, np.nan, 0, np.nan]], equal_nan=True)
    assert np.array_equal(cut.z, [[np.nan, np.nan, np.nan, 0]], equal_nan=True)
    assert np.array_equal(same.z, [[np.nan, 0, np.nan, np.nan]], equal_nan=True)
    assert cut.colorscale[0][1] != same.colorscale[0][1]
    assert (list(hatching.x), list(hatching.y), hatching.marker.symbol) == ([3], [0], "line-ne")
    assert (list(dots.x), dots.marker.symbol) == ([1], "circle")
    assert cut.text[0][3].endswith("<br>no path to the metric")
    assert same.text[0][1].endswith("<br>same in both prompts")
    notes = " ".join(note.text for note in plots.heatmaps(scores).layout.annotations)
    assert "no path to the metric" in notes
    assert "same in both prompts" in notes
    assert "cannot affect" not in notes
    assert "no path" not in " ".join(note.text for note in plots.heatmaps(random_map("z")).layout.annotations)


def test_structural_zeros_do_not_set_the_colour_limit():
    scores = make_map({"z": np.array([[[100.0, 2.0]]])}, live={"z": np.array([[False, True]])})
    assert _prepare_heatmaps(scores).limits == (2.0,)


def test_a_site_that_was_not_scored_says_why():
    scores = without_z(random_map(*SITES))
    assert _prepare_heatmaps(scores).rows[1][0].not_scored == "pattern is constant"
    figure = plots.heatmaps(scores)
    assert any("not scored" in note.text and "pattern is constant" in note.text for note in figure.layout.annotations)
    assert sum(isinstance(trace, go.Heatmap) for trace in figure.data) == 2  # resid_pre and its structural zeros


def test_sites_of_one_axis_are_columns():
    by_position = random_map("input")
    facet = only(_prepare_heatmaps(by_position))
    np.testing.assert_array_equal(facet.values[:, 0], by_position.mean("input"))
    assert (facet.rows.title, facet.columns.names) == ("position", ("effect",))
    assert facet.rows.names[2] == "cat"
    model, task = model_of("gpt2"), swap_task(n=2)
    sets = patch_edges(model, task, {"through m0": ["input->m0", "m0->logits"], "direct": ["input->logits"]}, progress=False)
    facet = only(_prepare_heatmaps(sets))
    np.testing.assert_array_equal(facet.values[:, 0], sets.mean("sets"))
    assert facet.rows.names == ("through m0", "direct")
    assert only(_prepare_heatmaps(random_map("z[layer]"))).columns.names == ("all positions",)


def test_normalised_heatmaps_are_shares_of_the_gap():
    scores = random_map("z")
    data = _prepare_heatmaps(scores, normalised=True)
    np.testing.assert_allclose(only(data).values, scores.mean("z") / scores.gap)
    assert data.value_label == "effect, share of the gap"
    assert only(data).hover[0, 0].endswith("of the gap")
    with pytest.raises(ScoreError, match="not distinguishable from 0"):
        plots.heatmaps(make_map({"z": np.ones((2, 1, 1))}, clean=np.array([1.0, -1.0])), normalised=True)


def test_three_axes_have_a_row_per_head():
    scores = random_map("z[layer,pos,head]")
    facet = only(_prepare_heatmaps(scores))
    assert facet.values.shape == (12, 6)
    np.testing.assert_array_equal(facet.values[7], scores.mean("z[layer,pos,head]")[1, :, 3])
    assert facet.rows.texts == tuple(f"L{layer}.H{head}" for layer in range(3) for head in range(4))
    assert facet.rows.breaks == (3.5, 7.5)
    assert "layer 1<br>position 2 “cat”<br>head 3" in facet.hover[7, 2]
    pattern = random_map("pattern[layer,head,src]")
    facet = only(_prepare_heatmaps(pattern))
    np.testing.assert_array_equal(facet.values[7], pattern.mean("pattern[layer,head,src]")[1, 3])


def test_attention_patterns_have_a_panel_per_head_with_the_largest_effect():
    scores = random_map("pattern[layer,head,dest,src]")
    facets = [facet for row in _prepare_heatmaps(scores).rows for facet in row]
    mean = scores.mean("pattern[layer,head,dest,src]").to_numpy()
    largest = np.abs(mean).max((2, 3))
    expected = sorted(zip(*np.unravel_index(np.argsort(-largest, axis=None)[:6], largest.shape), strict=True))
    assert [facet.title.split()[1] for facet in facets] == [f"L{layer}.H{head}" for layer, head in expected]
    for facet, place in zip(facets, expected, strict=True):
        np.testing.assert_array_equal(facet.values, mean[place])
    assert "the 6 of 12 heads with the largest effect" in facets[0].description


def test_neurons_are_ranked_in_their_layer():
    scores = random_map("mlp_post")
    facet = only(_prepare_heatmaps(scores))
    mean = scores.mean("mlp_post").to_numpy()
    np.testing.assert_array_equal(np.abs(facet.values), -np.sort(-np.abs(mean), axis=1)[:, :32])
    assert f"neuron {np.abs(mean[2]).argmax()}<br>" in facet.hover[2, 0]
    scores = random_map("mlp_post[layer,pos,neuron]")
    facet = only(_prepare_heatmaps(scores))
    layer, neuron = (int(part[1:]) for part in facet.rows.texts[5].split("."))
    np.testing.assert_array_equal(facet.values[5], scores.mean("mlp_post[layer,pos,neuron]")[layer, :, neuron])


def test_a_site_scored_by_layer_only_is_one_column():
    assert only(_prepare_heatmaps(random_map("attn_out[layer]"))).values.shape == (3, 1)


def test_several_maps_are_columns_on_one_scale_per_site():
    exact = random_map(*SITES)
    data = _prepare_heatmaps({"exact": exact, "double": altered(exact, lambda site, values: 2 * values)})
    assert [[facet.title for facet in row] for row in data.rows] == [["exact · resid_pre", "double · resid_pre"], ["exact · z", "double · z"]]
    np.testing.assert_allclose(data.limits, [2 * float(np.abs(exact.mean(site)).max()) for site in SITES])
    assert [facet.first for facet in data.rows[0]] == [True, False]
    figure = plots.heatmaps({"exact": exact, "double": altered(exact, half)})
    assert [trace.coloraxis for trace in figure.data if isinstance(trace, go.Heatmap) and trace.coloraxis] == ["coloraxis"] * 2 + ["coloraxis2"] * 2


def test_all_maps_of_a_figure_show_the_same_neurons_and_heads():
    exact, other = random_map("mlp_post"), random_map("mlp_post", seed=5)
    row = _prepare_heatmaps({"exact": exact, "other": other}).rows[0]
    for facets in zip(*(facet.hover.ravel() for facet in row), strict=True):
        assert len({text.partition("<br>effect")[0] for text in facets}) == 1


def test_unlike_maps_are_not_drawn_together():
    with pytest.raises(ScoreError, match=r"cannot compare b with a: the directions differ"):
        plots.heatmaps({"a": random_map("z"), "b": random_map("z", direction="noising")})
    with pytest.raises(ScoreError, match="nothing to draw"):
        plots.heatmaps({})


def noising(**options):
    return make_map({"z": np.array([[[1.0, -3.0]]])}, direction="noising", **options)


def test_blue_supports_and_red_opposes_in_both_directions():
    """Denoising raises the metric at what supports the behaviour, noising lowers it there."""
    for direction, sign in (("denoising", 1), ("noising", -1)):
        scores = make_map({"z": np.array([[[3.0, -3.0]]])}, direction=direction)
        means = _prepare_heatmaps(scores).signs
        assert (means.positive, means.negative)[::sign] == (SUPPORTS, OPPOSES)
        assert (means.above, means.below)[::sign] == ("supports the behaviour", "works against the behaviour")
        scale = plots.heatmaps(scores).layout.coloraxis1.colorscale
        red, blue = (scale[0][1], scale[-1][1])[::sign]
        assert (red, blue) == ("rgb(103,0,31)", "rgb(5,48,97)")
        assert means.legend.index(SUPPORTS) < means.legend.index("supports the behaviour") < means.legend.index(OPPOSES)


def test_scores_without_sign_are_neither_red_nor_blue():
    figure = plots.heatmaps(noising(unsigned=True))
    assert "sign unknown" in figure.layout.annotations[1].text
    assert (figure.data[0].zmin, figure.data[0].colorscale[0][1]) == (0, "white")
    both = plots.heatmaps({"exact": noising(), "drop": noising(unsigned=True)})
    assert [trace.coloraxis for trace in both.data] == ["coloraxis", None]
    assert "supports the behaviour" in both.layout.annotations[1].text


# large figures


def large_map(layers: int = 26, heads: int = 8, **options):
    values = 0.01 * np.random.default_rng(0).normal(size=(1, layers, 6, heads))
    values[0, 9, 4, 6], values[0, 20, 2, 1], values[0, 3, 0, 0] = 3.0, -2.0, 9.0
    live = np.ones(values.shape[1:], dtype=bool)
    live[:, 0] = False
    name = "z[layer,pos,head]"
    tokens = (("a", "b", "the", "c", "the", "d"),)
    return make_map({name: values}, live={name: live}, labels=Labels((), tokens), examples=[0], **options)


def test_large_figures_have_a_fixed_height_and_a_table_of_the_largest_cells():
    small, large = (_prepare_heatmaps(large_map(layers)) for layers in (25, 26))
    assert (small.tops, only(small).compact, len(only(small).rows.texts)) == ((), False, 200)
    facet, (top,) = only(large), large.tops
    assert (len(facet.rows.names), facet.compact, facet.hover) == (208, True, None)
    assert len(top.cells) == 20
    assert top.cells[:2] == ((0, 9 * 8 + 6, 4), (0, 20 * 8 + 1, 2))
    assert top.names[:2] == ("L9.H6 · the (4)", "L20.H1 · the (2)")
    np.testing.assert_allclose(top.values[:2, 0], [3.0, -2.0])
    assert np.abs(top.values).max() == 3.0, "a cell that cannot matter is not among them"
    figure = plots.heatmaps(large_map(60))
    assert figure.layout.height < 800
    assert len(figure.to_json()) < 100_000
    axis = figure.layout.yaxis
    assert (axis.type, axis.categoryarray[9 * 8 + 6], len(set(axis.categoryarray))) == ("category", "L9.H6", 480)
    heat, same, rings, table = figure.data
    assert (heat.y[9 * 8 + 6], heat.x[4]) == ("L9.H6", "the (4)")
    assert heat.z[9 * 8 + 6][4] == 3.0
    assert "same in both prompts" in same.hovertemplate
    assert (rings.x[0], rings.y[0]) == ("the (4)", "L9.H6")
    assert [list(column[:2]) for column in table.cells.values] == [["L9.H6 · the (4)", "L20.H1 · the (2)"], ["+3.00", "−2.00"]]


def test_the_table_of_several_maps_has_a_column_each(monkeypatch):
    exact = large_map()
    data = _prepare_heatmaps({"exact": exact, "half": altered(exact, half)})
    (top,) = data.tops
    assert top.columns == ("exact", "half")
    np.testing.assert_allclose(top.values[:2], [[3.0, 1.5], [-2.0, -1.0]])
    pair = {name: random_map("z", "resid_pre", seed=i) for i, name in enumerate("ab")}  # 2 × (12 + 18) cells
    monkeypatch.setattr("patchlab.plots._heatmaps.MOST_CELLS", 60)
    assert _prepare_heatmaps(pair).tops == ()
    monkeypatch.setattr("patchlab.plots._heatmaps.MOST_CELLS", 59)
    tops = _prepare_heatmaps(pair).tops
    assert all("." in name for name in tops[0].names), "L1.H2"
    assert all(" · " in name for name in tops[1].names), "L1 · cat"


# agreement


def test_agreement_pairs_the_same_cells():
    exact = random_map(*SITES)
    other = random_map(*SITES, seed=1)
    data = _prepare_agreement(exact, {"AtP": altered(exact, half), "IG": other})
    assert [[(panel.site, panel.method) for panel in row] for row in data.rows] == [[(site, name) for name in ("AtP", "IG")] for site in SITES]
    panel = data.rows[1][1]
    np.testing.assert_array_equal(panel.exact, exact.mean("z").to_numpy().ravel())
    np.testing.assert_array_equal(panel.approximation, other.mean("z").to_numpy().ravel())
    assert panel.layer.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.rows[0][0].live.tolist() == exact.live["resid_pre"].to_numpy().ravel().tolist()
    assert "layer 2<br>position 5" in data.rows[0][0].hover[-1]
    assert (data.rows[0][0].pearson, data.rows[0][0].slope) == (pytest.approx(1), pytest.approx(0.5))


def test_agreement_states_what_compare_states():
    exact, methods = random_map(*SITES), {"AtP": random_map(*SITES, seed=1)}
    table = compare(exact, methods, n_boot=2).table.query("cells == 'live'").set_index("site")
    for row in _prepare_agreement(exact, methods).rows:
        for name in (*FORMS, "slope"):
            assert getattr(row[0], name) == pytest.approx(table.loc[row[0].site, name]), name


def test_agreement_of_an_unsigned_method_is_drawn_and_stated_against_the_size():
    exact = random_map("z")
    methods = {"GradDrop": altered(random_map("z", seed=1), lambda site, values: np.abs(values), unsigned=True), "AtP": random_map("z", seed=2)}
    table = compare(exact, methods, n_boot=2).table.set_index("method")
    unsigned, signed = _prepare_agreement(exact, methods).rows[0]
    for scatter, values in ((unsigned, np.abs(exact.mean("z").to_numpy())), (signed, exact.mean("z").to_numpy())):
        np.testing.assert_array_equal(scatter.exact, values.ravel())
        for name in (*FORMS, "slope"):
            assert getattr(scatter, name) == pytest.approx(table.loc[scatter.method, name].iloc[0]), name
    notes = [note.text for note in plots.agreement(exact, methods).layout.annotations]
    assert [", |exact|" in note for note in notes if " · z" in note] == [True, False]


def test_agreement_is_drawn_on_equal_axes_with_identity_and_slope():
    exact = random_map("resid_pre")
    figure = plots.agreement(exact, {"AtP": altered(exact, half)})
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    identity, line, structural, live = figure.data
    assert np.array_equal(identity.x, identity.y)
    np.testing.assert_allclose(line.y, 0.5 * np.asarray(line.x))
    assert (len(structural.x), len(live.x)) == (3, 15)
    assert structural.marker.color == STRUCTURAL
    assert list(live.marker.color) == [0] * 5 + [1] * 5 + [2] * 5
    assert live.marker.coloraxis == "coloraxis"
    notes = [note.text for note in figure.layout.annotations]
    assert "r, means 1.00<br>per prompt 1.00<br>pooled 1.00<br>slope 0.50" in notes
    assert "exact effect (logits)" in figure.layout.xaxis.title.text


def test_agreement_of_a_site_that_was_not_scored_or_is_undefined():
    exact = random_map(*SITES)
    figure = plots.agreement(exact, {"AH": without_z(exact)})
    assert any("not scored" in note.text for note in figure.layout.annotations)
    flat = make_map({"z": np.zeros((3, 1, 4))})
    figure = plots.agreement(flat, {"x": altered(flat, half)})
    assert any(note.text == "r, means undefined<br>per prompt undefined<br>pooled undefined<br>slope undefined" for note in figure.layout.annotations)


def test_agreement_refuses_what_compare_refuses():
    exact = random_map("z")
    with pytest.raises(ScoreError, match="the tasks differ"):
        plots.agreement(exact, {"x": random_map("z", task_fingerprint="other")})
    with pytest.raises(ScoreError, match="nothing to compare"):
        plots.agreement(exact, {})


# comparison


@pytest.fixture(scope="module")
def comparison():
    exact = random_map(*SITES)
    return compare(exact, {"RelP": random_map(*SITES, seed=1), "AH": without_z(exact)}, n_boot=30)


def test_comparison_bars_are_the_table(comparison):
    data = _prepare_comparison(comparison)
    assert (data.methods, data.sites) == (("RelP", "AH"), SITES)
    assert tuple(panel.statistic for panel in data.panels) == tuple(STATISTICS)
    table = comparison.table.query("cells == 'live'").set_index(["method", "site"])
    for panel in data.panels:
        for column, values in (("", panel.value), ("_lo", panel.low), ("_hi", panel.high)):
            expected = [[table[panel.statistic + column].get((method, site), np.nan) for site in SITES] for method in data.methods]
            np.testing.assert_array_equal(values, expected)
    assert np.isnan(data.panels[0].value[1, 1])
    assert data.costs[0] == ("exact", COST.positions, "2 forwards, 1 backwards, 0.50 s")
    assert data.half_pearson == tuple(comparison.reliability.query("cells == 'live'")["half_pearson"])


def test_comparison_of_all_cells_and_of_unknown_ones(comparison):
    assert _prepare_comparison(comparison, cells="all").panels[0].value[0, 0] == comparison.table.query("cells == 'all'")["pearson"].iloc[0]
    with pytest.raises(ScoreError, match="unknown set of cells 'dead'"):
        plots.comparison(comparison, cells="dead")


def test_whiskers_span_the_interval_and_a_missing_bar_is_a_dash(comparison):
    figure, data = plots.comparison(comparison), _prepare_comparison(comparison)
    rings = [trace for trace in figure.data if isinstance(trace, go.Scatter) and trace.marker.symbol == "circle"]
    expected = [quartile[i] for i in range(2) for quartile in data.panels[1].quartiles]
    np.testing.assert_array_equal([trace.y for trace in rings], expected)
    np.testing.assert_array_equal(expected[0][0], comparison.table.query("cells == 'live'")["pearson_per_prompt_q25"].iloc[0])
    whiskers = figure.data[1]
    np.testing.assert_allclose(np.asarray(whiskers.y) - whiskers.error_y.array, data.panels[0].low[0])
    np.testing.assert_allclose(np.asarray(whiskers.y) + whiskers.error_y.array, data.panels[0].high[0])
    assert sum(note.text == "–" for note in figure.layout.annotations) == len(STATISTICS)
    assert figure.layout.xaxis.ticktext == SITES
    assert figure.layout.yaxis8.type == "log"


# differences


def test_differences_are_the_table_with_a_dot_per_pair_site_and_form():
    exact = random_map(*SITES)
    methods = {"AtP": random_map(*SITES, seed=1), "<b>": altered(exact, half), "AH": without_z(exact)}
    found = compare(exact, methods, n_boot=30)
    data = _prepare_differences(found)
    assert data.pairs == (("<b>", "AtP"), ("AH", "AtP"), ("AH", "<b>"))
    assert data.sites == SITES
    table = found.differences.query("cells == 'live'").set_index(["method", "other", "site"])
    for name in FORMS:
        for end, part in (("", data.value), ("_lo", data.low), ("_hi", data.high)):
            expected = [[table[name + end].get((*pair, site), np.nan) for site in SITES] for pair in data.pairs]
            np.testing.assert_array_equal(part[name], expected)
        assert np.isnan(data.value[name][1:, 1]).all()
    figure = plots.differences(found)
    assert figure.layout.yaxis.ticktext == ("&lt;b&gt; − AtP", "AH − AtP", "AH − &lt;b&gt;")
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range
    bars, dots = figure.data[0], figure.data[1]
    np.testing.assert_allclose(np.asarray(bars.x) - bars.error_x.array, data.low["pearson"][:, 0])
    np.testing.assert_array_equal(dots.x, data.value["pearson"][:, 0])
    for colour, low, high in zip(dots.marker.color, data.low["pearson"][:, 0], data.high["pearson"][:, 0], strict=True):
        assert (colour != "white") == (low > 0 or high < 0)
    assert sum(note.text == "–" for note in figure.layout.annotations) == 2 * len(FORMS)
    assert _prepare_differences(found, cells="all").value["pearson"][0, 0] == found.differences.query("cells == 'all'")["pearson"].iloc[0]


def test_differences_without_pairs_or_of_unknown_cells_are_refused(comparison):
    with pytest.raises(ScoreError, match="unknown set of cells 'dead'"):
        plots.differences(comparison, cells="dead")
    exact = random_map("z")
    with pytest.raises(ScoreError, match="there are no differences to draw; compare at least two methods"):
        plots.differences(compare(exact, {"x": altered(exact, half)}, n_boot=2))


def test_a_method_has_one_colour_whatever_the_company_and_order():
    known = [*_METHODS, *(f"mine {i}" for i in range(3))]
    alone = {name: method_colours([name])[name] for name in known}
    together = method_colours(known)
    assert len(set(together.values())) == len(known) >= 16
    assert {name: together[name] for name in _METHODS} == {name: alone[name] for name in _METHODS} == dict(_METHODS)
    assert method_colours(known[::-1]) == together
    for mine, ours in {
        "EAP": "atp",
        "AtP": "atp",
        "IG-5": "ig:5",
        "EAP-IG-5": "ig-right:5",
        "edge-RelP": "relp",
        "edge-RelP+IG-5": "relp+ig:5",
    }.items():
        assert method_colours([mine])[mine] == _METHODS[ours], mine
    assert len(set(method_colours(["EAP", "atp", "AtP"]).values())) == 3, "on one page they are told apart"
    assert len(set(method_colours([f"own {i}" for i in range(25)]).values())) == 25


def test_method_colours_are_neither_the_blue_nor_the_red_of_effects():
    assert not {SUPPORTS, OPPOSES} & {*_METHODS.values(), *_OTHERS}


def test_bars_and_curves_use_the_colour_of_the_name(comparison):
    figure = plots.comparison(comparison)
    assert figure.data[0].marker.color == _METHODS["relp"]


# all figures


def figures(comparison) -> list[go.Figure]:
    exact = random_map(*SITES)
    return [plots.heatmaps(exact), plots.agreement(exact, {"AtP": altered(exact, half)}), plots.comparison(comparison), plots.differences(comparison)]


def test_figures_leave_plotly_as_it_was(comparison):
    before = plotly.io.templates.default, set(plotly.io.templates), plotly.io.renderers.default
    drawn = figures(comparison)
    assert (plotly.io.templates.default, set(plotly.io.templates), plotly.io.renderers.default) == before
    assert all(figure.layout.template.layout.plot_bgcolor == "white" for figure in drawn)
    assert go.Figure().layout.template.layout.plot_bgcolor != "white"


def test_names_from_outside_are_not_taken_for_tags():
    scores = random_map("z", model="<b>odd", task="a<i>b")
    notes = " ".join(note.text for note in plots.heatmaps(scores).layout.annotations)
    assert "&lt;b&gt;odd × a&lt;i&gt;b" in notes
    assert [shown(token) for token in (" the", "<bos>", "\n", "  ", "", "a" * 30)] == ["the", "&lt;bos&gt;", "↵", "␣␣", "", "a" * 13 + "…"]


def test_ticks_and_rows_keep_to_the_room_there_is():
    assert sparse_ticks(12, 16) == list(range(12))
    assert sparse_ticks(100, 16) == list(range(0, 100, 10))
    assert flow([40, 40, 40, 200], 100) == [[0, 1], [2], [3]]
    wide = make_map({"resid_pre": np.ones((1, 2, 40))}, labels=Labels((), (tuple("abcd" * 10),)))
    assert plots.heatmaps(wide).layout.width > 40 * 13


# saving


@pytest.fixture(scope="module")
def figure() -> go.Figure:
    return plots.heatmaps(random_map("z"))


def loaded_from(html: str) -> list[str]:
    return re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"([^\"]*)\"", html)


def test_html_stands_alone(figure, tmp_path):
    path = save(figure, tmp_path / "a.html")
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "a.html"
    assert loaded_from(html) == []
    assert len(html) > 1_000_000
    with pytest.raises(OutputError, match="not overwritten"):
        save(figure, path)
    save(figure, path, overwrite=True)


def test_pages_follow_a_dark_browser(figure, tmp_path):
    html = save(figure, tmp_path / "dark.html", include_plotlyjs="directory").read_text(encoding="utf-8")
    assert '<meta name="color-scheme" content="light dark">' in html.partition("<body>")[0]
    assert "prefers-color-scheme: dark" in html.partition("<body>")[0]


def test_html_of_a_folder_shares_one_script(figure, tmp_path):
    for name in ("a.html", "b.html"):
        save(figure, tmp_path / name, include_plotlyjs="directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "plotly.min.js"]
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert loaded_from(html) == ["plotly.min.js"]
    assert len(html) < 100_000


@pytest.mark.parametrize("error", [RuntimeError("Kaleido requires Google Chrome\nmore"), ValueError("\n\n  no kaleido here \n"), OSError()])
def test_without_a_browser_the_figure_is_written_as_html_and_a_warning_says_so(figure, tmp_path, monkeypatch, error):
    def drawn(*args: object) -> bytes:
        raise error

    monkeypatch.setattr("patchlab.plots._save._drawn", drawn)
    with pytest.warns(UserWarning, match=r"wrote .*a\.html instead of a \.png image, which needs kaleido and Chromium.*patchlab\[images\]"):
        path = save(figure, tmp_path / "a.png")
    assert path == tmp_path / "a.html"
    assert [item.name for item in tmp_path.iterdir()] == ["a.html"]


def test_without_kaleido_the_warning_names_the_package(figure, tmp_path, monkeypatch):
    monkeypatch.setattr("patchlab.plots._save._DRAW", "import sys; sys.modules['kaleido'] = None\n" + _save._DRAW)
    with pytest.warns(UserWarning, match=r"(?i)a\.html instead of a \.svg image.*image export requires the kaleido package"):
        save(figure, tmp_path / "a.svg")


@pytest.mark.slow
def test_png(figure, tmp_path, browser):
    path = save(figure, tmp_path / "a.png", scale=1)
    assert path == tmp_path / "a.png"
    image = path.read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") == int(figure.layout.width)
    with pytest.raises(OutputError, match="not overwritten"):
        save(figure, path)


def test_endings_and_places_that_do_not_work(figure, tmp_path):
    with pytest.raises(OutputError, match=r"cannot tell the format of 'a\.gif' from its ending '\.gif'; use one of \.html"):
        save(figure, tmp_path / "a.gif")
    with pytest.raises(OutputError, match="there is no folder"):
        save(figure, tmp_path / "missing" / "a.html")
