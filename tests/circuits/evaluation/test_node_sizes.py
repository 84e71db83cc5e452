"""Curves over circuits of nodes: thresholds and numbers of nodes, against evaluations one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import gap_task, model_of, scores_of, swap_task

import patchlab as pl
from patchlab.circuits import FaithfulnessCurve, NodeCircuit, candidates, evaluate, faithfulness_curve, smallest_faithful, threshold, top_n
from patchlab.circuits.evaluation.node_sizes import THRESHOLDS, random_nodes
from patchlab.errors import CircuitError
from patchlab.plots._faithfulness import _prepare_faithfulness
from patchlab.scores import ScoreMap

DTYPE = torch.float64


@pytest.fixture(scope="module")
def maps() -> dict[str, ScoreMap]:
    model, task = model_of("gpt2", DTYPE), swap_task(4, seed=40)
    methods = {"atp": pl.AttributionPatching(), "relp": pl.RelevancePatching()}
    return {name: scores_of(one, model, task, ["z", "mlp_post"], "noising") for name, one in methods.items()}


def curve(maps: dict[str, ScoreMap], **options: object) -> FaithfulnessCurve:
    return faithfulness_curve(model_of("gpt2", DTYPE), maps, gap_task(4), progress=False, **{"random": 0, **options})


def test_thresholds_are_those_of_the_paper_and_every_row_is_an_evaluation(maps: dict[str, ScoreMap]) -> None:
    np.testing.assert_allclose(THRESHOLDS, np.logspace(-4, 0, 15))
    found = curve(maps, ablation="resample")
    assert list(found.table["threshold"][:15]) == sorted(THRESHOLDS, reverse=True)
    assert (found.unit, found.size_column) == ("nodes", "n_nodes")
    for name, scores in maps.items():
        rows = found.table[found.table["method"] == name].reset_index(drop=True)
        assert rows["n_nodes"].is_monotonic_increasing
        for i in (4, 9):
            circuit = threshold(scores, float(rows["threshold"][i]))
            assert found.circuits[name][i].equals(circuit)
            alone = evaluate(model_of("gpt2", DTYPE), circuit, gap_task(4), ablation="resample", progress=False).table.iloc[0]
            for column in ("n_nodes", "faithfulness", "lo", "hi", "completeness", "completeness_lo", "completeness_hi", "metric"):
                assert rows[column][i] == pytest.approx(alone[column], abs=1e-9), column
    with pytest.raises(CircuitError, match="one site of edges"):
        smallest_faithful(model_of("gpt2", DTYPE), maps, gap_task(4), gap_task(4, seed=90), progress=False)


def test_numbers_of_nodes_random_ones_and_the_file(maps: dict[str, ScoreMap], tmp_path: Path) -> None:
    total = NodeCircuit.full(candidates(model_of("gpt2").arch, ["z", "mlp_post"])).n_nodes
    found = curve(maps, sizes=[0, 3, total], random=2)
    rows = found.table[found.table["method"] == "relp"].reset_index(drop=True)
    assert rows["n_requested"].tolist() == rows["n_nodes"].tolist() == [0, 3, total]
    assert rows["faithfulness"].tolist() == pytest.approx([0, rows["faithfulness"][1], 1], abs=1e-9)
    assert rows["completeness"].tolist() == pytest.approx([1, rows["completeness"][1], 0], abs=1e-9)
    assert rows["threshold"].isna().all()
    assert found.circuits["relp"][1].equals(top_n(maps["relp"], 3))
    assert set(found.table["method"]) == {"atp", "relp", "random"}
    assert found.smallest("relp")["n_nodes"] == found.areas.set_index("method").loc["relp", "smallest"]
    assert " nodes on (of the 3 sizes tried" in repr(found)
    found.save(tmp_path / "curve.json")
    again = FaithfulnessCurve.load(tmp_path / "curve.json")
    assert again.table.equals(found.table)
    assert again.unit == "nodes"
    drawn = _prepare_faithfulness(again)
    assert (drawn.unit, drawn.total) == ("nodes", total)
    assert "nodes of largest |effect|" in drawn.subtitle
    assert "3 nodes" in drawn.lines[0].hover[0]
    assert "completeness" in drawn.lines[0].hover[0]
    assert f"nodes asked for, of {total}" in str(pl.plots.faithfulness(again).to_json())


def test_early_layers_are_not_among_the_candidates(maps: dict[str, ScoreMap]) -> None:
    found = curve(maps, sizes=[2, 5], start_layer=1)
    (small, large) = found.circuits["relp"]
    assert all(not node.startswith("L0.") for node in large.nodes)
    assert small.n_nodes == 2
    assert found.provenance["n_candidates"] == small.size < top_n(maps["relp"], 2).size
    late = top_n(maps["relp"], 40).from_layer(1).table()["node"][:5]
    assert set(large.nodes) == set(late), "the largest of what is left"


def test_random_nodes_are_spread_over_the_sites() -> None:
    universe = candidates(model_of("gpt2").arch, ["z", "mlp_post"])
    drawn = random_nodes(universe, 20, seed=1)
    assert drawn.n_nodes == 20
    assert drawn.equals(random_nodes(universe, 20, seed=1))
    assert not drawn.equals(random_nodes(universe, 20, seed=2))
    with pytest.raises(CircuitError, match="1,000 random nodes were asked for; there are"):
        random_nodes(universe, 1000)


def test_refuses_what_does_not_fit(maps: dict[str, ScoreMap]) -> None:
    with pytest.raises(CircuitError, match="over sizes= or over thresholds=; got both"):
        curve(maps, sizes=[1], thresholds=[0.1])
    with pytest.raises(CircuitError, match="thresholds are finite levels of importance"):
        curve(maps, thresholds=[])
    with pytest.raises(CircuitError, match="thresholds are finite levels"):
        curve(maps, thresholds=[-1.0])
    with pytest.raises(CircuitError, match="sizes are whole numbers of nodes from 0 to"):
        curve(maps, sizes=[3, 2])
    with pytest.raises(CircuitError, match="are for circuits of edges; got scores of nodes"):
        curve(maps, how="greedy")
    own = scores_of(pl.AttributionPatching(), model_of("gpt2", DTYPE), gap_task(4), ["z"], "noising")
    with pytest.raises(CircuitError, match="the map 'own' comes from 4 of the 4 examples"):
        curve({"own": own})
    with pytest.raises(CircuitError, match="their empty circuits differ"):
        curve({"own": own, **maps}, allow_overlap=True)
    edges = scores_of(pl.AttributionPatching(), model_of("gpt2", DTYPE), swap_task(4, seed=40), "edges", "noising")
    with pytest.raises(CircuitError, match="thresholds=, errors= and start_layer= are for circuits of nodes"):
        curve({"edges": edges}, thresholds=[0.1])
