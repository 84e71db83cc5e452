"""Every rule against a slow, literal float64 twin, and every preset against whole models written out in plain torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, model_of, swap_task
from rule_gradients import gradients, with_places
from torch import Tensor, nn

from patchlab.adapters import LinearPlace, NormPlace, Place
from patchlab.engine import Program, run
from patchlab.errors import RuleError
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


@pytest.mark.parametrize("family", ["gpt2", "llama", "native"])
def test_uniform_rule_halves_pattern_and_values_and_quarters_queries_and_keys(family: str) -> None:
    """In the last layer, where nothing else is shared on the way to the logits."""
    model = model_of(family, torch.float64)
    where = tuple((kind, model.arch.n_layers - 1) for kind in ("pattern", "v", "q", "k", "z", "attn_out"))
    plain, uniform = (gradients(model, rules, where) for rules in (None, Composite("uniform", bilinear=UniformRule())))
    for (kind, layer), share in zip(where, (0.5, 0.5, 0.25, 0.25, 1, 1), strict=True):
        assert float(plain[kind, layer].abs().max()) > 1e-4
        torch.testing.assert_close(uniform[kind, layer], share * plain[kind, layer], rtol=1e-6, atol=1e-9)


def test_ah_rule_keeps_the_gradient_of_pattern_and_values() -> None:
    model = model_of("gpt2", torch.float64)
    where = (("pattern", 2), ("v", 2), ("pattern", 1))
    plain, held = (gradients(model, rules, where) for rules in (None, Composite("ah", pattern=AHRule())))
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
    other = with_places(model, (*model.arch.places, place))
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
