"""Choosing nodes from scores: literal ranking, importance, what was not scored, sparse maps."""

from dataclasses import replace

import numpy as np
import pytest
from score_maps import Labels, make_map, random_map

from patchlab.circuits import Circuit, greedy, threshold, top_n
from patchlab.circuits.select_nodes import of_nodes
from patchlab.errors import CircuitError
from patchlab.graph import Graph
from patchlab.scores import ScoreMap
from patchlab.scores.arrays import Sparse

SITES = ("z[layer,pos,head]", "mlp_out", "attn_out")


def ranked(scores: ScoreMap, signed: bool = False) -> list[tuple[float, str]]:
    """All nodes of a map, the most important first, written out."""
    found = []
    for site in scores.sites:
        mean = scores.mean(site)
        for cell in np.ndindex(*mean.shape):
            at = dict(zip(mean.dims, cell, strict=True))
            unit = f"H{at['head']}." if "head" in at else ""
            sign = 1 if scores.provenance["direction"] == "denoising" else -1
            value = float(mean[cell])
            found.append((sign * value if signed else abs(value), f"L{at['layer']}.{unit}{site.partition('[')[0]}@{at['pos']}"))
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("by", ["abs", "signed"])
def test_the_most_important_nodes_of_all_sites_are_ranked_together(by: str, direction: str) -> None:
    scores = random_map(*SITES, direction=direction)
    expected = ranked(scores, by == "signed")
    circuit = top_n(scores, 7, by=by)
    assert set(circuit.nodes) == {name for _, name in expected[:7]}
    assert set(circuit.table()["node"]) == set(circuit.nodes)
    level = (expected[6][0] + expected[7][0]) / 2
    assert set(threshold(scores, level, by=by).nodes) == set(circuit.nodes)
    for node, score in zip(*(circuit.table()[column] for column in ("node", "score")), strict=True):
        assert score == pytest.approx(float(scores.sel(node).mean()))
    assert circuit.provenance["how"] == f"top 7 by {'|effect|' if by == 'abs' else 'signed importance'}"
    assert circuit.provenance["n_requested"] == 7
    assert circuit.sites == SITES
    assert circuit.size == sum(scores.live[site].size for site in SITES)


def test_a_threshold_takes_what_is_exactly_there() -> None:
    scores = make_map({"z": np.array([[[1.0, -2.0], [0.5, 2.0]]])})
    assert threshold(scores, 2.0).nodes == ("L0.H1.z", "L1.H1.z")
    assert threshold(scores, 2.0, by="signed").nodes == ("L1.H1.z",)
    assert threshold(scores, 5.0).n_nodes == 0
    assert threshold(scores, 0).n_nodes == 4
    assert top_n(scores, 1).nodes == ("L0.H1.z",), "of equals the first"


def test_sites_can_be_named() -> None:
    scores = random_map(*SITES)
    assert top_n(scores, 3, sites="mlp_out").sites == ("mlp_out",)
    assert top_n(scores, 3, sites=["attn_out", "mlp_out"]).sites == ("attn_out", "mlp_out")
    with pytest.raises(CircuitError, match="each kind once"):
        top_n(make_map({"z": np.ones((2, 1, 2)), "z[layer,pos,head]": np.ones((2, 1, 3, 2))}), 3)


def test_positions_have_the_names_of_the_map() -> None:
    labels = Labels(("", "S", "END"), (("a", "b", "c"),))
    circuit = top_n(make_map({"mlp_out": np.array([[[3.0, 2.0, 1.0]]])}, labels=labels), 2)
    assert circuit.nodes == ("L0.mlp_out@0", "L0.mlp_out@S")
    assert circuit.positions == ("0", "S", "END")


def test_what_was_not_scored_is_left_out_with_a_note_or_refused() -> None:
    effects = np.random.default_rng(0).normal(size=(3, 2, 4))
    scores = make_map({"z": effects, "q": np.full_like(effects, np.nan)}, not_scored={"q": "the pattern is constant"})
    circuit = top_n(scores, 3)
    assert circuit.sites == ("z",)
    assert circuit.provenance["notes"] == ["q was not scored (the pattern is constant) and is free"]
    assert "note: q was not scored" in repr(circuit)
    with pytest.raises(CircuitError, match=r"q was not scored \(the pattern is constant\), so no nodes of it can be chosen"):
        top_n(scores, 3, sites="q")
    with pytest.raises(CircuitError, match="none of the sites of the map was scored: q was not scored"):
        top_n(make_map({"q": np.full_like(effects, np.nan)}, not_scored={"q": "why"}), 1)


def test_sparse_maps() -> None:
    rng = np.random.default_rng(0)
    index = np.array([[0, 3], [1, 0], [1, 7]])
    scores = make_map({"mlp_post": np.zeros((2, 2, 8))})
    sparse = ScoreMap.build(
        {"mlp_post": Sparse(index, rng.normal(size=(2, 3)))},
        {"mlp_post": None},
        task_axis=None,
        examples=[0, 1],
        metric_clean=np.ones(2),
        metric_corrupted=np.zeros(2),
        provenance={**scores.provenance, "added_entries": {"mlp_post": {"n_layers": 3, "entries": {"0": 8, "1": 9}}}},
        cost=scores.cost,
    )
    circuit = top_n(sparse, 2)
    order = np.argsort(-np.abs(sparse.mean("mlp_post").to_numpy()))[:2]
    assert set(circuit.nodes) == {f"L{layer}.N{neuron}.mlp_post" for layer, neuron in index[order].tolist()}
    assert circuit.universe[0].layers == (0, 1)
    assert circuit.size == 17
    with pytest.raises(CircuitError, match="does not say how many there are"):
        top_n(replace(sparse, provenance=scores.provenance), 1)
    with pytest.raises(CircuitError, match="4 nodes were asked for, and 3 of the 17 of"):
        top_n(sparse, 4)


def test_refuses_what_does_not_fit() -> None:
    scores = random_map("z[layer,pos,head]")
    for n in (0, -1):
        with pytest.raises(CircuitError, match="n is the number of nodes to choose, a whole number of at least 1"):
            top_n(scores, n)
    with pytest.raises(CircuitError, match="unknown importance 'size'"):
        top_n(scores, 1, by="size")
    with pytest.raises(CircuitError, match="the scores are of denoising; got direction='noising'"):
        top_n(scores, 1, direction="noising")
    with pytest.raises(CircuitError, match="at least 0 for importance 'abs'; got -1"):
        threshold(scores, -1.0)
    with pytest.raises(CircuitError, match="greedy selection goes from edge to edge of a model's graph; these are scores of nodes"):
        greedy(scores, 1)


def test_maps_of_edges_stay_edges() -> None:
    graph = Graph(1, 1, 4)
    scores = make_map({"edges": np.where(graph.allowed, 1.0, 0.0)[None]}, graph=graph.as_dict())
    assert not of_nodes(scores)
    assert isinstance(top_n(scores, 2), Circuit)
    assert not of_nodes(np.zeros(graph.allowed.shape))
