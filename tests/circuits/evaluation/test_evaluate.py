"""Evaluating circuits: what is ablated to what, faithfulness and its intervals, selection apart from evaluation, curves over sizes."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import gap_task, mixed_task, model_of, pair, scores_of, swap_task
from routed import literal
from safetensors.torch import load_file

import patchlab as pl
from patchlab.circuits import (
    MIB_FRACTIONS,
    Circuit,
    FaithfulnessCurve,
    OptimalFit,
    evaluate,
    faithfulness_curve,
    greedy,
    random_circuit,
    top_n,
)
from patchlab.circuits.evaluation.ablations import Ablation, ablation_for
from patchlab.circuits.evaluation.runner import Runner
from patchlab.circuits.evaluation.scale import Scale
from patchlab.circuits.heldout import check_disjoint
from patchlab.engine import Program
from patchlab.engine.contributions import contributions
from patchlab.engine.masked import run_circuits
from patchlab.errors import CircuitError, ScoreError, TaskError
from patchlab.graph import Graph
from patchlab.metrics import Metric
from patchlab.tasks.task import Task

MODEL = ("gpt2", torch.float64)


def kl_task(n: int = 3, **options) -> Task:
    """Random pairs whose metric is highest on the clean run, whatever is ablated."""
    return swap_task(n, metric="neg_kl", **options)


def some(share: float = 0.6, seed: int = 0, family: str = "gpt2", positions: int | None = None) -> Circuit:
    graph = model_of(family, torch.float64).arch.graph
    shape = graph.allowed.shape + (() if positions is None else (positions,))
    draw = np.random.default_rng(seed).random(shape) < share
    return Circuit(graph, draw & (graph.allowed if positions is None else graph.allowed[:, :, None]))


def measured(
    circuit: Circuit | dict[str, Circuit], task: Task, ablation: str = "resample", family: str = "gpt2", **options
) -> pl.circuits.Evaluation:
    return evaluate(model_of(family, torch.float64), circuit, task, ablation=ablation, progress=False, **options)


def by_hand(circuit: Circuit, task: Task, ablated: torch.Tensor | None = None, family: str = "gpt2") -> np.ndarray:
    """Metric per example, one example at a time, by the literal twin of routing."""
    model, values = model_of(family, torch.float64), np.zeros(len(task))
    for batch in task.batches(1):
        own = contributions(model, batch.corrupted).values if ablated is None else ablated
        keep = torch.as_tensor(circuit.edges.copy())
        keep = keep[:, :, None].expand(-1, -1, batch.clean.shape[1]) if keep.ndim == 2 else keep
        logits = literal(model, batch.clean, own.expand(-1, 1, batch.clean.shape[1], -1), keep)
        values[int(batch.examples)] = float(task.metric(logits, Runner.of(model, task, "zero").program(batch).answers))
    return values


@pytest.mark.slow
def test_evaluation_equals_definitions_worked_out_by_hand() -> None:
    task, circuit = gap_task(4), some()
    result = measured(circuit, task)
    own, rest = by_hand(circuit, task), by_hand(~circuit, task)
    full, empty = by_hand(Circuit.full(circuit.graph), task), by_hand(Circuit.empty(circuit.graph), task)
    np.testing.assert_allclose(result.metric["circuit"], own, atol=1e-10)
    np.testing.assert_allclose(result.metric_full, full, atol=1e-10)
    np.testing.assert_allclose(result.metric_empty, empty, atol=1e-10)
    gap = full.mean() - empty.mean()
    (row,) = result.table.to_dict("records")
    assert row["faithfulness"] == pytest.approx((own.mean() - empty.mean()) / gap)
    assert row["completeness"] == pytest.approx((rest.mean() - empty.mean()) / gap)
    assert row["metric"] == pytest.approx(own.mean())
    assert (row["n_edges"], row["n_nodes"]) == (circuit.n_edges, len(circuit.nodes))
    assert row["lo"] <= row["faithfulness"] <= row["hi"]
    assert result.faithfulness() == row["faithfulness"] == result.faithfulness("circuit")
    long = result.to_dataframe()
    assert list(long.columns) == ["circuit", "example", "metric", "metric_full", "metric_empty"]
    assert len(long) == 4
    assert repr(result).startswith("Evaluation(gpt2 × swap[4], logit_diff, resample ablation)\n  circuit: ")
    with pytest.raises(ValueError, match="read-only"):
        result.metric_full[0] = 0.0


def test_whole_graph_is_faithful_and_its_complement_is_empty() -> None:
    graph = model_of(*MODEL).arch.graph
    (row,) = measured(Circuit.full(graph), gap_task()).table.to_dict("records")
    assert row["faithfulness"] == pytest.approx(1)
    assert row["completeness"] == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_results_depend_neither_on_batches_nor_on_mixed_lengths(batch_size: int | None) -> None:
    task, circuit = gap_task(task=mixed_task()), some()
    result = measured(circuit, task, batch_size=batch_size, max_memory=1)
    np.testing.assert_allclose(result.metric["circuit"], by_hand(circuit, task), atol=1e-10)


def test_metrics_that_compare_with_the_clean_run() -> None:
    task = kl_task()
    result = measured(some(), task)
    np.testing.assert_allclose(result.metric_full, 0, atol=1e-12)
    assert (result.metric_empty < -1e-3).all()
    assert (result.metric["circuit"] < 0).all()


def test_several_circuits_by_name_and_equal_ones() -> None:
    task = gap_task()
    result = evaluate(model_of(*MODEL), {"a": some(seed=0), "b": some(seed=1), "c": some(seed=0)}, task, progress=False, completeness=False)
    assert result.table["circuit"].tolist() == ["a", "b", "c"]
    assert np.isnan(result.table["completeness"]).all()
    assert result.faithfulness("a") == result.faithfulness("c") != result.faithfulness("b")
    np.testing.assert_allclose(result.metric["b"], by_hand(some(seed=1), task), atol=1e-10)
    with pytest.raises(CircuitError, match="unknown circuit 'd'; .*Valid: a, b, c"):
        result.faithfulness("d")
    with pytest.raises(CircuitError, match="unknown circuit None"):
        result.faithfulness()


@pytest.mark.parametrize("part", ["edge", "node"])
def test_minimality_is_what_is_lost_without_a_part(part: str) -> None:
    graph = model_of(*MODEL).arch.graph
    circuit = Circuit.of(graph, ["input->a0.h1<v>", "a0.h1->m1", "m1->a2.h0<q>", "a2.h0->logits", "m1->logits", "input->a2.h0<v>"])
    task = gap_task()
    result = measured(circuit, task, minimality=part)
    found = result.minimality.set_index("part")
    expected = circuit.edge_names if part == "edge" else ["a0.h1", "m1", "a2.h0"]
    assert found.index.tolist() == expected
    for name in expected:
        kept = [edge for edge in circuit.edge_names if edge != name and name not in edge.replace("<", "->").split("->")]
        lost = result.faithfulness() - measured(Circuit.of(graph, kept), task).faithfulness()
        assert found.loc[name, "minimality"] == pytest.approx(lost, abs=1e-12)
        assert found.loc[name, "lo"] <= found.loc[name, "minimality"] <= found.loc[name, "hi"]
    assert measured(circuit, task).minimality.empty


class TestAblations:
    def test_zero(self) -> None:
        task = kl_task(3)
        model = model_of(*MODEL)
        zeros = torch.zeros_like(contributions(model, task.batches()[0].corrupted).values[:, :1])
        np.testing.assert_allclose(measured(some(), task, "zero").metric["circuit"], by_hand(some(), task, zeros), atol=1e-10)

    def test_mean_is_over_examples_and_positions_and_never_over_writers(self) -> None:
        task, model = mixed_task("neg_kl"), model_of(*MODEL)
        rows = [contributions(model, batch.corrupted).values[:, 0] for batch in task.batches(1)]  # each [writer, pos, d]
        mean = torch.cat(rows, 1).mean(1)
        got = ablation_for(model, task, "mean").constants.values
        torch.testing.assert_close(got[:, 0, 0], mean, atol=1e-12, rtol=0)
        assert torch.pdist(got[:, 0, 0]).min() > 1e-3, "each writer has a mean of its own"
        np.testing.assert_allclose(measured(some(), task, "mean").metric["circuit"], by_hand(some(), task, got), atol=1e-10)

    def test_positional_mean_is_over_examples_only(self) -> None:
        task, model = kl_task(4), model_of(*MODEL)
        rows = torch.stack([contributions(model, batch.corrupted).values[:, 0] for batch in task.batches(1)])
        got = ablation_for(model, task, "mean_positional").constants.values
        torch.testing.assert_close(got[:, 0], rows.mean(0), atol=1e-12, rtol=0)
        np.testing.assert_allclose(measured(some(), task, "mean_positional").metric["circuit"], by_hand(some(), task, got), atol=1e-10)

    def test_means_come_from_the_training_examples(self) -> None:
        task, train = kl_task(3), kl_task(5, seed=50)
        got = ablation_for(model_of(*MODEL), task, "mean", train=train).constants.values
        torch.testing.assert_close(got, ablation_for(model_of(*MODEL), train, "mean").constants.values)
        result = measured(some(), task, "mean", train=train)
        assert result.provenance["ablation_examples"] == "swap[5]"
        assert "examples and positions" in result.provenance["ablation_is"]
        np.testing.assert_allclose(result.metric["circuit"], by_hand(some(), task, got), atol=1e-10)

    @pytest.mark.slow
    def test_optimal_constants_come_closer_to_the_full_model_than_means(self) -> None:
        train = kl_task(4, seed=50)  # with the divergence itself as the metric
        circuits = {"a": some(0.8), "b": some(0.7, seed=1)}
        options = {"train": train, "progress": False, "completeness": False, "allow_overlap": True}
        model = model_of(*MODEL)
        fitted = evaluate(model, circuits, train, ablation="optimal", fit=OptimalFit(steps=25), **options)
        means = evaluate(model, circuits, train, ablation="mean", **options)
        losses = fitted.provenance["optimal_losses"]
        assert set(losses) == {"no edges", "a", "b"}
        for name in circuits:
            assert -fitted.metric[name].mean() == pytest.approx(losses[name]["final"], rel=1e-6)
            assert -means.metric[name].mean() == pytest.approx(losses[name]["at_mean"], rel=1e-6)
            assert losses[name]["final"] < 0.7 * losses[name]["at_mean"]
        assert fitted.provenance["optimal_fit"] == {"steps": 25, "lr": 0.1}
        assert fitted.provenance["ablation_examples"] == "swap[4]"
        short = evaluate(model, circuits["a"], train, ablation="optimal", fit=OptimalFit(steps=8, lr=0.3), **options)
        assert short.provenance["optimal_losses"]["circuit"]["still_falling"]
        assert "circuit were still improving after 8 steps; raise OptimalFit.steps." in repr(short)
        assert "still improving" not in repr(means)
        # where steps are so large that the last one is not the best, the best one counts
        wild = evaluate(model, circuits["a"], train, ablation="optimal", fit=OptimalFit(steps=6, lr=3.0), **options)
        ends = wild.provenance["optimal_losses"]["circuit"]
        assert -wild.metric["circuit"].mean() == pytest.approx(ends["final"], rel=1e-6)
        assert ends["final"] <= ends["at_mean"] == pytest.approx(losses["a"]["at_mean"])
        alone = evaluate(model, circuits["b"], train, ablation="optimal", fit=OptimalFit(steps=25), max_memory=1, **options)
        np.testing.assert_allclose(alone.metric["circuit"], fitted.metric["b"], rtol=1e-5)

    @pytest.mark.parametrize("family", ["gemma2", "neox"])
    def test_optimal_on_other_architectures_and_positions(self, family: str) -> None:
        task, train = kl_task(3), kl_task(4, seed=50)
        circuit = some(0.8, family=family, positions=5)
        result = measured(circuit, task, "optimal", family, train=train, fit=OptimalFit(steps=3), completeness=False)
        losses = result.provenance["optimal_losses"]["circuit"]
        assert losses["final"] < losses["at_mean"]
        assert result.provenance.get("post_norm") == ("renormalised" if family == "gemma2" else None)

    def test_refuses_what_does_not_fit(self) -> None:
        task = kl_task(3)
        with pytest.raises(CircuitError, match="unknown ablation 'resmaple'; did you mean 'resample'"):
            measured(some(), task, "resmaple")
        with pytest.raises(CircuitError, match="optimal ablation fits its constants on examples of their own; pass train="):
            measured(some(), task, "optimal")
        with pytest.raises(CircuitError, match="train= comes from 3 of the 3 examples"):
            measured(some(), task, "optimal", train=task)
        with pytest.raises(CircuitError, match=r"positional means need prompts of one length.*swap has \[6\] tokens and swap \[5\]"):
            measured(some(), task, "mean_positional", train=kl_task(3, length=6))
        with pytest.raises(CircuitError, match=r"mixed has \[5, 6\] tokens"):
            measured(some(), mixed_task(), "mean_positional")
        templates = Task("two", (pair(5, (1,), 1, template="x"), pair(5, (1,), 2, template="y")), task.metric)
        with pytest.raises(CircuitError, match="examples of one template with its roles at the same positions; two has several"):
            measured(some(), templates, "mean_positional")
        with pytest.raises(CircuitError, match="fit= is the budget of optimal ablation, and 'zero' fits nothing; leave it out"):
            measured(some(), task, "zero", fit=OptimalFit())
        for steps, lr in ((0, 0.1), (5, 0.0)):
            with pytest.raises(CircuitError, match="at least one step and a positive learning rate"):
                OptimalFit(steps, lr)
        with pytest.raises(CircuitError, match="fitted on training examples"):
            Ablation("optimal")


class TestPositions:
    def test_kept_at_all_positions_is_kept(self) -> None:
        task, flat = gap_task(), some()
        wide = Circuit(flat.graph, np.repeat(flat.edges[:, :, None], 5, axis=2))
        np.testing.assert_allclose(measured(wide, task).metric["circuit"], measured(flat, task).metric["circuit"], atol=1e-12)

    def test_aligned_positions(self) -> None:
        task, circuit = kl_task(2), some(positions=5)
        np.testing.assert_allclose(measured(circuit, task).metric["circuit"], by_hand(circuit, task), atol=1e-10)

    def test_named_positions_lie_elsewhere_in_every_example(self) -> None:
        task = mixed_task("neg_kl")
        names = ["A", "B", "END"]
        circuit = some(positions=3)
        circuit = Circuit(circuit.graph, circuit.edges, None, {"positions": names})
        got = measured(circuit, task, completeness=False).metric["circuit"]
        for e, one in enumerate(task.pairs):
            edges = np.zeros((*circuit.graph.allowed.shape, len(one)), dtype=bool)
            for i, name in enumerate(names):
                edges[:, :, one.positions[name]] |= circuit.edges[:, :, i]
            alone = by_hand(Circuit(circuit.graph, edges), task.select([e]))
            assert got[e] == pytest.approx(float(alone[0]), abs=1e-10)

    def test_mixed_with_circuits_without_positions(self) -> None:
        for task, positions in ((kl_task(2), 5), (mixed_task("neg_kl"), 3)):
            both = {"flat": some(), "wide": some(positions=positions)}
            result = evaluate(model_of(*MODEL), both, task, progress=False)
            np.testing.assert_allclose(result.metric["flat"], by_hand(some(), task), atol=1e-10)

    def test_positions_of_other_prompts_are_refused(self) -> None:
        with pytest.raises(CircuitError, match=r"circuit 'circuit' has 4 positions \(no names\) and swap 5 \(0, 1, 2, 3, END\)"):
            measured(some(positions=4), swap_task(2))
        named = Circuit(some().graph, some(positions=3).edges, None, {"positions": ["A", "C", "END"]})
        with pytest.raises(CircuitError, match=r"has 3 positions \(A, C, END\) and mixed 3 \(A, B, END\)"):
            measured(named, mixed_task())


def test_intervals_resample_circuit_and_scale_jointly() -> None:
    rng = np.random.default_rng(0)
    full, empty = rng.normal(3, 0.2, 30), rng.normal(0, 0.2, 30)
    scale = Scale(full, empty)
    assert scale.value(full) == 1
    assert np.ptp(scale.resampled(full)) < 1e-9, "the full model has no uncertainty"
    metric = np.stack([full, (full + empty) / 2, empty + 1.0])
    np.testing.assert_allclose(scale.value(metric), [1, 0.5, 1 / (full - empty).mean()])
    draws = scale.resampled(metric)
    assert draws.shape == (1000, 3)
    np.testing.assert_allclose(draws[:, 1], 0.5)
    weights = scale.draws[17]
    assert draws[17, 2] == pytest.approx(1.0 / (weights @ (full - empty)))
    single = Scale(np.array([2.0]), np.array([0.0]))
    assert single.value(np.array([1.0])) == 0.5
    assert single.resampled(np.array([1.0])).size == 0


def test_no_faithfulness_without_a_behaviour() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 20)
    with pytest.raises(ScoreError, match=r"faithfulness is not defined: .* not distinguishable from 0 over 20 examples"):
        Scale(noise, np.zeros(20))
    with pytest.raises(ScoreError, match="one example, no CI"):
        Scale(np.array([1.0]), np.array([1.0]))


def test_metrics_are_there_where_faithfulness_is_not_defined() -> None:
    task = swap_task(4, metric=Metric("flat", lambda logits, answers: 0 * logits.amax(-1) + 0.5))
    result = measured({"some": some(), "all": Circuit.full(some().graph)}, task, minimality="node")
    with pytest.raises(ScoreError, match="faithfulness is not defined: full and fully ablated model differ by 0"):
        result.faithfulness("some")
    assert result.metric["some"].tolist() == result.metric_full.tolist() == [0.5] * 4
    assert len(result.to_dataframe()) == 8
    assert result.table[["faithfulness", "lo", "hi", "completeness"]].isna().all(axis=None)
    assert len(result.minimality)
    assert result.minimality[["minimality", "lo", "hi"]].isna().all(axis=None)
    assert "some: " in repr(result)
    assert "edges, flat 0.500" in repr(result)
    assert "faithfulness is not defined" in repr(result)
    assert json.dumps(result.provenance)


def test_an_empty_circuit_does_not_stop_the_others() -> None:
    task = gap_task(8)
    both = measured({"none": Circuit.empty(some().graph), "some": some()}, task)
    assert both.faithfulness("none") == 0
    assert both.faithfulness("some") == measured(some(), task).faithfulness()
    (note,) = both.provenance["notes"]
    assert note.startswith("circuit 'none' has no edges, so its faithfulness is 0 by definition")
    assert note in repr(both)


def test_circuits_of_another_model_empty_ones_and_none() -> None:
    task = swap_task(2)
    other = Circuit.full(Graph(2, 4, 16))
    with pytest.raises(CircuitError, match=r"circuit 'circuit' belongs to a graph of 2 layers.* and gpt2 to a graph of 3 layers.*n_layers 2 and 3"):
        measured(other, task)
    with pytest.raises(CircuitError, match="circuit 'circuit' has no edges, so its faithfulness is 0 by definition"):
        measured(Circuit.empty(some().graph), task)
    with pytest.raises(CircuitError, match="no circuits to evaluate"):
        evaluate(model_of(*MODEL), {}, task, progress=False)
    with pytest.raises(CircuitError, match="unknown part for minimality 'head'"):
        measured(some(), task, minimality="head")


def test_a_circuit_of_other_weights_is_noticed(demo_gpt2_4l: pl.Model) -> None:
    model, task = demo_gpt2_4l, pl.load_task("ioi", demo_gpt2_4l, n=6)
    circuit = Circuit(model.arch.graph, model.arch.graph.allowed, None, {"model": "mine", "model_fingerprint": "0123"})
    result = evaluate(model, circuit, task, allow_overlap=True, progress=False)
    (note,) = result.provenance["notes"]
    assert note == f"circuit 'circuit' was found on mine with other weights (0123); those of demo-gpt2-4l here are {model.fingerprint}"
    assert note in repr(result)
    own = Circuit(circuit.graph, circuit.edges, None, {"model_fingerprint": model.fingerprint})
    assert evaluate(model, own, task, allow_overlap=True, progress=False).provenance["notes"] == []


class TestHeldOut:
    def test_split_keeps_equal_pairs_together(self) -> None:
        task = swap_task(10)
        twice = replace(task, pairs=task.pairs + task.pairs)
        for seed in range(5):
            first, second = twice.split(seed=seed)
            assert len(first) + len(second) == 20
            assert not set(first.pair_fingerprints) & set(second.pair_fingerprints)
            assert len(first) == 10
        assert len(task.split(0.3)[0]) == 3
        assert task.split(seed=1)[0].pair_fingerprints != task.split(seed=2)[0].pair_fingerprints
        for share in (0, 1):
            with pytest.raises(TaskError, match="a part would be empty"):
                task.split(share)

    def test_scores_and_the_circuits_they_give_remember_their_examples(self) -> None:
        task, model = gap_task(6), model_of(*MODEL)
        select, held_out = task.split()
        scores = scores_of(pl.AttributionPatching(), model, select, "edges", "noising")
        circuit = top_n(scores, 60)
        result = evaluate(model, circuit, held_out, progress=False)
        assert result.provenance["selection"] == {"circuit": "disjoint"}
        with pytest.raises(CircuitError, match=r"circuit 'circuit' comes from 3 of the 6 examples of swap .*task.split\(\)"):
            evaluate(model, circuit, task, progress=False)
        allowed = evaluate(model, circuit, task, progress=False, allow_overlap=True)
        assert allowed.provenance["selection"] == {"circuit": "3 of 6 examples shared"}
        with pytest.raises(CircuitError, match="the map 'AtP' comes from 3 of the 3 examples"):
            faithfulness_curve(model, {"AtP": scores}, select, progress=False)

    def test_what_is_known_without_a_list_of_examples(self) -> None:
        task = swap_task(2)
        assert check_disjoint({}, task, "x", allow_overlap=False) == "not known"
        with pytest.raises(CircuitError, match="2 of the 2"):
            check_disjoint({"task_fingerprint": task.fingerprint}, task, "x", allow_overlap=False)


class TestCurves:
    def curve(self, **options) -> FaithfulnessCurve:
        model = model_of(*MODEL)
        select, held_out = gap_task(12).split()
        scores = scores_of(pl.AttributionPatching(), model, select, "edges", "noising")
        return faithfulness_curve(model, {"AtP": scores}, held_out, progress=False, **options)

    def test_rows_are_evaluations_of_the_circuits(self) -> None:
        curve = self.curve(random=3)
        held_out = gap_task(12).split()[1]
        table = curve.table
        assert table["method"].unique().tolist() == ["AtP", "random"]
        n = model_of(*MODEL).arch.graph.n_edges
        assert table["n_requested"].tolist() == [int(share * n) for share in MIB_FRACTIONS] * 2
        rows = table[table["method"] == "AtP"]
        assert rows["n_edges"].tolist() == [circuit.n_edges for circuit in curve.circuits["AtP"]]
        for i in (6, 8):
            circuit = curve.circuits["AtP"][i]
            assert circuit.equals(top_n(circuit.scores, int(rows["n_requested"].iloc[i]), graph=circuit.graph))
            alone = measured(circuit, held_out)
            (row,) = alone.table.to_dict("records")
            for column in ("faithfulness", "lo", "hi", "metric"):
                assert rows[column].iloc[i] == pytest.approx(row[column], abs=1e-10)
        assert rows["faithfulness"].iloc[0] == 0
        assert table.groupby("method")["faithfulness"].last().to_numpy() == pytest.approx(1)
        assert curve.provenance["selection"] == {"AtP": "disjoint"}
        assert "AtP: CPR" in repr(curve)
        assert "random: CPR" in repr(curve)
        assert "CPR and CMD are over MIB's ten sizes" in repr(curve)
        assert "over the sizes that were given, so they are not MIB's" in repr(self.curve(sizes=[30, 60], random=0))

    @pytest.mark.parametrize("by", ["abs", "signed"])
    def test_other_ways_to_choose(self, by: str) -> None:
        curve = self.curve(how="greedy", by=by, sizes=[30, 60], random=1)
        scores = scores_of(pl.AttributionPatching(), model_of(*MODEL), gap_task(12).split()[0], "edges", "noising")
        for circuit, n in zip(curve.circuits["AtP"], (30, 60), strict=True):
            assert circuit.equals(greedy(scores, n, by=by))
            assert circuit.provenance["how"].startswith(f"greedy {n} by {'|effect|' if by == 'abs' else 'signed'}")
        assert (curve.provenance["how"], curve.provenance["by"]) == ("greedy", by)

    def test_areas_by_hand(self) -> None:
        curve = self.curve(random=0)
        f, x = curve.table["faithfulness"].tolist(), list(MIB_FRACTIONS)
        (area,) = curve.areas.to_dict("records")
        steps = list(pairwise(zip(x, f, strict=True)))
        assert area["cpr"] == pytest.approx(sum((x2 - x1) * (f1 + f2) / 2 for (x1, f1), (x2, f2) in steps))
        assert area["cmd"] == pytest.approx(sum((x2 - x1) * (abs(1 - f1) + abs(1 - f2)) / 2 for (x1, f1), (x2, f2) in steps))
        assert area["cpr_lo"] <= area["cpr"] <= area["cpr_hi"]
        assert area["cmd_lo"] <= area["cmd"] <= area["cmd_hi"]

    def test_random_circuits_are_as_large_before_pruning_and_averaged_over_draws(self) -> None:
        curve = self.curve(sizes=[150, 200], random=2)
        rows = curve.table[curve.table["method"] == "random"]
        graph, held_out = model_of(*MODEL).arch.graph, gap_task(12).split()[1]
        for i, n in enumerate((150, 200)):
            drawn = [random_circuit(graph, n, seed=seed) for seed in (0, 1)]
            assert rows["n_edges"].iloc[i] == np.mean([circuit.n_edges for circuit in drawn])
            results = [measured(circuit, held_out) for circuit in drawn]
            values = [result.faithfulness() for result in results]
            assert rows["faithfulness"].iloc[i] == pytest.approx(np.mean(values))
            assert values[0] != values[1]
            scale = Scale(results[0].metric_full, results[0].metric_empty)
            of_draw = scale.resampled(np.stack([result.metric["circuit"] for result in results]))
            either = np.random.default_rng(0).integers(2, size=(2, 1000))  # two random circuits of the two, for each resample of the examples
            together = of_draw[np.arange(1000)[:, None], either.T].mean(1)
            low, high = np.quantile(together, [0.025, 0.975])
            room = 0.25 * (high - low)
            assert rows["lo"].iloc[i] == pytest.approx(low, abs=room)
            assert rows["hi"].iloc[i] == pytest.approx(high, abs=room)
        small, large = (random_circuit(graph, n, seed=3, prune=False) for n in (20, 90))
        assert (small.n_edges, large.n_edges) == (20, 90)
        assert not (small - large).n_edges
        assert random_circuit(graph, 90, seed=3).equals(large.pruned())
        assert large.scores is None, "what it was drawn by is no effect"
        assert "90 random edges (top_n, seed 3)" in repr(large)
        assert random_circuit(graph, 90, seed=3).provenance["pruned"] > large.provenance.get("pruned", False)
        assert not random_circuit(graph, 90, seed=4, prune=False).equals(large)

    def test_smallest_circuit(self) -> None:
        curve = self.curve(random=1)
        table = curve.table.copy()
        table["faithfulness"] = [0, 0.95, 0.5, 0.92, 0.3, 0.9, 0.4, 0.2, 0.96, 1.0] * 2
        table["n_edges"] = [0.0, 9, 10, 7, 12, 20, 21, 22, 30, 40] * 2
        edited = replace(curve, table=table)
        assert edited.smallest("AtP")["n_edges"] == 30, "7 edges reach it, and 22 do not"
        assert edited.smallest("AtP", 0.97)["n_edges"] == 40
        assert edited.smallest("AtP", 0.0)["n_edges"] == 0
        assert "f ≥ 0.9 from 30 edges on (of the 10 sizes tried; not from 22, the next)" in repr(edited)
        assert edited.smallest("AtP", 1.1) is None
        assert edited.smallest_circuit("AtP", 1.1) is None
        assert edited.smallest_circuit("AtP") is curve.circuits["AtP"][8]
        with pytest.raises(CircuitError, match="unknown method of this curve 'atp'; Valid: AtP, random"):
            curve.smallest("atp")
        with pytest.raises(CircuitError, match="no circuits of 'random'; it has those of: AtP"):
            curve.smallest_circuit("random")

    def test_positions_scored_apart_are_chosen_apart(self) -> None:
        model = model_of(*MODEL)
        select, held_out = gap_task(8).split()
        scores = scores_of(pl.AttributionPatching(), model, select, "edges[writer,reader,pos]", "noising")
        curve = faithfulness_curve(model, scores, held_out, progress=False, random=1)
        total = 5 * model.arch.graph.n_edges
        rows = curve.table[curve.table["method"] != "random"]
        assert rows["n_requested"].tolist() == [int(share * total) for share in MIB_FRACTIONS]
        assert curve.circuits[rows["method"].iloc[0]][7].n_positions == 5
        assert rows["faithfulness"].iloc[-1] == pytest.approx(1)
        assert curve.table["n_requested"].iloc[-1] == model.arch.graph.n_edges

    def test_edges_without_scores_do_not_stand_in_the_way_of_the_whole_graph(self) -> None:
        model = model_of(*MODEL)
        select, held_out = gap_task(8).split()
        scores = scores_of(pl.methods.get_method("relp-ah"), model, select, "edges", "noising")
        curve = faithfulness_curve(model, scores, held_out, progress=False, sizes=[10, model.arch.graph.n_edges], random=0)
        assert curve.table["faithfulness"].iloc[-1] == pytest.approx(1)
        with pytest.raises(CircuitError, match="are scored. Not scored: edges into q"):
            faithfulness_curve(model, scores, held_out, progress=False)

    def test_saved_and_read_again(self, tmp_path) -> None:
        curve = self.curve(sizes=[0, 40], random=1)
        curve.save(tmp_path / "curve.json")
        again = FaithfulnessCurve.load(tmp_path / "curve.json")
        assert again.to_dataframe().equals(curve.table)
        assert again.areas.equals(curve.areas)
        assert again.provenance == curve.provenance
        assert not again.circuits
        with pytest.raises(pl.PatchlabError, match="exists and is not overwritten"):
            curve.save(tmp_path / "curve.json")
        (tmp_path / "broken.json").write_text(json.dumps({"table": 3}))
        record = json.loads((tmp_path / "curve.json").read_text())
        (tmp_path / "columns.json").write_text(json.dumps(record | {"table": {"method": ["x"]}}))
        other = {name: ["x"] * 2 for name in record["areas"]}
        (tmp_path / "methods.json").write_text(json.dumps(record | {"areas": other}))
        for name in ("broken.json", "absent.json", "columns.json", "methods.json"):
            with pytest.raises(CircuitError, match="cannot read the faithfulness curve"):
                FaithfulnessCurve.load(tmp_path / name)

    def test_refuses_what_makes_no_sense(self) -> None:
        n = model_of(*MODEL).arch.graph.n_edges
        for sizes in ([], [5, 5], [9, 3], [-1, 4], [4, n + 1]):
            with pytest.raises(CircuitError, match=f"sizes are whole numbers of edges from 0 to {n}"):
                self.curve(sizes=sizes)
        with pytest.raises(CircuitError, match="unknown way to choose edges 'topn'; did you mean 'top_n'"):
            self.curve(how="topn")
        with pytest.raises(CircuitError, match="unknown way to choose edges"):
            random_circuit(some().graph, 4, how="x")
        with pytest.raises(CircuitError, match="at least one map"):
            faithfulness_curve(model_of(*MODEL), {}, swap_task(2), progress=False)
        scores = scores_of(pl.AttributionPatching(), model_of("gpt2", layers=2), swap_task(4), "edges", "noising")
        with pytest.raises(CircuitError, match="n_layers 2 and 3"):
            faithfulness_curve(model_of(*MODEL), scores, swap_task(4, seed=30), progress=False)


@pytest.mark.parametrize(
    ("name", "task_name"), [("llama-random", "swap1"), ("neox-random", "swap2"), ("trained-gpt2-4l", "ioi"), ("gemma2-random", "swap2")]
)
def test_published_faithfulness(reference_of, name: str, task_name: str) -> None:
    """Selected edges and faithfulness of EAP-IG's circuits, from its own scores."""
    reference_dir = reference_of(name)
    model = pl.load_model(reference_dir / "models" / name)
    task = pl.load_task(reference_dir / "tasks" / f"{name}.{task_name}.jsonl", model)
    stored = load_file(reference_dir / "values" / f"{name}.{task_name}.safetensors")
    names = json.loads((reference_dir / "edge_names.json").read_text())[name]
    listed = json.loads((reference_dir / "manifest.json").read_text())["models"][name]["tasks"][task_name]["circuits"]
    graph = model.arch.graph
    circuits = {one["key"]: Circuit(graph, graph.mask(np.array(names)[stored[one["key"] + ".in_graph"].numpy()])) for one in listed if one["n_kept"]}
    result = evaluate(model, circuits, task, progress=False, completeness=False)
    expected = {one["key"]: one for one in listed}
    for row in result.table.to_dict("records"):
        want = expected[row["circuit"]]
        assert row["n_edges"] == want["n_kept"]
        assert row["faithfulness"] == pytest.approx(want["faithfulness"], abs=1e-4)
        assert row["metric"] == pytest.approx(want["metric"], abs=1e-4)


def test_masks_of_a_batch() -> None:
    """Two names at one token: the edge is kept there if it is kept at either."""
    one = pair(5, (1,), 3, template="x", A=1, B=1)
    other = pair(6, (2,), 4, template="y", A=2, B=4)
    task = Task("meet", (one, other), swap_task(1).metric)
    graph = model_of(*MODEL).arch.graph
    edges = np.zeros((*graph.allowed.shape, 3), dtype=bool)
    edges[0, 0, 0] = True
    keep = Runner.of(model_of(*MODEL), task, "resample").masks([Circuit(graph, edges)], task.batches()[0])
    assert keep[0, 0, 0].tolist() == [[False, True, False, False, False]]
    program = Program(task.batches()[0].clean, task.batches()[0].examples, metric=task.metric, answers=task.batches()[0].answers)
    assert run_circuits(model_of(*MODEL), program, contributions(model_of(*MODEL), task.batches()[0].corrupted), keep).shape == (1, 1)
