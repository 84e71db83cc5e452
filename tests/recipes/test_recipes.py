"""Recipes: what they say, how they are found, and numbers of theirs that can be had in another way."""

import json

import numpy as np
import pytest
import torch
from families import model_of
from typer.testing import CliRunner

import patchlab as pl
from patchlab import weight_edit
from patchlab.cli import app
from patchlab.errors import PatchlabError, RecipeError
from patchlab.plots._bars import _prepare_bars
from patchlab.recipes import RECIPES, Inputs, Number, Outcome, Recipe, get_recipe, recipe
from patchlab.recipes.layer_ranking import rounded
from patchlab.recipes.recipe import rank_correlation
from patchlab.recipes.voids import accuracies


@pytest.fixture
def made():
    """A recipe that stands in for those of papers."""
    numbers = (Number("accuracy", 0.5, "0.7", 0.25, "chance"), Number("undefined", float("nan")))
    figures = {"bars": pl.plots.bars(["a"], {"here": [1.0], "control": [0.5]})}
    yield Recipe("made", "Nobody 2026", "something", lambda inputs: Outcome(numbers, False, "It is less.", figures))
    RECIPES.pop("made-up", None)


def test_a_result_says_its_numbers_the_papers_and_whether_the_claim_shows(made, tmp_path):
    result = made.run(model_of("gpt2"))
    text = result.summary()
    assert "0.5" in text
    assert "0.25 (chance)" in text
    assert "unknown" in text
    assert "DOES NOT reproduce here. It is less." in text
    result.write(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["numbers"][0] == {"what": "accuracy", "value": 0.5, "published": "0.7", "control": 0.25, "control_is": "chance"}
    assert record["numbers"][1]["value"] is None
    assert record["reproduces"] is False
    assert (tmp_path / "bars.html").is_file()
    assert (tmp_path / "summary.txt").read_text() == text + "\n"


def test_names_are_registered_once_and_unknown_ones_are_told(made):
    register = recipe("made-up", paper="Nobody 2026", claim="something")
    register(made.function)
    assert get_recipe("made-up").paper == "Nobody 2026"
    with pytest.raises(RecipeError, match="already a recipe"):
        recipe("made-up", paper="", claim="")(made.function)
    with pytest.raises(RecipeError, match="did you mean 'voids'"):
        get_recipe("viods")


def test_the_commands_list_and_refuse():
    listed = CliRunner().invoke(app, ["recipes", "--json"])
    assert set(json.loads(listed.output)) == set(RECIPES)
    assert "voids" in CliRunner().invoke(app, ["recipes"]).output
    wrong = CliRunner().invoke(app, ["recipe", "viods", "--model", "demo-gpt2-4l"])
    assert wrong.exit_code == 1
    assert "did you mean 'voids'" in wrong.output


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name, tmp_path):
    """On little; that numbers are what they say is tested where they are made."""
    done = CliRunner().invoke(app, ["recipe", name, "--model", "demo-gpt2-4l", "--scale", "0.25", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["recipe"] == name
    assert record["reproduces"] in (True, False, None)
    assert [number for number in record["numbers"] if number["control"] is not None or number["published"] != "unknown"]
    assert list((tmp_path / "out").glob("*.html"))


def test_a_text_file_is_taken_where_texts_are_needed(tmp_path, demo_gpt2_4l):
    (tmp_path / "text.txt").write_text("The book was in the garden.\n" * 40, encoding="utf-8")
    assert Inputs(demo_gpt2_4l, file=tmp_path / "text.txt").texts(8).name == "text.txt"
    assert len(Inputs(demo_gpt2_4l, scale=0.5).texts(32)) == 16
    assert Inputs(demo_gpt2_4l).second is None


def test_voids_with_all_layers_are_the_task(demo_gpt2_4l):
    inputs = Inputs(demo_gpt2_4l)
    task = inputs.task("ioi", 8)
    found = accuracies(inputs, task, 0.0)
    top = demo_gpt2_4l.run(task.prompts("clean")).logits[:, -1].argmax(-1).tolist()
    assert found["all layers"] == np.mean([t in pair.correct for t, pair in zip(top, task.pairs, strict=True)])
    assert 0 < found["share"] <= 1


@torch.no_grad()
def test_rounding_leaves_so_many_values():
    model = model_of("gpt2", torch.float64)
    edits = rounded(model, 1, 3)
    assert {"blocks.1.attn.q", "blocks.1.mlp.out"} < {edit.place for edit in edits}
    for edit in edits:
        weight = weight_edit.weight_of(model, edit.place) + edit.change
        step = weight_edit.weight_of(model, edit.place).abs().amax(0) / 3
        steps = (weight / step).round()
        torch.testing.assert_close(steps * step, weight)
        assert float(steps.abs().max()) == 3


def test_rank_correlations():
    assert rank_correlation([1, 2, 3], [10, 20, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([1, 2], [5, 5]))


def test_bars_show_their_numbers_and_controls_in_grey():
    data = _prepare_bars(["a", "b"], {"here": [1.0, 2.0], "control": [0.0, 0.5]}, "title", "label", ("words",))
    assert data.series["here"] == (1.0, 2.0)
    assert data.colours["control"] != data.colours["here"]
    assert data.subtitle[-1] == "words"
    assert [list(trace.x) for trace in pl.plots.bars(["a", "b"], {"here": [1, 2], "control": [0, 1]}).data] == [[1, 2], [0, 1]]
    with pytest.raises(PatchlabError, match="as many numbers"):
        pl.plots.bars(["a"], {"here": [1, 2]})
