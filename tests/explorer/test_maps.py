import inspect
from dataclasses import replace

import pytest
import torch
from families import mixed_task, model_of, scores_of, swap_task
from score_maps import altered

import patchlab as pl
from patchlab.errors import ScoreError
from patchlab.explorer.maps import grouped

SITES = ["resid_pre", "z"]


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2", torch.float64)


@pytest.fixture(scope="module")
def relp(model):
    return {direction: scores_of(pl.RelevancePatching(), model, swap_task(), SITES, direction) for direction in ("denoising", "noising")}


def test_maps_are_grouped_by_direction_and_may_share_a_name(model, relp):
    groups = grouped(model, swap_task(), list(relp.values()))
    assert {direction: list(maps.by_name) for direction, maps in groups.items()} == {"denoising": ["relp"], "noising": ["relp"]}
    assert (groups["denoising"].baseline == relp["denoising"].data["metric_corrupted"]).all()
    assert (groups["noising"].baseline == relp["noising"].data["metric_clean"]).all()
    assert list(grouped(model, swap_task(), relp["noising"])["noising"].by_name) == ["relp"]
    with pytest.raises(ScoreError, match="two maps in noising are named 'relp'; give them by name"):
        grouped(model, swap_task(), [relp["noising"], relp["noising"]])


def test_exact_maps_are_told_by_their_method(model):
    task = swap_task()
    maps = [scores_of(method, model, task, "z") for method in (pl.AttributionPatching(), pl.ActivationPatching(engine="literal"))]
    assert grouped(model, task, maps)["denoising"].exact is not None
    assert grouped(model, task, maps[:1])["denoising"].exact is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_fingerprint": "x"}, "of another model: gpt2, and what is explored is"),
        ({"task_fingerprint": "x"}, "give the task that was scored"),
        ({"metric": "prob_diff"}, "of the metric prob_diff, and what is explored is logit_diff"),
        ({"ambient": ["replace L0.z"]}, "surrounding edits replace L0.z"),
        ({"added_sites": {"features.resid_post": "a"}}, "add those that were scored"),
    ],
)
def test_a_map_of_something_else_is_refused(model, relp, changes, message):
    other = altered(relp["denoising"], lambda site, values: values, **changes)
    with pytest.raises(ScoreError, match=message):
        grouped(model, swap_task(), {"mine": other})


def test_a_map_made_inside_an_intervention_is_refused_outside(model):
    task = swap_task()
    with pl.intervene(model, pl.Edit("L0.mlp_out", pl.sources.zero())):
        inside = scores_of(pl.RelevancePatching(), model, task, "z")
    with pytest.raises(ScoreError, match=r"surrounding edits replace L0\.mlp_out"):
        grouped(model, task, inside)


def test_a_map_of_other_positions_is_refused_since_its_cells_would_be_others(model):
    task = mixed_task()
    some = scores_of(pl.RelevancePatching(), model, task.at_positions("B", "END"), "resid_pre")
    with pytest.raises(ScoreError, match=r"has the positions B, END, and the task is scored at A, B, END.*task.at_positions\('B', 'END'\)"):
        grouped(model, task, some)
    assert grouped(model, task.at_positions("B", "END"), some)
    with pytest.raises(ScoreError, match="B, END"):
        grouped(model, task.at_positions("END", "B"), some)


def test_maps_of_one_direction_have_one_source(model, relp):
    other = scores_of(replace(pl.RelevancePatching(), source="zero"), model, swap_task(), SITES)
    with pytest.raises(ScoreError, match="the sources differ"):
        grouped(model, swap_task(), {"a": relp["denoising"], "b": other})


def test_nothing_and_no_maps_are_refused(model, relp):
    with pytest.raises(ScoreError, match="there is nothing to explore"):
        grouped(model, swap_task(), [])
    with pytest.raises(ScoreError, match="'a' is a int and no score map"):
        inspect.unwrap(grouped)(model, swap_task(), {"a": 3})


def test_cells_that_are_not_there_are_refused(model, relp):
    maps = grouped(model, swap_task(), relp["denoising"])["denoising"]
    assert maps.cell("z", 5) == (1, 1)
    with pytest.raises(ScoreError, match="there is no cell 12 of z; it has 12"):
        maps.cell("z", 12)
    with pytest.raises(ScoreError, match="unknown site of these maps 'q'"):
        maps.cell("q", 0)
