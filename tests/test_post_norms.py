"""Exact edges and circuits where a norm follows the attention, against path patching of the plain Hugging Face module, one reader at a time."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import HEADS, LAYERS, VOCAB, WIDTH, bridged, model_of, scores_of, swap_task
from jaxtyping import Float
from torch import Tensor

import patchlab as pl
from patchlab.circuits import Circuit, acdc, evaluate, faithfulness_curve
from patchlab.errors import CircuitError, MethodError, ModelError, ScoreError
from patchlab.graph import Graph
from patchlab.methods import get_method
from patchlab.methods.path import kv_effects, patch_edges
from patchlab.models import Model

FAMILIES = ("gemma2", "gemma3", "olmo2")
"""Norms before and after; the same with norms of queries and keys; norms after alone, and one norm over the queries of all heads."""
EXACT = {"rtol": 0, "atol": 1e-8}
BY_POSITION = "edges[writer,reader,pos]"


def config(family: str, kv_heads: int) -> Any:
    from transformers import Gemma2Config, Gemma3TextConfig, Olmo2Config

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 12,
        "max_position_embeddings": 24,
    }
    gemma = {**common, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "gemma2": lambda: Gemma2Config(**gemma),
        "gemma3": lambda: Gemma3TextConfig(**gemma, layer_types=kinds),
        "olmo2": lambda: Olmo2Config(**common, pad_token_id=0),
    }[family]()


def hf_module(family: str, dtype: torch.dtype = torch.float64, kv_heads: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    chosen = config(family, kv_heads or (HEADS if family == "olmo2" else 2))
    module = AutoModelForCausalLM.from_config(chosen, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shift = float("norm" in name and family == "olmo2")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + shift)
    return module.eval()


@cache
def model_named(family: str, dtype: torch.dtype = torch.float64) -> Model:
    return bridged(hf_module(family, dtype), family)


# ---------- the twin: a plain module with torch hooks ----------


class Twin:
    """A Hugging Face module, run as a circuit by writing out what every reader reads.

    Heads contribute what ``o_proj`` makes of their part of its input; a reader gets the norm of the sum of the heads that it reads.
    """

    def __init__(self, family: str) -> None:
        self.module = hf_module(family)
        self.graph = Graph(LAYERS, HEADS, WIDTH, False, int(self.module.config.num_key_value_heads))
        self.layers = self.module.model.layers
        before = family != "olmo2"
        self.into_heads = [layer.input_layernorm if before else torch.nn.Identity() for layer in self.layers]
        self.into_mlp = [layer.pre_feedforward_layernorm if before else torch.nn.Identity() for layer in self.layers]

    def run(self, tokens: Tensor, reads: dict[Any, list] | None = None, writes: dict[tuple[Any, str], Callable] | None = None) -> Tensor:
        """Logits; ``reads`` collects the input of modules, ``writes`` changes an ``input`` or ``output``."""
        with ExitStack() as stack, torch.no_grad():
            for module, seen in (reads or {}).items():
                stack.callback(module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0])).remove)
            for (module, end), change in (writes or {}).items():
                if end == "input":
                    handle = module.register_forward_pre_hook(lambda m, args, change=change: (change(args[0]), *args[1:]))
                else:
                    handle = module.register_forward_hook(lambda m, args, out, change=change: change(out))
                stack.callback(handle.remove)
            return self.module(tokens, use_cache=False).logits

    def split(self, z: Tensor, layer: int) -> list[Tensor]:
        """The output of every head."""
        weight = self.layers[layer].self_attn.o_proj.weight
        return [part @ w.T for part, w in zip(z.chunk(HEADS, -1), weight.chunk(HEADS, 1), strict=True)]

    def outputs(self, tokens: Tensor) -> list[Tensor]:
        """What every writer puts out in an unpatched run: heads before the norm after them, MLPs behind theirs."""
        first: list[Tensor] = []
        inner: dict[Any, list] = {self.layers[0].self_attn.q_proj: []}
        for layer in self.layers:
            inner |= {layer.self_attn.o_proj: [], layer.mlp: []}
        start = self.layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        self.run(tokens, inner)
        start.remove()
        found = [first[0]]
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                found += self.split(inner[layer.self_attn.o_proj][0], i)
                found.append(layer.post_feedforward_layernorm(layer.mlp(inner[layer.mlp][0])))
        return found

    def circuit(self, tokens: Tensor, ablated: list[Tensor], keep: Float[Tensor, "writer reader pos"]) -> Tensor:
        """Last logits."""
        current: dict[int, Tensor] = {0: self.outputs(tokens)[0]}
        graph, size = self.graph, HEADS + 1

        def reads(reader: int) -> Tensor:
            def mixed(writer: int) -> Tensor:
                return torch.where(keep[writer, reader][None, :, None] > 0, current[writer], ablated[writer])

            x = mixed(0)
            for i, layer in enumerate(self.layers):
                heads = range(1 + i * size, 1 + i * size + HEADS)
                if graph.allowed[heads[0], reader]:
                    x = x + layer.post_attention_layernorm(sum(mixed(writer) for writer in heads))
                if graph.allowed[heads[-1] + 1, reader]:
                    x = x + mixed(heads[-1] + 1)
            return x

        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                start = graph.reader_slice(i).start
                own = {}
                for number, letter in enumerate("qkv"):
                    projection = getattr(layer.self_attn, f"{letter}_proj")
                    own[letter] = [projection(self.into_heads[i](reads(start + number * HEADS + head))) for head in range(HEADS)]
                z = [self._attended(tokens, i, own, copy).chunk(HEADS, -1) for copy in range(graph.copies)]
                taken = torch.cat([z[head % graph.copies][head] for head in range(HEADS)], -1)
                current |= {1 + i * size + head: part for head, part in enumerate(self.split(taken, i))}
                x = self.into_mlp[i](reads(graph.reader_slice(i).stop - 1))
                current[(i + 1) * size] = layer.post_feedforward_layernorm(layer.mlp(x))
            final = reads(len(graph.readers) - 1)
        return self.run(tokens, writes={(self.module.model.norm, "input"): lambda x: final})[:, -1]

    def _attended(self, tokens: Tensor, layer: int, own: dict[str, list[Tensor]], copy: int) -> Tensor:
        """The heads' z where every head has its own query, and copy ``copy`` of each group of query heads its own key and value."""
        attention, copies, writes = self.layers[layer].self_attn, self.graph.copies, {}
        for letter, values in own.items():
            chosen = range(HEADS) if letter == "q" else range(copy, HEADS, copies)
            parts = torch.cat([values[head].chunk(HEADS if letter == "q" else HEADS // copies, -1)[place] for place, head in enumerate(chosen)], -1)
            writes[getattr(attention, f"{letter}_proj"), "output"] = lambda out, parts=parts: parts
        seen: list[Tensor] = []
        self.run(tokens, {attention.o_proj: seen}, writes)
        return seen[0]

    def with_head(self, tokens: Tensor, other: Tensor, layer: int, head: int) -> Tensor:
        """Last logits where one head puts out what it does on other tokens: its part of the input of ``o_proj`` is replaced."""
        projection, theirs = self.layers[layer].self_attn.o_proj, list[Tensor]()
        self.run(other, {projection: theirs})

        def put(z: Tensor) -> Tensor:
            parts = list(z.chunk(HEADS, -1))
            parts[head] = theirs[0].chunk(HEADS, -1)[head]
            return torch.cat(parts, -1)

        return self.run(tokens, writes={(projection, "input"): put})[:, -1]


@cache
def twin_of(family: str) -> Twin:
    return Twin(family)


def prompts(direction: str = "noising") -> tuple[Tensor, Tensor, Callable[[Tensor], np.ndarray]]:
    """Tokens of the baseline and of the source, and the metric of last logits."""
    task = swap_task()
    (batch,) = task.batches()
    tokens, other = (batch.clean, batch.corrupted) if direction == "noising" else (batch.corrupted, batch.clean)
    return tokens, other, lambda logits: task.metric(logits, batch.answers).numpy()


def without(graph: Graph, edges: list[tuple[int, int]], pos: int | None = None) -> Tensor:
    keep = torch.as_tensor(graph.allowed.copy()).double()[..., None].repeat(1, 1, 5)
    for writer, reader in edges:
        keep[writer, reader, slice(None) if pos is None else pos] = 0
    return keep


def some(graph: Graph, n: int) -> list[tuple[int, int]]:
    """A few edges out of heads, into each kind of reader, and one out of each other kind of writer."""
    draw, found = np.random.default_rng(0), []
    heads = np.array([writer.startswith("a") for writer in graph.writers])
    for kind in sorted(set(graph.reader_kind)):
        edges = np.argwhere(graph.allowed & (np.array(graph.reader_kind) == kind) & heads[:, None])
        found += [tuple(edge) for edge in edges[draw.choice(len(edges), n, replace=False)].tolist()]
    return [*found, graph.edge("input->a1.h2<k>"), graph.edge("m0->a2.h1<v>")]


def same_module(family: str) -> None:
    """The twin and the model are one."""
    tokens, *_ = prompts()
    with torch.no_grad():
        got = model_named(family).bridge(tokens, return_type="logits", use_cache=False)
    torch.testing.assert_close(got, twin_of(family).run(tokens), atol=1e-10, rtol=0)


# ---------- single edges ----------


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_equal_path_patching_of_the_plain_module(family: str, direction: str) -> None:
    same_module(family)
    model, twin = model_named(family), twin_of(family)
    tokens, other, metric = prompts(direction)
    scores = scores_of(pl.ActivationPatching(), model, swap_task(), "edges", direction)
    effects, base, ablated = scores.data["edges"].to_numpy(), metric(twin.run(tokens)[:, -1]), twin.outputs(other)
    for edge in some(model.arch.graph, 2):
        expected = metric(twin.circuit(tokens, ablated, without(twin.graph, [edge]))) - base
        np.testing.assert_allclose(effects[:, *edge], expected, **EXACT, err_msg=scores.graph.name(*edge))
    assert np.abs(effects[:, 1 : 1 + HEADS]).max() > 0.1
