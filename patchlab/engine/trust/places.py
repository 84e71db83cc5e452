"""Local tests of places, at load: each module has to compute what a rule at its place takes it for.

Conservation cannot see everything: what q- and k-norms do ends in a pattern that is held, and a rule can sit at a hook from which nothing
flows on. So every place is tested on its own, with what it gets in a run on a few tokens. A place that fails notes the problem, and a composite
that has a rule for it refuses.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchlab.adapters import (
    LOGITS,
    AttentionPlace,
    BridgedModel,
    CapPlace,
    ClipPlace,
    ExpertsPlace,
    GatePlace,
    LinearPlace,
    MLPPlace,
    NormPlace,
    Place,
)
from patchlab.engine.hooks import hooked
from patchlab.engine.trust.precision import at_full_precision, is_half, mapped, widened
from patchlab.host import precise
from patchlab.rules import LNRule

_FORMULA = 1e-4
"""Largest difference of a module's output from its formula, as a share of its largest entry, in float32."""
_SUMS = 1e-5
"""Largest difference of Σ x·Jᵀg from Σ (y − b)·g, as a share of Σ |x·Jᵀg|."""


def checked_places(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> tuple[Place, ...]:
    """The places of a model, with a problem noted where a rule could not be right, and whether patterns can be reached."""
    places = [place for place in model.arch.places if place.problem is None and not isinstance(place, LinearPlace)]
    seen, calls = _observed(model, tokens, places)
    found: dict[tuple[str, type[Place]], Place] = {}
    for place in places:
        missing = [name for name in (*place.reads, *((place.at,) if place.at != LOGITS else ())) if name not in seen]
        problem = f"the hooks {missing} do not fire" if missing else _problem(model, tokens, place, seen, calls)
        found[place.name, type(place)] = place if problem is None else replace(place, problem=problem)
    for place in _reached(model, tokens, [place for place in found.values() if isinstance(place, AttentionPlace) and place.problem is None]):
        found[place.name, type(place)] = place
    return tuple(found.get((place.name, type(place)), place) for place in model.arch.places)


Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def _observed(model: BridgedModel, tokens: Int[Tensor, "row pos"], places: Iterable[Place]) -> tuple[dict[str, Tensor], Calls]:
    """What the hooks of places show in one run, the logits, and how norms are called."""
    seen: dict[str, Tensor] = {}
    calls: Calls = {}
    names = {name for place in places for name in (*place.reads, place.at) if name != LOGITS}
    handles = [model.hooks[name].register_forward_hook(partial(_record, seen, name)) for name in names]
    handles += [p.module.register_forward_pre_hook(partial(_record_call, calls), with_kwargs=True) for p in places if isinstance(p, NormPlace)]
    try:
        with torch.no_grad():
            seen[LOGITS] = _logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen, calls


def _record(seen: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Tensor) -> None:
    seen[name] = output


def _record_call(calls: Calls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls[id(module)] = args, dict(kwargs)


def _logits(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocab"]:
    return model.bridge(tokens, return_type="logits", use_cache=False)


def _problem(model: BridgedModel, tokens: Int[Tensor, "row pos"], place: Place, seen: dict[str, Tensor], calls: Calls) -> str | None:
    if isinstance(place, NormPlace):
        return _norm_problem(model, place, calls)
    if isinstance(place, MLPPlace):
        return _mlp_problem(place, seen)
    if isinstance(place, ExpertsPlace):
        return _experts_problem(place, seen)
    if isinstance(place, (ClipPlace, GatePlace)):
        return _next_problem(model, tokens, place, seen)
    if isinstance(place, CapPlace):
        return _cap_problem(model, tokens, place, seen)
    return None


def _cap_problem(model: BridgedModel, tokens: Int[Tensor, "row pos"], place: CapPlace, seen: dict[str, Tensor]) -> str | None:
    value = seen[place.at]
    if place.final:
        worst = _difference(place.activation(seen[place.reads[0]]), value)
        return None if worst <= _rounding(value) else f"the logits are not cap · tanh(x / cap) (off by {worst:.2g})"
    (other,) = _logits_with(model, tokens, place, torch.where(value.abs() <= place.cap, 0.0, value))
    return _NOT_LIVE if torch.equal(other, seen[LOGITS]) else None


def _norm_problem(model: BridgedModel, place: NormPlace, calls: Calls) -> str | None:
    """The norm alone, in float32: its formula, and what the LN-rule conserves, Σ x·Jᵀg = Σ (y − b)·g for any g."""
    if id(place.module) not in calls:
        return "it is not called as a module"
    args, kwargs = mapped(calls[id(place.module)], at_full_precision)
    at: dict[str, Tensor] = {}
    hooks = {name: partial(_leaf if name == place.reads[0] else _record, at, name) for name in (*place.reads, place.at)}
    with torch.enable_grad(), widened(place.module.modules()), hooked(model.hooks, hooks):
        place.module(*args, **kwargs)
        x, scale, y = (at[name] for name in (*place.reads, place.at))
        surrogate = LNRule().surrogate(place, x, scale)
        bias = place.bias
        own = surrogate + bias if bias is not None and place.centred else surrogate
        worst = _difference(own, y)
        if worst > _FORMULA:
            return f"its output is not w · x / s (off by {worst:.2g})"
        g = _cotangent(y)
        (gradient,) = torch.autograd.grad(surrogate, x, g.to(surrogate.dtype))
        shares = precise(x.detach()) * precise(gradient)
        gap = float(shares.sum() - (precise((y - (own - surrogate)).detach()) * precise(g)).sum())
    return None if abs(gap) <= _SUMS * float(shares.abs().sum()) else f"the LN-rule does not conserve relevance there (gap {gap:.2g})"


def _leaf(seen: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Tensor) -> Tensor:
    seen[name] = output.detach().requires_grad_()
    return seen[name]


def _mlp_problem(place: MLPPlace, seen: dict[str, Tensor]) -> str | None:
    f, g = place.activation, seen[place.pre]
    if f is None:
        return "its activation was not found"
    expected = f(g) if place.linear is None else f(g) * seen[place.linear]
    if _difference(f(g[..., :1]), f(g)[..., :1]) > _rounding(g):
        return "its activation is not elementwise"
    worst = _difference(expected.to(seen[place.at].dtype), seen[place.at])
    what = "its output is not f(g)" + ("" if place.linear is None else " · u")
    return None if worst <= _rounding(g) else f"{what} (off by {worst:.2g})"


def _experts_problem(place: ExpertsPlace, seen: dict[str, Tensor]) -> str | None:
    if place.experts is None:
        return "its experts were not found"
    try:
        with torch.no_grad():
            got = place.experts.run(seen[place.reads[0]])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"its router and experts cannot be run by themselves: {error}"
    worst = _difference(got, seen[place.at])
    return None if worst <= 4 * _rounding(got) else f"its output is not the sum of its experts' by their routing weights (off by {worst:.2g})"


def _next_problem(model: BridgedModel, tokens: Int[Tensor, "row pos"], place: ClipPlace | GatePlace, seen: dict[str, Tensor]) -> str | None:
    """Whether what follows the hook is the clamp, or the gate, that the place says: seen from logits, with large and with moderate values.

    A clamp makes no difference between what it clamps and what is clamped already; a closed gate between the heads behind it.
    """
    large = 4 * seen[place.at].abs().amax().clamp_min(1.0) * torch.sign(seen[place.at])
    if isinstance(place, ClipPlace):
        values = (place.limit * large, place.activation(place.limit * large))
        what = f"what follows is not a clamp to ±{place.limit:g}"
    else:
        # σ is 0 in float32 far below, so that any two very low inputs are one
        values = (torch.full_like(large, -1e4), torch.full_like(large, -2e4))
        what = "what follows is not a sigmoid"
    one, other = _logits_with(model, tokens, place, *values)
    if torch.equal(one, seen[LOGITS]):
        return _NOT_LIVE
    return None if torch.equal(one, other) else what


_NOT_LIVE = "what is put at its hook does not reach the logits"


def _logits_with(model: BridgedModel, tokens: Int[Tensor, "row pos"], place: Place, *values: Tensor) -> list[Tensor]:
    """Logits with other values at the hook of a place, in one run each."""
    found: list[Tensor] = []
    for value in values:
        with torch.no_grad(), hooked(model.hooks, {place.at: partial(_give, value)}):
            found.append(_logits(model, tokens))
    return found


def _give(value: Tensor, module: Any, inputs: Any, output: Tensor) -> Tensor:
    return value


def _reached(model: BridgedModel, tokens: Int[Tensor, "row pos"], places: list[AttentionPlace]) -> list[AttentionPlace]:
    """Attention places, with whether what is put at the pattern hook flows on: then a pattern that is held gives queries and keys no gradient."""
    if not places:
        return []
    patterns: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    gates = [place for place in model.arch.places if isinstance(place, GatePlace) and place.problem is None]
    hooks: dict[str, Callable[..., Tensor]] = {place.at: partial(_leaf, patterns, place.at) for place in places}
    hooks |= {name: partial(_view, scores, name) for place in places for name in place.scores}
    hooks |= {place.at: _held for place in gates}  # a gate can share the hook of the queries
    with torch.enable_grad(), hooked(model.hooks, hooks):
        embedded = partial(_leaf, {}, "input")
        with hooked(model.hooks, {"hook_embed": embedded}):
            logits = _logits(model, tokens)
    g = _cotangent(logits)
    leaves = {**{("pattern", name): value for name, value in patterns.items()}, **{("scores", name): value for name, value in scores.items()}}
    grads = dict(zip(leaves, torch.autograd.grad(logits, list(leaves.values()), g.to(logits.dtype), allow_unused=True), strict=True))
    found: list[AttentionPlace] = []
    for place in places:
        blocked = not any(_any(grads.get(("scores", name))) for name in place.scores)
        used = _any(grads.get(("pattern", place.at)))
        if place.scores:
            found.append(replace(place, open=blocked))
        else:
            found.append(place if used else replace(place, problem="its pattern hook does not flow on, and its queries and keys have no hooks"))
    return found


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _view(seen: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Tensor) -> Tensor:
    seen[name] = output.view_as(output) if output.requires_grad else output.detach().requires_grad_()
    return seen[name]


def _held(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.detach()


def _cotangent(y: Tensor) -> Float[Tensor, "*shape"]:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected tensor's largest entry."""
    scale = float(precise(expected.detach()).abs().max())
    return float((precise(got.detach()) - precise(expected.detach())).abs().max()) / max(scale, 1e-30)


def _rounding(values: Tensor) -> float:
    """What the same formula may differ by in the values' own precision."""
    return 4 * torch.finfo(values.dtype).eps if is_half(values) else _FORMULA
