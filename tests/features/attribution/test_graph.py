"""Influence, pruning and scores against the published algorithm, written with dense matrices and one node at a time."""

from dataclasses import replace

import numpy as np
import pytest
from attribution_graphs import by_hand, made, random_graph
from scipy import sparse

from patchlab.errors import CircuitError
from patchlab.features.attribution import AttributionGraph


def literal_normalised(matrix: np.ndarray) -> np.ndarray:
    sizes = np.abs(matrix)
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def literal_influence(matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """w (A + A² + ...) = w ((I − A)⁻¹ − I)."""
    n = len(matrix)
    return weights @ (np.linalg.inv(np.eye(n) - literal_normalised(matrix)) - np.eye(n))


def literal_threshold(scores: np.ndarray, share: float) -> float:
    ordered = sorted(scores.tolist(), reverse=True)
    total, so_far = sum(ordered), 0.0
    for score in ordered:
        so_far += score
        if so_far / total >= share:
            return score
    return min(score for score in ordered if score > 0)


def literal_pruned(graph: AttributionGraph, nodes: float, edges: float) -> tuple[set[str], set[tuple[str, str]]]:
    """Names of the nodes and edges that circuit-tracer's prune_graph keeps."""
    matrix, weights = graph.adjacency.toarray(), graph.nodes.probability
    feature, error = graph.nodes.of("feature"), graph.nodes.of("error")
    influence = literal_influence(matrix, weights)
    kept = influence >= literal_threshold(influence, nodes)
    kept |= ~feature & ~error
    pruned = matrix * np.outer(kept, kept)
    scores = literal_normalised(pruned) * (literal_influence(pruned, weights) + weights)[:, None]
    mask = scores >= literal_threshold(scores.flatten(), edges)
    for _ in range(len(kept)):
        mask &= np.outer(kept, kept)
        for i in range(len(kept)):
            if (feature | error)[i] and not mask[:, i].any():
                kept[i] = False
            if feature[i] and not mask[i].any():
                kept[i] = False
    names = [graph.name(i) for i in range(len(kept))]
    pairs = {(names[source], names[target]) for target, source in np.argwhere(mask & np.outer(kept, kept)).tolist()}
    return {name for name, held in zip(names, kept, strict=True) if held}, pairs


def shown(graph: AttributionGraph) -> tuple[set[str], set[tuple[str, str]]]:
    names = [graph.name(i) for i in range(len(graph.nodes))]
    edges = graph.adjacency.tocoo()
    return set(names), {(names[s], names[t]) for t, s in zip(edges.row.tolist(), edges.col.tolist(), strict=True)}


@pytest.mark.parametrize("seed", range(4))
def test_influence_and_scores_are_those_of_the_dense_formula(seed):
    graph = random_graph(seed)
    matrix, weights = graph.adjacency.toarray(), graph.nodes.probability
    influence = literal_influence(matrix, weights)
    np.testing.assert_allclose(graph.influence(), influence, rtol=1e-10, atol=1e-12)
    token, error = influence[graph.nodes.of("embedding")].sum(), influence[graph.nodes.of("error")].sum()
    assert graph.scores().replacement == pytest.approx(token / (token + error), rel=1e-10)
    explained = 1 - literal_normalised(matrix)[:, graph.nodes.of("error")].sum(1)
    reached = influence + weights
    assert graph.scores().completeness == pytest.approx((explained * reached).sum() / reached.sum(), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shares", [(0.8, 0.98), (0.5, 0.9), (1.0, 1.0), (0.9, 0.3), (0.0, 0.0)])
def test_pruning_is_the_published_one(seed, shares):
    graph = random_graph(seed)
    pruned = graph.prune(*shares)
    assert shown(pruned) == literal_pruned(graph, *shares)
    places = {graph.name(i): i for i in range(len(graph.nodes))}
    mine = [places[pruned.name(i)] for i in range(len(pruned.nodes))]
    whole = graph.adjacency.toarray()[mine][:, mine]
    part = pruned.adjacency.toarray()
    assert (part[part != 0] == whole[part != 0]).all()
    influence = graph.influence()
    for i, place in enumerate(mine):
        above = influence[influence > influence[place]].sum() / influence.sum()
        ties = influence[influence >= influence[place]].sum() / influence.sum()
        assert above - 1e-12 <= pruned.cumulative[i] <= ties + 1e-12


def test_influence_and_scores_by_hand():
    graph = by_hand()
    # the logit takes 3/4 from f1 and 1/4 from token 2; f1 takes 3/4 from f0 and 1/4 from the error; f0 takes all from token 1
    assert graph.influence().tolist() == pytest.approx([9 / 16, 3 / 4, 3 / 16, 0, 9 / 16, 1 / 4, 0])
    assert graph.scores().replacement == pytest.approx((9 / 16 + 1 / 4) / 1)
    reached = 9 / 16 + 3 / 4 + 3 / 16 + 9 / 16 + 1 / 4 + 1
    assert graph.scores().completeness == pytest.approx((reached - 1 / 4 * 3 / 4) / reached)
    assert graph.edge(0, 1) == -3.0
    assert (graph.name(1), graph.name(6)) == ("L1.F4@2", "logit ' sat'")


def test_a_feature_that_nothing_enters_is_dropped_with_all_that_hangs_on_it():
    # f1 → f0 → logit and nothing before f1: both go, and with them the error that led to them alone is not reached
    kind, layer, pos, unit = [0, 0, 2, 3], [0, 1, -1, 3], [1, 1, 1, 2], [0, 1, 1, 5]
    graph = made(kind, layer, pos, unit, {(1, 0): 1.0, (3, 1): 9.0, (3, 2): 1.0}, [0, 0, 0, 1.0])
    pruned = graph.prune(1.0, 1.0)
    assert shown(pruned) == ({"input@1 'the'", "logit ' sat'"}, {("input@1 'the'", "logit ' sat'")})


def test_table_lists_the_nodes():
    table = by_hand().table()
    assert table["node"].tolist()[:3] == ["L0.F1@1", "L1.F4@2", "L0.error@1"]
    assert table["token"].tolist()[-3:] == ["the", " cat", " sat"]
    assert table["influence"].tolist()[1] == pytest.approx(0.75)


def test_graphs_are_read_only_and_say_what_they_are():
    graph = by_hand()
    with pytest.raises(ValueError, match="read-only"):
        graph.nodes.kind[0] = 1
    assert repr(graph) == "AttributionGraph(2 features, 2 errors, 2 embeddings, 1 logits; 5 edges; 3 tokens, toy)"
    assert "pruned" in repr(graph.prune())


def test_what_makes_no_sense_is_refused():
    graph = by_hand()
    with pytest.raises(CircuitError, match="nodes is the share"):
        graph.prune(nodes=1.2)
    with pytest.raises(CircuitError, match="edges is the share"):
        graph.prune(edges=-0.1)
    with pytest.raises(CircuitError, match="square"):
        replace(graph, adjacency=sparse.csr_array(np.eye(3)))
    circle = made([0, 0, 3], [0, 1, 3], [1, 1, 2], [0, 1, 5], {(0, 1): 1.0, (1, 0): 1.0, (2, 1): 1.0}, [0, 0, 1.0])
    with pytest.raises(CircuitError, match="in a circle"):
        circle.influence()
    nothing = made([0, 3], [0, 3], [1, 2], [0, 5], {}, [0, 1.0])
    with pytest.raises(CircuitError, match="nothing to score"):
        nothing.scores()
