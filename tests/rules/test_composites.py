"""Presets against whole models written out in plain torch, with the rules where they act; and what a composite takes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import hf_module, model_of, swap_task
from rule_gradients import gradients
from torch import Tensor

import patchlab as pl
from patchlab.errors import RuleError
from patchlab.rules import (
    PRESETS,
    Composite,
    IdentityRule,
    LNRule,
    get_composite,
)


def test_rule_names_are_never_ignored() -> None:
    for wrong in ("relpp", "RelP", "ln", "", "relp+ah"):
        with pytest.raises(RuleError, match=r"unknown rule set .*Valid: attnlrp, cp-lrp, gim, gradient, relp, relp-ah"):
            pl.RelevancePatching(wrong)
        with pytest.raises(RuleError, match="unknown rule set"):
            get_composite(wrong)
        with pytest.raises(RuleError, match="unknown rule set"):
            pl.IntegratedGradients(3, rules=wrong)
    with pytest.raises(RuleError, match="did you mean 'relp-ah'"):
        get_composite("relp-ha")
    with pytest.raises(TypeError, match="idenity"):
        Composite("mine", idenity=IdentityRule())  # type: ignore[call-arg]
    with pytest.raises((RuleError, TypeError)):
        get_composite(["relp"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rules'"):
        pl.AttributionPatching(rules="relp")  # type: ignore[call-arg]


def test_each_field_of_each_preset_changes_the_gradient() -> None:
    """No rule of a preset is silently off: leaving any one out gives other scores (the Identity-rule among them)."""
    expected = {
        "relp": ("norm", "activation", "product"),
        "relp-ah": ("norm", "activation", "product", "pattern"),
        "attnlrp": ("norm", "activation", "product", "bilinear"),
        "cp-lrp": ("norm", "activation", "product", "pattern"),
        "gim": ("norm", "product", "pattern", "bilinear"),
    }
    model = model_of("llama")
    where = (("resid_pre", 0),)
    for name, fields in expected.items():
        preset = PRESETS[name]
        used = tuple(field for field in ("norm", "activation", "product", "pattern", "bilinear", "linear") if getattr(preset, field) is not None)
        assert used == fields
        whole = gradients(model, preset, where)[where[0]]
        for field in fields:
            part = gradients(model, replace(preset, **{field: None}), where)[where[0]]
            change = float((part - whole).norm() / whole.norm())
            if (name, field) == ("cp-lrp", "activation"):  # a constant gate leaves nothing for it to do in a gated MLP
                assert change < 1e-5
            else:
                assert change > 0.01, f"{name} without {field}"
    model = model_of("gpt2")  # and in a plain MLP
    for name in ("relp", "cp-lrp"):
        whole, off = (gradients(model, rules, where)[where[0]] for rules in (name, replace(PRESETS[name], activation=None)))
        assert float((whole - off).norm() / whole.norm()) > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Whole models in plain torch, with the rules written out where they act. Nothing of patchlab is used below.


def _constant_value(value: Tensor, gradient_of: Tensor) -> Tensor:
    return value.detach() + (gradient_of - gradient_of.detach())


class PlainRules:
    """The presets, as flags."""

    def __init__(self, preset: str, *, caps: bool = False) -> None:
        self.caps = caps
        self.ln = preset != "gradient"
        self.identity = preset in ("relp", "relp-ah", "attnlrp", "cp-lrp")
        self.half = preset in ("relp", "relp-ah", "attnlrp", "gim")
        self.constant_gate = preset == "cp-lrp"
        self.constant_pattern = preset in ("relp-ah", "cp-lrp")
        self.uniform = preset in ("attnlrp", "gim")
        self.temperature = 2.0 if preset == "gim" else None

    def divide(self, x: Tensor, s: Tensor) -> Tensor:
        return x / (s.detach() if self.ln else s)

    def activate(self, f: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        return g * (f(g) / g).detach() if self.identity else f(g)

    def gate(self, f: Callable[[Tensor], Tensor], g: Tensor, u: Tensor) -> Tensor:
        a = self.activate(f, g)
        if self.constant_gate:
            return f(g).detach() * u
        product = a * u
        return _constant_value(product, 0.5 * product) if self.half else product

    def cap(self, x: Tensor, cap: float) -> Tensor:
        y = cap * (x / cap).tanh()
        return x * (y / x).detach() if self.caps else y

    def bilinear(self, product: Tensor) -> Tensor:
        return _constant_value(product, 0.5 * product) if self.uniform else product

    def softmax(self, scores: Tensor) -> Tensor:
        pattern = scores.softmax(-1)
        if self.constant_pattern:
            return pattern.detach()
        if self.temperature is not None:
            return _constant_value(pattern, self.temperature * (scores / self.temperature).softmax(-1))
        return pattern


def _layer_norm(x: Tensor, norm: Any, rules: PlainRules) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    s = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return rules.divide(centred, s) * norm.weight + norm.bias


def _rms_norm(x: Tensor, norm: Any, rules: PlainRules) -> Tensor:
    return rules.divide(x, (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()) * norm.weight


def _attend(q: Tensor, k: Tensor, v: Tensor, rules: PlainRules, *, cap: float | None = None, window: int | None = None) -> Tensor:
    """[row, head, pos, d_head] each; grouped k and v are repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = rules.bilinear(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores if cap is None else rules.cap(scores, cap)
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mask = mask if window is None else mask | torch.ones_like(mask).tril(-window)
    z = rules.bilinear(rules.softmax(scores.masked_fill(mask, -torch.inf)) @ v)
    return z.transpose(1, 2).flatten(2)


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def plain_gpt2(module: Any, tokens: Tensor, rules: PlainRules) -> tuple[Tensor, list[Tensor]]:
    h = module.transformer
    x = h.wte.weight[tokens] + h.wpe.weight[: tokens.shape[1]]
    streams = []
    for block in h.h:
        x = x if x.requires_grad else x.detach().requires_grad_()
        streams.append(x)
        n = _layer_norm(x, block.ln_1, rules)
        q, k, v = (n @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)
        z = _attend(_heads(q, 4), _heads(k, 4), _heads(v, 4), rules)
        x = x + z @ block.attn.c_proj.weight + block.attn.c_proj.bias
        g = _layer_norm(x, block.ln_2, rules) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
        x = x + rules.activate(lambda t: F.gelu(t, approximate="tanh"), g) @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    return _layer_norm(x, h.ln_f, rules) @ module.lm_head.weight.T, streams


def _rotate(x: Tensor, theta: float) -> Tensor:
    d = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin


def plain_llama(module: Any, tokens: Tensor, rules: PlainRules) -> tuple[Tensor, list[Tensor]]:
    m = module.model
    x = m.embed_tokens.weight[tokens]
    streams = []
    for layer in m.layers:
        x = x if x.requires_grad else x.detach().requires_grad_()
        streams.append(x)
        n, a = _rms_norm(x, layer.input_layernorm, rules), layer.self_attn
        q, k, v = (_heads(n @ w.weight.T, n_heads) for w, n_heads in ((a.q_proj, 4), (a.k_proj, 2), (a.v_proj, 2)))
        x = x + _attend(_rotate(q, 10000.0), _rotate(k, 10000.0), v, rules) @ a.o_proj.weight.T
        n, p = _rms_norm(x, layer.post_attention_layernorm, rules), layer.mlp
        x = x + rules.gate(F.silu, n @ p.gate_proj.weight.T, n @ p.up_proj.weight.T) @ p.down_proj.weight.T
    return _rms_norm(x, m.norm, rules) @ module.lm_head.weight.T, streams


def plain_gemma2(module: Any, tokens: Tensor, rules: PlainRules) -> tuple[Tensor, list[Tensor]]:
    m = module.model

    def norm(x: Tensor, norm: Any) -> Tensor:
        return rules.divide(x, (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()) * (1 + norm.weight)

    x = m.embed_tokens.weight[tokens] * math.sqrt(16)
    streams = []
    for layer, window in zip(m.layers, (3, None, 3), strict=True):
        x = x if x.requires_grad else x.detach().requires_grad_()
        streams.append(x)
        n, a = norm(x, layer.input_layernorm), layer.self_attn
        q, k, v = (_heads(n @ w.weight.T, n_heads) for w, n_heads in ((a.q_proj, 4), (a.k_proj, 2), (a.v_proj, 2)))
        z = _attend(_rotate(q, 10000.0), _rotate(k, 10000.0), v, rules, cap=50.0, window=window)
        x = x + norm(z @ a.o_proj.weight.T, layer.post_attention_layernorm)
        n, p = norm(x, layer.pre_feedforward_layernorm), layer.mlp
        out = rules.gate(lambda t: F.gelu(t, approximate="tanh"), n @ p.gate_proj.weight.T, n @ p.up_proj.weight.T) @ p.down_proj.weight.T
        x = x + norm(out, layer.post_feedforward_layernorm)
    return rules.cap(norm(x, m.norm) @ module.lm_head.weight.T, 30.0), streams


WRITTEN_OUT = [("gpt2", plain_gpt2, 1e-10), ("llama", plain_llama, 5e-6), ("gemma2", plain_gemma2, 5e-6)]


def _assert_equal_written_out(family: str, plain: Callable[..., Any], rtol: float, composite: Composite, rules: PlainRules) -> None:
    """Gradients at every resid_pre, example by example. Llama and Gemma compute norms and softmax in float32 whatever their dtype."""
    task = swap_task(n=3, length=6)
    (batch,) = task.batches()
    model = model_of(family, torch.float64)
    where = tuple(("resid_pre", layer) for layer in range(model.arch.n_layers))
    got = gradients(model, composite, where, task)
    module = hf_module(family, torch.float64)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for e in range(len(task)):
        logits, streams = plain(module, batch.corrupted[e : e + 1], rules)
        torch.testing.assert_close(logits[0], model.run(batch.corrupted[e : e + 1]).logits[0], rtol=1e-5, atol=5e-6)
        metric = logits[0, -1, task.pairs[e].correct[0]] - logits[0, -1, task.pairs[e].incorrect[0]]
        expected = torch.autograd.grad(metric, streams)
        for layer, gradient in enumerate(expected):
            error = float((got["resid_pre", layer][e] - gradient[0]).norm() / gradient.norm())
            assert error < rtol, (layer, e, error)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("family", "plain", "rtol"), WRITTEN_OUT)
def test_presets_against_whole_models_written_out(family: str, plain: Callable[..., Any], rtol: float, preset: str) -> None:
    _assert_equal_written_out(family, plain, rtol, PRESETS[preset], PlainRules(preset))


@pytest.mark.parametrize("preset", ["relp", "gim"])
def test_the_rule_for_soft_caps_against_a_whole_model_written_out(preset: str) -> None:
    """Of the attention scores, of which only the capped ones are seen, and of the logits."""
    composite = replace(PRESETS[preset], softcap=IdentityRule())
    _assert_equal_written_out("gemma2", plain_gemma2, 5e-6, composite, PlainRules(preset, caps=True))
    plain, capped = (gradients(model_of("gemma2"), rules, (("resid_pre", 0),))["resid_pre", 0] for rules in (PRESETS[preset], composite))
    assert float((plain - capped).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("wrong", ["ln", LNRule, IdentityRule()], ids=["a name", "a class", "a rule for something else"])
def test_a_composite_takes_rules_of_the_right_kind(wrong: Any) -> None:
    composite = Composite("mine")
    object.__setattr__(composite, "norm", wrong)  # the shape checks of the tests would refuse it earlier
    with pytest.raises(RuleError, match=r"the norm rule of the composite 'mine' must be a NormRule, such as LNRule\(\); got"):
        composite.__post_init__()
