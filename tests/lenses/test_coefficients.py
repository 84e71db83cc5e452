"""Coefficients and relevance at sites, and conservation, against derivatives by differences and what must hold exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, mixed_task, model_of, swap_task

import patchlab as pl
from patchlab import lenses
from patchlab.errors import MethodError, MetricError, RuleError, SiteError
from patchlab.sources import Kept
from patchlab.testing.zoo import HEADS, LAYERS, WIDTH, zoo_model


def metric_of(model, task, edits=()):
    prompts = task.prompts("clean")
    return task.metric(model.run(prompts, edits=edits).logits[:, -1], task.batches()[0].answers)


def moved(model, task, site, kind, layer, direction, step):
    """The metric with an activation moved along a direction."""
    prompts = task.prompts("clean")
    own = model.run(prompts, keep=site).activations[kind, layer]
    source = Kept({(kind, layer): own + step * direction}, prompts.examples)
    return metric_of(model, task, [pl.Edit(site, source)])


@pytest.mark.parametrize(
    ("site", "dims"),
    [
        ("input", ("example", "pos", "d_model")),
        ("L1.resid_mid", ("example", "pos", "d_model")),
        ("L1.z", ("example", "pos", "head", "d_head")),
        ("L1.k", ("example", "pos", "kv_head", "d_head")),
        ("L1.mlp_post", ("example", "pos", "neuron")),
        ("L1.pattern", ("example", "head", "dest", "src")),
    ],
)
def test_a_gradient_is_the_slope_of_the_metric(site, dims):
    model, task = model_of("gpt2", torch.float64), swap_task()
    found = pl.coefficients(model, task, site)
    assert found.dims == dims
    wanted = pl.Site.parse(site)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down = (moved(model, task, site, wanted.kind, wanted.layer, direction, step) for step in (1e-4, -1e-4))
    slope = (up - down) / 2e-4
    np.testing.assert_allclose((found.to_numpy() * direction.numpy()).reshape(3, -1).sum(1), slope, atol=1e-4 * float(slope.abs().max()))


def test_attribution_patching_is_a_difference_times_the_coefficient():
    model, task = model_of("llama", torch.float64), swap_task()
    for rules in ("gradient", "relp"):
        method = pl.AttributionPatching() if rules == "gradient" else pl.RelevancePatching(rules)
        scores = method.run(model, task, "z[layer,pos,head]", direction="denoising", progress=False)
        coefficient = pl.coefficients(model, task, "z", rules=rules, side="corrupted")
        clean, corrupted = (model.run(task.prompts(side), keep="z").activations for side in ("clean", "corrupted"))
        difference = np.stack([(clean["z", layer] - corrupted["z", layer]).numpy() for layer in range(LAYERS)], 1)
        assert coefficient.dims == ("example", "layer", "pos", "head", "d_head")
        expected = (difference * coefficient.to_numpy()).sum(-1)
        np.testing.assert_allclose(np.nan_to_num(scores.data["z[layer,pos,head]"].to_numpy()), expected, atol=1e-6)


def test_addresses_narrow_layer_unit_and_positions():
    model, task = model_of("gpt2", torch.float64), mixed_task()
    whole = pl.coefficients(model, task, "z")
    assert list(whole["position"].to_numpy()) == ["A", "B", "END"]
    one = pl.coefficients(model, task, "L1.H2.z@B")
    assert one.dims == ("example", "d_head")
    assert (int(one["layer"]), int(one["head"]), str(one["position"].to_numpy())) == (1, 2, "B")
    np.testing.assert_array_equal(one, whole.sel(layer=1).isel(head=2, pos=1))
    last = pl.coefficients(model, task, "L1.resid_post@-1,A")
    np.testing.assert_array_equal(last.isel(pos=0), pl.coefficients(model, task, "resid_post").sel(layer=1).isel(pos=2))
    np.testing.assert_allclose(pl.coefficients(model, task, "z", batch_size=1), whole, atol=1e-12)
    pattern = pl.coefficients(model, swap_task(), "L1.H2.pattern@END<1")
    assert pattern.dims == ("example",)
    np.testing.assert_array_equal(pattern, pl.coefficients(model, swap_task(), "pattern")[:, 1, 2, 4, 1])
    assert pl.coefficients(model, swap_task(), "L1.q").shape == (3, 5, HEADS, WIDTH // HEADS)


def test_tokens_are_those_of_the_side():
    task = swap_task()
    found = pl.coefficients(model_of("gpt2"), task, "input", side="corrupted")
    assert list(found["token"].to_numpy()[1]) == [f"[{token}]" for token in task.pairs[1].corrupted_ids]
    assert found.attrs["rules"] == "gradient"


def test_relevance_is_activation_times_coefficient():
    model, task = model_of("gpt2", torch.float64), swap_task()
    found = lenses.relevance(model, task, "resid_pre", rules="relp")
    coefficient = pl.coefficients(model, task, "resid_pre", rules="relp")
    kept = model.run(task.prompts("clean"), keep="resid_pre").activations
    values = np.stack([kept["resid_pre", layer].numpy() for layer in range(LAYERS)], 1)
    assert found.dims == ("example", "layer", "pos")
    np.testing.assert_allclose(found, (values * coefficient.to_numpy()).sum(-1), atol=1e-12)


def test_what_has_no_coefficient_is_refused():
    model, task = model_of("gpt2"), swap_task()
    with pytest.raises(SiteError, match="edges is no activation"):
        pl.coefficients(model, task, "edges")
    with pytest.raises(RuleError, match="constant, so no gradient reaches"):
        pl.coefficients(model, task, "q", rules="relp-ah")
    with pytest.raises(RuleError, match="cannot cover|does not cover"):
        pl.coefficients(zoo_model("qwen3-next"), task, "resid_pre", rules="relp")
    with pytest.raises(SiteError, match="no position 'S2'"):
        pl.coefficients(model, task, "L1.z@S2")
    with pytest.raises(MethodError, match="vanishes at the clean"):
        pl.coefficients(model, swap_task(metric="neg_kl"), "z")
    assert float(abs(pl.coefficients(model, swap_task(metric="neg_kl"), "z", side="corrupted")).max()) > 0


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "cohere", "phi"])
def test_with_every_non_linearity_held_relevance_and_biases_are_the_metric(family):
    model, task = (model_of if family in FAMILIES else zoo_model)(family, torch.float64), swap_task(1)
    rules = pl.rules.get_composite("lrp[ln,identity,half,ah,gate,softcap]")
    found = lenses.conservation(model, task, [rules]).table()
    # norms in float32 round, and the metric can be small beside its parts
    np.testing.assert_allclose(found["total"], 1, atol=3e-5)
    assert len(found) == LAYERS + 1


def test_shares_by_rules_are_ratios_of_means():
    model = model_of("gpt2", torch.float64)
    task = swap_task(4)
    solved = zip(task.pairs, task.solved(model), strict=True)
    task = replace(task, pairs=tuple(pair if up else replace(pair, correct=pair.incorrect, incorrect=pair.correct) for pair, up in solved))
    found = lenses.conservation(model, task, ["gradient", "relp"])
    table = found.table().set_index(["rules", "layer"])
    for rules in ("gradient", "relp"):
        stream = lenses.relevance(model, task, "resid_pre", rules=rules).sum("pos")
        np.testing.assert_allclose(
            [table.loc[(rules, layer), "stream"] for layer in range(LAYERS)], stream.mean("example") / found.data["metric"].mean(), atol=1e-9
        )
    np.testing.assert_allclose(found.data["metric"], metric_of(model, task), atol=1e-12)
    assert (table["low"] <= table["stream"]).all()
    assert (table["stream"] <= table["high"]).all()
    assert "stream + biases before layer 0: gradient" in repr(found)


def test_shares_of_nothing_are_refused():
    model = model_of("gpt2")
    task = swap_task(1)
    there_and_back = replace(task, pairs=(task.pairs[0], replace(task.pairs[0], correct=task.pairs[0].incorrect, incorrect=task.pairs[0].correct)))
    with pytest.raises(MetricError, match="cannot be told from zero"):
        lenses.conservation(model, there_and_back, ["gradient"])
