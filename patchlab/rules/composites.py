"""Composites: which rule goes on which kind of place, with the named presets of the literature."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from patchlab.adapters import Place
from patchlab.errors import RuleError, unknown
from patchlab.grammar import Word, changed, enter, options, values, written
from patchlab.rules.attachments import Attachment, attachments
from patchlab.rules.linear import EpsilonRule, GammaRule
from patchlab.rules.nonlinear import AHRule, ConstantGateRule, HalfRule, IdentityRule, LNRule, TemperatureRule, UniformRule
from patchlab.rules.rule import ActivationRule, LinearRule, NormRule, PatternRule, ProductRule

LRP, GAPS = "lrp", "gaps"
_FIELDS: dict[str, tuple[type, str]] = {
    "norm": (NormRule, "LNRule()"),
    "activation": (ActivationRule, "IdentityRule()"),
    "product": (ProductRule, "HalfRule()"),
    "pattern": (PatternRule, "AHRule()"),
    "bilinear": (UniformRule, "UniformRule()"),
    "linear": (LinearRule, "EpsilonRule()"),
    "gate": (ConstantGateRule, "ConstantGateRule()"),
    "routing": (ProductRule, "ConstantGateRule()"),
    "softcap": (ActivationRule, "IdentityRule()"),
}
"""What each field of a composite takes, and an example."""


@dataclass(frozen=True)
class Composite:
    """The assignment of rules to places. A field left None keeps the plain gradient there.

    Composites with the same rules are equal, whatever they are called.

    Args:
        name: how it appears in results. Left out, it is the name of the preset that has these rules, else the rules themselves, as
            :func:`get_composite` reads them: ``lrp[ln,identity]``. Methods take no name that is not registered (:func:`register_preset`).
        norm: LayerNorm, RMSNorm, also the final one, post-norms and q/k-norms.
        activation: the elementwise activation of every MLP, and the clamp of queries, keys and values where there is one.
        product: the gated product (only in gated MLPs).
        pattern: the softmax of every attention layer.
        bilinear: the bilinear maps of attention, A·V and Q·K.
        linear: every linear map inside the blocks (q, k, v, o, and those of the MLP).
        gate: the sigmoid gate on the output of attention; as σ(0) = ½ it is no factor of its input, so it can only be held.
        routing: the product of an expert's output and its routing weight, in mixtures of experts: the weight held (``ConstantGateRule``), or half of
            the gradient to each (``HalfRule``). Rules for activations and products sit inside every expert.
        softcap: the tanh soft caps of attention scores and of logits; no preset has a rule for them.
        allow_gaps: run although the model has modules that no rule covers; they keep the plain gradient, and results name them.

    Example:
        >>> Composite(norm=LNRule(), linear=GammaRule(0.5)).name
        'lrp[ln,gamma:0.5]'
    """

    name: str = field(default="", compare=False)
    norm: NormRule | None = None
    activation: ActivationRule | None = None
    product: ProductRule | None = None
    pattern: PatternRule | None = None
    bilinear: UniformRule | None = None
    linear: LinearRule | None = None
    gate: ConstantGateRule | None = None
    routing: ProductRule | None = None
    softcap: ActivationRule | None = None
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        for place, (kind, example) in _FIELDS.items():
            rule = getattr(self, place)
            if rule is not None and not isinstance(rule, kind):
                raise RuleError(f"the {place} rule of the composite {self.name!r} must be a {kind.__name__}, such as {example}; got {rule!r}.")
        if not self.name:
            object.__setattr__(self, "name", rules_name(self))

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
        self.check(places)
        covered = [place for place in places if self.rules_at(place) and self.problem_at(place) is None]
        return tuple(attachment for place in covered for attachment in attachments(place, *self._rules_of(place)))

    def check(self, places: tuple[Place, ...]) -> None:
        """Check that the rules can be put on every place that they should cover.

        Raises:
            RuleError: a place that a rule should cover but cannot, unless gaps are allowed.
        """
        for place in () if self.allow_gaps else places:
            if self.rules_at(place) and (problem := self.problem_at(place)) is not None:
                raise RuleError(
                    f"the composite {self.name!r} cannot cover {place.name}: {problem}. Use a composite without {place.takes} rules "
                    f"(rules='gradient' has none), describe the module to patchlab.adapters, or leave it with its plain gradient: "
                    f"get_composite({self.name!r}, allow_gaps=True)."
                )

    def rules_at(self, place: Place) -> tuple[str, ...]:
        """Names of the rules that this composite puts on a place."""
        return tuple(type(rule).__name__ for rule in self._rules_of(place) if rule is not None)

    def problem_at(self, place: Place) -> str | None:
        """Why the rules of this composite cannot be put on a place; None if they can."""
        return place.problem_with(*self._rules_of(place))

    def _rules_of(self, place: Place) -> tuple[Any, ...]:
        """The rules in the slots of a place."""
        return tuple(getattr(self, slot) for slot in place.slots)


RULES: dict[str, tuple[str, type]] = {}
"""Rules by the short names that composites are written with: the field of the composite, and the rule's class."""


def _word_of(field: str, kind: type) -> str | None:
    return next((word for word, found in RULES.items() if found == (field, kind)), None)


def register_rule(name: str, field: str) -> Callable[[type], type]:
    """Decorator that gives a rule (a frozen dataclass) on one field of a composite its short name, as in ``lrp[ln,identity]``.

    A first field of the rule is written as its number, others in brackets: ``gamma:0.5[epsilon=1e-06]``.

    Raises:
        RuleError: the name is taken or malformed, the rule has a name on this field, or there is no such field.
    """

    def register(kind: type) -> type:
        if field not in _FIELDS:
            raise RuleError(unknown("field of a composite", field, _FIELDS))
        if (other := _word_of(field, kind)) is not None:
            raise RuleError(f"{kind.__name__} on {field} is already called {other!r}; use that name.")
        enter(RULES, "rule", name, (field, kind), RuleError)
        return kind

    return register


for _name, _place, _kind in (
    ("ln", "norm", LNRule),
    ("identity", "activation", IdentityRule),
    ("half", "product", HalfRule),
    ("constant", "product", ConstantGateRule),
    ("ah", "pattern", AHRule),
    ("temperature", "pattern", TemperatureRule),
    ("uniform", "bilinear", UniformRule),
    ("epsilon", "linear", EpsilonRule),
    ("gamma", "linear", GammaRule),
    ("gate", "gate", ConstantGateRule),
    ("routing", "routing", ConstantGateRule),
    ("half-routing", "routing", HalfRule),
    ("softcap", "softcap", IdentityRule),
):
    register_rule(_name, _place)(_kind)


PRESETS: dict[str, Composite] = {"gradient": Composite("gradient")}
DESCRIPTIONS: dict[str, str] = {}
"""What the presets with rules are, in words."""


def _preset_of(composite: Composite) -> str | None:
    """The preset that has the same rules, with ``[gaps]`` if the composite allows them and the preset does not; None if there is none."""
    for name, preset in PRESETS.items():
        if composite == preset:
            return name
    closed = replace(composite, name="closed", allow_gaps=False)
    return next((f"{name}[{GAPS}]" for name, preset in PRESETS.items() if closed == preset), None)


def register_preset(name: str) -> Callable[[Callable[[], Composite]], Callable[[], Composite]]:
    """Decorator that registers the composite which a function returns; the first line of the function's docstring describes it.

    >>> @register_preset("relp-held")
    ... def relp_held():
    ...     '''RelP with every gated product held.'''
    ...     return replace(PRESETS["relp"], product=ConstantGateRule())
    >>> get_composite("relp-held") == get_composite("lrp[ln,identity,constant,gate,routing]") == PRESETS.pop("relp-held")
    True

    Raises:
        RuleError: the name is taken or malformed, or the same rules have a name.
    """

    def register(function: Callable[[], Composite]) -> Callable[[], Composite]:
        composite = replace(function(), name=name)
        if name not in PRESETS and (other := _preset_of(composite)) is not None:
            raise RuleError(f"the rules of {name!r} are already registered as {other!r}; use that name.")
        if name in RULES or name == LRP:
            raise RuleError(f"{name!r} is the name of a rule; register the composite under another.")
        enter(PRESETS, "rule preset", name, composite, RuleError)
        DESCRIPTIONS[name] = (inspect.getdoc(function) or name).partition("\n")[0].rstrip(".")
        return function

    return register


@register_preset("relp")
def _relp() -> Composite:
    """Relevance patching: LN-, Identity- and Half-rule"""
    held = ConstantGateRule()
    return Composite("relp", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), gate=held, routing=held)


@register_preset("relp-ah")
def _relp_ah() -> Composite:
    """Relp with the attention pattern held constant (q and k are not scored)"""
    return replace(_relp(), pattern=AHRule())


@register_preset("attnlrp")
def _attnlrp() -> Composite:
    """Relp with the uniform rule on attention's bilinear maps"""
    return replace(_relp(), bilinear=UniformRule())


@register_preset("cp-lrp")
def _cp_lrp() -> Composite:
    """LN- and Identity-rule, attention pattern and gates held constant"""
    return replace(_relp_ah(), product=ConstantGateRule())


@register_preset("gim")
def _gim() -> Composite:
    """LN-rule, softmax temperature 2, uniform rule, gate and up ½ each"""
    rules = {"norm": LNRule(), "product": HalfRule(), "pattern": TemperatureRule(), "bilinear": UniformRule()}
    return Composite("gim", routing=ConstantGateRule(), **rules)


PACKAGED = frozenset(PRESETS)
"""The presets that patchlab comes with: their names say what they are wherever they are read."""


def get_composite(rules: str | Composite, *, allow_gaps: bool | None = None) -> Composite:
    """A composite by name, or as it is; with ``allow_gaps`` one that runs also where modules are left uncovered.

    Names are those of the presets and ``lrp[RULE,...]`` with the rules of :data:`RULES`; ``gaps`` in brackets is ``allow_gaps``.

    >>> get_composite("lrp[ln,identity]") == Composite(norm=LNRule(), activation=IdentityRule())
    True
    >>> get_composite("lrp[routing,gate,half,identity,ln]").name, get_composite("relp", allow_gaps=True).name
    ('relp', 'relp[gaps]')

    Raises:
        RuleError: unknown name; two rules for one place; anything that is neither a name nor a composite.
    """
    if isinstance(rules, Composite):
        if allow_gaps is None or allow_gaps == rules.allow_gaps:
            return rules
        own = replace(rules, allow_gaps=allow_gaps)
        return replace(own, name="") if _written(rules) == rules.name else own
    if not isinstance(rules, str):
        raise RuleError(f"rules is the name of a preset or a Composite; got {type(rules).__name__}. Presets: {', '.join(PRESETS)}.")
    word = Word.parse(rules)
    if word is None or word.number is not None or (word.text not in PRESETS and word.text != LRP):
        more = f"Or choose single rules, as in {LRP}[ln,identity], or build a patchlab.rules.Composite."
        raise RuleError(unknown("rule set", rules, PRESETS, more=more))
    if word.text == LRP:
        return get_composite(_chosen(rules, word), allow_gaps=allow_gaps)
    if word.items not in ((), (GAPS,)):
        raise RuleError(
            f"{rules!r}: a preset takes only [{GAPS}] (run although modules are left uncovered); for single rules write {LRP}[ln,identity]."
        )
    return get_composite(PRESETS[word.text], allow_gaps=True if word.items and allow_gaps is None else allow_gaps)


def rules_name(composite: Composite) -> str:
    """The name that :func:`get_composite` knows a composite by: a preset's, else ``lrp[...]`` with its rules in the order of the fields.

    Raises:
        RuleError: no registry knows its name, so that results could not be led back to it.
    """
    own = _written(composite)
    if own is not None and (composite.plain or _preset_of(composite) is not None or composite.name in ("", own)):
        return own
    if not composite.name:
        unnamed = next(rule for field in _FIELDS if (rule := getattr(composite, field)) is not None and _word_of(field, type(rule)) is None)
        raise RuleError(
            f"{unnamed!r} is in no registry, so a composite with it has no name of itself: decorate its class with "
            f"@patchlab.rules.register_rule, or name the composite and register it with @patchlab.rules.register_preset."
        )
    taken = "whose name is that of another one" if composite.name in PRESETS else "which is in no registry"
    instead = "" if own is None else f" Or leave its name out (name=''): then it is {own}."
    raise RuleError(
        f"no result could be led back to the composite {composite.name!r}, {taken}. "
        f"Register it: put @patchlab.rules.register_preset(NAME) over a function that returns it.{instead}"
    )


def _written(composite: Composite) -> str | None:
    """The name of a composite by its rules alone; None if a rule has no name."""
    if composite.plain:
        return "gradient"
    if (preset := _preset_of(composite)) is not None:
        return preset
    items = []
    for place in _FIELDS:
        if (rule := getattr(composite, place)) is None:
            continue
        if type(composite) is not Composite or (word := _word_of(place, type(rule))) is None:
            return None
        first, given = next(iter(fields(rule)), None), changed(rule)
        number = written(given.pop(first.name)) if first is not None and first.name in given else None
        items.append(str(Word(word, number, options(given))))
    return str(Word(LRP, None, (*items, *([GAPS] if composite.allow_gaps else []))))


def _chosen(name: str, word: Word) -> Composite:
    """The composite ``lrp[...]``."""
    found: dict[str, Any] = {}
    for item in word.items:
        rule = Word.parse(item)
        if rule is None or (rule.text not in RULES and item != GAPS):
            raise RuleError(unknown("rule", item, [*RULES, GAPS]))
        field, kind = ("allow_gaps", bool) if item == GAPS else RULES[rule.text]
        if field in found:
            raise RuleError(f"{name!r} has two rules for {field}; give one.")
        found[field] = True if item == GAPS else _rule(rule, kind)
    if not found:
        raise RuleError(f"{name!r} names no rules; choose among {', '.join(RULES)}, as in {LRP}[ln,identity], or take 'gradient', which has none.")
    return Composite(**found)


def _rule(word: Word, kind: type) -> Any:
    names = [field.name for field in fields(kind)]
    if word.number is not None and not names:
        raise RuleError(f"the rule {word.text} takes no number; got {word}.")
    numbers = () if word.number is None else (f"{names[0]}={word.number}",)
    return kind(**values((*numbers, *word.items), kind, f"the rule {word.text}", names, RuleError))
