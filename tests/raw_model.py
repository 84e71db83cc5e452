"""Slow, literal patching of a plain Hugging Face model with torch hooks: what patchlab's methods are checked against.

Nothing of patchlab's engine, accessors or interventions is used: one prompt, one patch and one pass at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, int | None]
Write = Callable[[Tensor], Tensor]
"""Takes a site's value ``[pos, ...]`` and returns the new one."""


class RawModel:
    """A GPT-2 or Llama module; ``run`` gives the logits of one prompt and the value of every site."""

    def __init__(self, module: Any, heads: int, kv_heads: int) -> None:
        self.module, self.heads, self.kv_heads = module.eval(), heads, kv_heads
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.gpt2 = hasattr(module, "transformer")
        self.blocks = module.transformer.h if self.gpt2 else module.model.layers
        self.embedding = module.transformer.wte if self.gpt2 else module.model.embed_tokens

    def run(self, tokens: tuple[int, ...], writes: dict[Key, Write] | None = None, *, grad: bool = False) -> tuple[Tensor, dict[Key, Tensor]]:
        """Logits of the last position, and the sites (attached to the graph if ``grad``)."""
        self.writes, self.seen, self.streams = writes or {}, {}, {}
        handles = [self.embedding.register_forward_hook(lambda m, i, out: self._visit(("input", None), out))]
        for layer, block in enumerate(self.blocks):
            handles += self._hook_block(layer, block)
        try:
            with torch.set_grad_enabled(grad):
                logits = self.module(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits, self.seen

    def _visit(self, key: Key, whole: Tensor) -> Tensor:
        """Write to the site if asked, remember it, and return what flows on; ``whole`` has a batch axis of one."""
        value = whole[0]
        if key in self.writes:
            value = self.writes[key](value)
        value = value if value.requires_grad or not torch.is_grad_enabled() else value.detach().requires_grad_()
        self.seen[key] = value
        return value[None]

    def _hook_block(self, layer: int, block: Any) -> list[Any]:
        attention = block.attn if self.gpt2 else block.self_attn
        before_o = attention.c_proj if self.gpt2 else attention.o_proj
        before_out = block.mlp.c_proj if self.gpt2 else block.mlp.down_proj

        def heads(kind: str, n: int) -> Callable[[Tensor], Tensor]:
            return lambda flat: self._visit((kind, layer), flat.unflatten(-1, (n, -1))).flatten(-2)

        def stream(module: Any, args: Any) -> Any:
            x = self._visit(("resid_pre", layer), args[0])
            self.streams[layer] = x
            return (x, *args[1:])

        def attn_out(module: Any, args: Any, output: Any) -> Any:
            out = self._visit(("attn_out", layer), output[0])
            middle = self._visit(("resid_mid", layer), self.streams[layer] + out)
            # the block adds its input again: what it must be given for the stream to become `middle`
            return (middle - self.streams[layer], *output[1:])

        def resid_post(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._visit(("resid_post", layer), output[0]), *output[1:])
            return self._visit(("resid_post", layer), output)

        hooks = [
            block.register_forward_pre_hook(stream),
            before_o.register_forward_pre_hook(lambda m, args: (heads("z", self.heads)(args[0]),)),
            attention.register_forward_hook(attn_out),
            before_out.register_forward_pre_hook(lambda m, args: (self._visit(("mlp_post", layer), args[0]),)),
            block.mlp.register_forward_hook(lambda m, args, out: self._visit(("mlp_out", layer), out)),
            block.register_forward_hook(resid_post),
        ]
        if self.gpt2:
            split = [heads(kind, self.heads) for kind in "qkv"]
            hooks.append(
                attention.c_attn.register_forward_hook(lambda m, a, out: torch.cat([f(x) for f, x in zip(split, out.chunk(3, -1), strict=True)], -1))
            )
            return hooks
        for kind, projection in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
            apply = heads(kind, self.heads if kind == "q" else self.kv_heads)
            hooks.append(projection.register_forward_hook(lambda m, a, out, apply=apply: apply(out)))
        return hooks
