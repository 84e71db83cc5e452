"""ACDC against the loop over single edges that it stands for."""

import numpy as np
import pytest
import torch
from families import model_of, swap_task

import patchlab as pl
from patchlab.circuits import Circuit, acdc, evaluate
from patchlab.circuits.evaluation.runner import Runner, full_divergence
from patchlab.errors import CircuitError
from patchlab.tasks.task import Task


def one_by_one(model: pl.Model, task: Task, tau: float, ablation: str = "resample") -> tuple[np.ndarray, int]:
    """Algorithm 1 of Conmy et al., one run per edge; the edges that stay, and the number of runs."""
    graph = model.arch.graph
    kept = graph.allowed.copy()
    runner = Runner.of(model, task, ablation)

    def measure() -> float:
        return float(runner.metric([Circuit(graph, kept)]).metric[0].mean())

    value, runs = measure(), 1
    for reader in range(len(graph.readers) - 1, -1, -1):
        for writer in range(len(graph.writers) - 1, -1, -1):
            if not kept[writer, reader]:
                continue
            kept[writer, reader] = False
            after = measure()
            runs += 1
            if value - after < tau:
                value = after
            else:
                kept[writer, reader] = True
    return kept, runs


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ablation"), [("gpt2", "resample"), ("neox", "resample"), ("qwen2", "mean"), ("gpt2", "zero")])
def test_equals_the_loop_over_single_edges(family: str, ablation: str) -> None:
    model, task = model_of(family, torch.float64, 2), swap_task(2)
    taus = [0.003, 0.3]
    found = acdc(model, task, taus, ablation=ablation, prune=False, progress=False)
    divergence = task.with_metric(full_divergence("answer"))
    sizes = []
    for tau in taus:
        expected, runs = one_by_one(model, divergence, tau, ablation)
        np.testing.assert_array_equal(found[tau].edges, expected)
        about = found[tau].provenance
        assert about["forwards"] < runs
        sizes.append(found[tau].n_edges)
    assert model.arch.graph.n_edges > sizes[0] > sizes[1]
    assert found[0.3].provenance["skipped"] > 0


@pytest.mark.slow
def test_by_the_metric_of_the_task() -> None:
    model, task = model_of("gpt2", torch.float64, 2), swap_task(3)
    found = acdc(model, task, 0.05, measure="metric", prune=False, progress=False)[0.05]
    np.testing.assert_array_equal(found.edges, one_by_one(model, task, 0.05)[0])
    assert found.provenance["how"] == "ACDC with tau 0.05 by metric"
    assert (found.provenance["metric"], found.provenance["metric_unit"]) == ("logit_diff", "logits")
    by_kl = acdc(model, task, 0.05, progress=False)[0.05].provenance
    assert (by_kl["metric"], by_kl["metric_unit"]) == ("neg_kl_to_full", "nats"), "what its scores are effects on"


def test_effects_are_those_of_the_trials() -> None:
    """What stayed was missed by tau at least; the first trial is the exact effect of its edge."""
    model, task = model_of("gpt2", torch.float64, 2), swap_task(3)
    circuit = acdc(model, task, 0.02, measure="metric", prune=False, progress=False)[0.02]
    scores = np.asarray(circuit.scores)
    assert not np.isnan(scores[circuit.graph.allowed]).any()
    assert (scores[circuit.edges] <= -0.02).all()
    assert (scores[~circuit.edges & circuit.graph.allowed] > -0.02).all()
    first = f"{circuit.graph.writers[-1]}->logits"
    without = Circuit.full(circuit.graph) - Circuit.of(circuit.graph, [first])
    values = Runner.of(model, task, "resample").metric([Circuit.full(circuit.graph), without]).metric.mean(1)
    assert scores[circuit.graph.edge(first)] == pytest.approx(values[1] - values[0])


@pytest.mark.slow
def test_pruned_by_default_and_fit_for_evaluation(demo_gpt2_4l) -> None:
    task = pl.load_task("ioi", demo_gpt2_4l, n=6, seed=0)
    loose, tight = acdc(demo_gpt2_4l, task, [0.5, 0.05], progress=False).values()
    assert loose.equals(loose.pruned())
    assert 0 < loose.n_edges < tight.n_edges < 200
    held_out = pl.load_task("ioi", demo_gpt2_4l, n=6, seed=1)
    assert evaluate(demo_gpt2_4l, tight, held_out, progress=False).faithfulness() > 0.6
    with pytest.raises(CircuitError, match="comes from 6 of the 6 examples"):
        evaluate(demo_gpt2_4l, tight, task, progress=False)


def test_refuses_what_makes_no_sense() -> None:
    model, task = model_of("gpt2"), swap_task(2)
    for taus in ([], 0.0, [0.1, -1.0], float("inf")):
        with pytest.raises(CircuitError, match="ACDC needs thresholds above 0"):
            acdc(model, task, taus, progress=False)
    with pytest.raises(CircuitError, match="unknown measure 'loss'"):
        acdc(model, task, 0.1, measure="loss", progress=False)
    with pytest.raises(CircuitError, match="optimal ablation would be fitted anew"):
        acdc(model, task, 0.1, ablation="optimal", progress=False)
    with pytest.raises(CircuitError, match="unknown ablation 'none'"):
        acdc(model, task, 0.1, ablation="none", progress=False)
