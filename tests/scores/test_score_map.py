"""ScoreMap: what it holds, what it refuses, and that a file gives back what was saved."""

import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray as xr
from score_maps import TOKENS, Labels, make_map, random_map

from patchlab.comparison.compare import compare
from patchlab.errors import OutputError, ScoreError
from patchlab.scores import Cost, ScoreMap
from patchlab.scores.arrays import Patterns
from patchlab.sites import Site
from patchlab.stats.bootstrap import interval, resampling_weights

ALL_SITES = ("resid_pre", "z", "z[layer,pos,head]", "k[layer,pos,kv_head]", "pattern[layer,head,dest,src]", "mlp_post")


def test_a_map_has_one_variable_per_site_with_named_axes_and_integer_indices():
    scores = random_map(*ALL_SITES)
    assert scores.sites == ALL_SITES
    for site in ALL_SITES:
        assert scores.data[site].dims == ("example", *Site.parse(site).axes)
        assert scores.live[site].dims == Site.parse(site).axes
        assert scores.live[site].dtype == bool
    for axis in ("example", "layer", "pos", "head", "kv_head", "neuron", "dest", "src"):
        assert scores.data.indexes[axis].dtype == np.int64
    for label, dims in {"token": ("example", "pos"), "dest_token": ("example", "dest"), "src_token": ("example", "src")}.items():
        assert scores.data[label].dims == dims
        assert label not in scores.data.indexes
    assert scores.data["resid_pre"].attrs == {"units": "logits"}


def test_repeated_tokens_stay_apart():
    scores = random_map("resid_pre")
    assert scores.data["token"].to_numpy()[0].tolist() == [*TOKENS[:-1], " dog"]
    total = scores.data["resid_pre"] + random_map("resid_pre", seed=1).data["resid_pre"]
    assert total.sizes["pos"] == len(TOKENS)


def test_named_positions_are_a_coordinate():
    assert random_map("resid_pre", named=True).data["position"].to_numpy().tolist() == [f"P{i}" for i in range(6)]
    assert "position" not in random_map("resid_pre").data.coords


def test_rows_are_put_in_the_order_of_the_examples():
    values = np.array([[[3.0]], [[1.0]], [[2.0]]])
    labels = Labels((), tuple((f"t{e}",) for e in range(9)))
    args = {"labels": labels, "clean": np.array([3.0, 1.0, 2.0]), "corrupted": np.zeros(3)}
    scores = make_map({"resid_pre": values}, examples=[8, 0, 4], **args)
    assert scores.data["example"].to_numpy().tolist() == [0, 4, 8]
    assert scores.data["resid_pre"].to_numpy().ravel().tolist() == [1.0, 2.0, 3.0]
    assert scores.data["metric_clean"].to_numpy().tolist() == [1.0, 2.0, 3.0]
    assert scores.data["token"].to_numpy().ravel().tolist() == ["t0", "t4", "t8"]


def test_arrays_are_read_only_and_their_own():
    values = np.ones((2, 3, 4))
    scores = make_map({"z": values})
    values[:] = 7
    assert float(scores.mean("z").max()) == 1
    for part in (scores.data["z"], scores.live["z"], scores.data["metric_clean"]):
        with pytest.raises(ValueError, match="read-only"):
            part.to_numpy()[0] = 0


def test_loaded_arrays_are_read_only_too(tmp_path):
    random_map("resid_pre", "z").save(tmp_path / "a.nc")
    scores = ScoreMap.load(tmp_path / "a.nc")
    assert not any(part.to_numpy().flags.writeable for part in (*scores.data.variables.values(), *scores.live.variables.values()))


def test_mean_is_over_examples_in_float64():
    scores = make_map({"z": np.array([[[1.0, 2.0]], [[3.0, 6.0]]], dtype=np.float32)})
    mean = scores.mean("z")
    assert mean.dims == ("layer", "head")
    assert mean.dtype == np.float64
    assert mean.to_numpy().tolist() == [[2.0, 4.0]]
    assert scores.mean("z[layer, head]").identical(mean)


def test_unknown_site_lists_those_of_the_map():
    with pytest.raises(ScoreError, match=r"unknown site of this score map 'q'; Valid: resid_pre, z\."):
        random_map("resid_pre", "z").mean("q")
    with pytest.raises(ScoreError, match="did you mean 'resid_pre'"):
        random_map("resid_pre", "z").mean("resid_pree")


def test_repr_says_what_it_is():
    scores = make_map({"resid_pre": np.ones((5, 12, 15)), "z[layer,pos,head]": np.ones((5, 12, 15, 4))}, cost=Cost(2, 1, 60, 0.44))
    text = (
        "ScoreMap(exact, denoising, logit_diff, tiny × toy[5]) resid_pre[layer 12, pos 15] z[layer 12, pos 15, head 4]; 2 forwards, 1 backward, 0.4 s"
    )
    assert repr(scores) == text
    assert "tiny × toy[9])" in repr(make_map({"z": np.ones((5, 1, 2))}, task="toy[9]"))


def test_a_site_that_was_not_scored_says_so():
    scores = make_map({"z": np.ones((2, 1, 2)), "q": np.full((2, 1, 2), np.nan)}, not_scored={"q": "pattern is constant"})
    assert scores.not_scored == {"q": "pattern is constant"}
    assert "q[layer 1, head 2] (not scored)" in repr(scores)
    assert np.isnan(scores.mean("q")).all()


def test_dataframe_has_one_row_per_score():
    scores = random_map("resid_pre", "z", "pattern[layer,head,dest,src]", n=3)
    table = scores.to_dataframe()
    assert len(table) == sum(scores.data[site].size for site in scores.sites)
    assert list(table.columns[:3]) == ["site", "example", "layer"]
    assert list(table.columns[-2:]) == ["effect", "live"]
    row = table.query("site == 'resid_pre' and example == 2 and layer == 1 and pos == 4").iloc[0]
    assert row["token"] == " the"
    assert row["effect"] == scores.data["resid_pre"].to_numpy()[2, 1, 4]
    assert not table.query("site == 'resid_pre' and pos == 0")["live"].any()
    assert table.query("site == 'z'")["pos"].isna().all()
    row = table.query("site == 'pattern[layer,head,dest,src]' and example == 1 and layer == 0 and head == 3 and dest == 5 and src == 2").iloc[0]
    assert (row["dest_token"], row["src_token"]) == (" cow", " cat")
    assert row["effect"] == scores.data["pattern[layer,head,dest,src]"].to_numpy()[1, 0, 3, 5, 2]


# normalising


def test_normalised_is_a_ratio_of_means_never_a_mean_of_ratios():
    effects = np.array([1.0, 1.0, 1.0])[:, None, None]
    clean = np.array([0.1, 2.0, 3.9])  # per-example ratios would average to 3.6
    scores = make_map({"z": effects}, clean=clean, corrupted=np.zeros(3))
    assert float(scores.normalised(n_boot=1).value["z"].item()) == pytest.approx(0.5)
    assert scores.gap == pytest.approx(2.0)


def test_normalised_resamples_effect_and_gap_together():
    clean = np.array([1.0, 2.0, 3.0, 4.0])
    scores = make_map({"z": 0.5 * clean[:, None, None]}, clean=clean, corrupted=np.zeros(4))
    result = scores.normalised(n_boot=300)
    # the effect is half the gap in every resample, so a joint bootstrap has no spread
    assert float(result.low["z"].item()) == pytest.approx(0.5)
    assert float(result.high["z"].item()) == pytest.approx(0.5)
    assert result.gap_interval[0] < 2.5 < result.gap_interval[1]


def test_normalised_interval_is_the_percentile_interval_of_the_draws():
    scores = random_map("z", n=6)
    weights = resampling_weights(6, 200, seed=3)
    gap = (scores.data["metric_clean"] - scores.data["metric_corrupted"]).to_numpy()
    ratios = np.einsum("be,elh->blh", weights, scores.data["z"].to_numpy().astype(float)) / (weights @ gap)[:, None, None]
    result = scores.normalised(n_boot=200, seed=3)
    np.testing.assert_allclose(result.low["z"], np.quantile(ratios, 0.025, axis=0), rtol=1e-10)
    np.testing.assert_allclose(result.high["z"], np.quantile(ratios, 0.975, axis=0), rtol=1e-10)


def test_normalising_with_a_gap_that_may_be_zero_raises():
    scores = make_map({"z": np.ones((4, 1, 2))}, clean=np.array([1.0, -1.0, 2.0, -1.9]), corrupted=np.zeros(4))
    with pytest.raises(
        ScoreError,
        match=r"gap mean m_clean − mean m_corrupted is 0\.025 \(95 % CI \[.*\]\), not distinguishable from 0 over 4 examples.*only_correct",
    ):
        scores.normalised()


def test_normalising_one_example_has_no_interval():
    scores = make_map({"z": np.ones((1, 1, 2))}, clean=np.array([4.0]), corrupted=np.zeros(1))
    result = scores.normalised()
    assert result.value["z"].to_numpy().tolist() == [[0.25, 0.25]]
    assert np.isnan(result.low["z"]).all()
    with pytest.raises(ScoreError, match="one example, no CI"):
        make_map({"z": np.ones((1, 1, 2))}, clean=np.zeros(1), corrupted=np.zeros(1)).normalised()


def test_resampling_weights_are_multinomial_rows():
    weights = resampling_weights(5, 400, seed=0)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights * 5, np.round(weights * 5))
    np.testing.assert_allclose(weights.mean(0), 0.2, atol=0.02)
    assert np.array_equal(weights, resampling_weights(5, 400, seed=0))
    assert not np.array_equal(weights, resampling_weights(5, 400, seed=1))


def test_interval_leaves_undefined_draws_out():
    values = np.stack([np.arange(101.0), np.full(101, np.nan), np.where(np.arange(101) < 50, np.nan, 7.0)], axis=1)
    low, high = interval(values)
    np.testing.assert_allclose(low, [2.5, np.nan, 7.0])
    np.testing.assert_allclose(high, [97.5, np.nan, 7.0])


# files


@pytest.mark.parametrize("named", [False, True])
def test_loading_gives_back_exactly_what_was_saved(tmp_path, named):
    scores = random_map(*ALL_SITES, named=named, notes=["a note", "ünïcode ×"], nested={"none": None, "yes": True, "list": [1, 2.5]})
    scores.save(tmp_path / "a.nc")
    again = ScoreMap.load(tmp_path / "a.nc")
    assert again.sites == scores.sites
    for before, after in ((getattr(scores, name), getattr(again, name)) for name in ("data", "live", "patterns", "no_path")):
        assert after.identical(before)
        assert {name: part.dtype for name, part in after.variables.items()} == {name: part.dtype for name, part in before.variables.items()}
    assert again.provenance == scores.provenance
    assert again.cost == scores.cost
    assert repr(again) == repr(scores)


def test_cost_with_bytes_and_scores_that_are_nan_survive(tmp_path):
    cost = Cost(2, 0, 7, 0.125, predicted_bytes=10, cuda_peak_bytes=None)
    scores = make_map({"q": np.full((2, 1, 2), np.nan)}, cost=cost, not_scored={"q": "why"})
    scores.save(tmp_path / "a.nc")
    again = ScoreMap.load(tmp_path / "a.nc")
    assert again.cost == cost
    assert again.data.identical(scores.data)


def test_tokens_that_text_formats_stumble_over_survive(tmp_path):
    tokens = ("", "\n", " ", "é", "<bos>", "\\n", "日本", "a\0b")
    scores = make_map({"resid_pre": np.ones((2, 1, len(tokens)))}, labels=Labels((), (tokens, tokens)))
    scores.save(tmp_path / "a.nc")
    again = ScoreMap.load(tmp_path / "a.nc").data["token"].to_numpy()[0].tolist()
    assert again == [*tokens[:-1], "a\\0b"]


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "a.nc"
    random_map("z").save(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"a\.nc exists and is not overwritten.*overwrite=True"):
        random_map("z", seed=1).save(path)
    assert path.read_bytes() == before
    random_map("z", seed=1).save(path, overwrite=True)
    assert path.read_bytes() != before


def test_a_failed_save_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "a.nc"
    random_map("z").save(path)
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(OutputError, match="No space left on device"):
        random_map("z").save(path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.nc"]


def test_an_interrupted_save_leaves_no_scraps(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        random_map("z").save(tmp_path / "a.nc")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="there is no folder"):
        random_map("z").save(tmp_path / "missing" / "a.nc")
    with pytest.raises(OutputError, match="there is no folder"):
        random_map("z").save(tmp_path / "file" / "a.nc")
    with pytest.raises(OutputError, match="it is a folder"):
        random_map("z").save(tmp_path)


def test_files_that_are_no_score_maps(tmp_path):
    with pytest.raises(ScoreError, match="there is no score map"):
        ScoreMap.load(tmp_path / "missing.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ScoreError, match="damaged or not a score map"):
        ScoreMap.load(tmp_path / "text.nc")
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ScoreError, match=r"other\.nc"):
        ScoreMap.load(tmp_path / "other.nc")


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.nc"
    random_map("z").save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ScoreError, match="damaged or not a score map"):
        ScoreMap.load(path)


def test_live_cells_of_each_example_survive_and_follow_the_order_of_the_rows(tmp_path):
    cells = {"z": np.array([[[True, False]], [[True, True]]])}
    given = make_map({"z": np.zeros((3, 1, 2))}, live={"z": cells["z"].any(0)}, examples=[5, 1, 3], patterns=Patterns(np.array([1, 0, 0]), cells))
    given.save(tmp_path / "a.nc")
    for scores in (given, ScoreMap.load(tmp_path / "a.nc")):
        assert scores.data["example"].to_numpy().tolist() == [1, 3, 5]
        assert scores.live_per_example("z")[:, 0].tolist() == [[True, False], [True, False], [True, True]]
        assert scores.live["z"].to_numpy().tolist() == [[True, True]]
    with pytest.raises(ScoreError, match="no site of this score map|unknown site of this score map"):
        given.live_per_example("q")


def test_a_map_that_does_not_know_the_live_cells_of_each_example(tmp_path):
    scores = replace(random_map("resid_pre"), patterns=None)
    assert scores.patterns is None
    assert (scores.live_per_example("resid_pre") == scores.live["resid_pre"].to_numpy()).all()
    assert scores.live_per_example("resid_pre").shape == scores.data["resid_pre"].shape
    scores.save(tmp_path / "a.nc")
    assert ScoreMap.load(tmp_path / "a.nc").patterns is None


def test_a_file_from_before_patterns_loads_without_them(tmp_path):
    random_map("z").save(tmp_path / "a.nc")
    with h5py.File(tmp_path / "a.nc", "r+") as file:
        record = json.loads(file.attrs["patchlab_scoremap"])
        record.pop("sha256")
        for name in record.pop("beside"):
            del file[name]
        file.attrs["patchlab_scoremap"] = json.dumps({**record, "format": 1})
    again = ScoreMap.load(tmp_path / "a.nc")
    assert again.patterns is again.no_path is again.noise is None
    assert again.data.identical(random_map("z").data)


@pytest.mark.parametrize(
    ("of", "cells", "message"),
    [
        ([0, 0], np.ones((1, 1, 2)), "one number per example \\(3\\)"),
        ([0, 0, 1], np.ones((1, 1, 2)), r"the shape \[1, 1, 2\] and the numbers 0 to 1"),
        ([0, 0, 0], np.ones((1, 2, 2)), r"the shape \[1, 2, 2\]"),
        ([0, 0, 0], [[[True, False]], [[True, True]]], "not those that can matter for at least one example"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(of, cells, message):
    with pytest.raises(ScoreError, match=message):
        make_map({"z": np.zeros((3, 1, 2))}, patterns=Patterns(np.array(of), {"z": np.asarray(cells, dtype=bool)}))


def test_a_map_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("patchlab.scores.score_map.FORMAT", 4)
    random_map("z").save(tmp_path / "a.nc")
    monkeypatch.undo()
    with pytest.raises(ScoreError, match="has the format 4 and this patchlab reads up to 3"):
        ScoreMap.load(tmp_path / "a.nc")


# what build refuses


def test_partly_missing_scores_are_refused():
    values = np.ones((3, 2, 4))
    values[1, 0, 2] = np.nan
    with pytest.raises(ScoreError, match=r"z: 1 of 24 scores are not finite, the first at row 1, layer 0, head 2"):
        make_map({"z": values})
    with pytest.raises(ScoreError, match=r"16 of 16 scores are not finite.*not_scored"):
        make_map({"z": np.full((2, 2, 4), np.nan)})
    with pytest.raises(ScoreError, match="z is in not_scored but has values"):
        make_map({"z": np.ones((2, 2, 4))}, not_scored={"z": "why"})


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ScoreError, match=r"z: got float64 scores of shape \[2, 3\].*\['example', 'layer', 'head'\]"):
        make_map({"z": np.ones((2, 3))})
    ones, zeros = np.ones((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)
    with pytest.raises(ScoreError, match="z: 12 cells are live and have no path to the metric; a cell is one or the other"):
        make_map({"z": np.ones((2, 3, 4))}, no_path={"z": ones})
    with pytest.raises(ScoreError, match=r"z: no_path has the shape \[3, 3\], live \[3, 4\]"):
        make_map({"z": np.ones((2, 3, 4))}, no_path={"z": zeros[:, :3]})
    with pytest.raises(ScoreError, match=r"must name the same sites; got \['q', 'z'\] and \['z'\]"):
        make_map({"z": np.ones((2, 3, 4))}, no_path={"q": zeros})
    with pytest.raises(ScoreError, match=r"live mask of shape \[3, 5\]"):
        make_map({"z": np.ones((2, 3, 4))}, live={"z": np.ones((3, 5), dtype=bool)})
    with pytest.raises(ScoreError, match="z: got int64 scores"):
        make_map({"z": np.ones((2, 3, 4), dtype=np.int64)})
    with pytest.raises(ScoreError, match="z has 5 along layer, the other sites 3"):
        make_map({"attn_out": np.ones((2, 3, 4)), "z": np.ones((2, 5, 4))})


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ScoreError, match="distinct task indices"):
        make_map({"z": np.ones((2, 1, 1))}, examples=[3, 3])
    with pytest.raises(ScoreError, match="z has 2 along example, the other sites 3"):
        make_map({"z": np.ones((2, 1, 1))}, examples=[0, 1, 2], clean=np.zeros(3), corrupted=np.zeros(3))
    with pytest.raises(ScoreError, match="3 examples, but metric_clean has 2 values and metric_corrupted 2"):
        make_map({"z": np.ones((3, 1, 1))}, clean=np.zeros(2), corrupted=np.zeros(2))
    with pytest.raises(ScoreError, match="must be finite"):
        make_map({"z": np.ones((2, 1, 1))}, clean=np.array([1.0, np.inf]))
    with pytest.raises(ScoreError, match="must name the same sites"):
        make_map({"z": np.ones((2, 1, 1))}, live={"q": np.ones((1, 1), dtype=bool)})


def test_names_that_are_no_whole_sites_are_refused():
    with pytest.raises(ScoreError, match=r"got 'z\[layer,head\]', expected 'z'"):
        make_map({"z[layer,head]": np.ones((2, 1, 1))})
    with pytest.raises(ScoreError, match=r"got 'L3\.z', expected 'z'"):
        make_map({"L3.z": np.ones((2,))})


def test_positions_of_another_task_are_refused():
    with pytest.raises(ScoreError, match="position axis has 1 examples of 6 positions; the scores have 6 along pos and examples up to 1"):
        make_map({"resid_pre": np.ones((2, 1, 6))}, labels=Labels((), (TOKENS,)))
    with pytest.raises(ScoreError, match="2 examples of 6 positions; the scores have 5 along pos"):
        make_map({"resid_pre": np.ones((2, 1, 5))}, labels=Labels((), (TOKENS, TOKENS)))


def test_provenance_must_be_json():
    with pytest.raises(ScoreError, match="provenance must be JSON"):
        make_map({"z": np.ones((2, 1, 1))}, device=object())
    assert make_map({"z": np.ones((2, 1, 1))}, options=(1, 2)).provenance["options"] == [1, 2]


def test_a_file_that_does_not_say_why_cells_cannot_matter(tmp_path):
    scores = make_map({"z": np.ones((2, 1, 2))}, live={"z": np.array([[True, False]])})
    replace(scores, no_path=None).save(tmp_path / "a.nc")
    again = ScoreMap.load(tmp_path / "a.nc")
    assert again.no_path is None
    assert again.zeros("z").to_numpy().tolist() == [["", "structural zero"]]
    assert scores.zeros("z").to_numpy().tolist() == [["", "same in both prompts"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # h5netcdf's own, when it lets go of a damaged file
def test_no_flipped_bit_goes_unnoticed(tmp_path):
    scores = random_map("resid_pre", "z", "pattern")
    scores.save(tmp_path / "a.nc")
    content = (tmp_path / "a.nc").read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path / "b.nc", 0
    for bit in rng.integers(0, 8 * len(content), 200):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        try:
            again = ScoreMap.load(path)
        except ScoreError:
            refused += 1
            continue
        for name in ("data", "live", "patterns", "no_path"):
            assert getattr(again, name).identical(getattr(scores, name))
        assert (again.provenance, again.cost) == (scores.provenance, scores.cost)
    assert refused


def test_a_negative_gap_warns_with_numbers_and_what_to_check():
    scores = make_map({"resid_pre": np.ones((4, 2, 3))}, clean=np.full(4, -1.0), corrupted=np.full(4, 2.0))
    warning = scores.reversed_gap()
    assert "logit_diff is -1 on the clean and 2 on the corrupted prompts (gap -3 logits, 95 % CI [-3, -3])" in warning
    assert "Are correct and incorrect answers swapped" in warning
    assert warning.endswith("use direction='noising'.")
    assert make_map({"resid_pre": np.ones((4, 2, 3))}).reversed_gap() is None
    assert "95 %" not in make_map({"resid_pre": np.ones((1, 2, 3))}, clean=np.zeros(1), corrupted=np.ones(1)).reversed_gap()


def test_a_comparison_with_a_negative_gap_says_so():
    both = [random_map("resid_pre", seed=seed, clean=np.full(8, -1.0), corrupted=np.full(8, 2.0)) for seed in (0, 1)]
    (note,) = (note for note in compare(both[0], {"other": both[1]}).notes if "gap" in note)
    assert note.startswith("The gap is negative: logit_diff is -1")
