"""Unpatched runs are made once for several methods, and no number changes."""

import numpy as np
import pytest
import torch
from families import mixed_task, model_of, swap_task

import patchlab as pl
from patchlab.methods.names import scoring_method
from patchlab.methods.setting.shared import SharedRuns, sharing_runs
from patchlab.scores import ScoreMap
from patchlab.sources import zero

NAMES = ("exact", "atp", "relp", "ig:2", "exact@mean", "atp*")
SITES = ["resid_pre", "z"]


def scores(model, task, direction: str, **options) -> dict[str, ScoreMap]:
    return {name: scoring_method(name).run(model, task, SITES, direction=direction, progress=False, **options) for name in NAMES}


def passes(model) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    """A list that grows by the rows of every pass through the model's last block, and the hook that does it."""
    seen: list[int] = []
    handle = model.bridge.unembed.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    return seen, handle


def same(one: dict[str, ScoreMap], other: dict[str, ScoreMap]) -> None:
    for name in NAMES:
        for site in one[name].sites:
            np.testing.assert_array_equal(one[name].data[site].values, other[name].data[site].values)
        assert one[name].provenance == other[name].provenance
        costs = [{**vars(scores.cost), "seconds": 0} for scores in (one[name], other[name])]
        assert costs[0] == costs[1], "each method costs what it costs by itself"


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("metric", ["logit_diff", "neg_kl"])
@pytest.mark.parametrize("changed", [(0, 1), (2, 3)], ids=["from the start", "from the third token"])
def test_no_number_changes_and_the_source_runs_are_made_once(direction, metric, changed):
    model, task = model_of("llama"), swap_task(changed=changed, metric=metric)
    if metric == "neg_kl" and direction == "noising":
        task = task.with_metric("logprob_diff")
    apart = scores(model, task, direction)
    seen, handle = passes(model)
    try:
        scores(model, task, direction)
        alone = len(seen)
        with sharing_runs(model) as shared:
            together = scores(model, task, direction)
    finally:
        handle.remove()
    same(apart, together)
    # exact, atp, relp and ig start from one source run; what a path of ig ends at and the means have no part in it
    assert shared.saved >= 3
    assert alone - (len(seen) - alone) == shared.saved


@pytest.mark.slow
def test_batches_and_lengths_are_told_apart():
    model, task = model_of("gpt2"), mixed_task()
    apart = scores(model, task, "denoising", batch_size=1)
    with sharing_runs(model) as shared:
        same(apart, scores(model, task, "denoising", batch_size=1))
    assert shared.saved >= 3 * len(task)


def test_answers_are_told_apart():
    model, task = model_of("gpt2"), swap_task()
    other = pl.Task(task.name, tuple(pl.tasks.Pair(p.clean_ids, p.corrupted_ids, p.incorrect, p.correct) for p in task.pairs), task.metric)
    with sharing_runs(model):
        first, second = (pl.AttributionPatching().run(model, one, "resid_pre", progress=False) for one in (task, other))
    np.testing.assert_allclose(first.data["resid_pre"].values, -second.data["resid_pre"].values, atol=1e-5)


def test_what_surrounds_a_run_is_not_shared():
    model, task = model_of("gpt2"), swap_task()
    with pl.intervene(model, pl.Edit("L0.mlp_out", zero())):
        apart = pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
    with sharing_runs(model) as shared:
        pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
        with pl.intervene(model, pl.Edit("L0.mlp_out", zero())):
            inside = pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
    np.testing.assert_array_equal(apart.data["resid_pre"].values, inside.data["resid_pre"].values)
    assert shared.saved == 0


def test_memory_is_bounded_and_the_block_leaves_nothing():
    model, task = model_of("gpt2"), swap_task()
    with sharing_runs(model, max_bytes=10) as shared:
        scores(model, task, "denoising")
    assert shared.saved == 0
    with sharing_runs(model) as outer:
        with sharing_runs(model) as inner:
            assert inner is not outer
        pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
        pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
        assert (outer.saved, inner.saved) == (1, 0)
    pl.AttributionPatching().run(model, task, "resid_pre", progress=False)
    assert outer.saved == 1
    assert isinstance(outer, SharedRuns)
