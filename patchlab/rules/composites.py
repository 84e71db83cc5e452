"""Composites: which rule goes on which kind of place, with the named presets of the literature."""

from dataclasses import dataclass, replace
from typing import Any

from patchlab.adapters import Place
from patchlab.errors import RuleError, unknown
from patchlab.rules.attachments import Attachment, attachments
from patchlab.rules.nonlinear import AHRule, ConstantGateRule, HalfRule, IdentityRule, LNRule, TemperatureRule, UniformRule
from patchlab.rules.rule import ActivationRule, LinearRule, NormRule, PatternRule, ProductRule

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
        found: list[Attachment] = []
        for place in places:
            if not self.rules_at(place):
                continue
            if (problem := self.problem_at(place)) is None:
                found += attachments(place, *self._rules_of(place))
            elif not self.allow_gaps:
                raise RuleError(
                    f"the composite {self.name!r} cannot cover {place.name}: {problem}. Use a composite without {place.takes} rules "
                    f"(rules='gradient' has none), describe the module to patchlab.adapters, or leave it with its plain gradient: "
                    f"get_composite({self.name!r}, allow_gaps=True)."
                )
        return tuple(found)

    def rules_at(self, place: Place) -> tuple[str, ...]:
        """Names of the rules that this composite puts on a place."""
        return tuple(type(rule).__name__ for rule in self._rules_of(place) if rule is not None)

    def problem_at(self, place: Place) -> str | None:
        """Why the rules of this composite cannot be put on a place; None if they can."""
        return place.problem_with(*self._rules_of(place))

    def _rules_of(self, place: Place) -> tuple[Any, ...]:
        """The rules in the slots of a place."""
        return tuple(getattr(self, slot) for slot in place.slots)


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
