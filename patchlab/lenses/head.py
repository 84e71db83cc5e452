"""The head of a model, from the last state of the residual stream to logits: final norm, unembedding, and a scale or soft cap of the logits.

Logits are read with TransformerLens' ``logit_readout``, which runs the model's own final norm and refuses models whose logits are made
in another way; whether it gives this model's logits is tested once per model. Its direct logit attribution is not used: it needs compatibility
mode (a norm folded into the unembedding, which changes the residual basis), leaves out biases and soft caps, and has no neurons.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchlab.adapters import NormPlace
from patchlab.adapters.places import value_and_slope_at_zero
from patchlab.engine import Program, run
from patchlab.engine.hooks import ruled
from patchlab.engine.session import found_once
from patchlab.engine.trust.trials import tolerance, trial
from patchlab.errors import LensError, MetricError
from patchlab.host import precise
from patchlab.metrics import Answers, Metric
from patchlab.models import Model
from patchlab.rules import Composite, LNRule, graft

_CHUNK = 2**24  # logits at a time


def head_logits(model: Model, states: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
    """The logits of states, as the model makes those of its last one.

    Raises:
        LensError: a model whose logits are not made from the last state by its final norm and unembedding.
    """
    check_head(model)
    return _read(model, states)


def check_head(model: Model) -> None:
    """Check, once per model, that its head gives the model's logits from the last state.

    Raises:
        LensError: it does not.
    """
    if (problem := found_once(model, "head", lambda: _problem(model))) is not None:
        raise LensError(f"states of {model.name} cannot be read as tokens: {problem}")


def _read(model: Model, states: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
    return logit_readout(model.bridge, states, chunk_size=max(1, _CHUNK // model.vocab_size)).values


def _problem(model: Model) -> str | None:
    last = ("resid_post", model.arch.n_layers - 1)
    if "resid_post" in model.arch.absent:
        return f"it has no resid_post ({model.arch.absent['resid_post']})."
    tokens = trial(model).tokens
    with torch.no_grad():
        plain = run(model, Program(tokens, torch.arange(len(tokens), device=tokens.device), keep=(last,), logits="all"))
        try:
            got = _read(model, plain.activations[last]).float()
        except (ValueError, NotImplementedError, TypeError, RuntimeError, AttributeError) as error:
            return str(error).partition("\n")[0]
    if plain.logits is None or got.shape != plain.logits.shape:
        return f"its head gives logits of shape {list(got.shape)}."
    expected = plain.logits.float()
    allowed = 0.1 if model.dtype in (torch.bfloat16, torch.float16) else 10 * tolerance(whole=True)
    off = float((got - expected).abs().max() / (expected - expected.mean(-1, keepdim=True)).abs().max().clamp_min(1e-30))
    return None if off <= allowed else f"final norm and unembedding of the last state give other logits (off by {off:.2g} of their range)."


@dataclass(frozen=True)
class HeadView:
    """A metric as a linear function of a state: ``value = state · coefficient + norm_bias + logit_bias``.

    The denominator of the final norm is held, and a soft cap of the logits is the factor that it is at this state.
    """

    metric: Float[Tensor, " row"]
    coefficient: Float[Tensor, "row d_model"]
    norm_bias: Float[Tensor, " row"]
    logit_bias: Float[Tensor, " row"]


def head_view(model: Model, states: Float[Tensor, "row d_model"], metric: Metric, answers: Answers) -> HeadView:
    """The metric of the logits that states give, taken apart into what is linear in the state and what biases add.

    Raises:
        MetricError: a metric that reads all positions, or that is not linear in the logits.
        LensError: a model whose head cannot be read.
    """
    check_head(model)
    if metric.reads != "answer":
        raise MetricError(f"direct attribution reads the answer position, and the metric {metric.name} reads all. Use logit_diff.")
    bridge: Any = model.bridge
    norms = [place for place in model.arch.places if isinstance(place, NormPlace) and place.name == "ln_final"]
    x = states.detach()[:, None].requires_grad_()
    leaves = [f"{place.name}.hook_out" for place in norms]
    with torch.enable_grad(), ruled(model, Composite("held", norm=LNRule()).attach(tuple(norms)), leaves) as seen:
        y = bridge.ln_final(x) if norms else x
        raw = bridge.unembed(y)
        logits = _capped(model, raw)
        read = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
        values = metric(read, answers)
        inner = seen[leaves[0]] if norms else x
        at_x, at_y, at_raw, at_logits = torch.autograd.grad(values.sum(), [x, inner, raw, logits])
    _check_linear(metric, precise(values.detach()), (precise(at_logits) * precise(logits.detach()))[:, 0])
    bias = norms[0].bias if norms else None
    zeros = torch.zeros_like(values)
    by_norm = zeros if bias is None else (at_y[:, 0] * bias).sum(-1).to(values.dtype)
    by_logits = (at_raw[:, 0] * bridge.b_U).sum(-1).to(values.dtype)
    return HeadView(values.detach(), at_x[:, 0], by_norm.detach(), by_logits.detach())


def _capped(model: Model, raw: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row pos vocab"]:
    """Logits after what the architecture does to them, whose gradient is that of a constant factor."""
    transform = model.bridge.adapter.apply_output_logits_transform
    out = transform(raw.detach())
    if torch.equal(out, raw):
        return raw
    _, slope = value_and_slope_at_zero(transform, raw.device)
    factor = torch.where(raw == 0, slope, out / torch.where(raw == 0, 1.0, raw.detach()))
    return graft(out, raw * factor.detach())


def _check_linear(metric: Metric, values: Float[Tensor, " row"], by_logit: Float[Tensor, "row vocab"]) -> None:
    off = float((values - by_logit.sum(1)).abs().max())
    if off > 1e-2 * float(by_logit.abs().sum(1).max()):
        raise MetricError(
            f"direct attribution needs a metric that is linear in the logits, and {metric.name} is not (it differs from logits times its gradient by "
            f"{off:.2g}). Use task.with_metric('logit_diff')."
        )
