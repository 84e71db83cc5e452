"""The ledger of one run: what relevance flows in and out of each module that is called, and of which the balance is off."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from patchlab.adapters.weights import fetched
from patchlab.engine.trust.precision import at_full_precision, mapped
from patchlab.host import precise


@contextmanager
def on_modules(
    modules: Iterable[nn.Module], before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Generator[None, None, None]:
    """Functions before and after calls of modules, for the duration of the block."""
    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a structure of plain containers."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


@dataclass(eq=False)
class Entry:
    """One call of a module: the tensors that it takes and gives, and the constants that enter in it."""

    module: nn.Module | None
    parent: "Entry | None" = None
    inputs: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    sources: list[Tensor] = field(default_factory=list[Tensor])


class Ledger:
    """The ledger of one run: what goes in and out of each module. ``lifts``: modules that read nothing differentiable are sources (embeddings)."""

    def __init__(self, held: Iterable[nn.Module], *, lifts: bool = False) -> None:
        self.held, self.lifts, self.running = {id(module) for module in held}, lifts, True
        self.root = Entry(None)
        self.open, self.closed = [self.root], [self.root]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.running or isinstance(module, HookPoint) or _is_wrapped_leaf(module, self.open[-1].module):
            return None
        entry = Entry(module, self.open[-1])
        self.open.append(entry)
        own = partial(self._own, entry)
        return mapped(args, own), mapped(kwargs, own)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entry = next((entry for entry in reversed(self.open) if entry.module is module), None)
        if entry is None:
            return None
        del self.open[self.open.index(entry) :]
        values = tensors_in(output)
        if id(module) in self.held or (self.lifts and not entry.inputs and not any(value.requires_grad for value in values)):
            output = mapped(output, partial(self._constant, entry))
        self.closed.append(entry)
        first, *others = tensors_in(output) or [None]
        if others:  # a pattern that is given too has been used inside
            output = mapped(output, lambda tensor: tensor if tensor is first or not tensor.requires_grad else tensor.view_as(tensor))
        entry.outputs += [value for value in tensors_in(output) if value.requires_grad]
        return output

    @staticmethod
    def _own(entry: Entry, tensor: Tensor) -> Tensor:
        """A tensor of its own, to tell this use of it from others."""
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)
            entry.inputs.append(tensor)
        return tensor

    @staticmethod
    def _constant(entry: Entry, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = at_full_precision(tensor).requires_grad_()
            entry.sources.append(tensor)
        return tensor

    def balance(self, y: Tensor) -> tuple[float, dict[int, float], list[Entry]]:
        """Σ|x·Jᵀg| of the whole, and the gap of each module that closed, without those of the modules called in it."""
        generator = torch.Generator().manual_seed(1)
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        tensors = {id(t): t for entry in self.closed for t in (*entry.inputs, *entry.outputs, *entry.sources)}
        grads: dict[int, Tensor | None] = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), g, allow_unused=True), strict=True))

        def flow(tensors: list[Tensor], size: Callable[[Tensor], Tensor] = lambda x: x) -> float:
            pairs = [(tensor, grads[id(tensor)]) for tensor in tensors]
            return sum((float(size(precise(tensor.detach()) * precise(grad)).sum()) for tensor, grad in pairs if grad is not None), 0.0)

        gaps: dict[int, float] = {}
        closed = {id(entry) for entry in self.closed}
        for entry in self.closed:
            gaps[id(entry)] = flow(entry.outputs) - flow(entry.inputs) - flow(entry.sources) - _bias(entry, grads)
        for entry in self.closed[1:]:
            parent = entry.parent
            while parent is not None and id(parent) not in closed:
                parent = parent.parent
            # what the module does to the flow has been counted with its parent
            gaps[id(parent)] -= flow(entry.outputs) - flow(entry.inputs)
        ends = [*self.root.inputs, *(source for entry in self.closed for source in entry.sources)]
        return flow(ends, torch.abs), gaps, self.closed


def _is_wrapped_leaf(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a component of the Bridge calls the one module that it wraps: both are one."""
    return isinstance(parent, GeneralizedComponent) and parent.original_component is module and not any(module.children())


def _bias(entry: Entry, grads: Mapping[int, Tensor | None]) -> float:
    """Σ b·g at the output of the module that owns b; a component of the Bridge owns the bias of the module it wraps."""
    owner = entry.module.original_component if isinstance(entry.module, GeneralizedComponent) else entry.module
    bias = None if owner is None or "bias" not in dict(owner.named_parameters(recurse=False)) else fetched(owner, "bias")
    grad = grads.get(id(entry.outputs[0])) if entry.outputs else None
    if bias is None or grad is None or not bias.is_floating_point():
        return 0.0
    at_channels = bias[:, None] if isinstance(owner, (nn.Conv1d, nn.ConvTranspose1d)) else bias
    return float((precise(at_channels.detach()) * precise(grad)).sum())
