"""Runs that start at the first difference, against whole ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, mixed_task, model_of, native_model, pair, scores_of, swap_task
from families import SITES as NAMED_SITES

import patchlab as pl
from patchlab.engine import Program, continues, empty_cache, run, run_rest, session_of
from patchlab.engine.resume import beginning
from patchlab.methods.linearized import LinearizedPatching
from patchlab.methods.method import DIRECTIONS, Method
from patchlab.metrics import METRICS, Metric
from patchlab.tasks.task import Task

SITES = (*NAMED_SITES, "pattern[layer,head,dest,src]")


def sites_of(model: Any) -> tuple[str, ...]:
    return tuple(site for site in SITES if site.split("[")[0] not in model.arch.absent)


def both(monkeypatch: Any, method: Method, model: Any, task: Task, direction: str = "denoising") -> tuple[pl.ScoreMap, pl.ScoreMap]:
    """The scores as they come, and with whole runs."""
    found = scores_of(method, model, task, sites_of(model), direction)
    with monkeypatch.context() as patch:
        patch.setattr(type(method), "resumes", lambda self, setting: False)
        return found, scores_of(method, model, task, sites_of(model), direction)


def assert_equal(found: pl.ScoreMap, whole: pl.ScoreMap, tolerance: float) -> None:
    for site in whole.sites:
        got, expected = (scores.data[site].to_numpy() for scores in (found, whole))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, float(np.nanmax(np.abs(expected), initial=0))), equal_nan=True)
        dead = ~whole.live[site].to_numpy()
        assert not np.nan_to_num(got)[:, dead].any()
    assert np.allclose(found.data.metric_clean, whole.data.metric_clean, atol=1e-5)
    assert np.allclose(found.data.metric_corrupted, whole.data.metric_corrupted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_runs(monkeypatch, family: str, direction: str) -> None:
    model = model_of(family, torch.float64)
    task = swap_task(changed=(2, 3))
    for rules in ("gradient", "attnlrp"):
        found, whole = both(monkeypatch, LinearizedPatching(rules=rules), model, task, direction)
        assert_equal(found, whole, 1e-10)
        # the native model ignores a cache, and is run in the whole
        assert (found.cost.positions < whole.cost.positions) == (family != "native")


@pytest.mark.parametrize("method", [pl.RelevancePatching(), pl.RelevancePatching("relp-ah"), pl.RelevancePatching("gim"), pl.IntegratedGradients(2)])
def test_other_rules_and_paths_in_single_precision(monkeypatch, method: Method) -> None:
    assert_equal(*both(monkeypatch, method, model_of("qwen3"), swap_task(changed=(3,))), 1e-5)


def test_named_positions_several_lengths_and_corrections(monkeypatch) -> None:
    model = model_of("gemma2", torch.float64)
    assert_equal(*both(monkeypatch, pl.AttributionPatching(), model, mixed_task()), 1e-10)
    assert_equal(*both(monkeypatch, LinearizedPatching(qk_fix=True), model, swap_task(changed=(2,))), 1e-10)


def test_the_cost_counts_what_was_run() -> None:
    model, task = model_of("gpt2"), swap_task(changed=(3,))
    rows, length = 3, 5
    assert scores_of(pl.AttributionPatching(), model, task, "z").cost.positions == rows * (length + 2)


@pytest.mark.parametrize(
    ("task", "direction", "method"),
    [
        (swap_task(changed=(0, 3)), "denoising", pl.AttributionPatching()),
        (Task("two", (pair(6, (4,), 1), pair(6, (0,), 2)), METRICS["logit_diff"]), "denoising", pl.AttributionPatching()),
        (
            swap_task(changed=(3,), metric=Metric("all", lambda logits, a: logits.cumsum(1).amax(-1).sum(1), reads="all")),
            "noising",
            pl.AttributionPatching(),
        ),
        (swap_task(changed=(3,), metric="neg_kl"), "noising", pl.IntegratedGradients(1)),
        (swap_task(changed=(3,)), "denoising", pl.AttributionPatching(source="zero")),
    ],
    ids=["first token", "one pair differs at once", "metric reads all positions", "clean run is the reference", "source is not paired"],
)
def test_whole_runs_where_the_beginning_counts(monkeypatch, task: Task, direction: str, method: Method) -> None:
    found, whole = both(monkeypatch, method, model_of("gpt2"), task, direction)
    assert found.cost.positions == whole.cost.positions
    assert_equal(found, whole, 1e-6)


def test_the_clean_run_as_reference_when_it_is_the_source(monkeypatch) -> None:
    found, whole = both(monkeypatch, pl.AttributionPatching(), model_of("llama"), swap_task(changed=(3,), metric="neg_kl"))
    assert found.cost.positions < whole.cost.positions
    assert_equal(found, whole, 1e-5)


def test_surrounding_edits_run_in_the_whole(monkeypatch) -> None:
    model = model_of("gpt2")
    with pl.intervene(model, [pl.Edit("L0.attn_out@0", pl.sources.zero())]):
        found, whole = both(monkeypatch, pl.AttributionPatching(), model, swap_task(changed=(3,)))
    assert found.cost.positions == whole.cost.positions
    assert_equal(found, whole, 1e-6)


def test_a_rest_says_what_the_whole_run_would_and_leaves_the_cache_alone() -> None:
    model, start = model_of("llama", torch.float64), 2
    (batch,) = swap_task(changed=(2, 4)).batches()
    keep = (("resid_pre", 1), ("pattern", 2), ("z", 0))
    cache = empty_cache()
    known = run(model, Program(batch.clean, batch.examples, keep=keep), cache=cache).activations
    before = [layer.keys.clone() for layer in cache.layers]
    program = Program(batch.corrupted, batch.examples, keep=keep, gradients=keep, metric=METRICS["logit_diff"], answers=batch.answers)
    whole = run(model, program)
    rest, base = run_rest(model, program, cache, start, known)
    assert base is None
    assert rest.work == (1, 1, 3 * 3)
    torch.testing.assert_close(rest.values, whole.values)
    for key in keep:
        dim = 2 if key[0] == "pattern" else 1
        torch.testing.assert_close(rest.activations[key], whole.activations[key])
        torch.testing.assert_close(rest.gradients[key].narrow(dim, start, 3), whole.gradients[key].narrow(dim, start, 3))
        assert not rest.gradients[key].narrow(dim, 0, start).any()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert beginning(cache, start).get_seq_length() == start
    again, base = run_rest(model, replace(program, gradients=()), cache, start, known)
    torch.testing.assert_close(again.values, whole.values)
    assert base is not None
    torch.testing.assert_close(base.inputs[1][:, start:], whole.activations["resid_pre", 1][:, start:])


def test_continues_is_found_out_once_per_model() -> None:
    model = native_model("alone")
    assert session_of(model).found["rest"] is False  # as the load found out
    session_of(model).found.pop("rest")
    assert not continues(model)
    session_of(model).found["rest"] = True
    assert continues(model)
    assert continues(model_of("gpt2"))
