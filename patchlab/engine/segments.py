"""Segments: one run cut at sites, so that every derivative goes from one site to the next and no further.

At each site what was computed is set aside with its graph, and a leaf of the same value flows on. Whatever comes later depends on the leaves before
it directly, and never through another site in between: one backward pass from it gives its derivatives by all of them, with the sites between held.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import LOGITS, Accessor, BridgedModel
from patchlab.engine.hooks import Execution, canonical, hook_at, hooked, host_hook, plan_of
from patchlab.engine.literal import evaluate, forward
from patchlab.engine.program import Program, Target
from patchlab.engine.session import exclusive, session_of
from patchlab.engine.trust.conservation import check_rules
from patchlab.errors import InterventionError
from patchlab.rules.attachments import Recorded

ORDER = ("input", "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
"""Activations in the order in which a block computes them."""


def in_order(targets: Iterable[Target]) -> tuple[Target, ...]:
    """Activations in the order in which a model computes them.

    >>> in_order([("mlp_out", 0), ("resid_mid", 0), ("attn_out", 1), ("attn_out", 0)])
    (('attn_out', 0), ('resid_mid', 0), ('mlp_out', 0), ('attn_out', 1))

    Raises:
        InterventionError: a kind whose place in a block is not known.
    """
    found = tuple(dict.fromkeys(targets))
    if strange := [kind for kind, _ in found if kind not in ORDER]:
        raise InterventionError(f"it is not known where in a block {strange[0]} is computed; known: {', '.join(ORDER)}.")
    return tuple(sorted(found, key=lambda target: (-1 if target[1] is None else target[1], ORDER.index(target[0]))))


@dataclass(frozen=True)
class Passing:
    """A part of a site's value that derivatives pass through at a cut, as a function of what stands at a hook (None: of the site's own value)."""

    of: Callable[[Tensor], Tensor]
    hook: str | None = None


@dataclass(frozen=True, eq=False)
class Segments:
    """What a run that is cut at sites has on both sides of every cut. It holds the graph of the run as long as it lives.

    Attributes:
        before: per site its value as it was computed, ``[row, pos, *site]``, with its graph.
        leaves: per site the leaf of the same value that flows on, by which everything later is differentiated.
        hooks: values at hooks that were asked for, with their graph.
        values: the metric per row, with its graph.
    """

    before: Mapping[Target, Tensor]
    leaves: Mapping[Target, Tensor]
    hooks: Mapping[str, Tensor]
    values: Float[Tensor, " row"]

    def pull(self, of: Float[Tensor, "row *rest"], cotangents: Float[Tensor, "n row *rest"], to: Sequence[Target]) -> dict[Target, Tensor]:
        """Cotangents of a quantity of the run taken back to the leaves of sites, ``[n, row, pos, *site]``; sites without a path are left out."""
        ends = [self.leaves[target] for target in to]
        if not of.requires_grad or not ends:
            return {}
        gradients: Any = torch.autograd.grad(of, ends, cotangents.to(of.dtype), retain_graph=True, allow_unused=True, is_grads_batched=True)
        return {target: gradient for target, gradient in zip(to, gradients, strict=True) if gradient is not None}


@exclusive
def cut_run(
    model: BridgedModel,
    program: Program,
    sites: Iterable[Target],
    hooks: Iterable[str] = (),
    passing: Mapping[Target, Passing] | None = None,
) -> Segments:
    """One run of a program's tokens under its rules, cut at sites; it evaluates the program's metric.

    Args:
        model: the model.
        program: tokens, rules, metric and answers; without edits, gradients or what it keeps.
        sites: where it is cut.
        hooks: hooks, by any of their names, whose values are wanted.
        passing: per site the part that is not held.

    Raises:
        InterventionError: inside ``intervene``; a hook that did not fire once.
        SiteError: a site that the model lacks.
        RuleError: rules that cannot cover the model.
        ModelError, MetricError: logits or values that are not finite.
    """
    if session_of(model).surrounding:
        raise InterventionError("a run that is cut at sites has no edits: take it outside of intervene.")
    if program.rules is not None:
        check_rules(model, program.rules)
    plan = plan_of(model, program, ())
    at_logits = plan.pop(LOGITS, None)
    execution, names = Execution(model, program), tuple(dict.fromkeys(hooks))
    before: dict[Target, Tensor] = {}
    leaves: dict[Target, Tensor] = {}
    for target in in_order(sites):
        accessor = model.arch.accessors[target[0]].at(target[1])
        through = (passing or {}).get(target)
        if through is not None and through.hook is not None:
            hook_at(plan, model, through.hook).recorded = True
        host_hook(plan, model, accessor, target[1]).rules.append(partial(_cut, execution, target, accessor, before, leaves, through))
    for name in names:
        hook_at(plan, model, name).gradient_raw.append(name)
    points = {name: partial(execution.at_hook, name, hook) for name, hook in plan.items()}
    with torch.enable_grad(), hooked(model.hooks, points):
        logits = forward(model, program, None)
        if at_logits is not None:
            logits = execution.at_hook(LOGITS, at_logits, None, None, logits)
        values = evaluate(model, program, logits)
    for name, hook in plan.items():
        if hook.fired != 1:
            raise InterventionError(f"the hook {name} fired {hook.fired} times in one forward pass of {model.name}; it must fire once.")
    return Segments(before, leaves, {name: execution.raw_leaves[name] for name in names}, values)


def _cut(
    execution: Execution,
    target: Target,
    accessor: Accessor,
    before: dict[Target, Tensor],
    leaves: dict[Target, Tensor],
    through: Passing | None,
    value: Tensor,
    seen: Recorded,
) -> Tensor:
    companion = execution.companion(accessor, target[1])
    before[target] = own = accessor.read(value, companion)
    leaves[target] = leaf = own.detach().requires_grad_()
    if through is not None:
        part = through.of(own if through.hook is None else seen[canonical(execution.model, through.hook)]).to(own.dtype).reshape(own.shape)
        leaf = leaf + (part - part.detach())
    return accessor.write(value, companion, leaf)
