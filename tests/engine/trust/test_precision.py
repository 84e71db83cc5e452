"""Half precision against float64 twins: rules, gradients, and how far results are from those of the same weights in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import bridged, hf_module, model_of, scores_of, swap_task
from torch import Tensor, nn

import patchlab as pl
from patchlab.adapters import LinearPlace, NormPlace
from patchlab.engine import Program, continues, resume, run, session_of, support, sweep
from patchlab.engine.trust.edges import edge_support
from patchlab.engine.trust.precision import in_single_precision
from patchlab.errors import ModelError
from patchlab.metrics import METRICS, Answers
from patchlab.models import Model
from patchlab.rules import PRESETS, graft
from patchlab.rules.composites import DESCRIPTIONS
from patchlab.rules.linear import EpsilonRule, GammaRule
from patchlab.rules.nonlinear import IdentityRule, LNRule, TemperatureRule

HALVES = (torch.float16, torch.bfloat16)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""


def _slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function at each entry."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("f", [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.relu], ids=["gelu", "tanh", "silu", "relu"])
def test_identity_rule(f: Any, dtype: torch.dtype) -> None:
    """f(x)/x down to the smallest subnormal number, where float16 has no f(x) left, and up to the largest."""
    sizes = torch.cat([torch.logspace(-7.2, 1.3, 400, dtype=torch.float64), torch.tensor([6e-8, 300.0, 6e4])])
    x = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0])]).to(dtype)
    exact = _slopes(lambda v: IdentityRule().surrogate(f, v), x.double())
    got = _slopes(lambda v: IdentityRule().surrogate(f, v), x).double()
    # GELU far below zero is what float32 leaves of 1 + erf
    assert float(((got - exact).abs() / (exact.abs() + 1e-3)).max()) <= 1.01 * UNIT[dtype]


@pytest.mark.parametrize("temperature", [1.5, 2.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_temperature_rule(dtype: torch.dtype, temperature: float) -> None:
    """As the models do it: the softmax in float32, its result in half precision, a sixth of it below float16's normal numbers."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(2, 4, 40, 40, dtype=torch.float64, generator=generator) * 4).to(dtype)
    weights = torch.randn(scores.shape, dtype=torch.float64, generator=generator).to(dtype)
    mask = torch.ones(40, 40, dtype=torch.bool).triu(1)

    def gradient(of: torch.dtype) -> Tensor:
        s = scores.to(of).requires_grad_()
        pattern = s.masked_fill(mask, -torch.inf).softmax(-1, dtype=torch.promote_types(of, torch.float32)).to(of)
        assert of == torch.float64 or float(((pattern > 0) & (pattern < 6e-5)).float().mean()) > 0.1
        value = graft(pattern, TemperatureRule(temperature).surrogate(pattern))
        return torch.autograd.grad((value * weights.to(of)).sum(), s)[0].double()

    expected, got = gradient(torch.float64), gradient(dtype)
    assert float((got - expected).norm() / expected.norm()) < UNIT[dtype]
    assert float((got - expected).abs().max() / expected.abs().max()) < 2 * UNIT[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", [EpsilonRule(1e-6), EpsilonRule(0.01), GammaRule()], ids=str)
def test_linear_rules(rule: EpsilonRule | GammaRule, dtype: torch.dtype) -> None:
    """Also where an output is zero, which only ε keeps from 0 / 0, and ε itself is below what float16 can hold."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(6, 8, bias=False, dtype=torch.float64)
    module.weight.data = (torch.randn(8, 6, dtype=torch.float64, generator=generator) * 0.5).to(dtype).double()
    module.weight.data[3] = 0.0
    x = torch.randn(5, 6, dtype=torch.float64, generator=generator).to(dtype).double()
    arriving = torch.randn(5, 8, dtype=torch.float64, generator=generator).to(dtype).double()

    def gradient(of: torch.dtype) -> Tensor:
        layer = nn.Linear(6, 8, bias=False, dtype=of)
        layer.weight.data = module.weight.data.to(of)
        place, leaf = LinearPlace("linear", "out", module=SimpleNamespace(original_component=layer)), x.to(of).requires_grad_()
        y = leaf @ layer.weight.T
        return torch.autograd.grad((graft(y, rule.surrogate(place, leaf, y)) * arriving.to(of)).sum(), leaf)[0].double()

    got, expected = gradient(dtype), gradient(torch.float64)
    assert bool(torch.isfinite(got).all())
    # a sum near zero under γ divides by what rounding leaves of it
    assert float((got - expected).norm() / expected.norm()) < (4 if isinstance(rule, EpsilonRule) else 40) * UNIT[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("centred", [True, False])
def test_norm_rule(centred: bool, size: float, dtype: torch.dtype) -> None:
    """With the denominator in float32, as the models have it, also where x² would overflow in float16."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 32, dtype=torch.float64, generator=generator) * size).to(dtype)
    arriving = torch.randn(4, 32, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(32, dtype=torch.float64, generator=generator).to(dtype)

    def gradient(of: torch.dtype) -> Tensor:
        wide = torch.promote_types(of, torch.float32)
        norm = SimpleNamespace(weight=weight.to(of))
        place = NormPlace("norm", "out", module=SimpleNamespace(uses_rms_norm=not centred, original_component=norm, uses_weight_offset=False))
        leaf = x.to(of).requires_grad_()
        scale = leaf.detach().to(wide).pow(2).mean(-1, keepdim=True).sqrt()
        y = LNRule().surrogate(place, leaf, scale).to(of)
        return torch.autograd.grad((y * arriving.to(of)).sum(), leaf)[0].double()

    got, expected = gradient(dtype), gradient(torch.float64)
    assert float(((got - expected).abs() / (expected.abs() + UNIT[dtype] * expected.abs().max())).max()) < 4 * UNIT[dtype]


@cache
def _pair(family: str, dtype: torch.dtype) -> tuple[Model, Model]:
    """A model in half precision, and the same (rounded) weights in float64."""
    half = hf_module(family, torch.float64).to(dtype)
    return bridged(half, family), bridged(hf_module(family, torch.float64).to(dtype).to(torch.float64), family)


def _saturated(scale: float) -> Any:
    """prob_diff of logits so far apart that its gradient is below float16's range."""
    return pl.metrics.Metric("sharp", lambda logits, answers: METRICS["prob_diff"](logits * scale, answers), unit="probability")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["atp", "relp", "ig:2"])
def test_gradients_below_the_range_of_float16_are_kept(name: str, dtype: torch.dtype) -> None:
    task = swap_task(n=4, metric=_saturated(4.0))
    half, wide = _pair("gpt2", dtype)
    got, expected = (scores_of(pl.methods.get_method(name), model, task, ["resid_pre", "z"]) for model in (half, wide))
    smallest = [float(np.abs(expected.data["resid_pre"][e]).max()) for e in range(4)]
    assert min(smallest) < 6e-5  # the gradients are smaller still than their products with differences
    for site in ("resid_pre", "z"):
        for e in range(4):
            one, other = got.data[site][e].to_numpy(), expected.data[site][e].to_numpy()
            # a probability near 0 changes by as many times itself as its logit is rounded by: 4 × logits of about 8
            assert np.linalg.norm(one - other) <= 64 * UNIT[dtype] * np.linalg.norm(other), (site, e)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_edges(dtype: torch.dtype) -> None:
    half, wide = _pair("llama", dtype)
    got, expected = (scores_of(pl.RelevancePatching("relp"), model, swap_task(), "edges").data["edges"].to_numpy() for model in (half, wide))
    assert float(np.abs(got - expected).max()) < 16 * UNIT[dtype] * float(np.abs(expected).max())


class _Steep(LNRule):
    def surrogate(self, place: NormPlace, x: Tensor, scale: Tensor) -> Tensor:
        return 1e4 * super().surrogate(place, x, scale)


def test_a_gradient_that_overflows_is_an_error(request: pytest.FixtureRequest) -> None:
    half, _ = _pair("gpt2", torch.float16)
    steep = pl.rules.Composite("steep", norm=_Steep())
    pl.rules.register_preset("steep")(lambda: steep)
    request.addfinalizer(lambda: (PRESETS.pop("steep"), DESCRIPTIONS.pop("steep")))
    with pytest.raises(ModelError, match=r"the gradient at L0.resid_pre of gpt2 overflows in float16. Load it with dtype='bfloat16' or 'float32'"):
        scores_of(pl.RelevancePatching(steep), half, swap_task(), "resid_pre")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_fast_ways_are_checked_in_single_precision_and_used(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the tolerance of float32: cached values that are a tenth larger are noticed, and nothing right is refused."""
    model = bridged(hf_module(family, torch.float64).to(dtype), family)
    assert (support(model).mode, edge_support(model).mode, continues(model)) == ("prefix", "prefix", True)
    assert all(parameter.dtype == dtype for parameter in model.bridge.parameters())
    right = resume.beginning

    def off(cache: Any, start: int) -> Any:
        cache = right(cache, start)
        for layer in cache.layers:
            layer.values *= 1.1
        return cache

    monkeypatch.setattr(resume, "beginning", off)
    session_of(model).found.pop("rest")
    assert not continues(model)


def test_gradients_in_single_precision() -> None:
    """Against the same weights in float64."""
    half, wide = _pair("gpt2", torch.bfloat16)
    (batch,) = swap_task().batches()
    at = (("resid_pre", 0), ("z", 1))
    program = Program(batch.clean, batch.examples, metric=METRICS["logit_diff"], answers=batch.answers, gradients=at)
    with in_single_precision(half):
        got = run(half, program).gradients
    expected = run(wide, program).gradients
    for key in at:
        assert float((got[key].double() - expected[key]).abs().max()) < 1e-5 * float(expected[key].abs().max())
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.bridge.parameters())


def test_metrics_of_half_precision_are_computed_in_single() -> None:
    model = model_of("gpt2", torch.bfloat16)
    tokens = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    answers = Answers.of([[0], [1]], [[2], [3]], "cpu")
    result = run(model, Program(tokens, torch.arange(2), metric=METRICS["logit_diff"], answers=answers, logits="all"))
    assert result.logits is not None
    assert result.values is not None
    expected = METRICS["logit_diff"](result.logits[:, -1].float(), answers)
    assert result.values.dtype == torch.float32
    torch.testing.assert_close(result.values, expected, rtol=0, atol=0)


@pytest.mark.parametrize("half", HALVES)
def test_swept_metrics_of_half_precision_are_computed_in_single(half: torch.dtype) -> None:
    model, seen = model_of("gpt2", half), list[torch.dtype]()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    answers = Answers.of([[0], [1]], [[2], [3]], "cpu")
    plain = METRICS["logit_diff"]

    def recorded(logits: Tensor, answers: Answers) -> Tensor:
        seen.append(logits.dtype)
        return plain.function(logits if logits.ndim == 2 else logits[:, -1], answers)

    for options in ({"columns": "answers"}, {"columns": "vocabulary"}, {"columns": "vocabulary", "reads": "all"}):
        program = Program(tokens, torch.arange(2), metric=replace(plain, function=recorded, **options), answers=answers)
        edit = pl.Edit("L1.resid_pre@2", pl.sources.zero())
        found = sweep(model, program, [(edit,)])
        expected = run(model, replace(program, metric=plain, edits=(edit,))).values
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0], expected, rtol=0, atol=8 * UNIT[half])
    assert {*seen} == {torch.float32}
