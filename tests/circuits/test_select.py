"""Choosing circuits from scores: the selections of EAP-IG, ties, signs, positions, and what cannot be chosen."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from score_maps import Labels, make_map

from patchlab.circuits import Circuit, greedy, threshold, top_n
from patchlab.circuits.select import mean_effects
from patchlab.errors import CircuitError
from patchlab.graph import Graph

SMALL = Graph(2, 2, 8)
HOW = {"topn": top_n, "greedy": greedy}


def effects(graph: Graph = SMALL, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=graph.allowed.shape)


def edge_map(values: np.ndarray, graph: Graph = SMALL, site: str = "edges", **about):
    """A map of these effects, the same in two examples up to noise that cancels."""
    noise = np.random.default_rng(9).normal(size=values.shape)
    both = np.stack([values + noise, values - noise])
    return make_map({site: both}, graph=graph.as_dict(), **about)


# --- the reference ---


def reference_cases(folder: Path):
    manifest = json.loads((folder / "manifest.json").read_text())["models"]
    names = json.loads((folder / "edge_names.json").read_text())
    for model, about in manifest.items():
        graph = Graph(about["n_layers"], about["n_heads"], about["d_model"], about["parallel_attn_mlp"], about["n_kv_heads"])
        places = tuple(np.array([graph.edge(name) for name in names[model]]).T)
        for task in about["tasks"].values():
            values = load_file(folder / task["values"])
            for circuit in task["circuits"]:
                yield graph, places, values[f"edge.{circuit['scores']}"], values[f"{circuit['key']}.in_graph"], circuit


def test_selections_of_the_reference_are_reproduced(shared_dir: Path) -> None:
    done = {"topn": 0, "greedy": 0}
    cases = chain(*(reference_cases(shared_dir / folder) for folder in ("reference", "reference_postnorm")))
    for graph, places, scores, in_graph, about in cases:
        given_scores, expected = np.full(graph.allowed.shape, np.nan, dtype=scores.dtype), np.zeros(graph.allowed.shape, dtype=bool)
        given_scores[places], expected[places] = scores, in_graph
        made = HOW[about["how"]](given_scores, about["n_requested"], graph=graph)
        assert np.array_equal(made.edges, expected), about["key"]
        assert made.n_edges == about["n_kept"]
        assert set(made.nodes) - {"logits"} == set(about["nodes"])
        done[about["how"]] += 1
    assert min(done.values()) > 50


# --- choosing ---


@settings(deadline=None, max_examples=25)
@given(st.integers(1, SMALL.n_edges), st.integers(0, 5))
def test_top_n_takes_the_largest(n: int, seed: int) -> None:
    values = effects(seed=seed)
    kept = top_n(values, n, graph=SMALL, prune=False).edges
    assert kept.sum() == n
    if n < SMALL.n_edges:
        assert np.abs(values[kept]).min() > np.abs(values[SMALL.allowed & ~kept]).max()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, SMALL.n_edges), st.integers(0, 5))
def test_greedy_equals_its_definition(n: int, seed: int) -> None:
    values = effects(seed=seed)
    inside, kept = {"logits"}, []
    for _ in range(n):
        open_edges = [name for name in SMALL.names() if name not in kept and name.split("->")[1].partition("<")[0] in inside]
        best = max(open_edges, key=lambda name: abs(values[SMALL.edge(name)]))
        kept.append(best)
        inside.add(best.split("->")[0])
    assert set(greedy(values, n, graph=SMALL, prune=False).edge_names) == set(kept)


def test_threshold_includes_its_level() -> None:
    values = np.zeros(SMALL.allowed.shape)
    for name, value in (("input->m0", -0.5), ("m0->logits", 0.25), ("m1->logits", 0.1)):
        values[SMALL.edge(name)] = value
    made = threshold(values, 0.25, graph=SMALL)
    assert made.edge_names == ["input->m0", "m0->logits"]
    assert made.provenance == {"how": "|effect| at least 0.25", "level": 0.25, "by": "abs", "pruned": True}
    assert threshold(values, 0, graph=SMALL).n_edges == SMALL.n_edges
    assert threshold(values, 9, graph=SMALL).n_edges == 0


def test_ties_go_to_the_first_edge_and_to_the_node_that_came_in_first() -> None:
    same = np.ones(SMALL.allowed.shape)
    assert top_n(same, 3, graph=SMALL, prune=False).edge_names == SMALL.names()[:3]
    # all edges into the logits come before any edge into the nodes they bring in
    into_logits = [name for name in SMALL.names() if name.endswith("->logits")]
    assert greedy(same, len(into_logits), graph=SMALL, prune=False).edge_names == into_logits
    further = greedy(same, len(into_logits) + 1, graph=SMALL, prune=False) - greedy(same, len(into_logits), graph=SMALL, prune=False)
    assert further.edge_names == ["input->a0.h0<q>"], "the input has no incoming edges, a0.h0 came in next"


@pytest.mark.parametrize("choose", [top_n, greedy])
def test_signed_importance_turns_with_the_direction(choose) -> None:
    values = np.where(SMALL.mask(["input->logits"]), -1.0, 0.1)
    values[SMALL.edge("m1->logits")] = 0.9
    noised = choose(values, 1, graph=SMALL, by="signed", direction="noising", prune=False)
    assert noised.edge_names == ["input->logits"], "noising it hurts, so it helps"
    assert noised.provenance["direction"] == "noising"
    with pytest.raises(CircuitError, match="signed importance depends on the direction, and an array of effects does not say it"):
        choose(values, 1, graph=SMALL, by="signed", prune=False)
    assert choose(values, 1, graph=SMALL, by="signed", direction="denoising", prune=False).edge_names == ["m1->logits"]
    assert choose(values, 1, graph=SMALL, prune=False).edge_names == ["input->logits"]
    assert threshold(values, 0.5, graph=SMALL, by="signed", direction="denoising", prune=False).edge_names == ["m1->logits"]
    for direction, expected in (("noising", "input->logits"), ("denoising", "m1->logits")):
        scores = edge_map(values, direction=direction)
        assert choose(scores, 1, by="signed", prune=False).edge_names == [expected], "a map knows its own direction"
        assert choose(scores, 1, by="signed", direction=direction, prune=False).edge_names == [expected]
        other = {"noising": "denoising", "denoising": "noising"}[direction]
        with pytest.raises(CircuitError, match=f"the scores are of {direction}; got direction={other!r}. Leave it out"):
            choose(scores, 1, by="signed", direction=other, prune=False)


def test_a_map_gives_its_mean_and_where_it_comes_from() -> None:
    values = effects()
    made = top_n(edge_map(values, direction="noising", method="eap"), 12)
    assert made.edges.tolist() == top_n(values, 12, graph=SMALL).edges.tolist()
    assert made.scores is not None
    assert np.allclose(made.scores[SMALL.allowed], values[SMALL.allowed])
    about = made.provenance
    assert (about["method"], about["model"], about["task"], about["direction"]) == ("eap", "tiny", "toy", "noising")
    assert (about["how"], about["n_requested"], about["by"], about["pruned"], about["examples"]) == ("top 12 by |effect|", 12, "abs", True, [0, 1])
    assert "graph" not in about
    assert repr(made).startswith("Circuit(eap, noising, logit_diff, top 12 by |effect|, pruned; tiny × toy)")


def test_positions_are_chosen_one_by_one() -> None:
    values = np.zeros((*SMALL.allowed.shape, 3))
    for name, pos, value in (("input->m0", 1, 3.0), ("m0->logits", 1, -2.0), ("input->m0", 2, 1.0)):
        values[(*SMALL.edge(name), pos)] = value
    labels = Labels(("S", "", "END"), (("a", "b", "c"),) * 2)
    made = top_n(edge_map(values, site="edges[writer,reader,pos]", labels=labels), 3)
    assert made.positions == ("S", "1", "END")
    assert [made.edges[SMALL.edge(name)].tolist() for name in ("input->m0", "m0->logits")] == [[False, True, True], [False, True, False]]
    assert top_n(values, 3, graph=SMALL).edges.tolist() == made.edges.tolist()
    assert top_n(values, 3 * SMALL.n_edges, graph=SMALL).n_edges == 3 * SMALL.n_edges
    with pytest.raises(CircuitError, match=r"139 edges were asked for; .* has 138"):
        top_n(values, 3 * SMALL.n_edges + 1, graph=SMALL)
    with pytest.raises(CircuitError, match="greedy selection follows nodes, which positions do not have"):
        greedy(values, 3, graph=SMALL)


def test_llama_8b_is_chosen_from_in_one_array() -> None:
    graph = Graph(32, 32, 4096, n_kv_heads=8)
    values = np.random.default_rng(0).normal(size=graph.allowed.shape).astype(np.float32)
    for choose in (top_n, greedy):
        assert choose(values, 15_928, graph=graph, prune=False).n_edges == 15_928


# --- what cannot be chosen ---


@pytest.mark.parametrize("choose", [top_n, greedy])
def test_numbers_of_edges(choose) -> None:
    values = effects()
    for n in (0, -3):
        with pytest.raises(CircuitError, match=rf"at least 1; got {n}\. Circuit\.empty"):
            choose(values, n, graph=SMALL)
    with pytest.raises(CircuitError, match="47 edges were asked for; a graph of 2 layers × 2 heads, width 8 has 46"):
        choose(values, 47, graph=SMALL)


def test_more_edges_than_are_scored() -> None:
    values = effects()
    values[:, [kind in "qk" for kind in SMALL.reader_kind]] = np.nan
    reasons = {"q": "the pattern is constant under the AH-rule", "k": "the same"}
    scores = edge_map(values, readers_not_scored=reasons)
    scored = int(np.isfinite(values[SMALL.allowed]).sum())
    assert top_n(scores, scored).n_edges <= scored
    with pytest.raises(CircuitError) as error:
        top_n(scores, scored + 1)
    assert f"{scored + 1} edges were asked for and {scored} of 46 are scored" in str(error.value)
    assert "Not scored: edges into q (the pattern is constant under the AH-rule). Not scored: edges into k (the same)." in str(error.value)
    assert str(error.value).endswith(f"Ask for at most {scored}.")
    assert not threshold(scores, 0).edges[np.isnan(values)].any()


def test_a_map_that_scored_nothing() -> None:
    nothing = make_map({"edges": np.full((2, *SMALL.allowed.shape), np.nan)}, graph=SMALL.as_dict(), not_scored={"edges": "post-norms"})
    with pytest.raises(CircuitError, match=r"0 of 46 are scored\. Not scored: edges \(post-norms\)"):
        top_n(nothing, 1)


def test_greedy_where_no_scored_edge_leads_on() -> None:
    values = np.full(SMALL.allowed.shape, np.nan)
    for name in ("m1->logits", "input->m0"):
        values[SMALL.edge(name)] = 1.0
    assert greedy(values, 1, graph=SMALL, prune=False).edge_names == ["m1->logits"]
    with pytest.raises(CircuitError, match="only 1 scored edges lead to the logits .* 2 were asked for"):
        greedy(values, 2, graph=SMALL)


def test_other_mistakes() -> None:
    values = effects()
    with pytest.raises(CircuitError, match="unknown importance 'absolute'; Valid: abs, signed"):
        top_n(values, 3, graph=SMALL, by="absolute")
    with pytest.raises(CircuitError, match="unknown direction 'noise'"):
        top_n(values, 3, graph=SMALL, direction="noise")
    with pytest.raises(CircuitError, match="does not say whose edges they are; pass graph="):
        top_n(values, 3)
    with pytest.raises(CircuitError, match=r"the effects have the shape \[7, 15\] and a graph of 1 layers"):
        top_n(values, 3, graph=Graph(1, 2, 8))
    with pytest.raises(CircuitError, match="46 edge effects are infinite"):
        top_n(np.full(SMALL.allowed.shape, np.inf), 3, graph=SMALL)
    for level in (-0.1, float("nan")):
        with pytest.raises(CircuitError, match=f"at least 0 for importance 'abs'; got {level}"):
            threshold(values, level, graph=SMALL)
    assert threshold(values, -0.1, graph=SMALL, by="signed", direction="noising").n_edges > 0
    with pytest.raises(CircuitError, match=r"one site of edges, .* this map has z\. Score the edges"):
        mean_effects(make_map({"z": np.zeros((2, 2, 2))}))


def test_a_chosen_circuit_is_a_circuit() -> None:
    made = top_n(effects(), 20, graph=SMALL)
    assert isinstance(made, Circuit)
    assert made.equals(made.pruned())
