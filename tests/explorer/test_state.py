import base64
import json

import numpy as np
import pytest
import torch
from families import mixed_task, model_of, pair, scores_of, swap_task

import patchlab as pl
from patchlab.explorer import explore
from patchlab.explorer.state import label, nodes
from patchlab.metrics import METRICS
from patchlab.tasks.task import Task


def numbers(packed):
    ((kind, text),) = packed.items()
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


def named_task(n=3):
    """Pairs of one length with two named positions."""
    return Task("named", tuple(pair(5, (1, 3), seed, A=1, B=3) for seed in range(n)), METRICS["logit_diff"])


SITES = ["resid_pre", "z[layer,pos,head]", "k[layer,pos,kv_head]", "z", "attn_out[layer]", "mlp_post", "pattern[layer,head,dest,src]", "input"]


@pytest.fixture(scope="module")
def seen():
    model, task = model_of("llama", torch.float64), named_task()
    maps = {
        name: scores_of(method, model, task, SITES) for name, method in {"exact": pl.ActivationPatching(), "AtP": pl.AttributionPatching()}.items()
    }
    return model, task, maps, explore(model, task, maps).state


def test_a_state_is_plain_json_of_finite_numbers(seen):
    assert json.loads(json.dumps(seen[3], allow_nan=False)) == seen[3]


def test_the_numbers_are_those_of_the_maps_also_per_example_and_with_their_intervals(seen):
    _, _, maps, state = seen
    for site in SITES:
        own = state["groups"]["denoising"]["sites"][site]
        for name, scores in maps.items():
            found = own["scores"][name]
            effects = scores.data[site].to_numpy().reshape(3, -1)[:, own["cells"]]
            np.testing.assert_allclose(numbers(found["each"]).reshape(len(own["cells"]), 3), effects.T, rtol=1e-6)
            np.testing.assert_allclose(numbers(found["mean"]), effects.mean(0), rtol=1e-12, atol=1e-15)
    top = maps["AtP"].top(1, "resid_pre").iloc[0]
    own = state["groups"]["denoising"]["sites"]["resid_pre"]
    place = own["labels"].index(label_at(maps["AtP"], "resid_pre", top["address"]))
    found = own["scores"]["AtP"]
    assert [numbers(found[key])[place] for key in ("mean", "low", "high")] == pytest.approx([top["effect"], top["low"], top["high"]])


def label_at(scores, site, address):
    return next(
        label(scores, site, tuple(cell)) for cell in scores.cells(site).tolist() if np.array_equal(scores.sel(address), scores.data[site][:, *cell])
    )


def test_a_label_names_its_cell_and_the_map_reads_it(seen):
    _, _, maps, state = seen
    for site in SITES:
        own, effects = state["groups"]["denoising"]["sites"][site], maps["exact"].data[site].to_numpy().reshape(3, -1)
        assert len(set(own["labels"])) == len(own["labels"])
        for number, text in zip(own["cells"], own["labels"], strict=True):
            if "[layer]" not in site:  # read as all positions
                np.testing.assert_array_equal(maps["exact"].sel(text), effects[:, number])
    labels = state["groups"]["denoising"]["sites"]["z[layer,pos,head]"]["labels"]
    assert {"L2.H3.z@A", "L0.H1.z@0", "L1.H0.z@END"} <= set(labels), "positions go by name where they have one"
    assert "L1.H2.pattern@B<A" in state["groups"]["denoising"]["sites"]["pattern[layer,head,dest,src]"]["labels"]


@pytest.mark.parametrize(
    ("site", "row", "column", "wanted"),
    [
        ("resid_pre", 2, 1, "L2.resid_pre@A"),
        ("z", 1, 3, "L1.H3.z"),
        ("z[layer,pos,head]", 1 * 4 + 2, 3, "L1.H2.z@B"),
        ("k[layer,pos,kv_head]", 2 * 2 + 1, 1, "L2.H1.k@A"),
        ("attn_out[layer]", 2, 0, "L2.attn_out"),
        ("input", 3, 0, "input@B"),
    ],
)
def test_rows_and_columns_of_a_heatmap_lead_to_the_cell_they_name(seen, site, row, column, wanted):
    own = seen[3]["groups"]["denoising"]["sites"][site]
    (panel,) = own["panels"]
    assert own["labels"][panel["cells"][row][column]] == wanted


def test_a_panel_of_a_head_leads_to_its_destinations_and_sources(seen):
    own = seen[3]["groups"]["denoising"]["sites"]["pattern[layer,head,dest,src]"]
    panel = next(panel for panel in own["panels"] if panel["title"].endswith("L1.H2"))
    assert own["labels"][panel["cells"][3][1]] == "L1.H2.pattern@B<A"
    place = panel["cells"][3][1]
    assert (own["places"]["dest"][place], own["places"]["src"][place]) == (3, 1)


def test_one_scale_for_all_methods(seen):
    _, _, maps, state = seen
    own = state["groups"]["denoising"]["sites"]["z"]
    assert own["limits"][0] == pytest.approx(max(np.abs(one.mean("z").to_numpy()).max() for one in maps.values()))
    assert own["limits"][1] == pytest.approx(max(np.abs(one.data["z"].to_numpy()).max() for one in maps.values()), rel=1e-6)
    scale = state["groups"]["denoising"]["scale"]
    assert (scale[0][0], scale[5][0], scale[-1][0]) == (0, 0.5, 1)
    assert scale[5][1] == "rgb(247,247,247)", "the middle, which 0 has, is white"


def test_nodes_of_cells_also_where_heads_share_keys():
    model, task = model_of("llama", torch.float64), swap_task()
    scores = scores_of(pl.AttributionPatching(), model, task, ["k[layer,pos,kv_head]", "z", "attn_out", "mlp_post", "resid_pre", "input"])
    of = lambda site, *cell: nodes(scores, site, cell, 4, 2)  # noqa: E731
    assert of("k[layer,pos,kv_head]", 1, 3, 1) == ["a1.h2", "a1.h3"]
    assert of("z", 2, 3) == ["a2.h3"]
    assert of("attn_out", 1, 0) == ["a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    assert of("mlp_post", 1, 0) == ["m1"]
    assert (of("resid_pre", 1, 0), of("input", 2)) == ([], ["input"])
    edges = scores_of(pl.AttributionPatching(), model, task, "edges")
    assert nodes(edges, "edges", edges.graph.edge("a0.h1->m1"), 4, 2) == ["a0.h1", "m1"]


def test_prompts_that_do_not_line_up_are_shown_at_their_named_positions():
    model, task = model_of("gpt2", torch.float64), mixed_task()
    state = explore(model, task, scores_of(pl.AttributionPatching(), model, task, "resid_pre")).state
    assert not state["aligned"]
    own = state["groups"]["denoising"]["sites"]["resid_pre"]
    place = own["labels"].index("L1.resid_pre@B")
    for example, one in enumerate(task.pairs):
        assert state["index"][example][own["places"]["pos"][place]] == one.positions["B"]
        assert len(state["prompts"][example]["clean"]) == len(one)
    assert state["prompts"][2]["changed"] == [False, False, True, True, False]


def test_a_site_that_was_not_scored_says_why(seen):
    model, task = seen[:2]
    maps = {"exact": scores_of(pl.ActivationPatching(), model, task, ["q", "z"])}
    maps["RelP-AH"] = scores_of(pl.RelevancePatching("relp-ah"), model, task, ["q", "z"])
    own = explore(model, task, maps).state["groups"]["denoising"]["sites"]["q"]
    assert own["scores"]["RelP-AH"]["not_scored"]
    assert own["scores"]["exact"]["not_scored"] is None
    assert own["limits"][0] == pytest.approx(float(np.abs(maps["exact"].mean("q")).max()))


def test_examples_are_left_out_where_they_would_be_too_many_and_means_are_not(seen, monkeypatch):
    model, task, maps, _ = seen
    monkeypatch.setattr("patchlab.explorer.state.NUMBERS", 60)
    one = maps["AtP"]
    state = explore(model, task, scores_of(pl.AttributionPatching(), model, task, "z")).state
    assert state["shown"] == 3
    monkeypatch.setattr("patchlab.explorer.state.NUMBERS", 24)
    state = explore(model, task, scores_of(pl.AttributionPatching(), model, task, "z")).state
    found = state["groups"]["denoising"]["sites"]["z"]["scores"]["atp"]
    assert (state["shown"], state["n"]) == (2, 3)
    np.testing.assert_allclose(numbers(found["mean"]), one.mean("z").to_numpy().ravel(), rtol=1e-12)
    np.testing.assert_allclose(numbers(found["each"]).reshape(-1, 2).T, one.data["z"].to_numpy()[:2].reshape(2, -1), rtol=1e-6)


def test_nodes_of_a_circuit_lead_to_their_cells(seen):
    model, task, maps, _ = seen
    chosen = pl.circuits.top_n(maps["exact"], 6, sites=["z[layer,pos,head]", "resid_pre"])
    state = explore(model, task, maps, circuit=chosen).state
    assert set(state["circuit"]["links"]) == set(chosen.nodes)
    for node, (site, number) in state["circuit"]["links"].items():
        own = state["groups"]["denoising"]["sites"][site]
        np.testing.assert_array_equal(maps["exact"].sel(node), maps["exact"].data[site].to_numpy().reshape(3, -1)[:, number])
        assert number in own["cells"]
