"""Composites: which rule goes on which kind of place, with the named presets of the literature."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchlab.adapters import AttentionPlace, CapPlace, ClipPlace, GatePlace, LinearPlace, MLPPlace, NormPlace, Place
from patchlab.errors import RuleError, unknown
from patchlab.rules.nonlinear import AHRule, ConstantGateRule, HalfRule, IdentityRule, LNRule, TemperatureRule, UniformRule
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


_FIELDS: dict[str, tuple[type, str]] = {
    "norm": (NormRule, "LNRule()"),
    "activation": (ActivationRule, "IdentityRule()"),
    "product": (ProductRule, "HalfRule()"),
    "pattern": (PatternRule, "AHRule()"),
    "bilinear": (UniformRule, "UniformRule()"),
    "linear": (LinearRule, "EpsilonRule()"),
    "gate": (ConstantGateRule, "ConstantGateRule()"),
    "softcap": (ActivationRule, "IdentityRule()"),
}
"""What each field of a composite takes, and an example."""


@dataclass(frozen=True)
class Composite:
    """The assignment of rules to places. A field left None keeps the plain gradient there.

    Args:
        name: how it appears in results.
        norm: LayerNorm, RMSNorm, also the final one, post-norms and q/k-norms.
        activation: the elementwise activation of every MLP, and the clamp of queries, keys and values where there is one.
        product: the gated product (only in gated MLPs).
        pattern: the softmax of every attention layer.
        bilinear: the bilinear maps of attention, A·V and Q·K.
        linear: every linear map inside the blocks (q, k, v, o, and those of the MLP).
        gate: the sigmoid gate on the output of attention; as σ(0) = ½ it is no factor of its input, so it can only be held.
        softcap: the tanh soft caps of attention scores and of logits; no preset has a rule for them.
        allow_gaps: run although the model has modules that no rule covers; they keep the plain gradient, and results name them.

    Example:
        >>> Composite("ln-only", norm=LNRule()).name
        'ln-only'
    """

    name: str
    norm: NormRule | None = None
    activation: ActivationRule | None = None
    product: ProductRule | None = None
    pattern: PatternRule | None = None
    bilinear: UniformRule | None = None
    linear: LinearRule | None = None
    gate: ConstantGateRule | None = None
    softcap: ActivationRule | None = None
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        for field, (kind, example) in _FIELDS.items():
            rule = getattr(self, field)
            if rule is not None and not isinstance(rule, kind):
                raise RuleError(f"the {field} rule of the composite {self.name!r} must be a {kind.__name__}, such as {example}; got {rule!r}.")

    @property
    def plain(self) -> bool:
        """Whether every place keeps its gradient."""
        return all(getattr(self, field) is None for field in _FIELDS)

    @property
    def not_scored(self) -> dict[str, str]:
        """Site kinds that get no gradient under this composite, with the reason."""
        if self.pattern is None or not self.pattern.blocks_scores:
            return {}
        reason = f"the {type(self.pattern).__name__} of {self.name!r} holds the attention pattern constant, so no gradient reaches queries and keys"
        return {"q": reason, "k": reason}

    def attach(self, places: tuple[Place, ...]) -> tuple[Attachment, ...]:
        """What to put at which hook.

        Raises:
            RuleError: a place that a rule should cover but cannot, unless gaps are allowed.
        """
        attachments: list[Attachment] = []
        for place in places:
            if not self.rules_at(place):
                continue
            if (problem := self.problem_at(place)) is None:
                attachments += self._attachments(place)
            elif not self.allow_gaps:
                raise RuleError(
                    f"the composite {self.name!r} cannot cover {place.name}: {problem}. Use a composite without {_FIELD[type(place)]} rules "
                    f"(rules='gradient' has none), describe the module to patchlab.adapters, or leave it with its plain gradient: "
                    f"get_composite({self.name!r}, allow_gaps=True)."
                )
        return tuple(attachments)

    def rules_at(self, place: Place) -> tuple[str, ...]:
        """Names of the rules that this composite puts on a place."""
        rules: tuple[Any, ...]
        if isinstance(place, MLPPlace):
            rules = (self.activation, self.product if place.gated or place.problem else None)
        elif isinstance(place, AttentionPlace):
            rules = (self.pattern, self.bilinear)
        else:
            rules = (getattr(self, _FIELD[type(place)]),)
        return tuple(type(rule).__name__ for rule in rules if rule is not None)

    def problem_at(self, place: Place) -> str | None:
        """Why the rules of this composite cannot be put on a place; None if they can."""
        if place.problem is not None or not isinstance(place, AttentionPlace) or place.open:
            return place.problem
        inside = f"the softmax runs inside {type(place.module.original_component).__name__}, where no hook of the Bridge reaches it"
        if self.pattern is not None and not self.pattern.blocks_scores:
            return f"{inside}, and the {type(self.pattern).__name__} needs it (the AHRule does not: it holds queries and keys)"
        return None if len(place.scores) == 2 else f"{inside}, nor its queries and keys"

    def _attachments(self, place: Place) -> list[Attachment]:
        if isinstance(place, NormPlace):
            return [Attachment(place.at, place.reads, partial(self._at_norm, place))]
        if isinstance(place, MLPPlace):
            return [Attachment(place.at, place.reads, partial(self._at_mlp, place))]
        if isinstance(place, LinearPlace):
            return [Attachment(place.at, place.reads, partial(self._at_linear, place))]
        if isinstance(place, GatePlace):
            return [Attachment(place.at, (), _hold)]
        if isinstance(place, ClipPlace):
            return [Attachment(place.at, (), partial(self._at_clip, place), after=True)]
        if isinstance(place, CapPlace):
            return [Attachment(place.at, place.reads, partial(self._at_cap, place))]
        if isinstance(place, AttentionPlace):
            return self._at_attention(place)
        raise RuleError(f"no rule is known for {type(place).__name__} {place.name}.")

    def _at_attention(self, place: AttentionPlace) -> list[Attachment]:
        """At the pattern, or at queries and keys where the pattern cannot be reached."""
        found = [] if self.bilinear is None else [Attachment(place.z, (), self._at_z)]
        if place.open:
            return [Attachment(place.at, (), self._at_pattern), *found]
        apply = _hold if self.pattern is not None else self._at_z
        return [*(Attachment(name, (), apply, after=True) for name in place.scores), *found]

    def _at_norm(self, place: NormPlace, value: Tensor, seen: Recorded) -> Tensor:
        x, scale = (seen[name] for name in place.reads)
        return value if self.norm is None else graft(value, self.norm.surrogate(place, x, scale).to(value.dtype))

    def _at_mlp(self, place: MLPPlace, value: Tensor, seen: Recorded) -> Tensor:
        g, f = seen[place.pre], place.activation
        if f is None:
            return value
        try:
            surrogate = f(g) if self.activation is None else self.activation.surrogate(f, g)
        except RuleError as error:
            raise RuleError(f"{place.name}: {error}") from error
        if place.linear is not None:
            u = seen[place.linear]
            surrogate = surrogate * u if self.product is None else self.product.surrogate(surrogate, u)
        return graft(value, surrogate)

    def _at_clip(self, place: ClipPlace, value: Tensor, seen: Recorded) -> Tensor:
        # what the model clamps next is clamped already, and passes the gradient as it is
        f = place.activation
        return value if self.activation is None else graft(f(value), self.activation.surrogate(f, value))

    def _at_cap(self, place: CapPlace, value: Tensor, seen: Recorded) -> Tensor:
        if self.softcap is None:
            return value
        f = place.activation
        if place.final:
            return graft(value, self.softcap.surrogate(f, seen[place.reads[0]]))
        # only the capped scores are seen: the gradient that the model takes back through the tanh is turned into the rule's
        with torch.enable_grad():
            capped = value.detach() if value.dtype == torch.float64 else value.detach().float()
            scores = place.cap * (capped / place.cap).clamp(-1, 1).atanh()
            inside = scores.isfinite()
            scores = torch.where(inside, scores, 0.0).requires_grad_()
            own, wanted = (torch.autograd.grad(y.sum(), scores)[0] for y in (f(scores), self.softcap.surrogate(f, scores)))
        return graft(value, value * torch.where(inside & (own > 0), wanted / own, 1.0).to(value.dtype))

    def _at_pattern(self, value: Tensor, seen: Recorded) -> Tensor:
        if self.pattern is not None:
            value = graft(value, self.pattern.surrogate(value))
        return value if self.bilinear is None else scale_gradient(value, self.bilinear.share)

    def _at_z(self, value: Tensor, seen: Recorded) -> Tensor:
        return value if self.bilinear is None else scale_gradient(value, self.bilinear.share)

    def _at_linear(self, place: LinearPlace, value: Tensor, seen: Recorded) -> Tensor:
        (x,) = place.reads
        return value if self.linear is None else graft(value, self.linear.surrogate(place, seen[x], value))


def _hold(value: Tensor, seen: Recorded) -> Tensor:
    """A value as a constant."""
    return value.detach()


_FIELD = {
    NormPlace: "norm",
    MLPPlace: "activation and product",
    AttentionPlace: "attention",
    LinearPlace: "linear",
    GatePlace: "gate",
    ClipPlace: "activation",
    CapPlace: "softcap",
}


PRESETS: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        Composite("gradient"),
        Composite("relp", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), gate=ConstantGateRule()),
        Composite("relp-ah", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), pattern=AHRule(), gate=ConstantGateRule()),
        Composite("attnlrp", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), bilinear=UniformRule(), gate=ConstantGateRule()),
        Composite("cp-lrp", norm=LNRule(), activation=IdentityRule(), product=ConstantGateRule(), pattern=AHRule(), gate=ConstantGateRule()),
        Composite("gim", norm=LNRule(), product=HalfRule(), pattern=TemperatureRule(), bilinear=UniformRule()),
    )
}


def get_composite(rules: str | Composite, *, allow_gaps: bool | None = None) -> Composite:
    """A preset by name, or a composite as it is; with ``allow_gaps`` one that runs also where modules are left uncovered.

    Raises:
        RuleError: unknown name; anything that is neither.
    """
    if isinstance(rules, Composite):
        return rules if allow_gaps is None else replace(rules, allow_gaps=allow_gaps)
    if not isinstance(rules, str):
        raise RuleError(f"rules is the name of a preset or a Composite; got {type(rules).__name__}. Presets: {', '.join(PRESETS)}.")
    if rules not in PRESETS:
        raise RuleError(unknown("rule set", rules, PRESETS, more="Or build a patchlab.rules.Composite."))
    return get_composite(PRESETS[rules], allow_gaps=allow_gaps)
