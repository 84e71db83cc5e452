"""Names of methods, rules and metrics: every one leads back to what it names."""

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import patchlab as pl
from patchlab.comparison.job import Job, scores_file
from patchlab.errors import MethodError, MetricError, RuleError
from patchlab.grammar import Word, split
from patchlab.methods import METHODS, ActivationPatching, LinearizedPatching, Method, SecondOrder, VerifiedPatching, get_method, register_method
from patchlab.methods.names import scoring_method
from patchlab.methods.quadrature import QUADRATURES
from patchlab.methods.registry import ENTRIES
from patchlab.methods.setting.setting import SOURCES
from patchlab.metrics import METRICS, Metric, get_metric, register_metric
from patchlab.rules import (
    PRESETS,
    RULES,
    AHRule,
    Composite,
    EpsilonRule,
    GammaRule,
    HalfRule,
    IdentityRule,
    LNRule,
    TemperatureRule,
    get_composite,
    register_preset,
    register_rule,
)
from patchlab.rules.composites import DESCRIPTIONS

shares = st.floats(0.001, 0.999)
positive = st.floats(1e-30, 1e30)
sources = st.sampled_from(SOURCES)


def _of(kind: Callable[..., Any], **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What a call is made of; the call itself is made in the test, as the shape checks of the tests draw random numbers of their own."""
    return st.tuples(st.just(kind), st.fixed_dictionaries(parts))


def _built(spec: Any) -> Any:
    return spec[0](**{name: _built(part) for name, part in spec[1].items()}) if isinstance(spec, tuple) else spec


def _on(place: str) -> st.SearchStrategy[Any]:
    kinds = [kind for own, kind in RULES.values() if own == place]
    return st.none() | st.one_of(*(_of(kind, **{field.name: positive for field in fields(kind)}) for kind in kinds))


composites = st.one_of(
    st.sampled_from(list(PRESETS)),
    _of(get_composite, rules=st.sampled_from(list(PRESETS)), allow_gaps=st.booleans()),
    _of(Composite, allow_gaps=st.booleans(), **{place: _on(place) for place in dict.fromkeys(place for place, _ in RULES.values())}),
)
points = st.integers(1, 99)
common: dict[str, Any] = {"source": sources, "rules": composites, "grad_drop": st.booleans(), "spliced": st.booleans()}
linearized = st.one_of(
    _of(LinearizedPatching, qk_fix=st.booleans(), **common),
    _of(LinearizedPatching, qk_fix=st.booleans(), n_steps=points, quadrature=st.sampled_from(QUADRATURES), **common),
    _of(LinearizedPatching, n_steps=points, quadrature=st.sampled_from(QUADRATURES), over=st.sampled_from(("activations", "groups")), **common),
)
exact = _of(ActivationPatching, source=sources, engine=st.sampled_from(("auto", "literal")), post_norm=st.sampled_from(("renormalised", "frozen")))
second = _of(SecondOrder, source=sources, tolerance=shares, probes=st.none() | points, seed=st.integers(0, 2**40))
verified = _of(
    VerifiedPatching,
    screen=linearized | second,
    k=points,
    target=st.none() | positive | st.integers(1, 3),
    recall=st.none() | shares | st.just(1),
    sample=st.none() | st.integers(0, 99),
    confidence=shares,
    max_share=shares | st.just(1),
    hierarchical=st.booleans(),
    group_fraction=positive | st.just(0),
    engine=st.sampled_from(("auto", "literal")),
    seed=st.integers(0, 99),
    subsets=st.just(0) | st.integers(9, 99),
    population=st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(linearized | exact | second | verified)
def test_a_name_gives_the_method_that_it_names(spec: Any) -> None:
    method = _built(spec)
    found = get_method(method.name)
    assert found == method
    assert type(found) is type(method)
    assert (found.name, hash(found)) == (method.name, hash(method))
    assert split(f"exact,{method.name}, atp") == ["exact", method.name, "atp"]
    assert not set(method.name) & set(" '\"()$&;|<>\\`!{}#~"), "nothing that a shell takes apart"


@settings(deadline=None, max_examples=100)
@given(composites)
def test_a_name_gives_the_composite_that_it_names(spec: Any) -> None:
    composite = get_composite(_built(spec))
    found = get_composite(composite.name)
    assert found.name == composite.name
    assert found == composite or composite.plain
    assert composite.plain or (found.name in PRESETS) == any(found == preset for preset in PRESETS.values())


def test_the_property_ranges_over_every_option() -> None:
    known = {
        ActivationPatching: {"source", "engine", "post_norm"},
        SecondOrder: {"source", "tolerance", "probes", "seed"},
        LinearizedPatching: {"source", "rules", "n_steps", "over", "quadrature", "qk_fix", "grad_drop", "spliced"},
    }
    assert {entry.kind for entry in ENTRIES.values()} == {*known, VerifiedPatching}
    for kind, names in known.items():
        assert {field.name for field in fields(kind)} == names, "a new option belongs into the property test"
    assert len(fields(VerifiedPatching)) == 13
    assert {place for place, _ in RULES.values()} == {field.name for field in fields(Composite)} - {"name", "allow_gaps"}


def test_names_that_are_in_files_stay() -> None:
    names = [
        *("exact", "exact-frozen", "atp", "atp*", "atp+qk", "atp+drop", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "relp+qk+drop"),
        *("ig:5", "ig-left:3", "ig-right:3", "ig-trapezoid:3", "ig-activations:4", "eap-ig-activations:5", "clean-corrupted"),
        *("relp+clean-corrupted", "relp+ig:5", "relp-ah+ig-left:2+qk", "gim+ig:3+drop", "second-order", "second-order:4"),
    ]
    assert [get_method(name).name for name in names] == names
    paths = [pl.IntegratedGradients(10, over, quadrature=way).name for over in ("inputs", "activations", "groups") for way in QUADRATURES]
    assert paths == [
        *("ig:10", "ig-left:10", "ig-right:10", "ig-trapezoid:10"),
        *("ig-activations:10", "ig-activations-left:10", "ig-activations-right:10", "ig-activations-trapezoid:10"),
        *("ig-groups:10", "eap-ig-activations:10", "ig-groups-right:10", "ig-groups-trapezoid:10"),
    ]


def test_names_of_options() -> None:
    assert ActivationPatching("literal", source="mean").name == "exact[engine=literal]@mean"
    assert pl.IntegratedGradients(5, rules="relp", source="zero", qk_fix=True).name == "relp+ig:5+qk@zero"
    assert SecondOrder(probes=4, seed=1).name == "second-order:4[seed=1]"
    assert SecondOrder(tolerance=0.3).name == "second-order[tolerance=0.3]"
    method = VerifiedPatching(pl.RelevancePatching(source="mean"), k=10, recall=0.8, population=True)
    assert method.name == "verified[relp@mean,k=10,recall=0.8,population=true]"
    assert VerifiedPatching(VerifiedPatching().screen).name == "verified[relp]"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("eap", "atp"),
        ("eap-ig:7", "ig-right:7"),
        ("eap-ig-inputs:7", "ig-right:7"),
        ("relp+eap-ig:7", "relp+ig-right:7"),
        ("eap+qk", "atp+qk"),
        ("atp+qk+drop@mean", "atp*@mean"),
        ("gradient+ig:4", "ig:4"),
        ("ig-trapezoid:1", "clean-corrupted"),
        ("ig:5[quadrature=left]", "ig-left:5"),
        ("exact[post_norm=frozen]@paired", "exact-frozen"),
        ("second-order[probes=4, seed=0]", "second-order:4"),
        ("verified", "verified[relp]"),
        ("verified[k=20]", "verified[relp]"),
        ("lrp[routing,gate,half,identity,ln]+ig:5", "relp+ig:5"),
        ("lrp[ln,identity,half,ah,gate,routing,gaps]", "relp-ah[gaps]"),
        ("lrp[identity,ln]", "lrp[ln,identity]"),
        ("lrp[gamma:0.25]", "lrp[gamma]"),
        ("lrp[gamma[epsilon=1e-3,gamma=.5]]", "lrp[gamma:0.5[epsilon=0.001]]"),
    ],
)
def test_other_spellings_are_read(alias: str, name: str) -> None:
    assert get_method(alias).name == name
    assert get_method(alias) == get_method(name)


def test_every_name_that_is_listed_can_be_typed() -> None:
    filled = {"METHOD": "relp", "PRESET": "gim", "SOURCE": "mean", "OPTION=VALUE,...": "rules=relp", "RULE,...": "ln,ah", "N": "3"}
    for name in METHODS:
        if name == "METHOD[OPTION=VALUE,...]":
            assert get_method("exact[engine=literal]") == ActivationPatching(engine="literal")
            continue
        text = re.sub("|".join(map(re.escape, filled)), lambda match: filled[match[0]], name)
        assert get_method(text).run, name
        assert METHODS[name]
        for example in re.findall(r"(?<=e\.g\. ).*$", METHODS[name]):
            assert all(get_method(one) for one in split(example.partition(";")[0])), example
    assert {"eap", "eap-ig:N", "eap-ig-inputs:N", "verified[METHOD]", "second-order", "lrp[RULE,...]"} <= set(METHODS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("atp+qk+qk", r"unknown method 'atp\+qk\+qk'.* once each and in this order: \+qk, \+drop"),
        ("relp+drop+qk", "once each and in this order"),
        ("atp*+qk", r"\+qk is part of atp\* already"),
        ("exact+qk", "'qk' is no suffix of exact; it has none"),
        ("relp+exact", "exact does not go with rules before it"),
        ("relp+atp", "atp does not go with rules before it"),
        ("relp+atp*", r"atp\* does not go with rules before it"),
        ("relp+ig", r"'ig' is no suffix of atp; it has \+qk, \+drop"),
        ("ig:x", "n_steps is of type int or none; got 'x'"),
        ("ig:none", "ig needs a number, as in ig:5"),
        ("exact:3", "unknown method"),
        ("ig:5@", "One source may follow"),
        ("ig:5@mean@zero", "One source may follow"),
        ("ig:5@men", "unknown source 'men'; did you mean 'mean'"),
        ("verified[relp]@mean", r"that of the method in brackets: verified\[relp@mean\]"),
        ("verified[verified]", "scores only the cells that it verifies"),
        ("verified[exact]", "the screen is exact patching itself"),
        ("verified[relp,k=1.5]", "k is of type int; got '1.5'"),
        ("verified[relp,kk=3]", "unknown option of the method verified 'kk'; did you mean 'k'"),
        ("verified[relp,atp]", "unknown option of the method verified 'atp'"),
        ("exact[engine=literal,engine=auto]", "has engine twice"),
        ("exact[source=mean]", "unknown option of the method exact 'source'"),
        ("exact[engine]", "'engine' in the name of the method exact is no option; write engine=VALUE"),
        ("exact[engine=literal", "unknown method"),
        ("exact[]", "unknown method"),
        ("second-order[seed=true]", "seed is of type int; got 'true'"),
        ("eap-ig-input:5", "did you mean 'eap-ig-inputs:N'"),
        ("", "unknown method ''"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        get_method(name)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises((MethodError, TypeCheckError)):  # the shape checks of the tests come first
        get_method(["lrp", ["ln"]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lrp", "names no rules; choose among ln, identity"),
        ("lrp[ln,nope]", "unknown rule 'nope'.* Valid: ah, .*gaps"),
        ("lrp[ln,identty]", "did you mean 'identity'"),
        ("lrp[ah,temperature]", "two rules for pattern"),
        ("lrp[gaps,gaps,ln]", "two rules for allow_gaps"),
        ("lrp[ln:3]", "the rule ln takes no number"),
        ("lrp[gamma:x]", "gamma is of type float; got 'x'"),
        ("lrp[gamma:1[gamma=2]]", "the rule gamma has gamma twice"),
        ("lrp[epsilon[eps=2]]", "unknown option of the rule epsilon 'eps'"),
        ("relp[ln]", r"a preset takes only \[gaps\]"),
        ("relp:3", "unknown rule set 'relp:3'"),
    ],
)
def test_wrong_rules_are_refused(name: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        get_composite(name)


def test_composites_by_name() -> None:
    assert get_composite("lrp[ln,identity]") == Composite("by hand", norm=LNRule(), activation=IdentityRule())
    assert Composite(norm=LNRule(), product=HalfRule(), pattern=AHRule(), activation=IdentityRule()).name == "lrp[ln,identity,half,ah]"
    assert Composite(linear=EpsilonRule(1e-4), pattern=TemperatureRule(3.0)).name == "lrp[temperature:3,epsilon:0.0001]"
    assert Composite(linear=GammaRule(epsilon=1e20)).name == "lrp[gamma[epsilon=1e20]]"
    assert [get_composite(name).name for name in PRESETS] == list(PRESETS)
    assert Composite().name == "gradient"
    assert replace(PRESETS["relp"], name="").name == "relp"
    assert get_composite("relp", allow_gaps=True) == get_composite("relp[gaps]") != get_composite("relp")
    assert get_composite("relp[gaps]", allow_gaps=False).name == "relp"
    assert get_composite(Composite("mine", norm=LNRule()), allow_gaps=True).name == "mine"
    ablations = ["lrp[ln]", "lrp[ln,identity]", "lrp[ln,identity,half]"]
    assert [pl.RelevancePatching(name).name for name in ablations] == ablations
    assert pl.RelevancePatching(Composite(norm=LNRule())) == pl.RelevancePatching("lrp[ln]")
    assert pl.RelevancePatching(PRESETS["relp"]).rules == "relp"


def test_one_class_for_all_linearised_methods() -> None:
    assert LinearizedPatching() == pl.AttributionPatching() == pl.RelevancePatching("gradient") == get_method("atp")
    assert LinearizedPatching(n_steps=5, rules="relp") == pl.IntegratedGradients(5, rules="relp") == get_method("relp+ig:5")
    assert replace(get_method("relp"), n_steps=3).name == "relp+ig:3"
    with pytest.raises(MethodError, match="describe a path, but there is one point only; give n_steps as well"):
        LinearizedPatching(over="activations")


@dataclass(frozen=True)
class Louder(LNRule):
    """An LN-rule with a parameter."""

    by: float = 2.0


@pytest.fixture
def registries() -> Iterator[None]:
    """Registries as they were, afterwards."""
    kept = [(registry, dict(registry)) for registry in (PRESETS, DESCRIPTIONS, RULES, METRICS, ENTRIES)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def test_composites_that_no_registry_knows_are_refused(registries: None) -> None:
    with pytest.raises(RuleError, match=r"the composite 'mine', which is in no registry. .*@patchlab\.rules\.register_preset.*then it is lrp\[ln\]"):
        pl.RelevancePatching(Composite("mine", norm=LNRule()))
    with pytest.raises(RuleError, match=r"'relp', whose name is that of another one.*lrp\[ln,half,gate,routing\]"):
        pl.RelevancePatching(replace(PRESETS["relp"], activation=None))
    with pytest.raises(RuleError, match=r"Louder\(by=2.0\) is in no registry.*register_rule.*register_preset"):
        Composite(norm=Louder())
    with pytest.raises(RuleError, match="'loud', which is in no registry"):
        pl.RelevancePatching(Composite("loud", norm=Louder()))
    register_rule("louder", "norm")(Louder)
    assert pl.RelevancePatching(Composite(norm=Louder(3.0), pattern=AHRule())).name == "lrp[louder:3,ah]"
    assert get_composite("lrp[louder:3]") == Composite(norm=Louder(3.0))

    @register_preset("loud")
    def loud() -> Composite:
        """twice as loud"""
        return Composite(norm=Louder())

    assert get_method("loud+ig:3").name == pl.IntegratedGradients(3, rules=Composite(norm=Louder())).name == "loud+ig:3"
    assert METHODS["loud"] == "twice as loud"


def test_registries_refuse_duplicates(registries: None) -> None:
    with pytest.raises(RuleError, match=r"there is already a rule preset 'relp' \(Composite\(name='relp'"):
        register_preset("relp")(lambda: Composite("x", norm=Louder()))
    with pytest.raises(RuleError, match="rules of 'mine' are already registered as 'relp'"):
        register_preset("mine")(lambda: PRESETS["relp"])
    with pytest.raises(RuleError, match="'lrp' is the name of a rule"):
        register_preset("lrp")(lambda: Composite("x", norm=Louder()))
    with pytest.raises(RuleError, match="there is already a rule 'ln'"):
        register_rule("ln", "norm")(Louder)
    with pytest.raises(RuleError, match="LNRule on norm is already called 'ln'"):
        register_rule("layernorm", "norm")(LNRule)
    with pytest.raises(RuleError, match="unknown field of a composite 'norms'; did you mean 'norm'"):
        register_rule("louder", "norms")(Louder)
    with pytest.raises(MetricError, match=r"there is already a metric 'logit_diff' \(Metric\(name='logit_diff'"):
        register_metric("logit_diff")(lambda logits, answers: logits[:, 0])
    for bad in ("a b", "x,y", "Ig", "x[y]", "x+y", ""):
        with pytest.raises(MetricError, match="cannot be the name of a metric"):
            register_metric(bad)(lambda logits, answers: logits[:, 0])

    @register_metric("first", unit="nats")
    def first(logits: Any, answers: Any) -> Any:
        return logits[:, 0]

    assert get_metric("first") == Metric("first", first, "nats")
    with pytest.raises(MethodError, match=r"there is already a method 'exact' \(ActivationPatching: activation patching"):
        register_method("exact", "again")(SecondOrder)
    with pytest.raises(MethodError, match="there is already a rule preset 'relp'"):
        register_method("relp", "again")(SecondOrder)
    with pytest.raises(MethodError, match="SecondOrder has no field 'steps', which 'mine:N' needs; it has probes, seed, source, tolerance"):
        register_method("mine:N", "mine", number="steps")(SecondOrder)
    with pytest.raises(MethodError, match="ends in ':N' if number= says"):
        register_method("mine", "mine", number="probes")(SecondOrder)


class Mine(ActivationPatching):
    """Exact patching by another name."""


def test_methods_of_ones_own(registries: None) -> None:
    with pytest.raises(MethodError, match=r"Mine is in no registry of methods.*@patchlab\.methods\.register_method"):
        _ = Mine().name

    @register_method("scaled:N", "N times as much", number="by")
    @register_method("scaled", "as much")
    @dataclass(frozen=True)
    class Scaled(Mine):
        by: int | None = None
        loud: bool = False

    for method in (Scaled(), Scaled(source="zero", by=3, loud=True), Scaled(engine="literal", by=2)):
        assert get_method(method.name) == method
    assert Scaled(source="zero", by=3, loud=True).name == "scaled:3[loud=true]@zero"
    assert METHODS["scaled:N"] == "N times as much"

    @register_method("needy", "needs")
    @dataclass(frozen=True, kw_only=True)
    class Needy(Mine):
        what: str

    assert get_method("needy[what=x]") == Needy(what="x")
    assert Needy(what="x").name == "needy[what=x]"
    with pytest.raises(MethodError, match=r"needy needs what, as in needy\[what=VALUE\]"):
        get_method("needy")
    assert all(field.default is not MISSING for field in fields(Scaled))


def test_a_preset_with_the_name_of_a_method_is_refused(registries: None) -> None:
    register_preset("atp")(lambda: Composite("x", pattern=TemperatureRule(5.0)))
    with pytest.raises(MethodError, match="the rule preset 'atp' has the name of a method"):
        _ = pl.RelevancePatching("atp").name


def test_lists_of_names() -> None:
    job = Job("m", "t", tuple(split("exact, lrp[ln,identity],relp+ig:2")), ("z",))
    assert job.methods == ("exact", "lrp[ln,identity]", "relp+ig:2")
    by_mean = Job("m", "t", tuple(split("relp@mean,exact[engine=literal]@mean")), ("z",))
    assert (by_mean.reference, by_mean.methods) == ("exact[engine=literal]@mean", ("exact[engine=literal]@mean", "relp@mean"))
    with pytest.raises(MethodError, match="exact patches in the source 'paired' and relp@zero the source 'zero', which cannot be compared"):
        Job("m", "t", ("relp@zero", "exact"), ("z",))
    with pytest.raises(MethodError, match=r"verified scores only the cells that it verifies.*name its screen instead, such as relp"):
        Job("m", "t", ("exact", "verified"), ("z",))
    assert isinstance(scoring_method("relp"), Method)
    names = ["relp+ig:5", "lrp[ln,identity]@mean", "second-order:4[seed=1]", "atp*"]
    assert [scores_file(name) for name in names] == [
        "scores.relp-ig-5.nc",
        "scores.lrp-ln-identity-mean.nc",
        "scores.second-order-4-seed-1.nc",
        "scores.atp*.nc",
    ]
    assert split("a[b,c[d,e]],f") == ["a[b,c[d,e]]", "f"]
    assert Word.parse("a]b[") is None
