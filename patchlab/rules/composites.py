"""Composites: which rule goes on which kind of place, with the named presets of the literature."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from patchlab.adapters import AttentionPlace, LinearPlace, MLPPlace, NormPlace, Place
from patchlab.errors import RuleError, unknown
from patchlab.rules.nonlinear import AHRule, ConstantGateRule, HalfRule, IdentityRule, LNRule, TemperatureRule, UniformRule
from patchlab.rules.rule import ActivationRule, LinearRule, NormRule, PatternRule, ProductRule, graft, scale_gradient

Recorded = dict[str, Tensor]
BackwardHook = Callable[[Tensor, Recorded], Tensor]


@dataclass(frozen=True)
class Attachment:
    """One function at one hook: ``apply(value, recorded)`` returns the value with the rule's gradient."""

    at: str
    reads: tuple[str, ...]
    apply: BackwardHook


_FIELDS: dict[str, tuple[type, str]] = {
    "norm": (NormRule, "LNRule()"),
    "activation": (ActivationRule, "IdentityRule()"),
    "product": (ProductRule, "HalfRule()"),
    "pattern": (PatternRule, "AHRule()"),
    "bilinear": (UniformRule, "UniformRule()"),
    "linear": (LinearRule, "EpsilonRule()"),
}
"""What each field of a composite takes, and an example."""


@dataclass(frozen=True)
class Composite:
    """The assignment of rules to places. A field left None keeps the plain gradient there.

    Args:
        name: how it appears in results.
        norm: LayerNorm, RMSNorm, also the final one, post-norms and q/k-norms.
        activation: the elementwise activation of every MLP.
        product: the gated product (only in gated MLPs).
        pattern: the softmax of every attention layer.
        bilinear: the bilinear maps of attention, A·V and Q·K.
        linear: every linear map inside the blocks (q, k, v, o, and those of the MLP).

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

    def __post_init__(self) -> None:
        for field, (kind, example) in _FIELDS.items():
            rule = getattr(self, field)
            if rule is not None and not isinstance(rule, kind):
                raise RuleError(f"the {field} rule of the composite {self.name!r} must be a {kind.__name__}, such as {example}; got {rule!r}.")

    @property
    def plain(self) -> bool:
        """Whether every place keeps its gradient."""
        return not any((self.norm, self.activation, self.product, self.pattern, self.bilinear, self.linear))

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
            RuleError: a place that a rule should cover but cannot.
        """
        attachments: list[Attachment] = []
        for place in places:
            if not self.rules_at(place):
                continue
            if place.problem is not None:
                raise RuleError(
                    f"the composite {self.name!r} cannot cover {place.name}: {place.problem}. Use a composite without {self._field(place)} rules "
                    f"(rules='gradient' has none), or describe the module to patchlab.adapters."
                )
            attachments += self._attachments(place)
        return tuple(attachments)

    def rules_at(self, place: Place) -> tuple[str, ...]:
        """Names of the rules that this composite puts on a place."""
        rules: tuple[Any, ...]
        if isinstance(place, NormPlace):
            rules = (self.norm,)
        elif isinstance(place, MLPPlace):
            rules = (self.activation, self.product if place.gated or place.problem else None)
        elif isinstance(place, AttentionPlace):
            rules = (self.pattern, self.bilinear)
        else:
            rules = (self.linear,)
        return tuple(type(rule).__name__ for rule in rules if rule is not None)

    def _attachments(self, place: Place) -> list[Attachment]:
        if isinstance(place, NormPlace):
            return [Attachment(place.at, place.reads, partial(self._at_norm, place))]
        if isinstance(place, MLPPlace):
            return [Attachment(place.at, place.reads, partial(self._at_mlp, place))]
        if isinstance(place, LinearPlace):
            return [Attachment(place.at, place.reads, partial(self._at_linear, place))]
        if isinstance(place, AttentionPlace):
            found = [Attachment(place.at, (), self._at_pattern)]
            return found if self.bilinear is None else [*found, Attachment(place.z, (), self._at_z)]
        raise RuleError(f"no rule is known for {type(place).__name__} {place.name}.")

    def _at_norm(self, place: NormPlace, value: Tensor, seen: Recorded) -> Tensor:
        x, scale = (seen[name] for name in place.reads)
        return value if self.norm is None else graft(value, self.norm.surrogate(place, x, scale).to(value.dtype))

    def _at_mlp(self, place: MLPPlace, value: Tensor, seen: Recorded) -> Tensor:
        g, f = seen[place.pre], place.activation
        if f is None:
            return value
        surrogate = f(g) if self.activation is None else self.activation.surrogate(f, g)
        if place.linear is not None:
            u = seen[place.linear]
            surrogate = surrogate * u if self.product is None else self.product.surrogate(surrogate, u)
        return graft(value, surrogate)

    def _at_pattern(self, value: Tensor, seen: Recorded) -> Tensor:
        if self.pattern is not None:
            value = graft(value, self.pattern.surrogate(value))
        return value if self.bilinear is None else scale_gradient(value, self.bilinear.share)

    def _at_z(self, value: Tensor, seen: Recorded) -> Tensor:
        return value if self.bilinear is None else scale_gradient(value, self.bilinear.share)

    def _at_linear(self, place: LinearPlace, value: Tensor, seen: Recorded) -> Tensor:
        (x,) = place.reads
        return value if self.linear is None else graft(value, self.linear.surrogate(place, seen[x], value))

    @staticmethod
    def _field(place: Place) -> str:
        return {NormPlace: "norm", MLPPlace: "activation and product", AttentionPlace: "attention", LinearPlace: "linear"}[type(place)]


PRESETS: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        Composite("gradient"),
        Composite("relp", norm=LNRule(), activation=IdentityRule(), product=HalfRule()),
        Composite("relp-ah", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), pattern=AHRule()),
        Composite("attnlrp", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), bilinear=UniformRule()),
        Composite("cp-lrp", norm=LNRule(), activation=IdentityRule(), product=ConstantGateRule(), pattern=AHRule()),
        Composite("gim", norm=LNRule(), product=HalfRule(), pattern=TemperatureRule(), bilinear=UniformRule()),
    )
}


def get_composite(rules: str | Composite) -> Composite:
    """A preset by name, or a composite as it is.

    Raises:
        RuleError: unknown name; anything that is neither.
    """
    if isinstance(rules, Composite):
        return rules
    if not isinstance(rules, str):
        raise RuleError(f"rules is the name of a preset or a Composite; got {type(rules).__name__}. Presets: {', '.join(PRESETS)}.")
    if rules not in PRESETS:
        raise RuleError(unknown("rule set", rules, PRESETS, more="Or build a patchlab.rules.Composite."))
    return PRESETS[rules]


@dataclass(frozen=True)
class Coverage:
    """Which rule sits on which module. Printing it shows a table."""

    composite: str
    rows: tuple[tuple[str, str, str], ...]
    uncovered: tuple[tuple[str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether every place that a rule is meant for can take it."""
        return not self.uncovered

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        lines = [f"{self.composite}: {len(self.rows)} places, " + ("all covered" if self.complete else f"{len(self.uncovered)} cannot be covered")]
        lines += [f"  {module:<{width}}  {kind:<10} {rules}" for module, kind, rules in self.rows]
        lines += [f"  NOT COVERED {module}: {problem}" for module, problem in self.uncovered]
        return "\n".join(lines)

    __repr__ = __str__


def coverage(model: Any, rules: str | Composite) -> Coverage:
    """Which rule of a composite sits on which module of a model; places left with the plain gradient say so.

    Linear maps are listed only if the composite has a rule for them. Never raises for modules that cannot be covered: it lists them.
    """
    composite = get_composite(rules)
    rows, uncovered = [], []
    for place in model.arch.places:
        names = composite.rules_at(place)
        if isinstance(place, LinearPlace) and not names:
            continue
        kind = type(place).__name__.removesuffix("Place").lower()
        problem = place.problem if names else None
        rows.append((place.name, kind, "not covered" if problem else " + ".join(names) or "plain gradient"))
        if problem is not None:
            uncovered.append((place.name, problem))
    return Coverage(composite.name, tuple(rows), tuple(uncovered))
