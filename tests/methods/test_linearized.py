"""Every method against a slow, literal float64 twin; and what methods refuse."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import HEADS, SITES, bridged, hf_module, mixed_task, model_of, pair, scores_of, swap_task, untested
from raw_model import Key, RawModel
from torch import Tensor

import patchlab as pl
from patchlab.engine import session_of
from patchlab.errors import InterventionError, MethodError
from patchlab.methods import METHODS, get_method
from patchlab.metrics import METRICS, Answers, Metric
from patchlab.models import Model
from patchlab.rules import PRESETS, AHRule, Composite, register_preset
from patchlab.rules.composites import DESCRIPTIONS
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Pair, Task

LAYERS = 3
ENGINES = ("auto", "literal")
CLOSE = {"gpt2": 1e-9, "llama": 2e-6}
"""Llama computes norms and softmax in float32 whatever its dtype."""


@cache
def raw_of(family: str) -> RawModel:
    return RawModel(hf_module(family, torch.float64), HEADS, HEADS if family == "gpt2" else 2)


def _logit_diff(logits: Tensor, one: Pair) -> Tensor:
    return logits[list(one.correct)].mean() - logits[list(one.incorrect)].mean()


def _sides(one: Pair, direction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Baseline and other tokens."""
    return (one.corrupted_ids, one.clean_ids) if direction == "denoising" else (one.clean_ids, one.corrupted_ids)


def _patched_in(raw: RawModel, task: Task, direction: str, source: str) -> list[dict[Key, Tensor]]:
    """Per example, the value that each site is patched with."""
    others = [raw.run(_sides(one, direction)[1])[1] for one in task.pairs]
    if source == "paired":
        return others
    if source == "zero":
        return [{key: torch.zeros_like(value) for key, value in seen.items()} for seen in others]
    found = []
    for seen in others:
        means = {}
        for key, value in seen.items():
            total, count = torch.zeros_like(value) if source == "mean_positional" else torch.zeros_like(value[0]), 0
            for other in others:
                for row in [other[key]] if source == "mean_positional" else other[key]:
                    total, count = total + row, count + 1
            means[key] = torch.broadcast_to(total / count, value.shape)
        found.append(means)
    return found


def _sizes(raw: RawModel, kind: str, value: Tensor) -> dict[str, int]:
    return dict(zip(KINDS[kind].axes, (LAYERS, *value.shape), strict=False)) if kind != "input" else {"pos": value.shape[0]}


def literal_exact(raw: RawModel, task: Task, name: str, direction: str, source: str = "paired") -> np.ndarray:
    """One prompt, one cell, one forward pass."""
    site, kind = Site.parse(name), Site.parse(name).kind
    rows = []
    for one, other in zip(task.pairs, _patched_in(raw, task, direction, source), strict=True):
        base_tokens, _ = _sides(one, direction)
        base_logits, own = raw.run(base_tokens)
        key = next(key for key in own if key[0] == kind)
        sizes = _sizes(raw, kind, own[key])
        effects = np.zeros([sizes[axis] for axis in site.axes])
        for cell in itertools.product(*(range(sizes[axis]) for axis in site.axes)):
            index = dict(zip(site.axes, cell, strict=True))
            inner = tuple(index.get(axis, slice(None)) for axis in KINDS[kind].axes if axis != "layer")
            where = (kind, index.get("layer"))

            def write(value: Tensor, inner: Any = inner, where: Key = where, other: dict[Key, Tensor] = other) -> Tensor:
                value = value.clone()
                value[inner] = other[where][inner]
                return value

            effects[cell] = float(_logit_diff(raw.run(base_tokens, {where: write})[0], one) - _logit_diff(base_logits, one))
        rows.append(effects)
    return np.stack(rows)


def literal_linear(
    raw: RawModel, task: Task, name: str, direction: str, source: str, points: Callable[[], list[float]], over: str = "inputs"
) -> np.ndarray:
    """Difference times gradient, prompt by prompt, averaged over the points of the path."""
    site, kind = Site.parse(name), Site.parse(name).kind
    rows = []
    for one, other in zip(task.pairs, _patched_in(raw, task, direction, source), strict=True):
        base_tokens, _ = _sides(one, direction)
        own = {key: value.detach() for key, value in raw.run(base_tokens)[1].items()}
        per_layer = []
        for layer in [None] if kind == "input" else range(LAYERS):
            where = (kind, layer)
            gradient = torch.zeros_like(own[where])
            for point in points():
                moved = ("input", None) if over == "inputs" else where

                def write(value: Tensor, moved: Key = moved, point: float = point, own: Any = own, other: Any = other) -> Tensor:
                    return ((1 - point) * own[moved] + point * other[moved]).requires_grad_()

                logits, seen = raw.run(base_tokens, {moved: write} if point else None, grad=True)
                gradient += torch.autograd.grad(_logit_diff(logits, one), seen[where])[0] / len(points())
            per_layer.append((other[where] - own[where]) * gradient)
        product = per_layer[0] if kind == "input" else torch.stack(per_layer)
        names = [*KINDS[kind].axes, "width"][: product.ndim]
        product = product.sum([dim for dim, axis in enumerate(names) if axis not in site.axes]) if len(names) > len(site.axes) else product
        rows.append(product.numpy())
    return np.stack(rows)


def _agree(got: np.ndarray, expected: np.ndarray, rtol: float, what: str) -> None:
    largest = float(np.abs(expected).max())
    assert largest > 1e-4, what
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * largest, err_msg=what)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exact_patching_against_its_literal_twin(family: str, direction: str) -> None:
    task = swap_task(n=1, length=4, changed=(1,))
    by_engine = {
        engine: scores_of(pl.ActivationPatching(engine=engine), model_of(family, torch.float64), task, SITES, direction) for engine in ENGINES
    }
    for name in SITES:
        expected = literal_exact(raw_of(family), task, name, direction)
        for engine, scores in by_engine.items():
            _agree(scores.data[name].to_numpy(), expected, CLOSE[family], f"{name}, {engine}")


@pytest.mark.parametrize("source", ["zero", "mean", "mean_positional"])
def test_exact_patching_with_other_sources_against_its_literal_twin(source: str) -> None:
    task = swap_task(n=2, length=4, changed=(1,))
    sites = ("resid_pre", "z[layer,pos,head]", "v", "mlp_post")
    scores = scores_of(pl.ActivationPatching(source=source), model_of("llama", torch.float64), task, sites)
    for name in sites:
        _agree(scores.data[name].to_numpy(), literal_exact(raw_of("llama"), task, name, "denoising", source), CLOSE["llama"], name)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("source", ["paired", "zero", "mean", "mean_positional"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attribution_patching_against_its_literal_twin(family: str, source: str, direction: str) -> None:
    task = swap_task(n=2)
    scores = scores_of(pl.AttributionPatching(source=source), model_of(family, torch.float64), task, SITES, direction)
    for name in SITES:
        expected = literal_linear(raw_of(family), task, name, direction, source, lambda: [0.0])
        _agree(scores.data[name].to_numpy(), expected, CLOSE[family], name)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("over", ["inputs", "activations"])
@pytest.mark.parametrize(("family", "source"), [("gpt2", "paired"), ("llama", "paired"), ("gpt2", "mean")])
def test_integrated_gradients_against_their_literal_twin(family: str, source: str, over: str, direction: str) -> None:
    """Three midpoints: 1/6, 3/6, 5/6."""
    task, sites = swap_task(n=2), ("input", "resid_mid", "z", "k[layer,pos,kv_head]", "mlp_post")
    scores = scores_of(pl.IntegratedGradients(3, over, source=source), model_of(family, torch.float64), task, sites, direction)
    for name in sites:
        expected = literal_linear(raw_of(family), task, name, direction, source, lambda: [1 / 6, 3 / 6, 5 / 6], over)
        _agree(scores.data[name].to_numpy(), expected, 3 * CLOSE[family], name)


def test_a_mean_never_mixes_heads_or_neurons() -> None:
    """Averaging over nodes as well, a mistake that has been shipped, gives clearly other scores."""
    task, raw = swap_task(n=2), raw_of("gpt2")
    scores = scores_of(pl.ActivationPatching(source="mean"), model_of("gpt2", torch.float64), task, "z").data["z"].to_numpy()
    means = torch.stack([raw.run(one.clean_ids)[1]["z", 1] for one in task.pairs]).mean((0, 1))  # head, d_head
    effects = []
    for mean in (means, means.mean(0, keepdim=True).expand_as(means)):
        one = task.pairs[0]

        def write(value: Tensor, mean: Tensor = mean) -> Tensor:
            value = value.clone()
            value[:, 2] = mean[2]
            return value

        base = _logit_diff(raw.run(one.corrupted_ids)[0], one)
        effects.append(float(_logit_diff(raw.run(one.corrupted_ids, {("z", 1): write})[0], one) - base))
    right, wrong = effects
    assert scores[0, 1, 2] == pytest.approx(right, rel=1e-9)
    assert abs(right - wrong) > 0.05 * abs(right)


def test_resid_mid_reaches_the_skip_connection() -> None:
    """Patching all of resid_mid in the last layer gives the whole effect; through ln2 alone it would not."""
    model, task = model_of("gpt2", torch.float64), swap_task(n=2)
    scores = scores_of(pl.ActivationPatching(), model, task, ["resid_mid", "resid_post"])
    whole = (scores.data.metric_clean - scores.data.metric_corrupted).to_numpy()
    for site in ("resid_mid", "resid_post"):
        np.testing.assert_allclose(scores.data[site].isel(layer=2, pos=4), whole, rtol=1e-9)


@pytest.mark.parametrize("rules", ["gradient", "relp", "gim"])
def test_paths_over_inputs_differ_only_in_sign_between_directions(rules: str) -> None:
    task, sites = swap_task(), ["input", "resid_mid", "z", "mlp_post"]
    method = pl.IntegratedGradients(3, rules=rules)
    one, other = (scores_of(method, model_of("gpt2", torch.float64), task, sites, direction) for direction in ("denoising", "noising"))
    for site in sites:
        _agree(one.data[site].to_numpy(), -other.data[site].to_numpy(), 1e-9, site)
    # which one-point methods do not
    one, other = (
        scores_of(pl.AttributionPatching(), model_of("gpt2", torch.float64), task, "z", direction) for direction in ("denoising", "noising")
    )
    assert float(np.abs(one.data["z"] + other.data["z"]).max()) > 0.05 * float(np.abs(one.data["z"]).max())


@pytest.mark.slow
def test_completeness_gap_falls_with_the_number_of_points() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task()
    for over, group in (("inputs", "input"), ("activations", "L0.attn_out")):
        gaps = []
        for steps in (1, 4, 16, 64):
            scores = scores_of(pl.IntegratedGradients(steps, over), model, task, ["attn_out", "input"])
            gaps.append(np.abs(scores.provenance["completeness_gap"][group]).max())
        assert gaps[1] < gaps[0] / 2, (over, gaps)
        assert gaps[3] < gaps[2] / 8 < gaps[0] / 8, (over, gaps)
        assert gaps[3] < 1e-3


def test_completeness_gaps_are_what_they_say() -> None:
    """Σ input scores − metric difference; over activations: Σ scores of a layer − the exact effect of all of it. In the map's order."""
    model, task = model_of("llama", torch.float64), mixed_task()
    scores = scores_of(pl.IntegratedGradients(2), model, task, "z", batch_size=1)
    inputs = scores_of(pl.IntegratedGradients(2), model, Task("i", task.pairs, task.metric), ["z"])
    assert scores.provenance["completeness_gap"]["input"] == pytest.approx(inputs.provenance["completeness_gap"]["input"], rel=1e-4)
    for e, one in enumerate(task.pairs):
        alone = scores_of(pl.IntegratedGradients(2), model, Task("one", (one,), task.metric), "input")
        gap = float(alone.data["input"].sum()) - (alone.data.metric_clean - alone.data.metric_corrupted).item()
        assert alone.provenance["completeness_gap"]["input"] == pytest.approx([gap], rel=1e-5)
        assert scores.provenance["completeness_gap"]["input"][e] == pytest.approx(gap, rel=1e-4)
    assert len({round(gap, 6) for gap in scores.provenance["completeness_gap"]["input"]}) == 4
    over = scores_of(pl.IntegratedGradients(2, "activations"), model, swap_task(), "mlp_out")
    tokens = swap_task().batches()[0]
    clean = model.run(tokens.clean, keep="mlp_out")
    for layer in range(LAYERS):
        patched = METRICS["logit_diff"](model.run(tokens.corrupted, edits=[pl.Edit(f"L{layer}.mlp_out", clean)]).logits[:, -1], tokens.answers)
        expected = over.data["mlp_out"].isel(layer=layer).sum("pos").to_numpy() - (patched.numpy() - over.data.metric_corrupted.to_numpy())
        assert over.provenance["completeness_gap"][f"L{layer}.mlp_out"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_gaps_under_rules_are_called_non_conservation() -> None:
    scores = scores_of(get_method("relp+ig:2"), model_of("gpt2"), swap_task(), "z")
    assert "completeness_gap" not in scores.provenance
    assert len(scores.provenance["non_conservation"]["input"]) == 3
    assert "non_conservation" not in scores_of(get_method("relp"), model_of("gpt2"), swap_task(), "z").provenance


def test_pairs_of_several_lengths_without_names_are_scored_at_their_ends() -> None:
    model, mixed = model_of("gpt2"), mixed_task()
    nameless = Task("nameless", tuple(replace(one, positions={}) for one in mixed.pairs), mixed.metric)
    scores = scores_of(pl.ActivationPatching(), model, nameless, ["resid_pre", "z"])
    at_end = scores_of(pl.ActivationPatching(), model, mixed, ["resid_pre"]).data["resid_pre"]
    assert scores.data["resid_pre"].shape == (4, LAYERS, 1)
    np.testing.assert_array_equal(scores.data["resid_pre"][:, :, 0], at_end[:, :, at_end.position.to_numpy().tolist().index("END")])
    (note,) = scores.provenance["notes"]
    assert "share no named position but END, so positions are scored at END alone" in note
    assert note in repr(scores)
    assert scores_of(pl.ActivationPatching(), model, nameless, ["z"]).provenance["notes"] == []


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2", "relp"])
def test_named_positions_are_direct_indices(name: str) -> None:
    """The map over named positions, pair by pair, equals the map over indices of that pair alone, read at the named indices."""
    model, task, method = model_of("qwen2", torch.float64), mixed_task(), get_method(name)
    sites = ["resid_pre", "z[layer,pos,head]", "pattern[layer,dest,src]"]
    scores = scores_of(method, model, task, sites)
    names = scores.data["position"].to_numpy().tolist()
    assert sorted(names) == ["A", "B", "END"]
    for e, one in enumerate(task.pairs):
        alone = scores_of(method, model, Task("alone", (one,), task.metric), sites)
        index = [one.positions[position] for position in names]
        assert np.array_equal(scores.data.token.to_numpy()[e], [task.token_text(one.clean_ids[i]) for i in index])
        for site, axes in zip(sites, (["pos"], ["pos"], ["dest", "src"]), strict=True):
            expected = alone.data[site].isel(example=0, **dict.fromkeys(axes, index)).to_numpy()
            np.testing.assert_allclose(scores.data[site].to_numpy()[e], expected, rtol=1e-4, atol=1e-6)
        assert float(scores.data.metric_clean[e]) == pytest.approx(float(alone.data.metric_clean[0]), rel=1e-5)


def test_sites_without_positions_need_no_names() -> None:
    task = Task("nameless", (pair(5, (1,), 1), pair(6, (1,), 2)), METRICS["logit_diff"])
    assert scores_of(pl.AttributionPatching(), model_of("gpt2"), task, "z").data["z"].shape == (2, LAYERS, HEADS)


METHOD_NAMES = ("exact", "atp", "ig:2", "relp", "relp-ah", "gim", "relp+ig:2")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_surrounding_edits_are_honoured_by_every_method(name: str, direction: str) -> None:
    """Zeroing an attention layer by an edit, or in the weights: the same scores."""
    model, task, method = model_of("gpt2", torch.float64), swap_task(n=2), get_method(name)
    with pl.intervene(model, pl.Edit("L1.attn_out", pl.sources.zero())):
        scores = scores_of(method, model, task, ["resid_pre", "z"], direction)
    expected = scores_of(method, _zeroed(), task, ["resid_pre", "z"], direction)
    plain = scores_of(method, model, task, ["resid_pre", "z"], direction)
    for site in expected.sites:
        _agree(scores.data[site].to_numpy(), expected.data[site].to_numpy(), 1e-9, site)
        assert float(np.abs(plain.data[site] - scores.data[site]).max()) > 0.01 * float(np.abs(plain.data[site]).max())
    assert scores.provenance["ambient"] == ["replace L1.attn_out"]
    if "ig" in name:
        note = "completeness_gap" if name == "ig:2" else "non_conservation"
        np.testing.assert_allclose(scores.provenance[note]["input"], expected.provenance[note]["input"], atol=1e-9)


@cache
def _zeroed() -> Model:
    """The same model with the weights of one attention layer's output at zero."""
    module = hf_module("gpt2", torch.float64)
    for tensor in (module.transformer.h[1].attn.c_proj.weight, module.transformer.h[1].attn.c_proj.bias):
        tensor.data.zero_()
    return untested(module, "zeroed")  # the self-test would find that attention does nothing


@pytest.mark.parametrize("name", ["atp", "ig:2", "relp"])
def test_sites_that_surrounding_edits_cut_off_score_zero(name: str) -> None:
    """As under exact patching; without surrounding edits a missing gradient is an error."""
    model, task = model_of("gpt2", torch.float64), swap_task(n=2)
    with pl.intervene(model, pl.Edit("L2.resid_post", torch.linspace(-1, 1, 16))):
        for method in (get_method("exact"), get_method(name)):
            scores = scores_of(method, model, task, ["resid_pre", "z"])
            for site in scores.sites:
                np.testing.assert_allclose(scores.data[site], 0, atol=1e-12)
        constant = Metric("constant", lambda logits, a: torch.ones(len(logits)))
    with pytest.raises(InterventionError, match="must be differentiable in the logits"):
        scores_of(get_method(name), model, swap_task(metric=constant), "z")


@pytest.mark.parametrize("name", ["exact", "atp"])
def test_nested_edits_compose_outer_first(name: str) -> None:
    model, task = model_of("gpt2", torch.float64), swap_task(n=2)
    value = torch.linspace(-1, 1, 16, dtype=torch.float64)  # not a constant, which LayerNorm would take out again
    replaced, scaled = pl.Edit("L1.mlp_out", value), pl.Edit("L1.mlp_out", 3.0, op="scale")
    found = {}
    for label, outer, inner in (("replace, scale", replaced, scaled), ("scale, replace", scaled, replaced)):
        with pl.intervene(model, outer), pl.intervene(model, inner):
            found[label] = scores_of(get_method(name), model, task, "z")
    for label, factor in (("replace, scale", 3), ("scale, replace", 1)):
        with pl.intervene(model, pl.Edit("L1.mlp_out", factor * value)):
            expected = scores_of(get_method(name), model, task, "z")
        np.testing.assert_allclose(found[label].data["z"], expected.data["z"], atol=1e-12)
        np.testing.assert_allclose(found[label].data.metric_clean, expected.data.metric_clean, atol=1e-12)
    assert not np.allclose(found["replace, scale"].data.metric_clean, found["scale, replace"].data.metric_clean)
    assert session_of(model).surrounding == ()


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_noise_does_not_depend_on_batches(name: str) -> None:
    model, task = model_of("gpt2", torch.float64), swap_task(n=4)
    with pl.intervene(model, pl.Edit("L0.resid_pre@2", pl.sources.noise(1.0, seed=3), op="add")):
        whole, parts = (scores_of(get_method(name), model, task, "resid_pre", batch_size=size) for size in (None, 3))
    plain = scores_of(get_method(name), model, task, "resid_pre")
    _agree(parts.data["resid_pre"].to_numpy(), whole.data["resid_pre"].to_numpy(), 1e-9, "batch size")
    assert not np.allclose(whole.data.metric_clean, plain.data.metric_clean)


def _clean_relative(logits: Tensor, answers: Answers) -> Tensor:
    clean = METRICS["logit_diff"](answers.clean_logits, answers)
    return METRICS["logit_diff"](logits, answers) - clean


@pytest.mark.parametrize("name", ["atp", "ig:2", "exact", "relp"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a_metric_that_needs_the_clean_run(name: str, direction: str) -> None:
    """Logit difference minus that of the clean run: the same effects as the logit difference, though it is measured against another run."""
    metric = Metric("relative", _clean_relative, columns="answers", needs_clean=True)
    model, method = model_of("gpt2", torch.float64), get_method(name)
    scores, expected = (scores_of(method, model, swap_task(metric=m), "z", direction) for m in (metric, "logit_diff"))
    _agree(scores.data["z"].to_numpy(), expected.data["z"].to_numpy(), 1e-9, name)
    np.testing.assert_allclose(scores.data.metric_clean, 0, atol=1e-12)


def test_neg_kl() -> None:
    """−KL(clean ‖ patched), summed over the vocabulary: zero at the clean run, and written out."""
    model, task = model_of("gpt2", torch.float64), swap_task(metric="neg_kl")
    scores = scores_of(pl.ActivationPatching(), model, task, "resid_post")
    (batch,) = task.batches()
    clean, corrupted = (model.run(tokens).logits[:, -1].softmax(-1) for tokens in (batch.clean, batch.corrupted))
    expected = -(clean * (clean / corrupted).log()).sum(-1)
    np.testing.assert_allclose(scores.data.metric_corrupted, expected, rtol=1e-9)
    np.testing.assert_allclose(scores.data.metric_clean, 0, atol=1e-12)
    np.testing.assert_allclose(scores.data["resid_post"].isel(layer=2, pos=4), -expected, rtol=1e-9)


def test_one_point_noising_with_neg_kl_is_refused() -> None:
    model, task = model_of("gpt2"), swap_task(metric="neg_kl")
    for name in ("atp", "relp"):
        with pytest.raises(MethodError, match=f"gradient of neg_kl vanishes at the clean run, so {name} in the noising direction .*denoising"):
            scores_of(get_method(name), model, task, "z", "noising")
        assert float(np.abs(scores_of(get_method(name), model, task, "z", "denoising").data["z"]).max()) > 1e-3
    assert float(np.abs(scores_of(get_method("ig:2"), model, task, "z", "noising").data["z"]).max()) > 1e-3


def test_queries_and_keys_are_not_scored_under_a_constant_pattern() -> None:
    model, task = model_of("llama"), swap_task()
    for name in ("relp-ah", "cp-lrp", "relp-ah+ig:2"):
        scores = scores_of(get_method(name), model, task, ["q", "k[layer,pos,kv_head]", "v", "pattern"])
        assert set(scores.not_scored) == {"q", "k[layer,pos,kv_head]"}
        assert "AHRule" in scores.not_scored["q"]
        assert np.isnan(scores.data["q"]).all()
        assert np.isfinite(scores.data["pattern"]).all()
        assert float(np.abs(scores.data["v"]).max()) > 1e-4
    alone = scores_of(get_method("relp-ah"), model, task, "q")
    assert alone.cost.backwards == 0
    assert set(alone.not_scored) == {"q"}


def test_user_composites_and_names(request: pytest.FixtureRequest) -> None:
    mine = Composite("mine", pattern=AHRule())
    register_preset("mine")(lambda: mine)
    request.addfinalizer(lambda: (PRESETS.pop("mine"), DESCRIPTIONS.pop("mine")))
    assert pl.RelevancePatching(mine).name == "mine"
    assert pl.IntegratedGradients(4, rules=mine).name == "mine+ig:4"
    assert pl.IntegratedGradients(4, "activations").name == "ig-activations:4"
    scores = scores_of(pl.RelevancePatching(mine), model_of("gpt2"), swap_task(), "z")
    assert scores.provenance["method"] == "mine"
    assert "AHRule()" in scores.provenance["method_options"]["rules"]


def test_method_names() -> None:
    for name in ("exact", "atp", "ig:5", "ig:12", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "relp+ig:5", "gim+ig:3"):
        assert get_method(name).name == name
    assert get_method("gradient+ig:4").name == "ig:4"
    for wrong in ("realp", "ig", "ig:", "ig:x", "gradient", "EXACT", "", "relp+ig"):
        valid = re.escape(f"Valid: {', '.join(sorted(METHODS))}.")
        with pytest.raises(MethodError, match=f"unknown method '{re.escape(wrong)}'.*{valid}"):
            get_method(wrong)
    with pytest.raises(pl.PatchlabError, match="unknown rule set 'rlp'; did you mean 'relp'"):
        get_method("rlp+ig:5")
    assert all(METHODS.values())
    assert {"exact", "atp", "ig:N", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "PRESET+ig:N"} <= set(METHODS)


def test_methods_are_frozen_values() -> None:
    assert get_method("relp") == pl.RelevancePatching("relp") != get_method("gim")
    assert len({get_method("ig:5"), pl.IntegratedGradients(5)}) == 1
    for method in (get_method("exact"), get_method("ig:5"), get_method("relp")):
        with pytest.raises(AttributeError):
            method.source = "zero"  # type: ignore[misc]
    assert replace(pl.ActivationPatching(), source="zero").source == "zero"


def test_an_edit_by_hand_is_a_cell_of_the_exact_map() -> None:
    model, task = model_of("llama", torch.float64), swap_task()
    scores = scores_of(pl.ActivationPatching(), model, task, ["z[layer,pos,head]", "k", "mlp_post"])
    (batch,) = task.batches()
    clean = model.run(batch.clean, keep=["z", "k", "mlp_post"])
    for site, address, cell in (
        ("z[layer,pos,head]", "L1.H2.z@3", {"layer": 1, "pos": 3, "head": 2}),
        ("k", "L1.H1.k", {"layer": 1, "kv_head": 1}),
        ("mlp_post", "L0.N7.mlp_post", {"layer": 0, "neuron": 7}),
    ):
        logits = model.run(batch.corrupted, edits=[pl.Edit(address, clean)]).logits[:, -1]
        effect = METRICS["logit_diff"](logits, batch.answers).numpy() - scores.data.metric_corrupted.to_numpy()
        np.testing.assert_allclose(scores.data[site].isel(cell), effect, atol=1e-7, err_msg=address)
        assert float(np.abs(effect).max()) > 1e-5
    assert isinstance(pl.Edit("L1.H2.z@3", clean).address, Site)


def test_bridged_copies_of_one_module_score_alike() -> None:
    """Nothing depends on which copy of the weights a model was built from."""
    one, two = (scores_of(get_method("relp"), model, swap_task(), "z") for model in (model_of("gpt2"), bridged(hf_module("gpt2"), "gpt2")))
    assert one.data.identical(two.data)
    assert one.provenance["model_fingerprint"] == two.provenance["model_fingerprint"]
