"""Second-order terms against second derivatives of the plain model, and whether the cells they flag are the worse ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import HEADS, LAYERS, hf_module, mixed_task, model_of, scores_of, swap_task
from raw_model import Key, RawModel
from torch import Tensor

import patchlab as pl
from patchlab.errors import MethodError, ScoreError
from patchlab.methods import SecondOrder
from patchlab.reliability import unreliable
from patchlab.sites import KINDS, parse_site
from patchlab.tasks.base import Task
from patchlab.testing import check_method


def literal(task: Task, name: str) -> np.ndarray:
    """Half the second derivative of the metric along each cell's own way from the corrupted to the clean value."""
    raw, site = RawModel(hf_module("gpt2", torch.float64), HEADS, HEADS), parse_site(name)
    rows = []
    for one in task.pairs:
        own, other = raw.run(one.corrupted_ids)[1], raw.run(one.clean_ids)[1]
        sizes = dict(zip(KINDS[site.kind].axes, (LAYERS, *own[site.kind, 0].shape), strict=False))
        cells = np.zeros([sizes[axis] for axis in site.axes])
        for cell in np.ndindex(*cells.shape):
            index = dict(zip(site.axes, cell, strict=True))
            where: Key = (site.kind, index["layer"])
            inner = tuple(index.get(axis, slice(None)) for axis in KINDS[site.kind].axes if axis != "layer")
            way = torch.zeros_like(own[where])
            way[inner] = (other[where] - own[where])[inner]
            step = torch.zeros((), dtype=torch.float64, requires_grad=True)

            def write(value: Tensor, start: Tensor = own[where], way: Tensor = way, step: Tensor = step) -> Tensor:
                return start + step * way

            logits = raw.run(one.corrupted_ids, {where: write}, grad=True)[0]
            (slope,) = torch.autograd.grad(logits[one.correct[0]] - logits[one.incorrect[0]], step, create_graph=True)
            (curve,) = torch.autograd.grad(slope, step)
            cells[cell] = float(curve) / 2
        rows.append(cells)
    return np.stack(rows)


def _agree(got: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    largest = float(np.abs(expected).max())
    assert largest > 1e-3
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("name", ["resid_pre[layer]", "attn_out[layer]", "z[layer]", "q[layer]", "k[layer]", "mlp_post[layer]"])
def test_a_layer_of_one_cell_is_exact(name: str) -> None:
    task = swap_task(n=2)
    scores = scores_of(SecondOrder(), model_of("gpt2", torch.float64), task, name)
    _agree(scores.data[name].to_numpy(), literal(task, name), 1e-3)


def test_signs_cancel_what_cells_do_together() -> None:
    """Two cells differ here, so a probe gives diagonal ± cross term; halfway between the two is the diagonal."""
    task, name = swap_task(n=2, length=3, changed=(1,)), "resid_pre"
    model = model_of("gpt2", torch.float64)
    seeds = np.stack([scores_of(SecondOrder(seed=seed), model, task, name).data[name].to_numpy() for seed in range(10)])
    diagonal = literal(task, name)
    _agree((seeds.max(0) + seeds.min(0)) / 2, diagonal, 1e-3)
    assert np.abs(seeds - diagonal).max() > 0.05 * np.abs(diagonal).max()
    several = scores_of(SecondOrder(probes=16), model, task, name).data[name].to_numpy()
    assert np.abs(several - diagonal).max() < 0.6 * np.abs(seeds - diagonal).max()


@pytest.mark.parametrize("source", ["paired", "zero", "mean"])
def test_it_keeps_the_contract(source: str) -> None:
    sites = ("input", "resid_pre", "z", "k[layer,pos,kv_head]", "mlp_post")
    check_method(SecondOrder(probes=2, source=source), model_of("gpt2", torch.float64, layers=2), swap_task(), sites)


def test_positions_by_name() -> None:
    """Only the named positions are cells: two, so that halfway between the extremes over seeds is each one's own term."""
    task, name = mixed_task(), "attn_out"
    pairs = tuple(replace(one, positions={key: one.positions[key] for key in ("END", "A")}) for one in task.pairs)
    named, model = Task("named", pairs, task.metric), model_of("gpt2", torch.float64)
    maps = [scores_of(SecondOrder(seed=seed), model, named, name).data for seed in range(10)]
    values = np.stack([found[name].to_numpy() for found in maps])
    names = maps[0]["position"].to_numpy().tolist()
    assert sorted(names) == ["A", "END"]
    for e, one in enumerate(pairs):
        expected = literal(Task("one", (one,), task.metric), name)[0][:, [one.positions[key] for key in names]]
        _agree((values.max(0) + values.min(0))[e] / 2, expected, 1e-3)


def test_cost_is_one_gradient_per_layer_and_probe() -> None:
    cost = scores_of(SecondOrder(probes=2), model_of("gpt2"), swap_task(), ["z", "mlp_out"]).cost
    assert (cost.forwards, cost.backwards) == (2 + 2 * 2 * LAYERS, 1 + 2 * 2 * LAYERS)


def test_flagged_cells_are_the_worse_ones(demo_gpt2_4l: Any) -> None:
    """On a trained model the first-order scores of flagged cells are off by several times more than the others'."""
    task = pl.load_task("ioi", demo_gpt2_4l, n=8)
    sites = ["z[layer,pos,head]", "attn_out", "mlp_out", "v[layer,pos,kv_head]", "resid_pre"]
    exact, atp, second = (
        scores_of(method, demo_gpt2_4l, task, sites) for method in (pl.ActivationPatching(), pl.AttributionPatching(), SecondOrder())
    )
    flags = unreliable(atp, second)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for site in sites:
        true, guess = exact.mean(site).to_numpy(), atp.mean(site).to_numpy()
        counts = exact.live[site].to_numpy() & (np.abs(true) > 0.01 * np.abs(true).max())
        for flag in errors:
            chosen = counts & (flags[site].to_numpy() == flag)
            errors[flag] += (np.abs(guess - true)[chosen] / np.abs(true)[chosen]).tolist()
    assert len(errors[True]) >= 5 <= len(errors[False])
    assert np.median(errors[True]) > 2 * np.median(errors[False])


def test_unreliable_compares_means_over_live_cells() -> None:
    model, task = model_of("gpt2"), swap_task()
    atp, second = (scores_of(method, model, task, ["z", "resid_pre"]) for method in (pl.AttributionPatching(), SecondOrder()))
    for fraction in (0.1, 1.0):
        flags = unreliable(atp, second, fraction)
        for site in ("z", "resid_pre"):
            one, two = (np.abs(scores.data[site].to_numpy().mean(0)) for scores in (atp, second))
            np.testing.assert_array_equal(flags[site], (two > fraction * one) & atp.live[site].to_numpy())
    assert flags["resid_pre"].dims == ("layer", "pos")


def test_refusals() -> None:
    model, task = model_of("gpt2"), swap_task()
    with pytest.raises(MethodError, match="probes is 0; at least 1"):
        SecondOrder(probes=0)
    half = model_of("gpt2", torch.bfloat16)
    with pytest.raises(MethodError, match="needs a model in float32 or float64.*bfloat16"):
        scores_of(SecondOrder(), half, task, "z")
    atp, second = (scores_of(method, model, task, "z") for method in (pl.AttributionPatching(), SecondOrder()))
    with pytest.raises(MethodError, match="second-order terms are of nodes, and edges are edges; ask for z and mlp_out"):
        SecondOrder().run(model_of("gpt2", torch.float32), swap_task(n=2), "edges", progress=False)
    with pytest.raises(ScoreError, match="needs a map of SecondOrder as its second; got one of 'atp'"):
        unreliable(atp, atp)
    with pytest.raises(ScoreError, match="fraction is 0.0; it must be above 0"):
        unreliable(atp, second, 0.0)
    other = scores_of(pl.AttributionPatching(), model, task, "z", "noising")
    with pytest.raises(ScoreError, match="direction"):
        unreliable(other, second)
