"""Every rule against a slow, literal float64 twin, and every preset against whole models written out in plain torch."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, GATED, bridged, hf_module, model_of, native_model, scores_of, swap_task
from torch import Tensor, nn

import patchlab as pl
from patchlab.adapters import AttentionPlace, LinearPlace, MLPPlace, NormPlace, Place
from patchlab.engine import Program, run
from patchlab.errors import RuleError, SiteError
from patchlab.metrics import METRICS, Answers
from patchlab.rules import (
    PRESETS,
    AHRule,
    Composite,
    ConstantGateRule,
    EpsilonRule,
    GammaRule,
    HalfRule,
    IdentityRule,
    LNRule,
    TemperatureRule,
    UniformRule,
    attachments,
    coverage,
    get_composite,
    graft,
    scale_gradient,
)
from patchlab.testing.zoo import zoo_model

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[output, input], one backward pass per output."""
    x = x.clone().requires_grad_()
    y = function(x).flatten()
    return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in y])


def _norm_place(module: nn.Module, *, rms: bool, offset: bool = False) -> NormPlace:
    bridge_like = SimpleNamespace(original_component=module, uses_rms_norm=rms, uses_weight_offset=offset)
    return NormPlace("norm", "norm.hook_out", module=bridge_like)


def test_graft_and_scale_gradient() -> None:
    x = _random(4).requires_grad_()
    value = graft(x**2, 3 * x)
    assert torch.equal(value, x**2)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(gradient, torch.full((4,), 3.0, dtype=torch.float64))
    value = scale_gradient(x, 0.25)
    assert torch.equal(value, x)
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["layernorm", "rms", "gemma", "no weight"])
def test_ln_rule(kind: str) -> None:
    """dy_j = w_j (dx_j − mean dx) / s for LayerNorm, w_j dx_j / s for RMS, (1 + w_j) for Gemma; entry by entry."""
    d, eps = 5, 1e-5
    x, w = _random(d), _random(d, seed=1)
    centred = kind in ("layernorm", "no weight")
    module = nn.Module() if kind == "no weight" else nn.LayerNorm(d, dtype=torch.float64)
    if kind != "no weight":
        module.weight.data = w
        module.bias.data = _random(d, seed=2)
    place = _norm_place(module, rms=not centred, offset=kind == "gemma")

    def rule(x: Tensor) -> Tensor:
        middle = x - x.mean() if centred else x
        scale = (middle.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return LNRule().surrogate(place, x, scale)

    mean = float(x.mean()) if centred else 0.0
    s = math.sqrt(sum((float(v) - mean) ** 2 for v in x) / d + eps)
    factor = {"no weight": torch.ones(d, dtype=torch.float64), "gemma": 1 + w}.get(kind, w)
    expected = torch.zeros(d, d, dtype=torch.float64)
    for j in range(d):
        for i in range(d):
            expected[j, i] = float(factor[j]) / s * ((i == j) - (1 / d if centred else 0))
    torch.testing.assert_close(_jacobian(rule, x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_identity_rule(name: str) -> None:
    f = ACTIVATIONS[name]
    x = torch.cat([_random(6) * 3, torch.tensor([0.0, -0.0, 1e-200, -1e-9], dtype=torch.float64)])
    surrogate = IdentityRule().surrogate(f, x)
    torch.testing.assert_close(surrogate, f(x), rtol=1e-12, atol=0)
    at_zero = 0.0 if name == "relu" else 0.5
    slopes = [float(f(v) / v) if v != 0 else at_zero for v in x]
    jacobian = _jacobian(lambda v: IdentityRule().surrogate(f, v), x)
    torch.testing.assert_close(jacobian, torch.diag(torch.tensor(slopes, dtype=torch.float64)), rtol=1e-12, atol=0)
    assert jacobian.diagonal()[6:8].tolist() == [at_zero, at_zero]


def test_identity_rule_refuses_an_activation_that_is_not_zero_at_zero() -> None:
    for f, value in ((F.softplus, "0.693147"), (torch.sigmoid, "0.5"), (torch.cos, "1")):
        with pytest.raises(RuleError, match=rf"Identity-rule needs .* f\(0\) = 0; this one has f\(0\) = {value}"):
            IdentityRule().surrogate(f, _random(3))


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("identity", [True, False])
def test_half_rule(name: str, identity: bool) -> None:
    """With Identity ½(p/g) dg + ½(p/u) du, written with divisions where nothing is zero; without ½ f'(g) u dg + ½ f(g) du."""
    f = ACTIVATIONS[name]
    g, u = _random(7) * 2, _random(7, seed=1)
    g[0], u[1], g[2], u[2] = 0.0, 0.0, 0.0, 0.0

    def rule(both: Tensor) -> Tensor:
        g, u = both[:7], both[7:]
        return HalfRule().surrogate(IdentityRule().surrogate(f, g) if identity else f(g), u)

    expected = torch.zeros(7, 14, dtype=torch.float64)
    for i in range(7):
        gi, ui = g[i].clone().requires_grad_(), u[i]
        (slope,) = torch.autograd.grad(f(gi), gi)
        p = f(g[i]) * ui
        if identity:
            to_gate = p / g[i] if g[i] != 0 else 0.5 * ui  # f(g)/g tends to f'(0) = ½
            to_linear = p / ui if ui != 0 else f(g[i])
        else:
            to_gate, to_linear = slope * ui, f(g[i])
        expected[i, i], expected[i, 7 + i] = 0.5 * to_gate, 0.5 * to_linear
    got = _jacobian(rule, torch.cat([g, u]))
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_constant_gate_rule() -> None:
    """dp = f(g) du; nothing reaches the gate."""
    g, u = _random(5), _random(5, seed=1)
    got = _jacobian(lambda both: ConstantGateRule().surrogate(F.silu(both[:5]), both[5:]), torch.cat([g, u]))
    torch.testing.assert_close(got, torch.cat([torch.zeros(5, 5, dtype=torch.float64), torch.diag(F.silu(g))], 1), rtol=1e-14, atol=0)


def _scores(seed: int = 0, length: int = 5) -> tuple[Tensor, Tensor]:
    scores = _random(1, 2, length, length, seed=seed) * 2
    return scores, torch.ones(length, length, dtype=torch.bool).triu(1)


def _pattern(scores: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    return (scores.masked_fill(mask, -torch.inf) / temperature).softmax(-1)


def test_ah_rule() -> None:
    scores, mask = _scores()
    scores.requires_grad_()
    pattern = _pattern(scores, mask)
    assert not AHRule().surrogate(pattern).requires_grad
    assert AHRule().blocks_scores
    assert not TemperatureRule().blocks_scores


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_temperature_rule_from_the_pattern_equals_its_definition_from_the_scores(temperature: float) -> None:
    """A.detach() + T · d softmax(s / T), though only the pattern is given."""
    scores, mask = _scores()
    weights = _random(*scores.shape, seed=1)
    s = scores.clone().requires_grad_()
    pattern = _pattern(s, mask)
    (got,) = torch.autograd.grad((graft(pattern, TemperatureRule(temperature).surrogate(pattern)) * weights).sum(), s)
    s = scores.clone().requires_grad_()
    value = _pattern(s, mask).detach() + temperature * (_pattern(s, mask, temperature) - _pattern(s, mask, temperature).detach())
    (expected,) = torch.autograd.grad((value * weights).sum(), s)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    assert float(expected.abs().max()) > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_temperature_rule_gives_masked_positions_nothing(dtype: torch.dtype) -> None:
    """In float16 the smallest normal number is large enough for a clamped log-pattern to leak."""
    length = 40
    pattern = torch.zeros(1, 1, 1, length, dtype=dtype)
    pattern[..., :2] = 0.5
    surrogate = TemperatureRule().surrogate(pattern)
    torch.testing.assert_close(surrogate.float(), torch.tensor([1.0, 1.0] + [0.0] * (length - 2)).reshape(1, 1, 1, -1), rtol=0, atol=1e-6)


def test_temperature_rule_with_underflowing_and_masked_entries_is_finite() -> None:
    scores = torch.tensor([[[[0.0, -95.0, -200.0, 0.5]]]], requires_grad=True)
    pattern = scores.masked_fill(torch.tensor([False, False, False, True]), -torch.inf).softmax(-1)
    (gradient,) = torch.autograd.grad((TemperatureRule().surrogate(pattern) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), scores)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) < 1e-6


def test_temperature_rule_refuses_rows_that_do_not_sum_to_one() -> None:
    with pytest.raises(RuleError, match=r"rows sum to one.*attention sinks"):
        TemperatureRule().surrogate(torch.full((1, 1, 2, 2), 0.3))


def _linear_place(d_in: int, d_out: int, *, bias: bool) -> tuple[LinearPlace, Tensor, Tensor]:
    module = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    module.weight.data = _random(d_out, d_in, seed=3)
    if bias:
        module.bias.data = _random(d_out, seed=4)
    b = module.bias.data if bias else torch.zeros(d_out, dtype=torch.float64)
    return LinearPlace("linear", "linear.hook_out", module=SimpleNamespace(original_component=module)), module.weight.data, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_epsilon_rule(epsilon: float, bias: bool) -> None:
    """R_i = Σ_j x_i w_ij / (z_j + ε sign z_j) · R_j with R_j = y_j · (gradient at y_j); z_j includes the bias."""
    place, w, b = _linear_place(4, 6, bias=bias)
    x, arriving = _random(4), _random(6, seed=5)
    xg = x.clone().requires_grad_()
    y = xg @ w.T + b
    value = graft(y, EpsilonRule(epsilon).surrogate(place, xg, y))
    assert torch.equal(value, y)
    (gradient,) = torch.autograd.grad((value * arriving).sum(), xg)
    relevance = [0.0] * 4
    for j in range(6):
        z = sum(float(x[i] * w[j, i]) for i in range(4)) + float(b[j])
        for i in range(4):
            relevance[i] += float(x[i] * w[j, i]) / (z + math.copysign(epsilon, z)) * z * float(arriving[j])
    torch.testing.assert_close(x * gradient, torch.tensor(relevance, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0])
def test_gamma_rule(gamma: float, bias: bool) -> None:
    """Contributions c_ij = x_i w_ij (and b_j) of the sign of y_j count 1 + γ times, the others once, in numerator and denominator."""
    place, w, b = _linear_place(5, 8, bias=bias)
    x, arriving = _random(5, seed=7), _random(8, seed=5)
    xg = x.clone().requires_grad_()
    y = xg @ w.T + b
    assert {True, False} == set((y > 0).tolist()), "both cases"
    value = graft(y, GammaRule(gamma).surrogate(place, xg, y))
    (gradient,) = torch.autograd.grad((value * arriving).sum(), xg)
    w, b, y = w.detach(), b.detach(), y.detach()
    relevance = torch.zeros(5, dtype=torch.float64)
    for j in range(8):
        sign = 1 if y[j] > 0 else -1
        favoured = [float(x[i] * w[j, i]) for i in range(5)]
        favoured = [c * (1 + gamma) if c * sign > 0 else c for c in favoured]
        own = float(b[j]) * (1 + gamma) if float(b[j]) * sign > 0 else float(b[j])
        total = sum(favoured) + own
        for i in range(5):
            relevance[i] += favoured[i] / total * float(y[j]) * float(arriving[j])
    torch.testing.assert_close(x * gradient, relevance, rtol=1e-6, atol=1e-8)


def _gradients(model: Any, rules: str | Composite | None, where: tuple[tuple[str, int | None], ...], task: Any = None) -> dict[Any, Tensor]:
    task = swap_task() if task is None else task
    (batch,) = task.batches()
    composite = None if rules is None else get_composite(rules)
    return dict(
        run(model, Program(batch.corrupted, batch.examples, rules=composite, gradients=where, metric=task.metric, answers=batch.answers)).gradients
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "native"])
def test_uniform_rule_halves_pattern_and_values_and_quarters_queries_and_keys(family: str) -> None:
    """In the last layer, where nothing else is shared on the way to the logits."""
    model = model_of(family, torch.float64)
    where = tuple((kind, model.arch.n_layers - 1) for kind in ("pattern", "v", "q", "k", "z", "attn_out"))
    plain, uniform = (_gradients(model, rules, where) for rules in (None, Composite("uniform", bilinear=UniformRule())))
    for (kind, layer), share in zip(where, (0.5, 0.5, 0.25, 0.25, 1, 1), strict=True):
        assert float(plain[kind, layer].abs().max()) > 1e-4
        torch.testing.assert_close(uniform[kind, layer], share * plain[kind, layer], rtol=1e-6, atol=1e-9)


def test_ah_rule_keeps_the_gradient_of_pattern_and_values() -> None:
    model = model_of("gpt2", torch.float64)
    where = (("pattern", 2), ("v", 2), ("pattern", 1))
    plain, held = (_gradients(model, rules, where) for rules in (None, Composite("ah", pattern=AHRule())))
    for key in where[:2]:
        torch.testing.assert_close(held[key], plain[key], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(held["pattern", 1], plain["pattern", 1], rtol=0.05), "layer 2's queries and keys read layer 1"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_leave_the_forward_pass_alone_bit_for_bit(family: str) -> None:
    model = model_of(family)
    tokens = swap_task().batches()[0].corrupted
    examples = torch.arange(len(tokens))
    composites = [
        *PRESETS.values(),
        Composite("linear", linear=EpsilonRule()),
        Composite("all", linear=GammaRule(), norm=LNRule(), bilinear=UniformRule()),
    ]
    plain = run(model, Program(tokens, examples, logits="all")).logits
    for composite in composites:
        # with and without a graph: the gradient's presence must not change a bit either
        task = swap_task()
        (batch,) = task.batches()
        with_graph = Program(
            tokens,
            examples,
            rules=composite,
            logits="all",
            gradients=(("resid_pre", 0),),
            metric=task.metric,
            answers=batch.answers,
            keep=(("resid_post", 2),),
        )
        assert torch.equal(run(model, with_graph).logits, plain), composite.name
        assert torch.equal(run(model, replace(with_graph, gradients=())).logits, plain), composite.name


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


@dataclass(frozen=True)
class _Scale(Place):
    """A kind of place that only this test knows."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ("activation", "gate")


def test_a_new_kind_of_place_is_a_class_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "ATTACHING", dict(attachments.ATTACHING))
    model = model_of("gpt2")
    place = _Scale("blocks.1.scale", "blocks.1.hook_mlp_out")
    other = _with_places(model, (*model.arch.places, place))
    relp = get_composite("relp")
    with pytest.raises(RuleError, match=r"no rule is known for _Scale blocks\.1\.scale\. Register a function"):
        relp.attach((place,))
    given = []

    @attachments.attaching(_Scale)
    def scale(place: _Scale, activation: Any, gate: Any) -> list[attachments.Attachment]:
        given.append((activation, gate))
        return [attachments.Attachment(place.at, (), lambda value, seen: value.detach())]

    assert relp.rules_at(place) == ("IdentityRule", "ConstantGateRule")
    assert ("blocks.1.scale", "_scale", "IdentityRule + ConstantGateRule") in coverage(other, relp).rows
    assert Composite("norms", norm=LNRule()).attach((place,)) == ()
    site, kept = ("mlp_out", 0), ("resid_pre", 0)
    plain, held = (_gradient_at(which, site, kept) for which in (model, other))
    assert given[-1] == (relp.activation, relp.gate)
    assert not torch.equal(plain, held)
    broken = _Scale("blocks.1.scale", "", problem="it is odd")
    with pytest.raises(RuleError, match=r"cannot cover blocks\.1\.scale: it is odd\. Use a composite without activation and gate rules"):
        relp.attach((broken,))
    with pytest.raises(RuleError, match="rules are put on a _Scale by scale already"):
        attachments.attaching(_Scale)(scale)


def _gradient_at(model: Any, *sites: Any) -> torch.Tensor:
    answers = Answers.of([[0]], [[1]], "cpu")
    composite = get_composite("relp", allow_gaps=True)
    program = Program(torch.tensor([[3, 11, 7]]), torch.arange(1), rules=composite, gradients=sites, metric=METRICS["logit_diff"], answers=answers)
    return run(model, program).gradients[sites[0]]


def _with_places(model: Any, places: tuple[Any, ...]) -> Any:
    """A stand-in with other places."""
    other = copy.copy(model)
    other.arch = replace(model.arch, places=places)
    return other


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
    model = _with_places(model_of("llama"), (*model_of("llama").arch.places, place))
    rules = Composite("linear", linear=EpsilonRule()) if composite == "linear" else PRESETS[composite]
    with pytest.raises(RuleError, match=message):
        rules.attach(model.arch.places)
    with pytest.raises(RuleError, match=message):
        _gradients(model, rules, (("resid_pre", 0),))
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
        whole = _gradients(model, preset, where)[where[0]]
        for field in fields:
            part = _gradients(model, replace(preset, **{field: None}), where)[where[0]]
            change = float((part - whole).norm() / whole.norm())
            if (name, field) == ("cp-lrp", "activation"):  # a constant gate leaves nothing for it to do in a gated MLP
                assert change < 1e-5
            else:
                assert change > 0.01, f"{name} without {field}"
    model = model_of("gpt2")  # and in a plain MLP
    for name in ("relp", "cp-lrp"):
        whole, off = (_gradients(model, rules, where)[where[0]] for rules in (name, replace(PRESETS[name], activation=None)))
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
    got = _gradients(model, composite, where, task)
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
    plain, capped = (_gradients(model_of("gemma2"), rules, (("resid_pre", 0),))["resid_pre", 0] for rules in (PRESETS[preset], composite))
    assert float((plain - capped).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("wrong", ["ln", LNRule, IdentityRule()], ids=["a name", "a class", "a rule for something else"])
def test_a_composite_takes_rules_of_the_right_kind(wrong: Any) -> None:
    composite = Composite("mine")
    object.__setattr__(composite, "norm", wrong)  # the shape checks of the tests would refuse it earlier
    with pytest.raises(RuleError, match=r"the norm rule of the composite 'mine' must be a NormRule, such as LNRule\(\); got"):
        composite.__post_init__()
