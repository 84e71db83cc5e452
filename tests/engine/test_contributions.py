"""Exact edges and circuits where a norm follows the attention, against path patching of the plain Hugging Face module, one reader at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
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
from patchlab.engine.trust.edges import edge_support
from patchlab.errors import CircuitError, MethodError, ModelError, ScoreError
from patchlab.graph import Graph
from patchlab.methods import get_method
from patchlab.methods.path_patching import kv_effects, patch_edges
from patchlab.metrics import Metric
from patchlab.models import Model
from patchlab.tasks.task import Task

NORMS = {
    "gemma2": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "glm4": ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
"""Names of the norms before and after the attention, before and after the MLP. OLMo 2 has one norm over the queries of all heads besides."""
EXACT = {"rtol": 0, "atol": 1e-8}
BY_POSITION = "edges[writer,reader,pos]"


def config(family: str, kv_heads: int) -> Any:
    from transformers import Gemma2Config, Gemma3TextConfig, Glm4Config, Olmo2Config

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 12,
        "max_position_embeddings": 24,
    }
    gemma = {**common, "attention_bias": True, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "gemma2": lambda: Gemma2Config(**gemma),
        "gemma3": lambda: Gemma3TextConfig(**gemma, layer_types=kinds),
        "glm4": lambda: Glm4Config(**common, head_dim=4, pad_token_id=0),
        "olmo2": lambda: Olmo2Config(**common, pad_token_id=0),
    }[family]()


def hf_module(family: str, dtype: torch.dtype = torch.float64, kv_heads: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    chosen = config(family, kv_heads or (HEADS if family == "olmo2" else 2))
    module = AutoModelForCausalLM.from_config(chosen, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shift = float("norm" in name and "gemma" not in family)
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
        self.bias = [0.0 if layer.self_attn.o_proj.bias is None else layer.self_attn.o_proj.bias for layer in self.layers]
        norms = ([layer.get_submodule(name) if name else torch.nn.Identity() for layer in self.layers] for name in NORMS[family])
        self.into_heads, self.behind_heads, self.into_mlp, self.behind_mlp = norms

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
        """The output of every head, without the bias of their sum."""
        weight = self.layers[layer].self_attn.o_proj.weight
        return [part @ w.T for part, w in zip(z.chunk(HEADS, -1), weight.chunk(HEADS, 1), strict=True)]

    def outputs(self, tokens: Tensor) -> list[Tensor]:
        """What every writer puts out in an unpatched run: heads before the norm after them, MLPs behind theirs."""
        inner: dict[Any, list] = {self.layers[0]: []}
        for layer in self.layers:
            inner |= {layer.self_attn.o_proj: [], layer.mlp: []}
        self.run(tokens, inner)
        found = [inner[self.layers[0]][0]]
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                found += self.split(inner[layer.self_attn.o_proj][0], i)
                found.append(self.behind_mlp[i](layer.mlp(inner[layer.mlp][0])))
        return found

    def circuit(self, tokens: Tensor, ablated: list[Tensor], keep: Float[Tensor, "writer reader pos"]) -> Tensor:
        """Last logits."""
        current: dict[int, Tensor] = {0: self.outputs(tokens)[0]}
        graph, size = self.graph, HEADS + 1

        def reads(reader: int) -> Tensor:
            def mixed(writer: int) -> Tensor:
                return torch.where(keep[writer, reader][None, :, None] > 0, current[writer], ablated[writer])

            x = mixed(0)
            for i in range(LAYERS):
                heads = range(1 + i * size, 1 + i * size + HEADS)
                if graph.allowed[heads[0], reader]:
                    x = x + self.behind_heads[i](sum(mixed(writer) for writer in heads) + self.bias[i])
                if graph.allowed[heads[-1] + 1, reader]:
                    x = x + mixed(heads[-1] + 1)
            return x

        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                start = graph.readers_of(i).start
                own = {}
                for number, letter in enumerate("qkv"):
                    projection = getattr(layer.self_attn, f"{letter}_proj")
                    own[letter] = [projection(self.into_heads[i](reads(start + number * HEADS + head))) for head in range(HEADS)]
                z = [self._attended(tokens, i, own, copy).chunk(HEADS, -1) for copy in range(graph.copies)]
                taken = torch.cat([z[head % graph.copies][head] for head in range(HEADS)], -1)
                current |= {1 + i * size + head: part for head, part in enumerate(self.split(taken, i))}
                x = self.into_mlp[i](reads(graph.readers_of(i).stop - 1))
                current[(i + 1) * size] = self.behind_mlp[i](layer.mlp(x))
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


def prompts(direction: str = "noising", task: Task | None = None) -> tuple[Tensor, Tensor, Callable[[Tensor], np.ndarray]]:
    """Tokens of the baseline and of the source, and the metric of last logits."""
    task = task or swap_task()
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


# ---------- edges ----------


@pytest.mark.parametrize(("family", "direction"), [("gemma2", "noising"), ("gemma2", "denoising"), ("gemma3", "noising"), ("olmo2", "noising")])
def test_edges_equal_path_patching_of_the_plain_module(family: str, direction: str) -> None:
    same_module(family)
    model, twin = model_named(family), twin_of(family)
    tokens, other, metric = prompts(direction)
    base, ablated = metric(twin.run(tokens)[:, -1]), twin.outputs(other)
    edges = some(twin.graph, 2 if direction == "noising" else 1)
    if edge_support(model).mode == "literal":
        found = (
            patch_edges(model, swap_task(), [[twin.graph.name(*edge)] for edge in edges], direction=direction, progress=False)
            .sel("sets")
            .to_numpy()
            .T
        )
    else:
        scores = scores_of(pl.ActivationPatching(), model, swap_task(), "edges", direction).data["edges"].to_numpy()
        found = np.stack([scores[:, *edge] for edge in edges])
    for edge, effects in zip(edges, found, strict=True):
        expected = metric(twin.circuit(tokens, ablated, without(twin.graph, [edge]))) - base
        np.testing.assert_allclose(effects, expected, **EXACT, err_msg=twin.graph.name(*edge))
    assert np.abs(found).max() > 0.1
    # the fast engine gives way where one norm spans the queries of all heads
    assert edge_support(model).mode == ("literal" if family == "olmo2" else "prefix")


def test_edges_by_position_equal_path_patching_of_the_plain_module() -> None:
    model, twin = model_named("gemma3"), twin_of("gemma3")
    tokens, other, metric = prompts()
    scores = scores_of(pl.ActivationPatching(), model, swap_task(), BY_POSITION, "noising").data[BY_POSITION].to_numpy()
    base, ablated = metric(twin.run(tokens)[:, -1]), twin.outputs(other)
    for i, edge in enumerate(some(model.arch.graph, 1)):
        pos = (1, 3, 4)[i % 3]
        expected = metric(twin.circuit(tokens, ablated, without(twin.graph, [edge], pos))) - base
        np.testing.assert_allclose(scores[:, *edge, pos], expected, **EXACT)


def test_shared_keys_and_values_equal_path_patching_of_the_plain_module() -> None:
    model, twin = model_named("gemma2"), twin_of("gemma2")
    tokens, other, metric = prompts()
    found = kv_effects(model, swap_task(), direction="noising", progress=False)
    for name, copies in (("a0.h2->a2.kv1<v>", ("h2<v>", "h3<v>")), ("a1.h3->a2.kv0<k>", ("h0<k>", "h1<k>"))):
        edges = [twin.graph.edge(f"{name.partition('kv')[0]}{copy}") for copy in copies]
        expected = metric(twin.circuit(tokens, twin.outputs(other), without(twin.graph, edges))) - metric(twin.run(tokens)[:, -1])
        np.testing.assert_allclose(found.sel(name), expected, **EXACT)


@pytest.mark.parametrize(("family", "direction"), [*((family, "noising") for family in NORMS), ("gemma2", "denoising")])
def test_all_edges_out_of_a_node_are_the_node(family: str, direction: str) -> None:
    model, twin, task = model_named(family), twin_of(family), swap_task()
    graph, (tokens, other, metric) = model.arch.graph, prompts(direction)
    sets = {}
    base = metric(twin.run(tokens)[:, -1])
    nodes = scores_of(pl.ActivationPatching(), model, task, ["z", "mlp_out[layer]"], direction).data
    plain = {"rtol": 0, "atol": 2e-6} if family == "glm4" else EXACT  # the Bridge's GLM 4 is that far from the module itself
    for layer in range(LAYERS):
        for head in range(0, HEADS, 3):
            sets[f"a{layer}.h{head}"] = nodes["z"][:, layer, head].to_numpy()
            np.testing.assert_allclose(sets[f"a{layer}.h{head}"], metric(twin.with_head(tokens, other, layer, head)) - base, **plain)
        sets[f"m{layer}"] = nodes["mlp_out[layer]"][:, layer].to_numpy()
    masks = {name: graph.allowed & (np.array(graph.writers) == name)[:, None] for name in sets}
    found = patch_edges(model, task, masks, direction=direction, progress=False)
    expected = np.stack(list(sets.values()))
    np.testing.assert_allclose(found.sel("sets").T, expected, **EXACT)
    assert found.provenance["post_norm"] == "renormalised"
    if (family, direction) == ("gemma2", "noising"):
        held = patch_edges(model, task, masks, direction=direction, post_norm="frozen", progress=False)
        assert np.abs(held.sel("sets").to_numpy().T - expected).max() > 0.05 * np.abs(expected).max()


def test_all_edges_out_of_a_node_at_a_position_are_the_node_there() -> None:
    model, task = model_named("gemma3"), swap_task()
    graph = model.arch.graph
    nodes = scores_of(pl.ActivationPatching(), model, task, "z[layer,pos,head]", "noising").data["z[layer,pos,head]"].to_numpy()
    masks = np.zeros((3, *graph.allowed.shape, 5), dtype=bool)
    cells = [(0, 1, 2), (0, 3, 0), (1, 4, 3)]
    for mask, (layer, pos, head) in zip(masks, cells, strict=True):
        writer = graph.writers.index(f"a{layer}.h{head}")
        mask[writer, :, pos] = graph.allowed[writer]
    found = patch_edges(model, task, list(masks), direction="noising", progress=False)
    np.testing.assert_allclose(found.sel("sets").T, np.stack([nodes[:, layer, pos, head] for layer, pos, head in cells]), **EXACT)


def test_edges_of_several_heads_of_one_attention_are_normalised_together() -> None:
    model, twin = model_named("gemma2"), twin_of("gemma2")
    tokens, other, metric = prompts()
    edges = ["a0.h0->m1", "a0.h2->m1", "a0.h2->a2.h1<v>", "a1.h1->m1", "m0->a2.h1<v>"]
    found = patch_edges(model, swap_task(), [edges], direction="noising", progress=False)
    keep = without(twin.graph, [twin.graph.edge(edge) for edge in edges])
    expected = metric(twin.circuit(tokens, twin.outputs(other), keep)) - metric(twin.run(tokens)[:, -1])
    np.testing.assert_allclose(found.sel("0"), expected, **EXACT)


# ---------- circuits ----------


def drawn(graph: Graph, share: float, *positions: int, seed: int = 0) -> Circuit:
    kept = np.random.default_rng(seed).random((*graph.allowed.shape, *positions)) < share
    return Circuit(graph, kept & graph.allowed.reshape(*graph.allowed.shape, *[1] * len(positions)))


LOGPROB = Metric("closeness", lambda logits, answers: (answers.clean_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1), "nats", needs_clean=True)
"""Highest where the output is that of the unpatched run, so that every ablation lowers it."""


def close_task(twin: Twin) -> tuple[Task, Callable[[Tensor], np.ndarray]]:
    """A task with this metric, and the metric of last logits."""
    task = swap_task(metric=LOGPROB)
    (batch,) = task.batches()
    full = twin.run(batch.clean)[:, -1]
    return task, lambda logits: LOGPROB(logits, replace(batch.answers, clean_logits=full)).numpy()


def constants(twin: Twin, ablation: str) -> list[Tensor]:
    own = twin.outputs(prompts()[1])
    means = {"mean": (0, 1), "mean_positional": (0,)}
    if ablation == "zero":
        return [torch.zeros_like(one) for one in own]
    return own if ablation == "resample" else [one.mean(means[ablation], keepdim=True).expand_as(one) for one in own]


@pytest.mark.parametrize(("family", "ablation"), [("gemma2", "resample"), ("gemma3", "mean"), ("gemma3", "zero"), ("olmo2", "mean_positional")])
def test_circuits_equal_path_patching_of_the_plain_module(family: str, ablation: str) -> None:
    model, twin = model_named(family), twin_of(family)
    (tokens, *_), (task, metric) = prompts(), close_task(twin)
    circuits = {"some": drawn(twin.graph, 0.8), "placed": drawn(twin.graph, 0.7, 5, seed=1)}
    found = evaluate(model, circuits, task, ablation=ablation, completeness=False, progress=False)
    for name, circuit in circuits.items():
        keep = torch.as_tensor(circuit.edges.copy()).double()
        expected = metric(twin.circuit(tokens, constants(twin, ablation), keep if keep.ndim == 3 else keep[..., None].expand(-1, -1, 5)))
        np.testing.assert_allclose(found.metric[name], expected, **EXACT)
    assert found.provenance["post_norm"] == "renormalised"
    assert found.provenance["post_norm_is"].startswith("where a norm follows the attention, every reader gets the norm of")


def test_acdc_weighs_edges_as_path_patching_of_the_plain_module_does() -> None:
    model, twin, tau = model_named("gemma2"), twin_of("gemma2"), 0.5
    tokens, other, metric = prompts()
    graph, ablated = twin.graph, twin.outputs(other)
    circuit = acdc(model, swap_task(), tau, measure="metric", prune=False, progress=False)[tau]
    kept, value = without(graph, []), metric(twin.run(tokens)[:, -1]).mean()
    for writer in reversed(range(len(graph.writers))):  # the edges into the logits come first
        trial = kept.clone()
        trial[writer, -1] = 0
        after = metric(twin.circuit(tokens, ablated, trial)).mean()
        np.testing.assert_allclose(circuit.scores[writer, -1], after - value, **EXACT)
        assert circuit.edges[writer, -1] == (value - after >= tau)
        if value - after < tau:
            kept, value = trial, after
    assert circuit.provenance["post_norm"] == "renormalised"
    held = acdc(model, swap_task(), tau, measure="metric", post_norm="frozen", prune=False, progress=False)[tau]
    assert held.provenance["post_norm"] == "frozen"
    assert np.nanmax(np.abs(held.scores - circuit.scores)) > 0.01


def test_a_curve_says_what_its_edges_carry() -> None:
    model, task = model_named("gemma2"), swap_task(metric=LOGPROB)
    scores = scores_of(pl.AttributionPatching(), model, swap_task(), "edges", "noising")
    options = {"sizes": [60, 150], "random": 0, "allow_overlap": True, "progress": False}
    both = {form: faithfulness_curve(model, scores, task, post_norm=form, **options) for form in ("renormalised", "frozen")}
    for form, curve in both.items():
        assert curve.provenance["post_norm"] == form
    apart = both["frozen"].table["faithfulness"] - both["renormalised"].table["faithfulness"]
    assert np.abs(apart).max() > 1e-3


# ---------- names, comparison, messages ----------


def test_the_two_forms_are_not_compared() -> None:
    model, task = model_of("gemma2"), swap_task()
    maps = {name: scores_of(get_method(name), model, task, "edges", "noising") for name in ("exact", "exact-frozen", "atp")}
    with pytest.raises(
        ScoreError, match=r"what edges out of heads carry through the norm after the attention differ \(frozen against renormalised\)"
    ):
        pl.compare(maps["exact"], {"held": maps["exact-frozen"]})
    with pytest.raises(ScoreError, match=r"differ \(renormalised against frozen\); take one form with both"):
        pl.compare(maps["exact-frozen"], {"AtP": maps["atp"]})
    assert pl.compare(maps["exact"], {"AtP": maps["atp"]}, n_boot=20).table["pearson"].notna().all()
    assert maps["exact-frozen"].provenance["method"] == "exact-frozen"
    assert "post_norm" not in scores_of(pl.ActivationPatching(), model, task, "z").provenance


def test_verified_edges_are_exact_ones() -> None:
    model, task = model_of("gemma2"), swap_task()
    found = pl.VerifiedPatching(k=3, hierarchical=True).run(model, task, "edges", direction="noising", progress=False)
    exact = scores_of(pl.ActivationPatching(), model, task, "edges", "noising").mean("edges").to_numpy()
    for row in found.table.to_dict("records"):
        assert row["effect"] == pytest.approx(float(exact[int(row["writer"]), int(row["reader"])]), abs=1e-5)


def test_forms_that_are_refused() -> None:
    gpt2, gemma, task = model_of("gpt2"), model_of("gemma2"), swap_task()
    with pytest.raises(MethodError, match=r"unknown form of the norm after attention \(post_norm\) 'freezed'; did you mean 'frozen'"):
        pl.ActivationPatching(post_norm="freezed")
    nothing = "gpt2 has no norm after its attention, so there is no denominator to hold; leave post_norm='frozen' out"
    with pytest.raises(MethodError, match=nothing):
        scores_of(get_method("exact-frozen"), gpt2, task, "edges")
    with pytest.raises(MethodError, match=nothing):
        patch_edges(gpt2, task, ["m0->m1"], post_norm="frozen", direction="noising", progress=False)
    with pytest.raises(MethodError, match=r"got the sites z, resid_pre, which are patched in the model as it runs"):
        scores_of(get_method("exact-frozen"), gemma, task, ["z", "resid_pre"])
    with pytest.raises(CircuitError, match=nothing):
        evaluate(gpt2, Circuit.full(gpt2.arch.graph), task, post_norm="frozen")
    with pytest.raises(CircuitError, match=nothing):
        acdc(gpt2, task, 0.1, post_norm="frozen")
    with pytest.raises(CircuitError, match="unknown form of the norm"):
        evaluate(gemma, Circuit.full(gemma.arch.graph), task, post_norm="thawed")


def test_one_norm_over_keys_that_query_heads_share_is_refused() -> None:
    model = bridged(hf_module("olmo2", torch.float32, kv_heads=2), "grouped")
    with pytest.raises(ModelError, match=r"grouped .* cannot be run as a circuit: blocks.0.attn.k_norm is one norm over the keys of all heads"):
        scores_of(pl.ActivationPatching(), model, swap_task(), "edges", "noising")
