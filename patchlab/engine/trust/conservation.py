"""The conservation test, which finds relevance that is lost in a module that no rule covers.

With every non-linearity held, a part of a network is homogeneous in its input and its biases: for any cotangent g at its output,
Σ x·(Jᵀg) + Σ b·(the rules' gradient at the output of the module that owns b) = Σ y·g. The embedding, every block alone (fed the
input that it gets) and the final norm with the unembedding, before any cap, are each run in float32 (float64 stays) with random g. A gap is
a non-linearity that kept its plain gradient; it is followed down to the innermost module whose own balance is off.

What is tested is the cover, not the rules: a composite that leaves the softmax its gradient (``relp``), or scales gradients (``attnlrp``, an
ε-rule), is not conservative itself. So the test puts the *holding* rule (:data:`HOLDING`) on every kind of place for which the composite has
a rule, and also on the kinds that it leaves alone, which is its choice and no gap. A place that it leaves alone and that cannot be
held (a mixture of experts under a composite of norms) counts as a constant, like a bias.

Conservation cannot see everything (with q and k held, nothing that acts on them), so the pattern rule is probed too: in each block alone,
queries and keys get exactly no gradient if it holds the pattern, and another one than without it if it does not.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from patchlab.adapters import AttentionPlace, BridgedModel, CapPlace, ExpertsPlace, GatePlace, LinearPlace, MLPPlace, Place
from patchlab.adapters.places import value_and_slope_at_zero
from patchlab.engine.hook_points import Shown
from patchlab.engine.hooks import ruled
from patchlab.engine.session import found_once
from patchlab.engine.trust.ledger import Ledger, on_modules, tensors_in
from patchlab.engine.trust.precision import at_full_precision, mapped, widened
from patchlab.engine.trust.trials import trial
from patchlab.errors import RuleError
from patchlab.host import precise
from patchlab.rules import AHRule, Composite, ConstantGateRule, HalfRule, IdentityRule, LNRule, SoftCap, Uncovered
from patchlab.rules.attachments import Attachment

TOLERANCE = 1e-5
"""Largest gap, as a share of Σ|x·Jᵀg|."""

_HELD = ConstantGateRule()
HOLDING = Composite("holding", norm=LNRule(), activation=IdentityRule(), product=HalfRule(), pattern=AHRule(), gate=_HELD, routing=_HELD)


def uncovered(model: BridgedModel, composite: Composite) -> tuple[Uncovered, ...]:
    """Modules of the model that the rules of a composite do not cover though they should: places with a problem, then gaps. Found once per model."""
    problems = [(place, composite.problem_at(place)) for place in model.arch.places if composite.rules_at(place)]
    found = tuple(Uncovered(place.name, problem) for place, problem in problems if problem is not None)
    if composite.plain:
        return ()
    # all that the test depends on: other composites share it
    key = ("rules", found, composite.activation is None, repr(composite.pattern))
    return found_once(model, key, lambda: (*found, *_gaps(model, composite, {gap.module for gap in found})))


def check_rules(model: BridgedModel, composite: Composite) -> None:
    """Check that the rules cover the whole model.

    Raises:
        RuleError: modules that no rule covers, unless the composite allows gaps.
    """
    composite.check(model.arch.places)
    found = uncovered(model, composite)
    if not composite.allow_gaps:
        for first in found:
            more = f" ({len(found) - 1} more: see coverage())" if len(found) > 1 else ""
            raise RuleError(
                f"the composite {composite.name!r} does not cover all of {model.name}: {first.module}: {first.problem}{more}. "
                f"Use rules='gradient', which has none, describe the module to patchlab.adapters, or leave it with its plain gradient: "
                f"get_composite({composite.name!r}, allow_gaps=True)."
            )


def soft_caps(model: BridgedModel) -> tuple[SoftCap, ...]:
    """The soft caps of a model, and what relevance each loses with its plain gradient, on random tokens."""
    places = [place for place in model.arch.places if isinstance(place, CapPlace)]
    return found_once(model, "soft caps", lambda: _losses(model, places)) if places else ()


def _losses(model: BridgedModel, places: list[CapPlace]) -> tuple[SoftCap, ...]:
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for place in places:
            if not place.final and place.problem is None:
                stack.enter_context(on_modules((model.hooks[place.at],), after=partial(_note, seen, place.at)))
        logits = model.bridge(trial(model, 6, seed=0).tokens, return_type="logits", use_cache=False)
    values = [logits if place.final else seen.get(place.at) for place in places]
    return tuple(_loss(place, value) for place, value in zip(places, values, strict=True))


def _note(seen: dict[str, Tensor], name: str, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
    seen[name] = output.detach()


def _loss(place: CapPlace, capped: Tensor | None) -> SoftCap:
    """Of y = f(x), x·f'(x) is kept: with t = y / c, f'(x) = 1 − t². NaN where the scores are not seen."""
    if capped is None:
        return SoftCap(place.name, place.cap, *[float("nan")] * 3)
    y = precise(capped)
    y = y[y.abs() <= place.cap]  # not what is masked
    t = (y / place.cap).clamp(-1 + 1e-12, 1 - 1e-12)
    lost = (y - place.cap * t.atanh() * (1 - t * t)).abs()
    top = int(y.abs().argmax())
    return SoftCap(place.name, place.cap, float(lost.sum() / y.abs().sum()), float(y[top].abs()), float(lost[top] / y[top].abs()))


def _gaps(model: BridgedModel, composite: Composite, problems: set[str]) -> Iterator[Uncovered]:
    tokens = trial(model, 6, seed=0).tokens
    rules = [_holding(composite, place, place.name in problems, model.device) for place in model.arch.places]
    seen = _observe(model, tokens)
    yield from _test_embedding(model, tokens, rules, seen)
    for layer, (args, kwargs) in enumerate(seen.calls):
        inside = [rule for rule in rules if rule.place.name.startswith(f"blocks.{layer}.")]
        block = model.bridge.blocks[layer]
        call = partial(_call, block, *mapped((args, kwargs), at_full_precision))
        with widened(block.modules()):
            yield from _test_block(model, f"blocks.{layer}", block, call, inside)
            if composite.pattern is not None:
                yield from _probe(model, composite, call, [rule.place for rule in inside if rule.attachments])
    yield from _test_unembedding(model, tokens, rules, seen)


@dataclass(frozen=True)
class _Rule:
    """What holds a place: rules at hooks; None makes its output a constant, unless it is known to be uncovered."""

    place: Place
    attachments: tuple[Attachment, ...] | None = None
    known: bool = False


def _holding(composite: Composite, place: Place, problem: bool, device: torch.device) -> _Rule:
    if isinstance(place, (LinearPlace, CapPlace)):
        return _Rule(place, ())  # linear as it is; caps are measured apart
    if problem or place.problem is not None:
        return _Rule(place, () if problem else None, known=problem)
    if isinstance(place, MLPPlace) and composite.activation is None and place.activation is not None:
        at_zero, _ = value_and_slope_at_zero(place.activation, device)
        if at_zero != 0:  # no factor of its input: the gate is the constant, or all of it
            return _Rule(place, Composite("gate", product=ConstantGateRule()).attach((place,))) if place.gated else _Rule(place)
    return _Rule(place, HOLDING.attach((place,)))


@dataclass
class _Seen:
    """How a run calls the blocks, what the last of them gives, and the modules that run before and after them (no embeddings)."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list[tuple[tuple[Any, ...], dict[str, Any]]])
    output: Any = None
    head: list[nn.Module] = field(default_factory=list[nn.Module])
    tail: list[nn.Module] = field(default_factory=list[nn.Module])


def _observe(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> _Seen:
    seen, blocks = _Seen(), list(model.bridge.blocks)
    outside = _outside(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in blocks:
            seen.calls.append((args, dict(kwargs)))
        elif not isinstance(module, nn.Embedding):
            (seen.head if seen.output is None else seen.tail).append(module)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is blocks[-1]:
            seen.output = output

    with torch.no_grad(), on_modules((*blocks, *outside), before, after):
        model.bridge(tokens, return_type="logits", use_cache=False)
    return seen


def _outside(model: BridgedModel) -> list[nn.Module]:
    """The modules that belong to no block, of the Bridge and of the model that it wraps."""
    inside = {id(module) for block in model.bridge.blocks for module in block.modules()}
    found = {id(module): module for root in (model.bridge, model.bridge.original_model) for module in root.modules()}
    return [module for module in found.values() if id(module) not in inside and not isinstance(module, HookPoint)]


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The block's output for its own input, and that input, by which it can be differentiated."""
    x = (args[0] if args else kwargs["hidden_states"]).requires_grad_()
    return tensors_in(block(*args, **kwargs))[0], x


def _found(model: BridgedModel, part: str, ledger: Ledger, y: Tensor, rules: list[_Rule]) -> Iterator[Uncovered]:
    """The gap of a part, if there is one beside those of places that are known to be uncovered, and the modules that are to blame."""
    scale, gaps, entries = ledger.balance(y)
    total = sum(gaps.values())
    if abs(total) <= TOLERANCE * scale:
        return
    points = [model.hooks[attachment.at] for attachment in _attachments(rules)]
    ruled_at = {id(point.module if isinstance(point, Shown) else point) for point in points}
    for entry in entries:
        if isinstance(entry.module, GeneralizedComponent) and id(entry.module.hook_in) in ruled_at and entry.parent is not None:
            # the rule acts within the module that reads what it gives
            gaps[id(entry.parent)] = gaps.get(id(entry.parent), 0.0) + gaps[id(entry)]
            gaps[id(entry)] = 0.0
    known = {id(module) for rule in rules if rule.known and rule.place.module is not None for module in rule.place.module.modules()}
    worst = sorted((entry for entry in entries if abs(gaps[id(entry)]) > TOLERANCE * scale), key=lambda entry: -abs(gaps[id(entry)]))
    if worst and all(id(entry.module) in known for entry in worst):
        return
    modules = {**_named(model.bridge.original_model), **_named(model.bridge)}
    names = {key: name.replace("._original_component", "").replace("_original_component.", "") for key, name in modules.items()}
    named = dict.fromkeys(
        part if entry.module is None else f"{names[id(entry.module)]} ({_type(entry.module)})" for entry in worst if id(entry.module) not in known
    )
    share = abs(total) / scale
    yield Uncovered(
        ", ".join(list(named)[:3]) or part,
        f"a non-linearity that no rule covers keeps its plain gradient, so that in {part} {share:.2g} of the relevance appears or disappears",
    )


def _named(root: nn.Module) -> dict[int, str]:
    """Names of the modules of a tree, by identity."""
    return {id(module): name for name, module in cast(Iterable[tuple[str, nn.Module]], root.named_modules())}


def _type(module: nn.Module) -> str:
    original = module.original_component if isinstance(module, GeneralizedComponent) else None
    return type(module if original is None else original).__name__


def _modules_of(rules: list[_Rule]) -> list[nn.Module]:
    return [rule.place.module for rule in rules if rule.attachments is None and rule.place.module is not None]


def _attachments(rules: list[_Rule]) -> list[Attachment]:
    return [attachment for rule in rules for attachment in rule.attachments or ()]


def _test_block(
    model: BridgedModel, part: str, block: nn.Module, call: Callable[[], tuple[Tensor, Tensor]], rules: list[_Rule]
) -> Iterator[Uncovered]:
    ledger = Ledger(_modules_of(rules))
    modules = [module for module in block.modules() if not isinstance(module, HookPoint)]
    constants = [value for rule in rules if isinstance(rule.place, ExpertsPlace) and rule.place.experts for value in rule.place.experts.constants]
    with torch.enable_grad(), _differentiable(constants), ruled(model, _attachments(rules)), on_modules(modules, ledger.before, ledger.after):
        y, x = call()
        ledger.root.inputs, ledger.root.outputs, ledger.root.sources = [x], [y], constants
        yield from _found(model, part, ledger, y, rules)


@contextmanager
def _differentiable(constants: list[Tensor]) -> Generator[None, None, None]:
    """Constants by which a run can be differentiated, for the duration of the block."""
    before = [value.requires_grad for value in constants]
    try:
        for value in constants:
            value.requires_grad_()
        yield
    finally:
        for value, wanted in zip(constants, before, strict=True):
            value.requires_grad_(wanted)


def _probe(model: BridgedModel, composite: Composite, call: Callable[[], tuple[Tensor, Tensor]], places: list[Place]) -> Iterator[Uncovered]:
    """Whether the pattern rule does to queries and keys what it should."""
    # a gate can share the hook of the queries
    pattern = Composite("pattern", pattern=composite.pattern, gate=HOLDING.gate)
    gates = tuple(place for place in places if isinstance(place, GatePlace))
    for place in places:
        if not isinstance(place, AttentionPlace) or pattern.problem_at(place) is not None:
            continue
        try:
            plain, under = (_at_scores(model, call, place, pattern.attach(held)) for held in (gates, (*gates, place)))
        except RuleError as error:
            yield Uncovered(place.name, str(error).rstrip("."))
            continue
        name = type(composite.pattern).__name__
        if composite.pattern is not None and composite.pattern.blocks_scores:
            if any(bool(gradient.any()) for gradient in under):
                yield Uncovered(place.name, f"the {name} has no effect there: queries and keys still get a gradient")
        elif any(bool(gradient.any()) for gradient in plain) and all(torch.equal(a, b) for a, b in zip(plain, under, strict=True)):
            yield Uncovered(place.name, f"the {name} has no effect there: queries and keys get the same gradient as without it")


def _at_scores(model: BridgedModel, call: Callable[[], tuple[Tensor, Tensor]], place: AttentionPlace, rules: tuple[Attachment, ...]) -> list[Tensor]:
    with torch.enable_grad(), ruled(model, rules, place.scores) as leaves:
        y, _ = call()
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
        values = list(leaves.values())
        return list(torch.autograd.grad(y, values, g, allow_unused=True, materialize_grads=True)) if values else []


class _Reached(Exception):
    """The first block has been reached."""


@contextmanager
def _standing_in(blocks: list[nn.Module], forward: Callable[..., Any]) -> Generator[None, None, None]:
    """Blocks that do ``forward(block, *args, **kwargs)`` instead of their own."""
    try:
        for block in blocks:
            # a bridge component hands plain attributes on to the module it wraps
            object.__setattr__(block, "forward", partial(forward, block))
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _at_full_precision(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """What an embedding gives is widened, not its table."""
    return mapped(output, at_full_precision)


def _test_embedding(model: BridgedModel, tokens: Int[Tensor, "row pos"], rules: list[_Rule], seen: _Seen) -> Iterator[Uncovered]:
    """From embeddings, of tokens and positions, to the first block."""
    rules = [rule for rule in rules if not rule.place.name.startswith("blocks.")]
    ledger, outside = Ledger(_modules_of(rules), lifts=True), _outside(model)
    reached: list[Tensor] = []

    def stop(block: nn.Module, *args: Any, **kwargs: Any) -> None:
        reached.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    with (
        torch.enable_grad(),
        ruled(model, _attachments(rules)),
        widened(seen.head),
        on_modules((module for module in outside if isinstance(module, nn.Embedding)), after=_at_full_precision),
        on_modules(outside, ledger.before, ledger.after),
        _standing_in([model.bridge.blocks[0]], stop),
    ):
        try:
            model.bridge(tokens, return_type="logits", use_cache=False)
        except _Reached:
            ledger.root.outputs = reached
            yield from _found(model, "embedding", ledger, reached[0], rules)


def _test_unembedding(model: BridgedModel, tokens: Int[Tensor, "row pos"], rules: list[_Rule], seen: _Seen) -> Iterator[Uncovered]:
    """From the last block to the logits, before any cap, and whether what follows is one."""
    rules = [rule for rule in rules if not rule.place.name.startswith("blocks.")]
    ledger, outside, blocks = Ledger(_modules_of(rules)), _outside(model), list(model.bridge.blocks)
    ledger.running = False
    output = mapped(seen.output, at_full_precision)
    h = tensors_in(output)[0].requires_grad_()

    def give(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ledger.running = block is blocks[-1]
        return output

    with (
        torch.enable_grad(),
        ruled(model, _attachments(rules)),
        widened([*seen.head, *seen.tail]),
        on_modules((module for module in outside if isinstance(module, nn.Embedding)), after=_at_full_precision),
        on_modules(outside, ledger.before, ledger.after),
        _standing_in(blocks, give),
    ):
        logits = model.bridge(tokens, return_type="logits", use_cache=False)
        raw = next((entry.outputs[0] for entry in ledger.closed if entry.module is model.bridge.unembed and entry.outputs), None)
        if raw is None:
            yield Uncovered("unembed", "the unembedding is not run as one module, so that what leads to the logits cannot be tested")
            return
        ledger.root.inputs, ledger.root.outputs = [h], [raw]
        yield from _found(model, "unembedding", ledger, raw, rules)
        if any(isinstance(rule.place, CapPlace) and rule.place.final for rule in rules):
            return
        after = Ledger(())
        after.root.inputs, after.root.outputs = [raw], [logits]
        yield from _found(model, "what follows the unembedding", after, logits, [])
