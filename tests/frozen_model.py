"""A model with everything but its residual stream held, run with plain hooks: what the edges of attribution graphs are checked against.

Attention patterns and the denominators of norms are those of the run without changes; the output of every MLP is what one gives it, plus
what a skip makes of what the MLP reads. Nothing of patchlab's rules and of its engine is used.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from patchlab.adapters import AttentionPlace, NormPlace
from patchlab.models import Model


class FrozenModel:
    """One prompt's affine map from token embeddings and MLP outputs to everything else."""

    def __init__(self, model: Model, tokens: list[int], skips: dict[int, tuple[str, Tensor]] | None = None) -> None:
        self.model, self.tokens, self.skips = model, torch.tensor([tokens]), skips or {}
        self.norms = [place for place in model.arch.places if isinstance(place, NormPlace)]
        attention = [place for place in model.arch.places if isinstance(place, AttentionPlace)]
        # where the pattern is out of reach, the queries and keys that it is made of
        self.patterns = [name for place in attention for name in ((place.at,) if place.open else place.scores)]
        self.out = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.arch.n_layers)]
        self.shown = [*self.out, *(f"blocks.{layer}.mlp.hook_in" for layer in range(model.arch.n_layers)), "hook_embed", "unembed.hook_in"]
        self.clean = self._run({}, self.tokens, [*self.shown, *self.patterns, *(name for norm in self.norms for name in (*norm.reads, norm.at))])
        for norm in self.norms:
            torch.testing.assert_close(self._normed(norm, self.clean[norm.reads[0]]), self.clean[norm.at], rtol=1e-5, atol=1e-5)

    def run(self, embedding: Tensor, outputs: list[Tensor]) -> dict[str, Tensor]:
        """What the hooks show: for embeddings ``[row, pos, d]`` and outputs of the MLPs ``[row, pos, d]``, without their skips."""
        writes: dict[str, Any] = {"hook_embed": lambda value, seen: embedding}
        for norm in self.norms:
            writes[norm.at] = lambda value, seen, norm=norm: self._normed(norm, seen[norm.reads[0]])
        for name in self.patterns:
            writes[name] = lambda value, seen, name=name: self.clean[name].expand_as(value)
        reads: list[str] = []
        for layer, (name, output) in enumerate(zip(self.out, outputs, strict=True)):
            if layer in self.skips:
                hook, w_skip = self.skips[layer]
                reads.append(hook)
                writes[name] = lambda value, seen, output=output, hook=hook, w_skip=w_skip: output + seen[hook] @ w_skip
            else:
                writes[name] = lambda value, seen, output=output: output
        tokens = self.tokens.expand(len(embedding), -1)
        return self._run(writes, tokens, [*self.shown, *reads, *(norm.reads[0] for norm in self.norms)])

    def _normed(self, norm: NormPlace, x: Tensor) -> Tensor:
        component = norm.module.original_component
        x = x if norm.module.uses_rms_norm else x - x.mean(-1, keepdim=True)
        weight, bias = getattr(component, "weight", None), getattr(component, "bias", None)
        if weight is not None:
            x = x * (weight + 1 if norm.module.uses_weight_offset else weight)
        return x / self.clean[norm.reads[1]] + (0 if bias is None else bias)

    def _run(self, writes: dict[str, Any], tokens: Tensor, shown: list[str]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        at: dict[str, list[str]] = {}
        for name in (*shown, *writes):
            names = at.setdefault(str(self.model.hooks[name].name), [])
            if name not in names:
                names.append(name)

        def hook(names: list[str], value: Tensor) -> Tensor | None:
            # where a norm gives the MLP's output or the embedding, what stands in for these comes last
            found = [writes[name] for name in sorted(names, key=lambda name: name in (*self.out, "hook_embed")) if name in writes]
            for write in found:
                value = write(value, seen)
            seen.update(dict.fromkeys(names, value.detach()))
            return value if found else None

        with ExitStack() as stack, torch.no_grad():
            for names in at.values():
                handle = self.model.hooks[names[0]].register_forward_hook(lambda m, i, value, names=names: hook(names, value))
                stack.callback(handle.remove)
            self.model.bridge(tokens, return_type="logits", use_cache=False)
        return seen
