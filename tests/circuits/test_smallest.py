"""The smallest faithful circuit: the grid of sizes, three sets of pairs, and the interval of a size, against resampling by hand."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import gap_task, model_of, scores_of

import patchlab as pl
from patchlab.circuits import evaluate, size_grid, smallest_faithful, three_sets, top_n
from patchlab.errors import CircuitError

METHODS = {"AtP": pl.AttributionPatching(), "RelP": pl.RelevancePatching()}


@pytest.fixture(scope="module")
def setting():
    model = model_of("gpt2", torch.float64)
    sets = three_sets(gap_task(16))
    return model, sets, {name: scores_of(method, model, sets.choosing, "edges", "noising") for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def found(setting):
    model, sets, maps = setting
    return smallest_faithful(model, maps, sets.finding, sets.reporting, n_boot=50, seed=3, progress=False)


# sets


def test_three_sets_share_no_pair_and_the_first_is_that_of_split():
    task = gap_task(16)
    sets = three_sets(task, seed=5)
    parts = [set(part.pair_fingerprints) for part in (sets.choosing, sets.finding, sets.reporting)]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert set.union(*parts) == set(task.pair_fingerprints)
    assert sets.choosing.pair_fingerprints == task.split(seed=5)[0].pair_fingerprints
    assert sets.as_dict()["finding"] == {"n": 4, "pairs": list(sets.finding.pair_fingerprints)}
    assert repr(sets) == "8 pairs for choosing, 4 for finding the size, 4 for reporting"
    assert three_sets(task, seed=6).choosing.pair_fingerprints != sets.choosing.pair_fingerprints


def test_too_few_pairs_for_three_sets_are_an_error_and_repeated_ones_do_not_count():
    task = gap_task(16)
    assert [len(part) for part in vars(three_sets(task.select(range(8)))).values()] == [4, 2, 2]
    few = task.select(range(7))
    repeated = replace(few, pairs=few.pairs * 3)
    uneven = replace(task, pairs=task.pairs[:8] + task.pairs[:1] * 24)
    for one, distinct in ((few, 7), (repeated, 7), (task.select([0]), 1), (uneven, 8)):
        with pytest.raises(CircuitError, match=rf"with {len(one)} pairs, {distinct} of them distinct, into three sets.*Use at least 8"):
            three_sets(one)


# grid


def test_sizes_go_from_one_edge_to_all_in_steps_of_a_tenth_or_one_edge(setting):
    model, _, maps = setting
    sizes = size_grid(maps)
    assert (sizes[0], sizes[-1]) == (1, model.arch.graph.n_edges)
    assert all(b == a + 1 or 10 * b <= 11 * a for a, b in pairwise(sizes))
    assert all(b > a for a, b in pairwise(sizes))


def test_a_method_that_does_not_score_all_edges_ends_the_grid_of_all(setting):
    model, sets, maps = setting
    part = scores_of(pl.methods.get_method("relp-ah"), model, sets.choosing, "edges", "noising")
    scored = int(np.isfinite(part.mean("edges").to_numpy()[model.arch.graph.allowed]).sum())
    assert scored < model.arch.graph.n_edges
    assert size_grid({**maps, "relp-ah": part})[-2:] == [scored, model.arch.graph.n_edges]
    by_position = scores_of(pl.AttributionPatching(), model, sets.choosing, "edges[writer,reader,pos]", "noising")
    assert size_grid(by_position)[-1] == by_position.data.sizes["pos"] * model.arch.graph.n_edges
    for wrong in ({**maps, "pos": by_position}, {}):
        with pytest.raises(CircuitError, match="one graph and one granularity"):
            size_grid(wrong)


# what is found


def test_size_and_interval_equal_resampling_by_hand(setting, found):
    model, sets, maps = setting
    for name, scores in maps.items():
        circuits = [top_n(scores, n) for n in size_grid(maps)]
        named = {str(i): circuit for i, circuit in enumerate(circuits) if circuit.n_edges}
        whole = evaluate(model, named, sets.finding, completeness=False, progress=False)
        metric = np.stack([whole.metric.get(str(i), whole.metric_empty) for i in range(len(circuits))])

        def smallest(rows, metric=metric, circuits=circuits, whole=whole):
            gap = (whole.metric_full[rows] - whole.metric_empty[rows]).mean()
            best = np.inf
            for values, circuit in zip(metric[::-1], circuits[::-1], strict=True):
                if (values[rows] - whole.metric_empty[rows]).mean() / gap < 0.9:
                    break
                best = circuit.n_edges
            return best

        draws = np.random.default_rng(3).integers(len(sets.finding), size=(50, len(sets.finding)))
        sizes = sorted(smallest(rows) for rows in draws)
        (row,) = (row for row in found.table.to_dict("records") if row["method"] == name)
        assert row["n_edges"] == smallest(np.arange(len(sets.finding)))
        assert (row["n_edges_lo"], row["n_edges_hi"]) == (sizes[1], sizes[48]), "2.5 % of 50 draws, and sizes that were measured"
        assert sizes[1] < sizes[48]
        alone = evaluate(model, found.circuits[name], sets.reporting, n_boot=50, seed=3, progress=False).table.iloc[0]
        assert [row[key] for key in ("faithfulness", "lo", "hi", "metric")] == pytest.approx(
            [alone[k] for k in ("faithfulness", "lo", "hi", "metric")]
        )
        assert row["found_faithfulness"] >= 0.9
        assert found.circuits[name].n_edges == row["n_edges"]
        assert (row["choosing_pairs"], row["finding_pairs"], row["reporting_pairs"]) == (8, 4, 4)


def test_methods_share_their_draws(setting, found):
    model, sets, maps = setting
    twice = smallest_faithful(
        model, {"a": maps["AtP"], "b": maps["RelP"], "c": maps["AtP"]}, sets.finding, sets.reporting, n_boot=50, seed=3, progress=False
    )
    columns = [name for name in twice.table.columns if name != "method"]
    assert twice.table.loc[0, columns].equals(twice.table.loc[2, columns])
    assert twice.table.loc[0, columns].to_list() == found.table.loc[0, columns].to_list()


def test_says_what_was_found_on_which_pairs(found):
    head, *lines = repr(found).splitlines()
    assert head.endswith(f"{found.table['n_sizes'].iloc[0]} sizes; found on 4 pairs, reported on 4 others)")
    row = found.table.iloc[0]
    assert lines[0].startswith(f"  AtP: f ≥ 0.9 from {row['n_edges']:,.0f} edges on (95 % interval {row['n_edges_lo']:,.0f} to ")
    assert lines[0].endswith("there on the reporting pairs")
    nothing = replace(found, table=found.table.assign(n_edges=np.nan))
    assert nothing.sentence("RelP") == "f ≥ 0.9 from no size on"


def test_sets_that_share_pairs_and_levels_without_meaning_are_refused(setting):
    model, sets, maps = setting
    for finding, reporting, what in (
        (sets.finding, sets.finding, "the size comes from 4 of the 4"),
        (sets.choosing, sets.reporting, "the map 'AtP' comes from 8 of the 8"),
        (sets.finding, sets.choosing.select(range(4)), "circuit 'AtP' comes from 4 of the 4"),
    ):
        with pytest.raises(CircuitError, match=what):
            smallest_faithful(model, maps, finding, reporting, progress=False)
    for level in (0, 1.01, float("nan")):
        with pytest.raises(CircuitError, match="the level is a faithfulness above 0"):
            smallest_faithful(model, maps, sets.finding, sets.reporting, level=level, progress=False)


def test_one_map_and_another_level(setting):
    model, sets, maps = setting
    found = smallest_faithful(model, maps["RelP"], sets.finding, sets.reporting, level=0.99, progress=False, how="greedy", by="signed")
    assert found.level == found.table["level"].iloc[0] == 0.99
    assert found.table["method"].tolist() == ["relp"]
    assert (found.curve.provenance["how"], found.curve.provenance["by"]) == ("greedy", "signed")
