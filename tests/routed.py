"""The literal twin of routing: a circuit, one reader at a time."""

import torch
from families import HEADS
from torch import Tensor

import patchlab as pl
from patchlab.engine import Program, run
from patchlab.models import Model
from patchlab.sources import Kept


def literal(model: Model, clean: Tensor, ablated: Tensor, keep: Tensor, form: str = "renormalised") -> Tensor:
    """Last logits of a circuit, one reader at a time: give the whole layer what the reader reads, take only what the reader makes of it.

    ``ablated`` is [writer, row, pos, d]; ``keep`` is [writer, reader, pos].
    """
    post = {i: block.ln1_post.original_component for i, block in enumerate(model.bridge.blocks) if f"blocks.{i}.ln1_post.hook_out" in model.hooks}
    graph, rows = model.arch.graph, torch.arange(len(clean))

    def patched(edits: dict[str, Tensor], keep: str) -> Tensor:
        kind = keep.rpartition(".")[2]
        layer = int(keep[1 : keep.index(".")])
        sources = [pl.Edit(name, Kept({(name.rpartition(".")[2], int(name[1 : name.index(".")])): value}, rows)) for name, value in edits.items()]
        return run(model, Program(clean, rows, edits=tuple(sources), keep=((kind, layer),))).activations[kind, layer]

    plain = run(model, Program(clean, rows, keep=(("input", None), ("resid_pre", 0)))).activations
    rest = plain["resid_pre", 0] - plain["input", None]
    current = {0: plain["input", None]}

    def reads(reader: int) -> Tensor:
        before = [w for w in range(len(graph.writers)) if graph.allowed[w, reader]]
        parts = {w: ablated[w] + keep[w, reader][None, :, None] * (current[w] - ablated[w]) for w in before}
        total = rest
        for layer, norm in post.items() if form == "renormalised" else ():
            heads = [parts.pop(w) for w in range(len(graph.writers))[graph.heads_of(layer)] if w in parts]
            total = total + norm(sum(heads)) if heads else total
        return total + sum(parts.values())

    for layer in range(graph.n_layers):
        start, out = graph.readers_of(layer).start, graph.heads_of(layer).start
        z = []
        for head in range(HEADS):
            own = {}
            for i, letter in enumerate("qkv"):
                found = patched({f"L{layer}.resid_pre": reads(start + i * HEADS + head)}, f"L{layer}.{letter}")
                own[f"L{layer}.{letter}"] = found
            z.append(patched(own, f"L{layer}.z")[:, :, head])
        attention = model.bridge.blocks[layer].attn.o.original_component
        weight = attention.weight if type(attention).__name__ == "Conv1D" else attention.weight.T
        parts = [z[head] @ weight.unflatten(0, (HEADS, -1))[head] for head in range(HEADS)]
        bias = torch.zeros(graph.d_model, dtype=weight.dtype) if attention.bias is None else attention.bias
        if post and form == "frozen":
            norm = post[layer]
            total = sum(parts) + bias
            scale = (1 + norm.weight) / (total.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
            parts, bias = [part * scale for part in parts], bias * scale
        before, rest = rest, rest + bias
        current |= {out + head: part for head, part in enumerate(parts)}
        if graph.mlps:
            reader = graph.readers_of(layer).stop - 1
            if graph.parallel:
                rest, after = before, rest
                current[out + HEADS] = patched({f"L{layer}.resid_pre": reads(reader)}, f"L{layer}.mlp_out")
                rest = after
            else:
                current[out + HEADS] = patched({f"L{layer}.resid_mid": reads(reader)}, f"L{layer}.mlp_out")
    last = graph.n_layers - 1
    value = Kept({("resid_post", last): reads(len(graph.readers) - 1)}, rows)
    return run(model, Program(clean, rows, edits=(pl.Edit(f"L{last}.resid_post", value),), logits="answer")).logits
