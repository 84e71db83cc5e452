"""Attachments: how the rules that a place takes are put on hooks. One function per kind of place, given the rules of its slots in their order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchlab.adapters import AttentionPlace, CapPlace, ClipPlace, ExpertsPlace, GatePlace, LinearPlace, MLPPlace, NormPlace, Place
from patchlab.adapters.experts import Activation, Gated, Neurons, Weighted, plain_weighted
from patchlab.errors import RuleError
from patchlab.rules.nonlinear import ConstantGateRule, UniformRule
from patchlab.rules.rule import ActivationRule, LinearRule, NormRule, PatternRule, ProductRule, graft, scale_gradient

Recorded = dict[str, Tensor]
BackwardHook = Callable[[Tensor, Recorded], Tensor]


@dataclass(frozen=True)
class Attachment:
    """One function at one hook: ``apply(value, recorded)`` returns the value with the rule's gradient.

    ``after``: it stands in for what the model does with the value next, so it comes after edits and what is captured there.
    """

    at: str
    reads: tuple[str, ...]
    apply: BackwardHook
    after: bool = False


Attaching = Callable[..., list[Attachment]]
Function = TypeVar("Function", bound=Attaching)
ATTACHING: dict[type[Place], Attaching] = {}
"""How rules are put on each kind of place."""


def attaching(kind: type[Place]) -> Callable[[Function], Function]:
    """A decorator: the function puts rules on places of a kind. It is given the place and the rules of its ``slots``, None where there is none.

    Raises:
        RuleError: the kind has a function already.
    """

    def register(function: Function) -> Function:
        if kind in ATTACHING:
            raise RuleError(f"rules are put on a {kind.__name__} by {ATTACHING[kind].__name__} already; give the new kind a class of its own.")
        ATTACHING[kind] = function
        return function

    return register


def attachments(place: Place, *rules: Any) -> list[Attachment]:
    """The rules of a place's slots on its hooks.

    Raises:
        RuleError: a kind of place that has no function.
    """
    if type(place) not in ATTACHING:
        raise RuleError(f"no rule is known for {type(place).__name__} {place.name}. Register a function with patchlab.rules.attachments.attaching.")
    return ATTACHING[type(place)](place, *rules)


@attaching(NormPlace)
def _norm(place: NormPlace, rule: NormRule) -> list[Attachment]:
    return [Attachment(place.at, place.reads, partial(_normed, place, rule))]


def _normed(place: NormPlace, rule: NormRule, value: Tensor, seen: Recorded) -> Tensor:
    x, scale = (seen[name] for name in place.reads)
    return graft(value, rule.surrogate(place, x, scale).to(value.dtype))


@attaching(MLPPlace)
def _mlp(place: MLPPlace, activation: ActivationRule | None, product: ProductRule | None = None) -> list[Attachment]:
    return [Attachment(place.at, place.reads, partial(_neurons, place, activation, product))]


def _neurons(place: MLPPlace, activation: ActivationRule | None, product: ProductRule | None, value: Tensor, seen: Recorded) -> Tensor:
    g, f = seen[place.pre], place.activation
    if f is None:
        return value
    try:
        surrogate = f(g) if activation is None else activation.surrogate(f, g)
    except RuleError as error:
        raise RuleError(f"{place.name}: {error}") from error
    if place.linear is not None:
        u = seen[place.linear]
        surrogate = surrogate * u if product is None else product.surrogate(surrogate, u)
    return graft(value, surrogate)


@attaching(ExpertsPlace)
def _experts(
    place: ExpertsPlace,
    activation: ActivationRule | None,
    product: ProductRule | None = None,
    routing: ProductRule | None = None,
    linear: LinearRule | None = None,
) -> list[Attachment]:
    """The layer computed again from its input, under the rules; ``linear`` is refused by the place."""
    neurons = partial(_in_expert, activation, product)
    weighted = plain_weighted if routing is None else routing.surrogate
    return [Attachment(place.at, place.reads, partial(_mixed, place, neurons, weighted))]


def _in_expert(activation: ActivationRule | None, product: ProductRule | None, gated: Gated, g: Tensor, u: Tensor) -> Tensor:
    def ruled(f: Activation, x: Tensor) -> Tensor:
        return f(x) if activation is None else activation.surrogate(f, x)

    a, u = ruled(gated.activation, g), gated.linear(u if gated.clamp is None else ruled(gated.clamp, u))
    return a * u if product is None else product.surrogate(a, u)


def _mixed(place: ExpertsPlace, neurons: Neurons, weighted: Weighted, value: Tensor, seen: Recorded) -> Tensor:
    if place.experts is None:
        return value
    try:
        return graft(value, place.experts.run(seen[place.reads[0]], neurons, weighted))
    except RuleError as error:
        raise RuleError(f"{place.name}: {error}") from error


@attaching(AttentionPlace)
def _attention(place: AttentionPlace, pattern: PatternRule | None, bilinear: UniformRule | None) -> list[Attachment]:
    """At the pattern, or at queries and keys where the pattern cannot be reached."""
    share = partial(_shared, bilinear)
    found = [] if bilinear is None else [Attachment(place.z, (), share)]
    if place.open:
        return [Attachment(place.at, (), partial(_pattern, pattern, bilinear)), *found]
    apply = share if pattern is None else _hold
    return [*(Attachment(name, (), apply, after=True) for name in place.scores), *found]


def _shared(bilinear: UniformRule | None, value: Tensor, seen: Recorded) -> Tensor:
    return value if bilinear is None else scale_gradient(value, bilinear.share)


def _pattern(pattern: PatternRule | None, bilinear: UniformRule | None, value: Tensor, seen: Recorded) -> Tensor:
    return _shared(bilinear, value if pattern is None else graft(value, pattern.surrogate(value)), seen)


@attaching(GatePlace)
def _gate(place: GatePlace, rule: ConstantGateRule) -> list[Attachment]:
    return [Attachment(place.at, (), _hold)]


def _hold(value: Tensor, seen: Recorded) -> Tensor:
    """A value as a constant."""
    return value.detach()


@attaching(ClipPlace)
def _clip(place: ClipPlace, rule: ActivationRule) -> list[Attachment]:
    return [Attachment(place.at, (), partial(_clipped, place, rule), after=True)]


def _clipped(place: ClipPlace, rule: ActivationRule, value: Tensor, seen: Recorded) -> Tensor:
    # what the model clamps next is clamped already, and passes the gradient as it is
    f = place.activation
    return graft(f(value), rule.surrogate(f, value))


@attaching(CapPlace)
def _cap(place: CapPlace, rule: ActivationRule) -> list[Attachment]:
    return [Attachment(place.at, place.reads, partial(_final_cap if place.final else _score_cap, place, rule))]


def _final_cap(place: CapPlace, rule: ActivationRule, value: Tensor, seen: Recorded) -> Tensor:
    return graft(value, rule.surrogate(place.activation, seen[place.reads[0]]))


def _score_cap(place: CapPlace, rule: ActivationRule, value: Tensor, seen: Recorded) -> Tensor:
    """Only the capped scores are seen: the gradient that the model takes back through the tanh is turned into the rule's."""
    f = place.activation
    with torch.enable_grad():
        capped = value.detach() if value.dtype == torch.float64 else value.detach().float()
        scores = place.cap * (capped / place.cap).clamp(-1, 1).atanh()
        inside = scores.isfinite()
        scores = torch.where(inside, scores, 0.0).requires_grad_()
        own, wanted = (torch.autograd.grad(y.sum(), scores)[0] for y in (f(scores), rule.surrogate(f, scores)))
    return graft(value, value * torch.where(inside & (own > 0), wanted / own, 1.0).to(value.dtype))


@attaching(LinearPlace)
def _linear(place: LinearPlace, rule: LinearRule) -> list[Attachment]:
    return [Attachment(place.at, place.reads, partial(_mapped, place, rule))]


def _mapped(place: LinearPlace, rule: LinearRule, value: Tensor, seen: Recorded) -> Tensor:
    (x,) = place.reads
    return graft(value, rule.surrogate(place, seen[x], value))
