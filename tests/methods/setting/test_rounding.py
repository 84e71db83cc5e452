"""Noise floors: against what half precision really does to the same weights, and how maps keep and show them."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bridged, hf_module, model_of, scores_of, swap_task
from score_maps import make_map

import patchlab as pl
from patchlab.errors import ScoreError
from patchlab.methods import SecondOrder, get_method
from patchlab.methods.second_order import STEPS
from patchlab.methods.setting.rounding import product_variance, rounding, spacing
from patchlab.metrics import METRICS, Answers, Metric
from patchlab.models import Model
from patchlab.scores import ScoreMap

SITES = ("resid_pre", "z[layer,pos,head]", "mlp_out", "q", "mlp_post", "pattern")


@cache
def _twins(family: str, dtype: torch.dtype, layers: int) -> tuple[Model, Model]:
    """A model in a dtype, and the same (rounded) weights in float64."""
    rounded = hf_module(family, torch.float64, layers).to(dtype)
    return bridged(rounded, family), bridged(hf_module(family, torch.float64, layers).to(dtype).to(torch.float64), family)


def _ratios(got: ScoreMap, true: ScoreMap, site: str) -> np.ndarray:
    """|error| / floor of every live cell and example that has an effect at all."""
    error = np.abs(got.data[site].to_numpy() - true.data[site].to_numpy())
    assert got.noise is not None
    floor = (got.noise[site] + xr_zero(got, site)).transpose(*got.data[site].dims).to_numpy()
    return (error / np.maximum(floor, 1e-300))[(true.data[site].to_numpy() != 0) & np.isfinite(error)]


def xr_zero(scores: ScoreMap, site: str) -> Any:
    """Zeros with the dims of the effects, to broadcast a floor that all cells share."""
    return 0.0 * scores.data[site].fillna(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "atp", "relp", "ig:2", "atp*"])
@pytest.mark.parametrize(
    ("family", "dtype", "layers", "metric"),
    [("gpt2", torch.bfloat16, 6, "logit_diff"), ("gemma2", torch.float16, 3, "prob_diff"), ("gpt2", torch.float32, 3, "logit_diff")],
)
def test_floors_are_the_size_of_the_errors(family: str, dtype: torch.dtype, layers: int, name: str, metric: str) -> None:
    """Most errors are below them, hardly one is five times as large, and they are no more than ten times the usual error."""
    task, sites = swap_task(n=6, metric=metric), SITES if name != "atp*" else ("q", "k", "z")
    got, true = (scores_of(get_method(name), model, task, sites) for model in _twins(family, dtype, layers))
    ratios = np.concatenate([_ratios(got, true, site) for site in sites])
    assert len(ratios) > 150
    assert (ratios > 1).mean() < (0.4 if metric == "prob_diff" else 0.2)
    assert (ratios > 5).mean() < 0.05
    assert np.median(ratios) > 0.1 / (2 if name == "atp*" else 1)


@pytest.mark.parametrize("name", ["exact", "relp", "ig:2"])
def test_floors_of_edges(name: str) -> None:
    got, true = (scores_of(get_method(name), model, swap_task(n=4), "edges") for model in _twins("gpt2", torch.bfloat16, 3))
    ratios = _ratios(got, true, "edges")
    assert (ratios > 1).mean() < 0.2
    assert np.median(ratios) > 0.1


def test_floor_of_the_mean() -> None:
    got, true = (scores_of(get_method("relp"), model, swap_task(n=12), list(SITES)) for model in _twins("gpt2", torch.bfloat16, 6))
    assert got.noise is not None
    ratios = []
    for site in SITES:
        floor = got.noise_floor(site)
        assert floor.dims == got.live[site].dims
        np.testing.assert_allclose(floor, np.sqrt(np.square(got.noise[site].to_numpy().astype(float)).sum(0)) / 12, rtol=1e-6)
        ratios.append((np.abs(got.mean(site) - true.mean(site)) / floor).to_numpy()[got.live[site].to_numpy()])
    together = np.concatenate(ratios)
    assert (together > 1).mean() < 0.2
    assert np.median(together) > 0.1


def test_second_differences_of_float32_have_the_floor_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 with the same step: what a longer step leaves out of the third order is no rounding."""
    monkeypatch.setitem(STEPS, torch.float64, STEPS[torch.float32])
    task = swap_task(n=4)
    got, true = (scores_of(SecondOrder(probes=2), model_of("gpt2", dtype), task, ["resid_pre", "z"]) for dtype in (torch.float32, torch.float64))
    ratios = np.concatenate([_ratios(got, true, site) for site in ("resid_pre", "z")])
    assert got.noise is not None
    assert 0.02 < np.median(ratios) < 1
    assert (ratios > 1).mean() < 0.3
    assert float(got.noise["z"].max()) > 20 * float(np.max(scores_of(get_method("atp"), model_of("gpt2"), task, "z").noise["z"]))  # type: ignore[index]


def test_resolution_of_a_difference_of_logits() -> None:
    """By hand: two logits, each as large as it is or as the spread of all."""
    clean, corrupted = torch.tensor([[8.0, -2.0, 0.0, 1.0]]), torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    answers = Answers.of([[0]], [[1]])
    found = rounding(METRICS["logit_diff"], answers, clean, corrupted, dtype=torch.bfloat16, n_layers=4, denoising=True)
    spread = float(clean.std())
    assert spacing(torch.bfloat16) == 2**-7
    assert found.unit == 2 * 2**-7
    assert found.metric[0] == pytest.approx(2**-7 * np.hypot(8.0, max(3.0, spread)), rel=1e-5)
    assert found.slope[0] == pytest.approx(0.0, abs=1e-6)
    ends = torch.tensor([[20.0, 0.0, -20.0, -20.0]]), torch.tensor([[0.0, 20.0, -20.0, -20.0]])
    flat = rounding(METRICS["prob_diff"], answers, *ends, dtype=torch.bfloat16, n_layers=4, denoising=True)
    assert flat.metric[0] > 0.05, "between two saturated ends the probability is not flat"
    wide = rounding(METRICS["logit_diff"], answers, clean, corrupted, dtype=torch.float64, n_layers=1, denoising=True)
    assert wide.unit == 2 * 2**-52


def test_a_metric_without_a_derivative_has_no_floor() -> None:
    rank = Metric("rank", lambda logits, a: (logits > logits.gather(-1, a.correct[:, :1])).sum(-1).to(logits.dtype))
    scores = scores_of(get_method("exact"), model_of("gpt2"), swap_task(metric=rank), "z")
    assert scores.noise is not None
    assert np.isnan(scores.noise["z"]).all()
    assert np.isnan(scores.noise_floor("z")).all()
    assert not scores.below_noise("z").any()
    assert "noise" not in repr(scores)
    plain = Metric("numpy", lambda logits, a: torch.as_tensor(logits.numpy().max(-1)))
    assert np.isnan(scores_of(get_method("exact"), model_of("gpt2"), swap_task(metric=plain), "z").noise["z"]).all()  # type: ignore[index]


def test_products_by_hand() -> None:
    own, source, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]])
    vectors = product_variance(source - own, own, g, vectors=True)
    assert float(vectors) == (25 + 4 + 13) * 5 / 2
    numbers = product_variance(source - own, own, g, vectors=False)
    # sizes 9 and 20, at least their mean 14.5; slopes 1 and 4, at least 2.5; changes 9 and 4
    assert numbers.tolist() == [[14.5 * 1 + 9 * 2.5, 20.0 * 4 + 4 * 4]]


def test_maps_keep_floors_and_count_the_cells_below(tmp_path: Path) -> None:
    values = np.array([[[1.0, 0.01], [0.5, 0.0]], [[1.0, -0.02], [0.5, 0.0]]])
    live = {"z": np.array([[True, True], [True, False]])}
    made = make_map({"z": values}, live=live, noise={"z": np.array([0.1, 0.1])}, dtype="bfloat16")
    assert made.noise is not None
    assert made.noise["z"].dims == ("example",)
    np.testing.assert_allclose(made.noise_floor("z"), np.full((2, 2), 0.1 / np.sqrt(2)), rtol=1e-6)
    np.testing.assert_array_equal(made.below_noise("z"), [[False, True], [False, False]])
    assert "; 1 of 3 cells below the noise floor of bfloat16; 2 forwards" in repr(made)
    made.save(tmp_path / "map.nc")
    loaded = ScoreMap.load(tmp_path / "map.nc")
    assert loaded.noise is not None
    assert loaded.noise.identical(made.noise)
    assert loaded.standard_error is None
    assert not loaded.noise["z"].to_numpy().flags.writeable
    bare = make_map({"z": values})
    bare.save(tmp_path / "bare.nc")
    assert ScoreMap.load(tmp_path / "bare.nc").noise is None
    assert np.isnan(bare.noise_floor("z")).all()
    for noise in ({"q": np.ones(2)}, {"z": np.ones(3)}, {"z": np.array([0.1, -0.1])}):
        with pytest.raises(ScoreError, match="noise"):
            make_map({"z": values}, noise=noise)


def test_a_comparison_says_once_which_methods_are_below_the_floor() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 2, 3))
    noise = {"z": np.full(4, 0.6)}
    maps = {name: make_map({"z": values * (0.5 if name == "b" else 1)}, noise=noise, dtype="bfloat16") for name in ("exact", "a", "b")}
    counts = {name: int((maps["exact"].below_noise("z") | maps[name].below_noise("z")).sum()) for name in "ab"}
    assert 0 < counts["a"] < counts["b"]
    (note,) = (note for note in pl.compare(maps["exact"], {name: maps[name] for name in "ab"}, n_boot=5).notes if "noise floor" in note)
    assert f"noise floor of bfloat16: {counts['a']} (a), {counts['b']} (b) of 6 at z." in note


def test_summary_of_a_model_in_half_precision() -> None:
    scores = scores_of(pl.AttributionPatching(), _twins("gpt2", torch.bfloat16, 6)[0], swap_task(n=2), ["mlp_post[layer,pos,neuron]"])
    assert "cells below the noise floor of bfloat16" in repr(scores)
