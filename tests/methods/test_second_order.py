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
from patchlab.comparison.reliability import unreliable
from patchlab.errors import MethodError, ScoreError
from patchlab.methods import SecondOrder
from patchlab.methods.second_order import _affordable, _worth_more
from patchlab.scores import ScoreMap
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Task
from patchlab.testing import check_method


def literal(task: Task, name: str) -> np.ndarray:
    """Half the second derivative of the metric along each cell's own way from the corrupted to the clean value."""
    raw, site = RawModel(hf_module("gpt2", torch.float64), HEADS, HEADS), Site.parse(name)
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
    scores = scores_of(SecondOrder(probes=1), model_of("gpt2", torch.float64), task, name)
    _agree(scores.data[name].to_numpy(), literal(task, name), 1e-3)


def test_signs_cancel_what_cells_do_together() -> None:
    """Two cells differ here, so a probe gives diagonal ± cross term; halfway between the two is the diagonal."""
    task, name = swap_task(n=2, length=3, changed=(1,)), "resid_pre"
    model = model_of("gpt2", torch.float64)
    seeds = np.stack([scores_of(SecondOrder(probes=1, seed=seed), model, task, name).data[name].to_numpy() for seed in range(10)])
    diagonal = literal(task, name)
    _agree((seeds.max(0) + seeds.min(0)) / 2, diagonal, 1e-3)
    assert np.abs(seeds - diagonal).max() > 0.05 * np.abs(diagonal).max()
    several = scores_of(SecondOrder(probes=16), model, task, name).data[name].to_numpy()
    assert np.abs(several - diagonal).max() < 0.6 * np.abs(seeds - diagonal).max()


CONTRACT = ("input", "resid_pre", "z", "k[layer,pos,kv_head]", "mlp_post")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["paired", "zero", "mean"])
def test_it_keeps_the_contract(source: str) -> None:
    check_method(SecondOrder(probes=2, source=source), model_of("gpt2", torch.float64, layers=2), swap_task(), CONTRACT)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["paired", "mean"])
def test_it_keeps_the_contract_with_a_tolerance(source: str, probing: None) -> None:
    check_method(SecondOrder(tolerance=0.9, source=source), model_of("gpt2", torch.float64, layers=2), swap_task(), CONTRACT)


@pytest.mark.parametrize("name", ["z[layer,pos,head]", "resid_pre"])
def test_the_step_of_single_precision_is_small_enough(name: str) -> None:
    """The same probes in float32 and in float64, whose step is a hundredth of it: what the larger step cuts off is little."""
    task, method = swap_task(n=3), SecondOrder(probes=8, seed=0)
    single, double = (scores_of(method, model_of("gpt2", dtype), task, name).data[name].to_numpy() for dtype in (torch.float32, torch.float64))
    assert np.abs(single - double).max() < 0.04 * np.abs(double).max()


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let probes cost next to nothing, as among thousands of cells."""
    monkeypatch.setattr("patchlab.methods.second_order.PROBE", 1e-3)
    monkeypatch.setattr("patchlab.methods.second_order.FIXED", 0.0)


def test_standard_errors_are_those_of_the_probes() -> None:
    """Over seeds the means of 12 probes spread by what the probes of each seed say of it."""
    task, name, model = swap_task(n=2, length=6, changed=(1, 2, 4)), "z[layer,pos,head]", model_of("gpt2", torch.float64, layers=2)
    maps = [scores_of(SecondOrder(probes=12, seed=seed), model, task, name) for seed in range(8)]
    values, errors = (np.stack([part(one)[name].to_numpy() for one in maps]) for part in (lambda one: one.data, lambda one: one.standard_error))
    random = errors.min(0) > 0
    assert random.sum() > 20
    ratio = values.var(0, ddof=1)[random] / np.square(errors).mean(0)[random]
    assert 0.7 < ratio.mean() < 1.4
    mean = np.sqrt(np.square(errors[0]).sum(0)) / 2
    np.testing.assert_allclose(maps[0].error_of_mean(name), mean, rtol=1e-6)


def test_one_probe_has_no_standard_error_unless_one_cell_differs() -> None:
    model, task = model_of("gpt2", torch.float64, layers=2), swap_task(n=2, changed=(2,))
    assert np.isnan(scores_of(SecondOrder(probes=1), model, task, "z").standard_error["z"]).all()
    # at the residual stream before the first block only one position differs
    errors = scores_of(SecondOrder(probes=1), model, task, "resid_pre").standard_error["resid_pre"]
    assert (errors[:, 0] == 0).all()
    assert np.isnan(errors[:, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_cell_is_within_the_tolerance_or_patched(direction: str, probing: None) -> None:
    task, name, model = swap_task(n=3, length=6, changed=(1, 2, 4)), "z[layer,pos,head]", model_of("gpt2", torch.float64, layers=2)
    second = scores_of(SecondOrder(tolerance=0.3), model, task, name, direction)
    exact, atp = (
        scores_of(method, model, task, name, direction).data[name].to_numpy() for method in (pl.ActivationPatching(), pl.AttributionPatching())
    )
    value, error = second.data[name].to_numpy(), second.standard_error[name].to_numpy()
    probed = error > 0
    assert probed.sum() > 10
    assert (error <= 1.0001 * 0.3 * np.sqrt(3) * np.maximum(np.abs(value), np.abs(atp)))[probed].all()
    patched = np.isclose(value, exact - atp, rtol=1e-6, atol=1e-12 * np.abs(exact).max()) & (atp != 0) & ~probed
    assert int(patched.sum()) == sum(second.provenance["patched_exactly"][name])
    assert (patched | probed | (value == 0)).all()
    counts = np.array(second.provenance["probes"][name])
    assert counts.shape == (3, 2)
    assert counts.min() >= 8
    assert set(np.log2(counts).ravel() % 1) == {0}
    smaller = scores_of(SecondOrder(tolerance=0.1), model, task, name, direction)
    terms, errors = np.maximum(np.abs(smaller.data[name].to_numpy()), np.abs(atp)), smaller.standard_error[name].to_numpy()
    assert (errors <= 1.0001 * 0.1 * np.sqrt(3) * terms)[errors > 0].all()
    assert np.sum(smaller.provenance["probes"][name]) > counts.sum()


def test_few_cells_are_patched_and_not_probed() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task(n=2)
    second = scores_of(SecondOrder(), model, task, ["z", "input"])
    exact, atp = (scores_of(method, model, task, ["z", "input"]) for method in (pl.ActivationPatching(), pl.AttributionPatching()))
    for name in ("z", "input"):
        np.testing.assert_allclose(second.data[name], exact.data[name] - atp.data[name], rtol=1e-6, atol=1e-9)
        assert not second.standard_error[name].any()
        assert np.array(second.provenance["probes"][name]).max() == 0
    total = 2 * int(second.live["z"].sum())
    assert f"z: {sum(second.provenance['patched_exactly']['z'])} of {total} terms patched exactly, where probes would cost more" in repr(second)


def _price(scores: ScoreMap, task: Task) -> float:
    """Forward passes over one prompt, a backward pass as two."""
    return scores.cost.positions / len(task.pairs[0]) + 2 * scores.cost.backwards


SHAPES = [
    ("mlp_post[layer,pos,neuron]", 3, 16, (0, 3), 0.9, "paired", "savings"),
    ("mlp_post[layer,pos,neuron]", 3, 16, (0, 3), 1e-6, "paired", "above"),
    ("mlp_post[layer,pos,neuron]", 3, 16, (3,), 1e-6, "zero", "above"),
    ("pattern[layer,head,dest,src]", 2, 14, (1, 9), 1e-6, "paired", "above"),
    ("mlp_post", 3, 9, (1, 4), 0.3, "paired", "patched"),
    ("k[layer,pos,kv_head]", 3, 16, (0, 1), 0.5, "zero", "patched"),
    ("resid_pre", 3, 6, (2,), 0.3, "paired", "patched"),
    ("input", 3, 6, (2,), 0.3, "paired", "patched"),
]


@pytest.mark.parametrize(("name", "layers", "length", "changed", "tolerance", "source", "outcome"), SHAPES)
def test_it_never_costs_more_than_exact_patching(
    monkeypatch: pytest.MonkeyPatch, name: str, layers: int, length: int, changed: tuple[int, ...], tolerance: float, source: str, outcome: str
) -> None:
    """Counted, with the backward pass of a probe as two forward passes, for one prompt; positions are counted in whole ones.

    The pilot is a short one, which pays on toys as one of 8 probes does on models.
    """
    monkeypatch.setattr("patchlab.methods.second_order.PILOT", 2)
    model, task = model_of("gpt2", layers=layers), swap_task(n=1, length=length, changed=changed)
    methods = SecondOrder(tolerance=tolerance, source=source), pl.ActivationPatching(source=source), pl.AttributionPatching(source=source)
    second, exact, atp = (scores_of(method, model, task, name) for method in methods)
    probes, half = np.array(second.provenance["probes"][name]), 0.5 / length
    (patched,), (above,) = second.provenance["patched_exactly"][name], second.provenance["above_tolerance"][name]
    saved = _price(exact, task) - _price(second, task)
    # where all is patched the first-order scores come on top; what is counted in whole positions may be off by a half
    assert saved >= (-half if probes.any() else -4 - half)
    assert (probes.any(), above > 0) == (outcome != "patched", outcome == "above")
    assert outcome != "savings" or saved > 1
    value, error, first = second.data[name].to_numpy(), second.standard_error[name].to_numpy(), atp.data[name].to_numpy()
    assert int((error > 1.0001 * tolerance * np.maximum(np.abs(value), np.abs(first))).sum()) == above
    remainder = exact.data[name].to_numpy() - first
    known = np.isclose(value, remainder, rtol=1e-3, atol=1e-4 * np.abs(exact.data[name].to_numpy()).max())
    if outcome == "patched":
        assert known.all()
    elif outcome == "above":
        assert set(probes.ravel()) <= {0, 2}
        assert patched > above
        assert f"{above} of {int(second.live[name].sum())} terms above the tolerance" in repr(second)
        flags = unreliable(atp, second, 1e-9)[name].to_numpy()
        assert flags[error[0] > 0].all()


def test_what_is_patched_where_not_all_can_be() -> None:
    left, error = np.array([[True, True, False], [True, True, True]]), np.array([[1.0, 5.0, 9.0], [3.0, 2.0, 4.0]])
    price = np.array([[1.0, 1.0, 1.0], [0.5, 0.5, 2.0]])
    assert _affordable(left, error, price, 3.6).tolist() == [[False, True, False], [True, False, True]]
    assert _affordable(left, error, price, 5.0).tolist() == left.tolist()
    assert not _affordable(left, error, price, 0.5).any()


def test_when_to_go_on_probing() -> None:
    price = np.full(1000, 0.5)
    assert _worth_more(np.full(1000, 1.9), price, 8, 500.0)  # two doublings, 72 passes, for 500
    assert not _worth_more(np.full(1000, 30.0), price, 8, 500.0)  # ten doublings would cost 24,552
    assert not _worth_more(np.full(1000, np.inf), price, 8, 500.0)  # no probe will do
    assert not _worth_more(np.array([]), np.array([]), 8, 500.0)  # all cells are known
    assert not _worth_more(np.full(1000, 1.9), price, 16, 500.0)  # 96 passes more and then perhaps all cells all the same
    assert _worth_more(np.full(900, 1.9), np.full(900, 0.5), 16, 500.0)


def test_positions_by_name() -> None:
    """Only the named positions are cells: two, so that halfway between the extremes over seeds is each one's own term."""
    task, name = mixed_task(), "attn_out"
    pairs = tuple(replace(one, positions={key: one.positions[key] for key in ("END", "A")}) for one in task.pairs)
    named, model = Task("named", pairs, task.metric), model_of("gpt2", torch.float64)
    maps = [scores_of(SecondOrder(probes=1, seed=seed), model, named, name).data for seed in range(10)]
    values = np.stack([found[name].to_numpy() for found in maps])
    names = maps[0]["position"].to_numpy().tolist()
    assert sorted(names) == ["A", "END"]
    for e, one in enumerate(pairs):
        expected = literal(Task("one", (one,), task.metric), name)[0][:, [one.positions[key] for key in names]]
        _agree((values.max(0) + values.min(0))[e] / 2, expected, 1e-3)


def test_cost_is_one_gradient_per_layer_and_probe() -> None:
    cost = scores_of(SecondOrder(probes=2), model_of("gpt2"), swap_task(), ["z", "mlp_out"]).cost
    assert (cost.forwards, cost.backwards) == (2 + 2 * 2 * LAYERS, 1 + 2 * 2 * LAYERS)


@pytest.mark.slow
def test_flagged_cells_are_the_worse_ones(demo_gpt2_4l: Any) -> None:
    """On a trained model the first-order scores of flagged cells are off by several times more than the others'."""
    task = pl.load_task("ioi", demo_gpt2_4l, n=8)
    sites = ["z[layer,pos,head]", "attn_out", "mlp_out", "v[layer,pos,kv_head]", "resid_pre"]
    exact, atp, second = (
        scores_of(method, demo_gpt2_4l, task, sites) for method in (pl.ActivationPatching(), pl.AttributionPatching(), SecondOrder(probes=16))
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
    atp, second = (scores_of(method, model, task, ["z", "resid_pre"]) for method in (pl.AttributionPatching(), SecondOrder(probes=4)))
    for fraction in (0.1, 1.0):
        flags = unreliable(atp, second, fraction)
        for site in ("z", "resid_pre"):
            one, two = (np.abs(scores.data[site].to_numpy().mean(0)) for scores in (atp, second))
            error = np.sqrt(np.square(second.standard_error[site].to_numpy()).sum(0)) / len(task)
            np.testing.assert_array_equal(flags[site], (two + 2 * error > fraction * one) & atp.live[site].to_numpy())
            assert (unreliable(atp, scores_of(SecondOrder(probes=1), model, task, ["z", "resid_pre"]), 1e9)["z"] == atp.live["z"]).all(), "unknown"
    assert flags["resid_pre"].dims == ("layer", "pos")


def test_refusals() -> None:
    model, task = model_of("gpt2"), swap_task()
    with pytest.raises(MethodError, match="probes is 0; at least 1"):
        SecondOrder(probes=0)
    half = model_of("gpt2", torch.bfloat16)
    with pytest.raises(MethodError, match="needs a model in float32 or float64.*bfloat16"):
        scores_of(SecondOrder(), half, task, "z")
    for tolerance in (0.0, 1.0, float("nan")):
        with pytest.raises(MethodError, match=f"tolerance is {tolerance}; it must be above 0 and below 1"):
            SecondOrder(tolerance=tolerance)
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
