"""Coverage: every preset covers every family, and a composite fails closed where something is not covered."""

from typing import Any

import pytest
import torch.nn.functional as F
from families import FAMILIES, GATED, bridged, hf_module, model_of, native_model, scores_of, swap_task
from rule_gradients import gradients, with_places
from torch import Tensor, nn

import patchlab as pl
from patchlab.adapters import AttentionPlace, LinearPlace, MLPPlace, NormPlace
from patchlab.errors import RuleError, SiteError
from patchlab.rules import (
    PRESETS,
    Composite,
    EpsilonRule,
    coverage,
)
from patchlab.testing.zoo import zoo_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_covers_every_family(family: str) -> None:
    model = model_of(family)
    for name in PRESETS:
        report = coverage(model, name)
        assert report.complete, report
    rows = {module: (kind, rules) for module, kind, rules in coverage(model, "relp").rows}
    gated = family in GATED
    for layer in range(3):
        assert rows[f"blocks.{layer}.ln1"] == ("norm", "LNRule")
        assert rows[f"blocks.{layer}.ln2"] == ("norm", "LNRule")
        assert rows[f"blocks.{layer}.mlp"] == ("mlp", "IdentityRule + HalfRule" if gated else "IdentityRule")
        assert rows[f"blocks.{layer}.attn"] == ("attention", "plain gradient")
    assert rows["ln_final"] == ("norm", "LNRule")
    norms = [module for module, (kind, _) in rows.items() if kind == "norm"]
    # two per block and the final one; q- and k-norms; norms after attention and MLP
    assert len(norms) == {"qwen3": 4 * 3 + 1, "gemma2": 4 * 3 + 1}.get(family, 2 * 3 + 1)


def test_coverage_text() -> None:
    text = str(coverage(model_of("llama"), "cp-lrp"))
    assert text.startswith("cp-lrp: 13 places, all covered\n")
    assert "  blocks.0.mlp   mlp        IdentityRule + ConstantGateRule\n" in text
    assert "  blocks.2.attn  attention  AHRule" in text
    assert "linear" not in text
    linear = coverage(model_of("llama"), Composite("eps", linear=EpsilonRule()))
    assert [kind for _, kind, _ in linear.rows].count("linear") == 7 * 3
    assert "  blocks.1.attn.o    linear     EpsilonRule" in str(linear)
    assert "blocks.0.mlp       mlp        plain gradient" in str(linear)


@pytest.mark.parametrize(
    ("place", "composite", "message"),
    [
        (
            MLPPlace("blocks.1.mlp", "", problem="MoEBridge has no single activation (a router)"),
            "relp",
            r"'relp' cannot cover blocks\.1\.mlp: MoEBridge .*router",
        ),
        (
            MLPPlace("blocks.1.mlp", "", problem="the activation function was not found"),
            "gim",
            r"'gim' cannot cover blocks\.1\.mlp: the activation .* not found",
        ),
        (
            NormPlace("blocks.0.odd", "", problem="OddNorm is not a norm that the Bridge opens"),
            "relp-ah",
            r"'relp-ah' cannot cover blocks\.0\.odd: OddNorm .*without norm",
        ),
        (
            AttentionPlace("blocks.0.attn", "", problem="the hooks ['hook_pattern'] are missing"),
            "attnlrp",
            r"cannot cover blocks\.0\.attn.*without attention rules",
        ),
        (
            LinearPlace("blocks.0.attn.o", "", problem="Quantised is not a plain linear map"),
            "linear",
            r"cannot cover blocks\.0\.attn\.o.*without linear rules",
        ),
    ],
)
def test_composites_fail_closed(place: Any, composite: str, message: str) -> None:
    model = with_places(model_of("llama"), (*model_of("llama").arch.places, place))
    rules = Composite("linear", linear=EpsilonRule()) if composite == "linear" else PRESETS[composite]
    with pytest.raises(RuleError, match=message):
        rules.attach(model.arch.places)
    with pytest.raises(RuleError, match=message):
        gradients(model, rules, (("resid_pre", 0),))
    report = coverage(model, rules)
    assert not report.complete
    assert f"NOT COVERED {place.name}: {place.problem}" in str(report)
    assert "1 cannot be covered" in str(report)
    assert PRESETS["gradient"].attach(model.arch.places) == ()


def test_experts_have_no_neurons_to_score() -> None:
    """What the Bridge calls their neurons is the output of the whole layer."""
    with pytest.raises(SiteError, match=r"no site mlp_post: .*shows the MLP's output \(a mixture of experts\?\)"):
        scores_of(pl.AttributionPatching(), zoo_model("mixtral", layers=2), swap_task(), "mlp_post")


def test_a_norm_that_the_bridge_does_not_open_is_found() -> None:
    class OddNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (1 + x.abs().mean(-1, keepdim=True))

    module = hf_module("gpt2")
    module.transformer.h[1].mlp.dropout = OddNorm()
    model = bridged(module, "odd")
    with pytest.raises(RuleError, match=r"cannot cover blocks\.1\.mlp\.dropout: OddNorm is not a norm"):
        scores_of(pl.RelevancePatching(), model, swap_task(), "resid_pre")
    scores_of(pl.AttributionPatching(), model, swap_task(), "resid_pre")


def test_an_activation_that_is_not_elementwise_is_found() -> None:
    model = native_model("solu", act_fn="solu")
    with pytest.raises(RuleError, match=r"blocks\.0\.mlp: its activation is not elementwise"):
        scores_of(pl.RelevancePatching(), model, swap_task(), "resid_pre")


def test_a_gate_that_computes_something_else_is_found() -> None:
    class Doubled(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (1 + self.up_proj(x)))

    module = hf_module("llama")
    module.model.layers[2].mlp = Doubled(module.model.layers[2].mlp)
    with pytest.raises(RuleError, match=r"blocks\.2\.mlp: its output is not f\(g\) · u \(off by"):
        scores_of(pl.RelevancePatching("gim"), bridged(module, "doubled"), swap_task(), "resid_pre")


def test_an_mlp_without_a_known_activation_is_found() -> None:
    class Inline(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    module = hf_module("llama")
    module.model.layers[0].mlp = Inline(module.model.layers[0].mlp)
    with pytest.raises(RuleError, match=r"blocks\.0\.mlp: the activation function of Inline was not found"):
        scores_of(pl.RelevancePatching(), bridged(module, "inline"), swap_task(), "resid_pre")


def test_identity_rule_refuses_a_whole_model_with_softplus() -> None:
    module = hf_module("gpt2")
    for block in module.transformer.h:
        block.mlp.act = nn.Softplus()
    model = bridged(module, "softplus")
    with pytest.raises(RuleError, match=r"f\(0\) = 0; this one has f\(0\) = 0\.693"):
        scores_of(pl.RelevancePatching(), model, swap_task(), "resid_pre")
