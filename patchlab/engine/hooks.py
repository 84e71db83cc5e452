"""Hooks: what happens at each hook of the Bridge during one run, and how it is put there.

At every hook the order is rule, edits, capture, and then what stands in for the model's next step. Hooks return new tensors and are
removed at the end, also after an exception.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from patchlab.adapters import LOGITS, Accessor, BridgedModel
from patchlab.engine.program import Program, Target
from patchlab.interventions import Edit
from patchlab.rules.attachments import Attachment, Recorded

Step = Callable[[Tensor, Recorded], Tensor]
"""A rule's step at a hook: from its value, and those recorded before it, to the value that flows on."""


@dataclass
class Hook:
    """One hook of the Bridge during one run, and all that happens there."""

    rules: list[Step] = field(default_factory=list[Step])
    edits: list[tuple[Edit, Accessor]] = field(default_factory=list[tuple[Edit, Accessor]])
    keep: list[Target] = field(default_factory=list[Target])
    gradients: list[tuple[Target, int]] = field(default_factory=list[tuple[Target, int]])
    keep_raw: list[str] = field(default_factory=list[str])
    gradient_raw: list[str] = field(default_factory=list[str])
    after: list[Step] = field(default_factory=list[Step])
    recorded: bool = False
    fired: int = 0


@dataclass
class Execution:
    """One forward pass: what it collects, and what it does when a hook fires."""

    model: BridgedModel
    program: Program | None = None
    recorded: Recorded = field(default_factory=Recorded)
    activations: dict[Target, Tensor] = field(default_factory=dict[Target, Tensor])
    hooks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    leaves: dict[Target, Tensor] = field(default_factory=dict[Target, Tensor])
    more_leaves: dict[tuple[Target, int], Tensor] = field(default_factory=dict[tuple[Target, int], Tensor])
    raw_leaves: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def at_hook(self, name: str, hook: Hook, module: Any, inputs: Any, value: Tensor) -> Tensor:
        """Rule, edits, capture, what stands in for the next step; returns the tensor that flows on."""
        hook.fired += 1
        for rule in hook.rules:
            value = rule(value, self.recorded)
        host, joint = value, ""
        for edit, accessor in hook.edits:
            companion = self.companion(accessor, edit.address.layer)
            host, joint = (host if edit.joint and edit.joint == joint else value), edit.joint
            own = accessor.read(host, companion)
            new = accessor.write(host, companion, edit.apply(own, self.program.examples, self.program.positions))  # type: ignore[union-attr]
            value = new if host is value else value + (new - host)
        if hook.gradients or hook.gradient_raw:
            # a tensor of its own: if the model drops what a hook returns, no gradient may reach it by another way
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            self.leaves.update((target, value) for target, part in hook.gradients if part == 0)
            self.more_leaves.update(((target, part), value) for target, part in hook.gradients if part > 0)
            self.raw_leaves.update(dict.fromkeys(hook.gradient_raw, value))
        for target in hook.keep:
            accessor = self.model.arch.accessors[target[0]].at(target[1])
            self.activations[target] = accessor.read(value, self.companion(accessor, target[1])).detach().clone()
        self.hooks.update((wanted, value.detach().clone()) for wanted in hook.keep_raw)
        if hook.recorded:
            self.recorded[name] = value
        for rule in hook.after:
            value = rule(value, self.recorded)
        return value

    def companion(self, accessor: Accessor, layer: int | None) -> Any:
        """What an accessor needs beside its host: nothing, a tensor, or several."""
        names = accessor.companion(layer)
        if names is None or isinstance(names, str):
            return None if names is None else self.recorded[canonical(self.model, names)]
        return tuple(self.recorded[canonical(self.model, name)] for name in names)


def canonical(model: BridgedModel, name: str) -> str:
    """The hook's own name; several names can lead to one hook."""
    return str(model.hooks[name].name)


def hook_at(plan: dict[str, Hook], model: BridgedModel, name: str) -> Hook:
    """The entry of a hook in a plan, by any of its names."""
    # aliases of one hook share one entry, so that the order rule, edits, capture holds across them
    return plan.setdefault(canonical(model, name), Hook())


def host_hook(plan: dict[str, Hook], model: BridgedModel, accessor: Accessor, layer: int | None) -> Hook:
    """The hook that hosts a site in a plan, with what the accessor reads beside it recorded."""
    companion = accessor.companion(layer)
    for name in (companion,) if isinstance(companion, str) else companion or ():
        hook_at(plan, model, name).recorded = True
    return hook_at(plan, model, accessor.host(layer))


def plan_of(model: BridgedModel, program: Program, edits: tuple[Edit, ...]) -> dict[str, Hook]:
    """The plan of a program and edits: what they do at which hook, by the hook's own name."""
    plan: dict[str, Hook] = {}
    if program.rules is not None:
        _put_rules(plan, model, program.rules.attach(model.arch.places))
    accessors = model.arch.accessors
    for edit in edits:
        site = edit.address
        for accessor in accessors[site.kind].at(site.layer).parts():
            host_hook(plan, model, accessor, site.layer).edits.append((edit, accessor))
    for kind, layer in program.keep:
        host_hook(plan, model, accessors[kind].at(layer), layer).keep.append((kind, layer))
    for kind, layer in program.gradients:
        for part, accessor in enumerate(accessors[kind].at(layer).parts()):
            host_hook(plan, model, accessor, layer).gradients.append(((kind, layer), part))
    for name in program.hooks:
        hook_at(plan, model, name).keep_raw.append(name)
    for name in program.hook_gradients:
        hook_at(plan, model, name).gradient_raw.append(name)
    return plan


def _put_rules(plan: dict[str, Hook], model: BridgedModel, attachments: Iterable[Attachment]) -> None:
    for attachment in attachments:
        reads = {name: canonical(model, name) for name in attachment.reads}
        hook = plan.setdefault(LOGITS, Hook()) if attachment.at == LOGITS else hook_at(plan, model, attachment.at)
        (hook.after if attachment.after else hook.rules).append(partial(_apply_rule, attachment, reads))
        for name in attachment.reads:
            hook_at(plan, model, name).recorded = True


@contextmanager
def ruled(model: BridgedModel, attachments: Iterable[Attachment], leaves: Iterable[str] = ()) -> Generator[dict[str, Tensor], None, None]:
    """Rules on a model's hooks for the duration of the block, however it is run; gives the values at ``leaves``, to differentiate by."""
    plan: dict[str, Hook] = {}
    _put_rules(plan, model, attachments)
    for name in leaves:
        hook_at(plan, model, name).gradient_raw.append(name)
    execution = Execution(model)
    with hooked(model.hooks, {name: partial(execution.at_hook, name, hook) for name, hook in plan.items()}):
        yield execution.raw_leaves


def _apply_rule(attachment: Attachment, reads: dict[str, str], value: Tensor, recorded: Recorded) -> Tensor:
    return attachment.apply(value, {name: recorded[canonical] for name, canonical in reads.items()})


@contextmanager
def hooked(points: Mapping[str, Any], hooks: Mapping[str, Callable[..., Tensor | None]]) -> Generator[None, None, None]:
    """Put functions on hook points for the duration of the block."""
    handles: list[RemovableHandle] = []
    try:
        for name, function in hooks.items():
            handles.append(points[name].register_forward_hook(function))
        yield
    finally:
        for handle in handles:
            handle.remove()
