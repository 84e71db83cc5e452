"""The literal engine: order at a hook, hooks that go away, exact gradients, and refusals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import VOCAB, bridged, hf_module, model_of, scores_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.adapters.places import Activation
from patchlab.engine import Program, Result, run, session_of
from patchlab.engine.program import targets
from patchlab.errors import InterventionError, MetricError, ModelError, SiteError
from patchlab.metrics import METRICS, Answers, Metric
from patchlab.models import Model
from patchlab.rules import AHRule, Composite
from patchlab.rules.rule import ActivationRule

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
ROWS = torch.arange(3)
ANSWERS = Answers.of([[1], [2], [3]], [[4], [5], [6]])
DIFF = METRICS["logit_diff"]


def _program(**options: Any) -> Program:
    return Program(TOKENS, ROWS, **options)


def _gradients(model: Model, *at: tuple[str, int | None], **options: Any) -> Result:
    return run(model, _program(gradients=at, metric=DIFF, answers=ANSWERS, **options))


def _hooks(model: Model) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.bridge.modules() for kind in kinds]


@pytest.fixture
def untouched() -> Any:
    """Checks, when the test is over, that the GPT-2 model has the hooks, weights and state it had before."""
    model = model_of("gpt2")
    before, weights = _hooks(model), {name: parameter.clone() for name, parameter in model.bridge.named_parameters()}
    logits = model.run(TOKENS).logits
    yield model
    assert _hooks(model) == before
    assert all(torch.equal(weights[name], parameter) and not parameter.requires_grad for name, parameter in model.bridge.named_parameters())
    assert torch.equal(model.run(TOKENS).logits, logits)
    assert session_of(model).surrounding == ()
    assert torch.is_grad_enabled()


@dataclass(frozen=True)
class _Scaled(ActivationRule):
    """The activation's own gradient, times a factor."""

    factor: float

    def surrogate(self, f: Activation, g: Tensor) -> Tensor:
        return self.factor * f(g)


# --- order ---------------------------------------------------------------------------------------------------------------


def test_the_rule_comes_before_the_edits() -> None:
    """An edit that scales the neurons must scale the rule's gradient: the rule is about the module, not about the edit."""
    model = model_of("gpt2", torch.float64)
    edit = pl.Edit("L1.mlp_post", 3.0, op="scale")
    plain = _gradients(model, ("resid_pre", 1), edits=(edit,)).gradients["resid_pre", 1]
    same = _gradients(model, ("resid_pre", 1), edits=(edit,), rules=Composite("one", activation=_Scaled(1.0))).gradients["resid_pre", 1]
    other = _gradients(model, ("resid_pre", 1), edits=(edit,), rules=Composite("two", activation=_Scaled(2.0))).gradients["resid_pre", 1]
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)
    assert (other - plain).abs().max() > 1e-2


def test_capture_comes_after_the_edits_and_edits_in_their_order() -> None:
    model = model_of("gpt2")
    plain = model.run(TOKENS, keep="L1.z")["L1.z"]
    add, double = pl.Edit("L1.z", 1.0, op="add"), pl.Edit("L1.z", 2.0, op="scale")
    torch.testing.assert_close(model.run(TOKENS, edits=[add, double], keep="L1.z")["L1.z"], (plain + 1) * 2)
    torch.testing.assert_close(model.run(TOKENS, edits=[double, add], keep="L1.z")["L1.z"], plain * 2 + 1)


def test_two_sites_that_share_a_hook_are_edited_in_program_order() -> None:
    """The stream after attention is written through the attention's output."""
    model = model_of("gpt2", torch.float64)
    keep = ["L1.resid_pre", "L1.attn_out", "L1.resid_mid"]
    before = model.run(TOKENS, keep=keep)["L1.resid_pre"]
    shift = torch.randn(before.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention, stream = pl.Edit("L1.attn_out", shift, op="add"), pl.Edit("L1.resid_mid", pl.sources.zero())
    first = model.run(TOKENS, edits=[attention, stream], keep=keep)
    torch.testing.assert_close(first["L1.resid_mid"], torch.zeros_like(before), atol=1e-12, rtol=0)
    torch.testing.assert_close(first["L1.attn_out"], -before, atol=1e-12, rtol=0)
    second = model.run(TOKENS, edits=[stream, attention], keep=keep)
    torch.testing.assert_close(second["L1.resid_mid"], shift.expand_as(before), atol=1e-12, rtol=0)
    torch.testing.assert_close(second["L1.attn_out"], shift - before, atol=1e-12, rtol=0)


def test_a_site_reads_what_earlier_edits_made_of_its_companion() -> None:
    model = model_of("gpt2", torch.float64)
    result = model.run(TOKENS, edits=[pl.Edit("L1.resid_pre", 5.0)], keep=["L1.resid_mid", "L1.attn_out"])
    torch.testing.assert_close(result["L1.resid_mid"], 5 + result["L1.attn_out"], rtol=1e-12, atol=1e-12)


# --- nothing stays -------------------------------------------------------------------------------------------------------


class _BoomError(RuntimeError):
    pass


def _boom(*args: Any, **options: Any) -> Tensor:
    raise _BoomError


class _BoomSource:
    values = staticmethod(_boom)


class _BoomRule(ActivationRule):
    surrogate = _boom


def test_nothing_stays_after_success(untouched: Model) -> None:
    result = _gradients(
        untouched, ("z", 1), ("resid_mid", 0), keep=(("q", 2),), edits=(pl.Edit("L0.v", pl.sources.zero()),), rules=pl.rules.PRESETS["relp"]
    )
    assert not result.gradients["z", 1].requires_grad
    assert not result.activations["q", 2].requires_grad
    assert result.values is not None
    assert not result.values.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"metric": Metric("boom", _boom)},
        {"edits": (pl.Edit("L1.z", _BoomSource()),)},
        {"rules": Composite("boom", activation=_BoomRule())},
    ],
    ids=["metric", "edit", "rule"],
)
def test_nothing_stays_after_an_exception(untouched: Model, options: dict[str, Any]) -> None:
    with pytest.raises(_BoomError), pl.intervene(untouched, pl.Edit("L0.z", 0.0)):
        run(untouched, replace(_program(gradients=(("z", 0),), metric=DIFF, answers=ANSWERS), **options))


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig:2"])
def test_nothing_stays_after_a_method_whose_metric_fails(untouched: Model, method: str) -> None:
    with pytest.raises(_BoomError):
        scores_of(pl.methods.get_method(method), untouched, swap_task(metric=Metric("boom", _boom)), ["z", "resid_mid"])


def test_what_is_kept_is_a_copy(untouched: Model) -> None:
    kinds = list(untouched.arch.sites)
    first = untouched.run(TOKENS, keep=kinds)
    expected = {key: value.clone() for key, value in first.activations.items()}
    starts = [value.data_ptr() for value in first.activations.values()]
    assert len(set(starts)) == len(starts)
    for value in first.activations.values():
        value.fill_(7.0)
    again = untouched.run(TOKENS, keep=kinds)
    assert all(torch.equal(again.activations[key], value) for key, value in expected.items())


def test_changing_a_source_after_the_run_does_not_change_the_result(untouched: Model) -> None:
    value = torch.zeros(3, 5, 4, 4)
    result = untouched.run(TOKENS, edits=[pl.Edit("L1.z", value)], keep="L1.z")
    value.fill_(3.0)
    assert not result["L1.z"].any()


# --- gradients -----------------------------------------------------------------------------------------------------------


# step and tolerance: only GPT-2 computes in float64 throughout; the others round softmax or norms to float32
STEPS = {"gpt2": (1e-5, 1e-6), "neox": (1e-3, 5e-3), "neox-sequential": (1e-3, 5e-3), "llama": (1e-3, 5e-3), "gemma2": (1e-3, 5e-3)}


@pytest.mark.parametrize("family", ["gpt2", "neox-sequential", "llama"])
def test_the_gradient_at_resid_mid_is_that_of_the_whole_stream(family: str) -> None:
    """Against finite differences of the untouched Hugging Face model, moved where its attention writes to the stream."""
    layer, (step, rtol) = 1, STEPS[family]
    model = model_of(family, torch.float64)
    module = hf_module(family, dtype=torch.float64)
    blocks = {"gpt2": "transformer.h", "neox-sequential": "gpt_neox.layers", "llama": "model.layers"}[family]
    attention = module.get_submodule(f"{blocks}.{layer}.{ {'gpt2': 'attn', 'neox-sequential': 'attention', 'llama': 'self_attn'}[family] }")
    gradient = _gradients(model, ("resid_mid", layer)).gradients["resid_mid", layer]
    direction = torch.randn(gradient.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def metric(distance: float) -> Tensor:
        handle = attention.register_forward_hook(lambda m, i, output: (output[0] + distance * direction, *output[1:]))
        with torch.no_grad():
            logits = module(TOKENS).logits[:, -1]
        handle.remove()
        return DIFF(logits, ANSWERS)

    expected = (metric(step) - metric(-step)) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_every_gradient_agrees_with_finite_differences_of_edits(family: str) -> None:
    model = model_of(family, torch.float64)
    step, rtol = STEPS[family]
    generator = torch.Generator().manual_seed(2)
    for kind in model.arch.sites:
        target = (kind, None if kind == "input" else 1)
        gradient = _gradients(model, target).gradients[target]
        direction = torch.randn(gradient.shape[1:], dtype=torch.float64, generator=generator)
        site = kind if kind == "input" else f"L1.{kind}"
        edits = [pl.Edit(site, sign * step * direction, op="add") for sign in (1, -1)]
        after, before = (run(model, _program(edits=(edit,), metric=DIFF, answers=ANSWERS)).values for edit in edits)
        expected = (after - before) / (2 * step)
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), expected, rtol=rtol, atol=rtol * float(expected.abs().max()), msg=kind)


def test_many_gradients_at_once_equal_one_at_a_time() -> None:
    model = model_of("gpt2", torch.float64)
    every = tuple(target for kind in model.arch.sites for target in targets(kind, model.arch))
    together = _gradients(model, *every).gradients
    assert set(together) == set(every)
    for target in every[::4]:
        torch.testing.assert_close(_gradients(model, target).gradients[target], together[target], rtol=1e-12, atol=1e-14)


def test_rows_do_not_interact() -> None:
    model = model_of("llama", torch.float64)
    together = _gradients(model, ("z", 1), ("resid_pre", 0), keep=(("pattern", 2),))
    for row in range(3):
        one = torch.tensor([row])
        alone = run(
            model,
            Program(TOKENS[one], one, gradients=(("z", 1), ("resid_pre", 0)), keep=(("pattern", 2),), metric=DIFF, answers=ANSWERS.rows(one)),
        )
        torch.testing.assert_close(alone.values, together.values[one], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(alone.activations["pattern", 2], together.activations["pattern", 2][one], rtol=1e-12, atol=1e-14)
        for key, value in alone.gradients.items():
            torch.testing.assert_close(value, together.gradients[key][one], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_the_last_logits_alone_give_the_same_metric_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, torch.float64)
    assert model.keeps_logits
    short = _gradients(model, ("resid_pre", 1))
    full = _gradients(model, ("resid_pre", 1), logits="all")
    monkeypatch.setattr(model, "keeps_logits", False)
    without = _gradients(model, ("resid_pre", 1))
    assert short.logits is None
    assert full.logits.shape == (3, 5, VOCAB)
    for other in (full, without):
        torch.testing.assert_close(other.values, short.values, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other.gradients["resid_pre", 1], short.gradients["resid_pre", 1], rtol=1e-10, atol=1e-13)


def test_a_metric_of_all_positions_gets_all_of_them() -> None:
    metric = Metric("first and last", lambda logits, answers: logits[:, 0, 1] + logits[:, -1, 2], reads="all")
    model = model_of("gpt2")
    logits = model.run(TOKENS).logits
    got = run(model, _program(metric=metric, answers=ANSWERS)).values
    torch.testing.assert_close(got, logits[:, 0, 1] + logits[:, -1, 2])


def test_work_is_counted() -> None:
    model = model_of("gpt2")
    assert run(model, _program()).work == (1, 0, 15)
    assert _gradients(model, ("z", 0)).work == (1, 1, 15)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": (("zz", 0),)}, r"unknown site 'zz'; did you mean 'z'\?"),
        ({"keep": (("z", 3),)}, r"L3.z names layer 3, but this model has 3 \(layer 0 to 2\)"),
        ({"keep": (("z", None),)}, "an address of z needs its layer"),
        ({"keep": (("input", 0),)}, "input has no layers"),
        ({"gradients": (("resid", 0),), "metric": DIFF, "answers": ANSWERS}, "unknown site 'resid'"),
        ({"edits": (pl.Edit("L7.z", 0.0),)}, "L7.z names layer 7"),
        ({"edits": (pl.Edit("L0.H4.z", 0.0),)}, r"L0.H4.z names head 4, but this model has 4 \(head 0 to 3\)"),
    ],
)
def test_misspelt_places_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        run(model_of("gpt2"), _program(**options))


def test_a_hook_that_fires_twice_or_never_is_an_error() -> None:
    bridge = bridged(hf_module("gpt2"), "twice").bridge
    out = bridge.blocks[1].mlp.out
    kind = type(out)
    out.__class__ = type("Twice", (kind,), {"forward": lambda self, x: kind.forward(self, self.hook_in(x))})
    model = Model(bridge, "twice", test=False)
    with pytest.raises(
        InterventionError, match=r"the hook blocks.1.mlp.out.hook_in fired 2 times in one forward pass of twice; a site must be computed exactly once"
    ):
        model.run(TOKENS, keep="mlp_post")
    out.__class__ = type("Never", (kind,), {"forward": lambda self, x: self.original_component(x)})
    with pytest.raises(InterventionError, match=r"fired 0 times"):
        model.run(TOKENS, edits=[pl.Edit("L1.mlp_post", 0.0)])
    assert model.run(TOKENS, keep="L2.mlp_post").activations


def test_a_site_without_gradient_is_an_error() -> None:
    rules = Composite("ah", pattern=AHRule())
    with pytest.raises(InterventionError, match="no gradient reaches q of layer 2; under these rules it cannot be scored"):
        _gradients(model_of("gpt2"), ("resid_pre", 0), ("q", 2), rules=rules)


def test_a_metric_without_gradient_is_an_error() -> None:
    metric = Metric("counted", lambda logits, answers: logits.detach()[:, 0])
    with pytest.raises(InterventionError, match=r"the metric does not depend on the sites .* \(it must be differentiable in the logits\)"):
        run(model_of("gpt2"), _program(gradients=(("z", 0),), metric=metric, answers=ANSWERS))


def test_gradients_and_metrics_need_their_parts() -> None:
    with pytest.raises(InterventionError, match="gradients need a metric and its answers; give both or ask for no gradients"):
        _program(gradients=(("z", 0),), metric=DIFF)
    with pytest.raises(InterventionError, match="a metric needs the answers of its rows"):
        run(model_of("gpt2"), _program(metric=DIFF))


def test_non_finite_logits_are_an_error() -> None:
    message = r"gpt2 gave non-finite logits \(NaN or infinity\) for 1 of 3 rows in torch.float32. Load it in another dtype .* or check the edits"
    edit = pl.Edit("L1.resid_pre", float("nan"), rows=torch.tensor([False, True, False]))
    with pytest.raises(ModelError, match=message):
        run(model_of("gpt2"), _program(edits=(edit,), metric=DIFF, answers=ANSWERS))


def test_a_metric_that_is_not_finite_is_an_error() -> None:
    metric = Metric("log", lambda logits, answers: (logits[:, 0] * 0).log())
    with pytest.raises(MetricError, match="metric 'log' is not finite for 3 of 3 rows, though the logits are"):
        run(model_of("gpt2"), _program(metric=metric, answers=ANSWERS))


def test_wrong_shapes_raise_under_the_shape_checks() -> None:
    from jaxtyping import TypeCheckError

    wrong: list[Callable[[], object]] = [
        lambda: Program(TOKENS[0], ROWS),
        lambda: Program(TOKENS, ROWS[:2]),
        lambda: Program(TOKENS.float(), ROWS),
        lambda: model_of("gpt2").run(TOKENS[None]),
    ]
    for make in wrong:
        with pytest.raises(TypeCheckError):
            make()


# --- results -------------------------------------------------------------------------------------------------------------


def test_a_result_gives_its_parts_by_address() -> None:
    model = model_of("llama")
    result = model.run(TOKENS, keep=["L1.z", "v", "L0.pattern", "L2.mlp_post", "input"])
    assert result["L1.z"].shape == (3, 5, 4, 4)
    assert torch.equal(result["L1.H2.z"], result["L1.z"][:, :, 2])
    assert torch.equal(result["L0.H3.pattern"], result["L0.pattern"][:, 3])
    assert torch.equal(result["L2.N7.mlp_post"], result["L2.mlp_post"][:, :, 7])
    assert result["L2.v"].shape == (3, 5, 2, 4)
    assert result["input"].shape == (3, 5, 16)
    assert repr(result) == f"Result(3 rows, logits [3, 5, {VOCAB}]; kept L1.z, L0.v, L1.v, L2.v, L0.pattern, L2.mlp_post, input)"
    assert repr(run(model, _program())) == "Result(3 rows, no logits; kept nothing)"
    with pytest.raises(InterventionError, match=r"this run did not keep L2.z; it kept L1.z, L0.v, .*, input. Add it to keep=\[...\]"):
        result["L2.z"]
    with pytest.raises(
        InterventionError, match=r"select positions of a kept activation by indexing the tensor; got L1.z@END. Drop everything from '@' on"
    ):
        result["L1.z@END"]


def test_shapes_of_every_site() -> None:
    result = model_of("gemma2").run(TOKENS, keep=list(model_of("gemma2").arch.sites))
    expected = {"z": (3, 5, 4, 4), "q": (3, 5, 4, 4), "k": (3, 5, 2, 4), "v": (3, 5, 2, 4), "pattern": (3, 4, 5, 5), "mlp_post": (3, 5, 12)}
    for (kind, _), value in result.activations.items():
        assert value.shape == expected.get(kind, (3, 5, 16)), kind
