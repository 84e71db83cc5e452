"""Stability: the Jaccard index against a literal twin, what is kept on most resamples, and where tables, files and figures have it."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from families import gap_task, model_of, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from score_maps import make_map

import patchlab as pl
from patchlab import plots
from patchlab.circuits import (
    Circuit,
    FaithfulnessCurve,
    consistent,
    faithfulness_curve,
    greedy,
    read,
    smallest_faithful,
    stability,
    three_sets,
    threshold,
    top_n,
    write,
)
from patchlab.circuits.evaluation.curve import areas_note
from patchlab.circuits.stability import stabilities
from patchlab.errors import CircuitError
from patchlab.graph import Graph
from patchlab.plots._stability import _prepare_stability
from patchlab.stats.jaccard import NUMBERS, likeness, sentence

SMALL = Graph(2, 2, 8)


def edges(n: int = 12, noise: float = 1.0, graph: Graph = SMALL, seed: int = 0, n_pos: int = 0):
    """A map of edge effects that differ between examples."""
    rng = np.random.default_rng(seed)
    shape = (*graph.allowed.shape, *([n_pos] if n_pos else []))
    values = rng.normal(size=shape)[None] + noise * rng.normal(size=(n, *shape))
    return make_map({"edges[writer,reader,pos]" if n_pos else "edges": values}, graph=graph.as_dict())


def index(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def literal(scores, choose, draws: int, seed: int) -> tuple[dict[str, float], list[set[str]]]:
    """The numbers from the definition: sets of names, one resample after the other, from means in float64."""
    values = scores.data["edges"].to_numpy().astype(np.float64)
    n = len(values)
    chosen = []
    for rows in np.random.default_rng(seed).integers(n, size=(draws, n)):
        mean = sum(values[row] for row in rows) / n
        chosen.append(set(choose(mean, graph=SMALL, direction="denoising").edge_names))
    own = set(choose(values.sum(0) / n, graph=SMALL, direction="denoising").edge_names)
    pairs = [index(one, other) for one, other in combinations(chosen, 2)]
    total = SMALL.n_edges
    sizes = [(len(one), len(other)) for one, other in combinations(chosen, 2)]
    chance = [(a * b / total) / (a + b - a * b / total) if a + b else 0.0 for a, b in sizes]
    mean = sum(pairs) / len(pairs)
    spread = (sum((one - mean) ** 2 for one in pairs) / len(pairs)) ** 0.5
    to_choice = sum(index(own, one) for one in chosen) / draws
    return dict(zip(NUMBERS, (mean, *np.quantile(pairs, [0.025, 0.975]), spread, to_choice, np.mean(chance)), strict=True)), chosen


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores, **about: top_n(scores, 9, **about),
        lambda scores, **about: top_n(scores, 9, by="signed", prune=False, **about),
        lambda scores, **about: threshold(scores, 1.0, **about),
        lambda scores, **about: greedy(scores, 7, **about),
    ],
    ids=["top_n", "signed, not pruned", "threshold", "greedy"],
)
def test_stability_is_what_its_definition_gives(choose):
    scores = edges()
    found = stability(scores, choose, draws=25, seed=3)
    expected, chosen = literal(scores, choose, 25, 3)
    assert found.numbers == pytest.approx(expected, abs=1e-12)
    assert found.sizes.tolist() == [len(one) for one in chosen]
    table = found.table().set_index("edge")
    assert dict(table["share"]) == pytest.approx({name: np.mean([name in one for one in chosen]) for name in set.union(*chosen)})
    own = choose(scores)
    assert {name for name in table.index if table["chosen"][name]} == set(own.edge_names) & set(table.index)
    assert found.choice.equals(own)
    assert found.choice.provenance["stability"] == found.record()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 9)), min_size=2, max_size=6), st.sets(st.integers(0, 9)))
def test_likeness_is_that_of_sets(chosen, own):
    arrays = [np.array(sorted(one), dtype=np.int64) for one in chosen]
    found = likeness(arrays, np.array(sorted(own), dtype=np.int64), 10)
    pairs = [index(one, other) for one, other in combinations(chosen, 2)]
    assert found["jaccard"] == pytest.approx(np.mean(pairs))
    assert found["jaccard_sd"] == pytest.approx(np.std(pairs))
    assert found["jaccard_to_choice"] == pytest.approx(np.mean([index(own, one) for one in chosen]))
    assert 0 <= found["jaccard_chance"] <= 1


def test_prompts_that_agree_give_one_circuit_and_prompts_that_do_not_give_many():
    def choose(scores):
        return top_n(scores, 9)

    alike, unlike = (stability(edges(noise=noise), choose, draws=20) for noise in (0.0, 20.0))
    assert alike.numbers["jaccard"] == alike.numbers["jaccard_lo"] == alike.numbers["jaccard_to_choice"] == 1
    assert set(alike.shares.values()) == {1.0}
    assert unlike.jaccard < 0.5 < alike.jaccard
    assert unlike.jaccard < unlike.numbers["jaccard_to_choice"], "the choice on all prompts is nearer to each than they are to each other"


def test_chance_is_what_random_choices_share():
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(1000)[:size] for size in rng.integers(50, 300, size=60)]
    found = likeness(drawn, drawn[0], 1000)
    assert found["jaccard"] == pytest.approx(found["jaccard_chance"], rel=0.03)


def test_the_bar_is_for_a_hundred_prompts():
    def choose(scores):
        return top_n(scores, 9)

    few, many, wild = (stability(edges(n, noise), choose, draws=5) for n, noise in ((99, 0.1), (100, 0.1), (100, 30.0)))
    assert (few.reaches_bar, many.reaches_bar, wild.reaches_bar) == (None, True, False)
    assert "the bar of .8 asks for 100" in repr(few)
    assert "the bar of .8 is reached" in repr(many)
    assert "the bar of .8 is not reached" in repr(wild)
    assert sentence(many.record()) in many.choice.summary()


def test_several_choices_share_their_resamples():
    scores = edges()
    both = stabilities(scores, {n: lambda one, n=n: top_n(one, n) for n in (5, 9)}, draws=10, seed=1)
    for n in (5, 9):
        alone = stability(scores, lambda one, n=n: top_n(one, n), draws=10, seed=1)
        assert both[n].numbers == alone.numbers
        assert both[n].shares == alone.shares


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_consistent_edges_are_those_of_enough_resamples(share):
    scores = edges(noise=3.0)

    def choose(one, **about):
        return top_n(one, 9, prune=False, **about)

    _, chosen = literal(scores, choose, 20, 5)
    counts = {name: sum(name in one for one in chosen) for name in SMALL.names(SMALL.allowed)}
    found = consistent(scores, choose, share=share, draws=20, seed=5, prune=False)
    assert set(found.edge_names) == {name for name, count in counts.items() if count >= share * 20 - 1e-9}
    assert found.provenance["how"] == f"in at least {share:.0%} of 20 resamples: top 9 by |effect|"
    np.testing.assert_array_equal(found.scores, choose(scores).scores)
    pruned = consistent(scores, choose, share=share, draws=20, seed=5)
    assert pruned.equals(found.pruned())
    assert "stability" not in found.provenance, "which is that of another choice"


def test_by_position_every_position_of_an_edge_is_a_part():
    scores = edges(noise=2.0, n_pos=3)
    found = stability(scores, lambda one: top_n(one, 20, prune=False), draws=10)
    assert set(found.table()) == {"edge", "pos", "share", "chosen"}
    assert found.table()["chosen"].sum() == 20
    assert found.numbers["jaccard_chance"] == pytest.approx(20 * 20 / 3 / SMALL.n_edges / (40 - 20 * 20 / 3 / SMALL.n_edges))


def test_a_map_of_nodes_is_chosen_from_by_a_mask():
    values = np.random.default_rng(0).normal(size=(10, 3, 4))
    scores = make_map({"z": values})

    def largest(one):
        size = np.abs(one.mean("z").to_numpy())
        return size >= np.sort(size.ravel())[-5]

    found = stability(scores, largest, draws=30, seed=2)
    chosen = [set(np.argsort(-np.abs(values[rows].mean(0)).ravel())[:5].tolist()) for rows in np.random.default_rng(2).integers(10, size=(30, 10))]
    assert found.jaccard == pytest.approx(np.mean([index(one, other) for one, other in combinations(chosen, 2)]))
    kept = consistent(scores, largest, share=0.6, draws=30, seed=2)
    assert set(np.flatnonzero(kept).tolist()) == {cell for cell in range(12) if sum(cell in one for one in chosen) >= 18}


def test_circuits_of_nodes_are_measured_over_all_their_sites(tmp_path):
    rng = np.random.default_rng(4)
    values = {"z": rng.normal(size=(10, 3, 4)), "mlp_out[layer]": rng.normal(size=(10, 3))}
    scores = make_map(values)

    def choose(one):
        return top_n(one, 5)

    found = stability(scores, choose, draws=30, seed=2)
    names = [f"L{layer}.H{head}.z" for layer in range(3) for head in range(4)] + [f"L{layer}.mlp_out" for layer in range(3)]
    flat = np.concatenate([one.reshape(10, -1) for one in values.values()], axis=1)
    draws = np.random.default_rng(2).integers(10, size=(30, 10))
    chosen = [{names[i] for i in np.argsort(-np.abs(flat[rows].mean(0)))[:5]} for rows in draws]
    assert found.jaccard == pytest.approx(np.mean([index(one, other) for one, other in combinations(chosen, 2)]))
    assert found.numbers["jaccard_chance"] == pytest.approx((25 / 15) / (10 - 25 / 15))
    table = found.table().set_index("node")
    assert dict(table["share"]) == pytest.approx({name: np.mean([name in one for one in chosen]) for name in set.union(*chosen)})
    assert set(table.index[table["chosen"]]) == set(choose(scores).nodes)
    kept = consistent(scores, choose, share=0.5, draws=30, seed=2)
    assert set(kept.nodes) == {name for name in names if sum(name in one for one in chosen) >= 15}
    means = dict(zip(names, flat.mean(0), strict=True))
    assert dict(zip(kept.table()["node"], kept.table()["score"], strict=True)) == pytest.approx({name: means[name] for name in kept.nodes}, rel=1e-6)
    assert "Stability: Jaccard" in found.choice.summary()
    assert "stability" not in (~found.choice).provenance
    write(found.choice, tmp_path / "n.json")
    assert read(tmp_path / "n.json").provenance["stability"] == pytest.approx(found.record())


def test_what_cannot_be_measured_is_refused():
    scores = edges()
    with pytest.raises(CircuitError, match="at least 2 of each; got 100 resamples and 1 prompts"):
        stability(edges(1), lambda one: top_n(one, 5))
    with pytest.raises(CircuitError, match="at least 2 of each; got 1 resamples"):
        stability(scores, lambda one: top_n(one, 5), draws=1)
    with pytest.raises(CircuitError, match="nothing is chosen on all prompts"):
        stability(scores, lambda one: threshold(one, 1e9), draws=3)
    with pytest.raises(CircuitError, match="a circuit, or a bool array over cells; got list"):
        stability(scores, lambda one: [1], draws=3)
    with pytest.raises(CircuitError, match="a bool array over cells; got an array of float64"):
        stability(scores, lambda one: np.ones(3), draws=3)
    for share in (0, 1.1):
        with pytest.raises(CircuitError, match="above 0 and at most 1; got"):
            consistent(scores, lambda one: top_n(one, 5), share=share, draws=3)


def test_files_keep_it_and_what_changes_the_circuit_drops_it(tmp_path):
    circuit = stability(edges(), lambda one: top_n(one, 12, prune=False), draws=10).choice
    for name in ("c.json", "c.pt"):
        write(circuit, tmp_path / name)
        again = read(tmp_path / name)
        assert again.provenance["stability"] == pytest.approx(circuit.provenance["stability"], nan_ok=True)
    assert json.loads((tmp_path / "c.json").read_text())["patchlab"]["provenance"]["stability"]["prompts"] == 12
    assert "stability" not in (circuit | Circuit.full(SMALL)).provenance
    assert "stability" not in (~circuit).provenance
    assert circuit.pruned().n_edges < circuit.n_edges
    assert "stability" not in circuit.pruned().provenance
    assert "stability" in stability(edges(), lambda one: top_n(one, 12), draws=4).choice.pruned().provenance


@pytest.fixture(scope="module")
def measured():
    model, sets = model_of("gpt2", torch.float64), three_sets(gap_task(16))
    scores = scores_of(pl.AttributionPatching(), model, sets.choosing, "edges", "noising")
    return {
        "curve": faithfulness_curve(model, {"a": scores}, sets.finding, sizes=[0, 20, 60], random=1, stability=12, n_boot=20, progress=False),
        "found": smallest_faithful(model, {"a": scores}, sets.finding, sets.reporting, stability=12, n_boot=20, progress=False),
        "scores": scores,
    }


def test_curves_have_it_per_method_and_size(measured, tmp_path):
    curve, scores = measured["curve"], measured["scores"]
    rows = curve.table.set_index(["method", "n_requested"])
    for n in (20, 60):
        alone = stability(scores, lambda one, n=n: top_n(one, n), draws=12)
        assert {name: rows.loc[("a", n), name] for name in NUMBERS} == pytest.approx(alone.numbers)
    assert rows.loc[("a", 0), "jaccard":].isna().all(), "nothing is chosen"
    assert rows.loc["random", "jaccard":].isna().all().all()
    assert "stability" in curve.circuits["a"][1].provenance
    assert curve.provenance["stability"] == {"draws": 12, "seed": 0, "prompts": {"a": scores.data.sizes["example"]}}
    assert curve.provenance["versions"] == scores.provenance["versions"]
    curve.save(tmp_path / "curve.json")
    again = FaithfulnessCurve.load(tmp_path / "curve.json")
    assert again.table["jaccard"].tolist() == pytest.approx(curve.table["jaccard"].tolist(), nan_ok=True)
    data = _prepare_stability(again)
    assert [line.method for line in data.lines] == ["a"]
    assert data.lines[0].n_requested.tolist() == [20, 60]
    assert data.lines[0].value.tolist() == [rows.loc[("a", n), "jaccard"] for n in (20, 60)]
    assert data.total == scores.graph.n_edges
    assert "12 resamples" in data.subtitle
    figure = plots.stability(again)
    assert any(trace.name == "a" and list(trace.y) == data.lines[0].value.tolist() for trace in figure.data)
    assert "Jaccard between resamples" in str(plots.faithfulness(again).data)


@pytest.mark.parametrize("sizes", [{"sizes": [0, 2, 5]}, {"thresholds": [0.02, 1e9]}], ids=str)
def test_curves_of_nodes_have_it_too(sizes):
    model, sets = model_of("gpt2", torch.float64), three_sets(gap_task(16))
    scores = scores_of(pl.AttributionPatching(), model, sets.choosing, ["z", "mlp_out"], "noising")
    curve = faithfulness_curve(
        model, {"a": scores}, sets.finding, **sizes, ablation="resample", random=1, stability=12, seed=2, n_boot=20, progress=False
    )
    own = curve.table[curve.table["method"] == "a"]
    some = own[own["n_nodes"] > 0]
    assert 1 <= len(some) < len(own), "one has no nodes"
    for row in some.to_dict("records"):
        choose = {
            "sizes": lambda one, row=row: top_n(one, int(row["n_nodes"]), sites=["z", "mlp_out"]),
            "thresholds": lambda one: threshold(one, 0.02, sites=["z", "mlp_out"]),
        }
        alone = stability(scores, choose[next(iter(sizes))], draws=12, seed=2)
        assert {name: row[name] for name in NUMBERS} == pytest.approx(alone.numbers)
        assert row["jaccard"] < 1 or row["n_nodes"] == scores.mean("z").size, "resamples differ"
    assert curve.table.loc[(curve.table["method"] != "a") | (curve.table["n_nodes"] == 0), "jaccard"].isna().all()
    assert [("stability" in one.provenance) for one in curve.circuits["a"]] == [one.n_nodes > 0 for one in curve.circuits["a"]]
    data = _prepare_stability(curve)
    assert data.unit == "nodes"
    assert all("nodes (" in text for text in data.lines[0].hover)


def test_without_it_the_figure_says_how_to_get_it(measured):
    curve = measured["curve"]
    bare = FaithfulnessCurve(curve.table.drop(columns=list(NUMBERS)), curve.areas, {}, curve.provenance)
    with pytest.raises(CircuitError, match=r"stability=100"):
        plots.stability(bare)


def test_areas_and_sizes_are_always_told_together(measured):
    curve = measured["curve"]
    [line] = [line for line in repr(curve).splitlines() if line.strip().startswith("a:")]
    assert "CPR" in line
    assert "CMD" in line
    assert line.count("[") == 2
    assert "f ≥ 0.9" in line
    assert "not MIB's; CPR has no upper bound and rewards f above 1" in areas_note(curve)
    assert areas_note(curve) in repr(curve)


def test_the_smallest_circuit_has_it(measured):
    found, scores = measured["found"], measured["scores"]
    row = found.table.iloc[0]
    if "a" not in found.circuits or np.isnan(row["jaccard"]):
        pytest.fail("the toy has a faithful circuit")
    n = int(row["n_requested"])
    assert {name: row[name] for name in NUMBERS} == pytest.approx(stability(scores, lambda one: top_n(one, n), draws=12).numbers)
    assert found.circuits["a"].provenance["stability"]["jaccard"] == row["jaccard"]
