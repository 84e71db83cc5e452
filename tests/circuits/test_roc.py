"""Scores and circuits against a known circuit: counted by hand."""

from itertools import product

import numpy as np
import pytest
from families import model_of, scores_of, swap_task

import patchlab as pl
from patchlab.circuits import Circuit, overlap, roc
from patchlab.errors import CircuitError
from patchlab.graph import Graph

GRAPH = Graph(2, 2, 8)
TRUE = ("input->a0.h1<v>", "a0.h1->m1", "m1->logits")


def reference(positions: int | None = None) -> Circuit:
    mask = GRAPH.mask(TRUE)
    return Circuit(GRAPH, mask if positions is None else np.repeat(mask[:, :, None], positions, 2))


def effects(seed: int = 0, levels: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=GRAPH.allowed.shape) if levels is None else rng.integers(-levels, levels + 1, GRAPH.allowed.shape).astype(float)


def pairs_auc(importance: np.ndarray, truth: np.ndarray) -> float:
    """Share of (true, false) pairs that are ranked rightly, ties half."""
    wins = [float(a > b) + 0.5 * float(a == b) for a, b in product(importance[truth], importance[~truth])]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("by", ["abs", "signed"])
@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_area_is_the_share_of_pairs_ranked_rightly(by: str, levels: int | None, direction: str) -> None:
    values = effects(levels=levels)
    result = roc(values, reference(), by=by, direction=direction)
    sign = {"abs": np.abs(values), "signed": values if direction == "denoising" else -values}[by]
    truth = reference().edges[GRAPH.allowed]
    assert result.auc == pytest.approx(pairs_auc(sign[GRAPH.allowed], truth))
    assert (result.n_true, result.n_all) == (3, GRAPH.n_edges)


def test_counts_at_every_threshold() -> None:
    values = effects(levels=2)
    table = roc(values, reference()).to_dataframe()
    flat, truth = np.abs(values[GRAPH.allowed]), reference().edges[GRAPH.allowed]
    assert table["threshold"].tolist() == [np.inf, 2.0, 1.0, 0.0]
    for row in table.to_dict("records"):
        guess = flat >= row["threshold"]
        assert (row["tp"], row["fp"]) == ((guess & truth).sum(), (guess & ~truth).sum())
        assert (row["fn"], row["tn"]) == ((~guess & truth).sum(), (~guess & ~truth).sum())
        assert row["chosen"] == guess.sum()
        assert row["tpr"] == row["tp"] / 3
        assert row["precision"] == (row["tp"] / guess.sum() if guess.any() else 1)
    steps = np.diff(table["tpr"]) * table["precision"][1:]
    assert roc(values, reference()).average_precision == pytest.approx(steps.sum())


def test_perfect_and_reversed_scores() -> None:
    perfect = np.where(reference().edges, -1.0, 0.1)
    assert roc(perfect, reference()).auc == 1
    assert roc(perfect, reference()).average_precision == 1
    assert roc(-perfect, reference(), by="signed", direction="noising").auc == 0
    assert roc(-perfect, reference(), by="signed", direction="denoising").auc == 1
    with pytest.raises(CircuitError, match="signed importance depends on the direction"):
        roc(perfect, reference(), by="signed")
    assert roc(np.zeros(GRAPH.allowed.shape), reference()).auc == 0.5


def test_edges_without_scores_are_an_error_or_the_worst() -> None:
    values = effects()
    missed = GRAPH.edge(TRUE[0])
    values[missed] = np.nan
    with pytest.raises(CircuitError, match=r"1 of 46 edges have no score \(NaN\), input->a0.h1<v> among them; pass not_scored='worst'"):
        roc(values, reference())
    result = roc(values, reference(), not_scored="worst")
    flat = np.abs(values[GRAPH.allowed])
    assert result.auc == pytest.approx(pairs_auc(np.where(np.isnan(flat), -1, flat), reference().edges[GRAPH.allowed]))
    assert result.table["threshold"].iloc[-1] == -np.inf
    assert result.provenance["not_scored"] == 1


def test_nodes_are_scored_by_the_sum_of_their_edges() -> None:
    values = effects()
    result = roc(values, reference(), level="node")
    sums = np.where(GRAPH.allowed, values, 0).sum(1)[1:]
    truth = np.array([name in ("a0.h1", "m1") for name in GRAPH.writers[1:]])
    assert result.auc == pytest.approx(pairs_auc(np.abs(sums), truth))
    assert (result.n_true, result.n_all) == (2, len(GRAPH.writers) - 1)
    values[GRAPH.edge("m0->m1")] = np.nan
    with pytest.raises(CircuitError, match="1 of 6 nodes have no score .*, m0 among them"):
        roc(values, reference(), level="node")


def test_positions_count_apart() -> None:
    values = np.random.default_rng(0).normal(size=(*GRAPH.allowed.shape, 3))
    result = roc(values, reference(3))
    assert (result.n_true, result.n_all) == (9, 3 * GRAPH.n_edges)
    assert result.auc == pytest.approx(pairs_auc(np.abs(values[GRAPH.allowed]).ravel(), reference(3).edges[GRAPH.allowed].ravel()))
    assert roc(values, reference(3), level="node").n_all == 6
    with pytest.raises(CircuitError, match=r"the scores have the shape \[7, 15, 3\] and the reference \[7, 15\]"):
        roc(values, reference())


def test_maps_know_their_direction_and_their_graph() -> None:
    model, task = model_of("gpt2"), swap_task(3)
    known = Circuit.of(model.arch.graph, ["input->a0.h1<v>", "m1->logits"])
    for direction, sign in (("noising", -1), ("denoising", 1)):
        scores = scores_of(pl.AttributionPatching(), model, task, "edges", direction)
        mean = scores.mean("edges").to_numpy()[model.arch.graph.allowed]
        result = roc(scores, known, by="signed")
        assert result.auc == pytest.approx(pairs_auc(sign * mean, known.edges[model.arch.graph.allowed]))
        assert result.provenance["scores"]["direction"] == direction
    with pytest.raises(CircuitError, match="the scores belongs to a graph of 3 layers.*the reference to a graph of 2 layers"):
        roc(scores, reference())


def test_what_only_the_reference_has_is_a_false_negative() -> None:
    guess = Circuit.of(GRAPH, [TRUE[0], "input->m0"])
    counts = overlap(guess, reference())
    assert counts == {"tp": 1, "fp": 1, "fn": 2, "tn": 42, "precision": 0.5, "recall": 1 / 3, "f1": 2 / 5, "fpr": 1 / 43}
    nodes = overlap(guess, reference(), level="node")
    assert (nodes["tp"], nodes["fp"], nodes["fn"], nodes["tn"]) == (1, 1, 1, 3)
    empty = overlap(Circuit.empty(GRAPH), reference())
    assert (empty["tp"], empty["fn"], empty["recall"]) == (0, 3, 0)
    assert np.isnan(empty["precision"])


def test_refuses_what_cannot_be_compared() -> None:
    for options, message in (({"by": "size"}, "importance"), ({"level": "head"}, "level"), ({"not_scored": "skip"}, "way to treat")):
        with pytest.raises(CircuitError, match=f"unknown {message}"):
            roc(effects(), reference(), **options)
    with pytest.raises(CircuitError, match="unknown direction 'up'"):
        roc(effects(), reference(), direction="up")
    for whole, word in ((Circuit.full(GRAPH), "all"), (Circuit.empty(GRAPH), "none")):
        with pytest.raises(CircuitError, match=f"the reference has {word} of the 46 edges"):
            roc(effects(), whole)
    with pytest.raises(CircuitError, match="the hypothesis belongs to"):
        overlap(Circuit.full(Graph(3, 2, 8)), reference())
    with pytest.raises(CircuitError, match="unknown level 'x'"):
        overlap(reference(), reference(), level="x")
    with pytest.raises(CircuitError, match="drop the positions of one"):
        overlap(reference(3), reference())
