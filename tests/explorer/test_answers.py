import json

import numpy as np
import pytest
import torch
from families import mixed_task, model_of, scores_of, swap_task

import patchlab as pl
from patchlab import weight_edit
from patchlab.errors import MethodError, PatchlabError, ScoreError, SiteError, TaskError
from patchlab.explorer import explore
from patchlab.methods import ActivationPatching
from patchlab.testing.dictionaries import random_dictionary

SITES = ["resid_pre", "z[layer,pos,head]", "k[layer,pos,kv_head]", "mlp_out"]


@pytest.fixture(scope="module")
def model():
    return model_of("llama", torch.float64)


@pytest.fixture(scope="module", params=["aligned", "mixed"])
def explored(model, request):
    task = swap_task() if request.param == "aligned" else mixed_task()
    maps = [scores_of(pl.RelevancePatching(), model, task, SITES, direction) for direction in ("denoising", "noising")]
    return explore(model, task, maps)


def largest(scores, site):
    return int(np.abs(scores.mean(site).to_numpy().ravel()).argmax())


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_an_exact_patch_is_that_of_activation_patching_in_the_direction_of_the_map(explored, direction):
    task, model = explored.answers.task, explored.answers.model
    exact = scores_of(pl.ActivationPatching(engine="literal"), model, task, SITES, direction)
    for site in SITES:
        number = largest(exact, site)
        found = explored.ask("exact", direction, site, number)
        wanted = exact.data[site].to_numpy().reshape(len(task), -1)[:, number]
        np.testing.assert_allclose(found["each"], wanted, rtol=1e-5, atol=1e-9)
        assert found["mean"] == pytest.approx(wanted.mean(), rel=1e-5, abs=1e-9)
        side = exact.data["metric_corrupted" if direction == "denoising" else "metric_clean"].to_numpy()
        assert [found["before"], found["after"]] == pytest.approx([side.mean(), (side + wanted).mean()], rel=1e-5)


@pytest.mark.parametrize("source", ["zero", "mean"])
def test_an_exact_patch_puts_in_what_the_map_put_in(model, source):
    task = swap_task()
    relp = scores_of(pl.RelevancePatching(source=source), model, task, "z", "noising")
    exact = scores_of(pl.ActivationPatching(source=source), model, task, "z", "noising")
    found = explore(model, task, relp).ask("exact", "noising", "z", 6)
    np.testing.assert_allclose(found["each"], exact.data["z"].to_numpy()[:, 1, 2], rtol=1e-5, atol=1e-9)


def test_cells_together_are_one_run_with_all_edits(model):
    task = swap_task()
    explored = explore(model, task, scores_of(pl.RelevancePatching(), model, task, ["z", "mlp_out"], "noising"))
    cells = [["z", 1], ["z", 6], ["mlp_out", 2 * 5 + 3]]
    clean, corrupted = (model.run(task.prompts(side), keep=["z", "mlp_out"]) for side in ("clean", "corrupted"))
    answers = task.batches()[0].answers

    def metric(edits):
        return task.metric(model.run(task.prompts("clean"), edits=edits).logits[:, -1], answers).numpy()

    addresses = ("L0.H1.z", "L1.H2.z", "L2.mlp_out@3")
    for source, values in {"paired": corrupted, "zero": pl.sources.zero()}.items():
        found = explored.ask("together", "noising", source, cells)
        wanted = metric([pl.Edit(address, values) for address in addresses])
        assert found["after"] == pytest.approx(wanted.mean(), rel=1e-5)
        np.testing.assert_allclose(found["each"], wanted - metric([]), rtol=1e-5, atol=1e-9)
        assert found["cells"] == 3
    assert explored.ask("together", "noising", "paired", [["z", 1], ["z", 1]])["cells"] == 1
    restored = explored.ask("together", "denoising", "paired", [["z", 1]])
    edited = model.run(task.prompts("corrupted"), edits=[pl.Edit("L0.H1.z", clean)]).logits[:, -1]
    assert restored["after"] == pytest.approx(float(task.metric(edited, answers).mean()), rel=1e-5)


def test_attention_is_the_pattern_of_that_head_example_and_side(explored):
    task, model = explored.answers.task, explored.answers.model
    for example in range(len(task)):
        alone = pl.lenses.attention(model, task.select([example]), side="corrupted")
        found = explored.ask("attention", "a1.h2", example, "corrupted")["pattern"]
        wanted = alone.pattern("a1.h2", 0)
        assert [len(row) for row in found] == list(range(1, len(wanted) + 1))
        for row, line in zip(found, wanted, strict=True):
            np.testing.assert_allclose(row, line[: len(row)], atol=6e-4)
    if task.aligned:
        mean = pl.lenses.attention(model, task).pattern("a2.h0", None)
        np.testing.assert_allclose(explored.ask("attention", "a2.h0", -1, "clean")["pattern"][-1], mean[-1], atol=6e-4)
    else:
        with pytest.raises(TaskError, match="do not line up, so their patterns have no mean; choose an example"):
            explored.ask("attention", "a2.h0", -1, "clean")


def test_neurons_are_ranked_at_the_place_of_the_cell_and_add_up_to_the_mlp(explored):
    task = explored.answers.task
    relp = explored.answers.groups["noising"].first
    number = largest(relp, "mlp_out")
    layer, pos = relp.cells("mlp_out")[number].tolist()
    (found,) = explored.ask("parts", "noising", "mlp_out", number)["lists"]
    scores = scores_of(pl.RelevancePatching(), explored.answers.model, task, "mlp_post[layer,pos,neuron]", "noising")
    here = scores.data["mlp_post[layer,pos,neuron]"].to_numpy()[:, layer, pos]
    order = np.argsort(-np.abs(here.mean(0)), kind="stable")[:10]
    assert [row["label"].split(".")[1] for row in found["rows"]] == [f"N{neuron}" for neuron in order]
    np.testing.assert_allclose(found["rows"][0]["each"], here[:, order[0]], rtol=1e-5)
    np.testing.assert_allclose(found["sum"]["each"], relp.data["mlp_out"].to_numpy()[:, layer, pos], rtol=1e-5, atol=1e-8)
    assert (found["count"], found["method"]) == (12, "relp")


def test_neurons_of_a_layer_as_a_whole_and_features_of_the_dictionaries_there():
    model, task = model_of("gpt2", torch.float64), swap_task()
    relp = scores_of(pl.RelevancePatching(), model, task, ["mlp_out[layer]", "resid_post"])
    explored = explore(model, task, relp)
    assert not explored.ask("parts", "denoising", "resid_post", 7)["lists"]
    model.add_dictionaries([random_dictionary(model, "mlp_out", 1), random_dictionary(model, "mlp_out", 2, width=30)])
    try:
        neurons, features = explored.ask("parts", "denoising", "mlp_out[layer]", 1)["lists"]
        scores = scores_of(pl.RelevancePatching(), model, task, "features.mlp_out")
        assert [one["what"] for one in explored.ask("parts", "denoising", "mlp_out[layer]", 0)["lists"]] == ["neurons"]
    finally:
        model.drop_dictionaries()
    assert neurons["sum"]["mean"] == pytest.approx(float(relp.mean("mlp_out[layer]")[1]), rel=1e-5)
    first = features["rows"][0]
    own = {
        tuple(cell): effects
        for cell, effects in zip(scores.cells("features.mlp_out").tolist(), scores.data["features.mlp_out"].to_numpy().T, strict=True)
    }
    sizes = {cell: abs(effects.mean()) for cell, effects in own.items() if cell[0] == 1}
    layer, feature = max(sizes, key=sizes.__getitem__)
    assert first["label"] == f"L{layer}.F{feature}.mlp_out"
    np.testing.assert_allclose(first["each"], own[layer, feature], rtol=1e-5)


def test_an_exact_patch_of_an_edge_and_of_a_feature():
    model, task = model_of("gpt2", torch.float64), swap_task()
    edges = scores_of(pl.RelevancePatching(), model, task, "edges", "noising")
    writer, reader = edges.graph.edge("a0.h1->m2")
    number = writer * len(edges.graph.readers) + reader
    exact = scores_of(pl.ActivationPatching(), model, task, "edges", "noising").sel("a0.h1->m2")
    np.testing.assert_allclose(explore(model, task, edges).ask("exact", "noising", "edges", number)["each"], exact, rtol=1e-5, atol=1e-8)
    backwards = edges.graph.writers.index("m2") * len(edges.graph.readers) + edges.graph.readers.index("m1")
    with pytest.raises(ScoreError, match="is no edge, so it has no effect"):
        explore(model, task, edges).ask("exact", "noising", "edges", backwards)
    model.add_dictionaries([random_dictionary(model, "resid_post", 1)])
    try:
        scores = scores_of(pl.RelevancePatching(), model, task, "features")
        site = scores.sites[0]
        exact = scores_of(pl.ActivationPatching(), model, task, "features")
        number = largest(scores, site)
        found = explore(model, task, scores).ask("exact", "denoising", site, number)
        cell = scores.cells(site)[number].tolist()
        np.testing.assert_allclose(found["each"], exact.sel(f"L{cell[0]}.F{cell[1]}.resid_post"), rtol=1e-5, atol=1e-8)
    finally:
        model.drop_dictionaries()


def test_what_was_worked_out_is_kept_also_when_the_next_is_stopped(model, monkeypatch):
    task = swap_task()
    explored = explore(model, task, scores_of(pl.RelevancePatching(), model, task, "z"))
    first = explored.ask("exact", "denoising", "z", 5)

    def stop(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explored.ask("exact", "denoising", "z", 6, tick=stop)
    assert set(explored.answers.exact) == {("denoising", "z", 5)}
    monkeypatch.setattr(ActivationPatching, "prepared", None)
    assert explored.ask("exact", "denoising", "z", 5) == first
    monkeypatch.undo()
    assert explored.ask("exact", "denoising", "z", 6)["mean"] != first["mean"], "the model is as it was"


def test_nothing_is_patched_inside_an_intervention(model):
    task = swap_task()
    explored = explore(model, task, scores_of(pl.RelevancePatching(), model, task, "z"))
    questions = [("exact", "denoising", "z", 5), ("attention", "a0.h0", 0, "clean"), ("parts", "denoising", "z", 5)]
    explored.ask(*questions[0])  # what patches these cells is there already
    for question in questions:
        with pl.intervene(model, pl.Edit("L0.mlp_out", pl.sources.zero())), pytest.raises(MethodError, match="surrounding edits"):
            explored.ask(*question)
    edit = weight_edit.neuron_row(model, 0, 1, torch.ones(model.arch.d_model, dtype=model.dtype))
    for question in questions:
        with weight_edit.edited(model, edit), pytest.raises(MethodError, match=r"weights of .* are not those that the maps are of"):
            explored.ask(*question)
    assert (
        explored.ask("exact", "denoising", "z", 6)["each"]
        == explore(model, task, scores_of(pl.RelevancePatching(), model, task, "z")).ask("exact", "denoising", "z", 6)["each"]
    )


def test_neurons_are_those_of_the_map_also_where_it_has_other_sites(model):
    task = swap_task()
    maps = scores_of(pl.RelevancePatching(), model, task, ["mlp_out", "mlp_post[layer,pos,neuron]"])
    alone = explore(model, task, scores_of(pl.RelevancePatching(), model, task, "mlp_out"))
    (found,), (wanted,) = (one.ask("parts", "denoising", "mlp_out", 8)["lists"] for one in (explore(model, task, maps), alone))
    assert found["count"] == wanted["count"] == model.arch.d_mlp
    assert [row["label"] for row in found["rows"]] == [row["label"] for row in wanted["rows"]]


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (["exat"], MethodError, "unknown question 'exat'; did you mean 'exact'"),
        (["exact", "noising", "z", 0], MethodError, "unknown direction of the maps 'noising'"),
        (["exact", "denoising", "z", 99], ScoreError, "there is no cell 99 of z"),
        (["together", "denoising", "paired", []], MethodError, "no cells are chosen"),
        (["together", "denoising", "noise", [["z", 0]]], MethodError, "unknown source 'noise'"),
        (["together", "up", "paired", [["z", 0]]], MethodError, "unknown direction 'up'"),
        (["attention", "a9.h0", 0, "clean"], SiteError, "there is no head 'a9.h0'; llama has a0.h0 to a2.h3"),
        (["attention", "a0.h0", 7, "clean"], TaskError, "there is no example 7; swap has 3"),
        (["attention", "a0.h0", 0, "dirty"], TaskError, "unknown side 'dirty'"),
    ],
)
def test_what_cannot_be_answered_says_why(model, question, error, message):
    explored = explore(model, swap_task(), scores_of(pl.RelevancePatching(), model, swap_task(), "z"))
    with pytest.raises(error, match=message):
        explored.ask(*question)


def test_answers_are_plain_json(explored):
    for question in (["exact", "noising", "mlp_out", 5], ["parts", "noising", "mlp_out", 5], ["attention", "a0.h0", 0, "clean"]):
        json.dumps(explored.ask(*question), allow_nan=False)


def test_neurons_that_are_too_many_are_refused_with_a_way_out(model, monkeypatch):
    monkeypatch.setattr("patchlab.explorer.answers.MOST_PARTS", 10)
    explored = explore(model, swap_task(), scores_of(pl.RelevancePatching(), model, swap_task(), "mlp_out"))
    (found,) = explored.ask("parts", "denoising", "mlp_out", 5)["lists"]
    assert "Explore fewer examples (task.select), or mlp_out[layer]" in found["why"]


def test_an_unknown_screen_is_refused(model):
    with pytest.raises(PatchlabError, match="unknown method 'realp'"):
        explore(model, swap_task(), scores_of(pl.RelevancePatching(), model, swap_task(), "z"), screen="realp")
