"""Pullbacks: one run whose reverse map is kept, to take any number of cotangents at its hooks back to its other hooks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.hooks import ruled
from patchlab.engine.session import exclusive, session_of
from patchlab.errors import InterventionError
from patchlab.rules.attachments import Attachment


@dataclass(frozen=True, eq=False)
class Pullback:
    """The reverse map of one run, from hooks to the hooks before them; it holds the run's activations as long as it lives.

    Attributes:
        values: what the run had at each of its hooks, ``[row, pos, ...]``, detached.
        logits: its logits ``[row, pos, vocab]``.
    """

    values: Mapping[str, Tensor]
    logits: Float[Tensor, "row pos vocab"]
    _leaves: Mapping[str, Tensor]

    def __call__(self, at: str, cotangents: Float[Tensor, "n row pos *rest"], to: Sequence[str]) -> dict[str, Float[Tensor, "n row pos *rest"]]:
        """Cotangents at a hook, taken back to other hooks: ``Jᵀg`` for each. Zeros where no path leads from the one to the other.

        Raises:
            InterventionError: a hook that the run did not keep.
        """
        if missing := [name for name in (at, *to) if name not in self._leaves]:
            raise InterventionError(f"this run did not keep the hook {missing[0]}; it kept {', '.join(self._leaves)}.")
        start, ends = self._leaves[at], [self._leaves[name] for name in to]
        shape = (cotangents.shape[0],)
        if start.is_leaf or not ends:  # nothing before it is differentiated by
            return {name: leaf.new_zeros(*shape, *leaf.shape) for name, leaf in zip(to, ends, strict=True)}
        gradients: Any = torch.autograd.grad(start, ends, cotangents.to(start.dtype), retain_graph=True, allow_unused=True, is_grads_batched=True)
        found = zip(to, ends, gradients, strict=True)
        return {name: leaf.new_zeros(*shape, *leaf.shape) if gradient is None else gradient for name, leaf, gradient in found}


@exclusive
def pullback(model: BridgedModel, tokens: Int[Tensor, "row pos"], attachments: Iterable[Attachment], hooks: Iterable[str]) -> Pullback:
    """A run of token rows under backward rules, with its reverse map between the hooks that are named (by any of their names).

    Raises:
        InterventionError: inside ``intervene``, or a hook that the model lacks or that did not fire.
    """
    if session_of(model).surrounding:
        raise InterventionError("a run whose reverse map is kept has no edits: take it outside of intervene.")
    names = tuple(dict.fromkeys(hooks))
    if missing := [name for name in names if name not in model.hooks]:
        raise InterventionError(f"{model.name} has no hook {missing[0]}.")
    with torch.enable_grad(), ruled(model, attachments, names) as leaves:
        logits = model.bridge(tokens, return_type="logits", use_cache=False)
    if silent := [name for name in names if name not in leaves]:
        raise InterventionError(f"the hook {silent[0]} of {model.name} did not fire, so nothing can be taken back to it.")
    return Pullback({name: leaves[name].detach() for name in names}, logits.detach(), dict(leaves))
