"""Cotangents taken back by a kept run against one backward pass each."""

import pytest
import torch
from families import model_of

import patchlab as pl
from patchlab.engine.pullback import pullback
from patchlab.errors import InterventionError
from patchlab.rules import get_composite

TOKENS = torch.tensor([[3, 7, 1, 20], [5, 2, 9, 9]])
HOOKS = ("hook_embed", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre", "blocks.1.hook_attn_out")


@pytest.mark.parametrize("rules", ["gradient", "relp", "gim", "cp-lrp"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_many_cotangents_are_many_backward_passes(family, rules):
    model = model_of(family, torch.float64)
    run = pullback(model, TOKENS, get_composite(rules).attach(model.arch.places), HOOKS)
    value = run.values["blocks.2.hook_resid_pre"]
    cotangents = torch.randn(5, *value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = run("blocks.2.hook_resid_pre", cotangents, ("hook_embed", "blocks.1.hook_attn_out"))
    for name, gradients in found.items():
        assert gradients.shape == (5, *run.values[name].shape)
        for cotangent, gradient in zip(cotangents, gradients, strict=True):
            (expected,) = torch.autograd.grad(run._leaves["blocks.2.hook_resid_pre"], run._leaves[name], cotangent, retain_graph=True)
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert float(found["hook_embed"].abs().max()) > 0.01


def test_values_and_logits_are_those_of_a_plain_run():
    model = model_of("gpt2", torch.float64)
    run, plain = pullback(model, TOKENS, (), HOOKS), model.run(TOKENS, keep=["L2.resid_pre", "L0.mlp_out"])
    assert torch.equal(run.logits, plain.logits)
    assert torch.equal(run.values["blocks.2.hook_resid_pre"], plain["L2.resid_pre"])
    assert torch.equal(run.values["blocks.0.hook_mlp_out"], plain["L0.mlp_out"])


def test_where_no_path_leads_there_is_zero():
    model = model_of("gpt2", torch.float64)
    run = pullback(model, TOKENS, (), HOOKS)
    cotangents = torch.ones(2, *run.values["hook_embed"].shape, dtype=torch.float64)
    assert not run("hook_embed", cotangents, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"].any()
    assert not run("blocks.0.hook_mlp_out", cotangents, ["blocks.1.hook_attn_out"])["blocks.1.hook_attn_out"].any()
    assert run("blocks.0.hook_mlp_out", cotangents, []) == {}


def test_hooks_are_gone_and_unknown_ones_are_refused():
    model = model_of("gpt2", torch.float64)
    run = pullback(model, TOKENS, get_composite("relp").attach(model.arch.places), HOOKS)
    assert not any(point._forward_hooks for point in model.bridge.hook_dict.values())
    with pytest.raises(InterventionError, match="did not keep the hook blocks.1.hook_z"):
        run("blocks.1.hook_z", torch.zeros(1, 2, 4), ["hook_embed"])
    with pytest.raises(InterventionError, match="has no hook blocks.9.hook_mlp_out"):
        pullback(model, TOKENS, (), ["blocks.9.hook_mlp_out"])
    with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.zero())), pytest.raises(InterventionError, match="no edits"):
        pullback(model, TOKENS, (), HOOKS)
