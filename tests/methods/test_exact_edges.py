"""Exact patches of edges against a slow literal twin, whole routed passes, and published values; and the work they take."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, GROUPED, HEADS, LAYERS, mixed_task, model_of, native_model, scores_of, swap_task
from safetensors.torch import load_file
from torch import Tensor

import patchlab as pl
from patchlab.engine import Program, Support, Work, node_sweep, run, session_of
from patchlab.engine import edge_sweep as edge_sweep_module
from patchlab.engine.edge_sweep import Differences, edge_sweep
from patchlab.engine.hooks import hooked
from patchlab.engine.trust.edges import edge_support
from patchlab.errors import InterventionError, MethodError, SiteError
from patchlab.methods.path_patching import kv_effects, patch_edges
from patchlab.metrics import Metric
from patchlab.models import Model
from patchlab.tasks.task import Task
from patchlab.testing import TOY_CIRCUITS

LITERAL = pl.ActivationPatching(engine="literal")
BY_POSITION = "edges[writer,reader,pos]"
SINGLE_PRECISION = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2"), 2e-6)
"""Their norms compute in float32 whatever the model's dtype."""


@cache
def model_named(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return native_model(name, dtype=dtype, attn_only=True) if name == "attention-only" else model_of(name, dtype)


# ---------- a literal twin: whole forward passes, the change of one reader's input written out ----------


def watched(model: Model, tokens: Tensor, hooks: dict[str, Any]) -> Tensor:
    with torch.no_grad(), hooked(model.hooks, hooks):
        return model.bridge(tokens, return_type="logits", use_cache=False)


def kept(model: Model, tokens: Tensor, names: list[str], hooks: dict[str, Any] | None = None) -> list[Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: Any, inputs: Any, value: Tensor) -> None:
        seen[name] = value.clone()

    watched(model, tokens, {**(hooks or {}), **{name: partial(keep, name) for name in names}})
    return [seen[name] for name in names]


def put(value: Tensor, module: Any, inputs: Any, old: Tensor) -> Tensor:
    return value.reshape(old.shape)


def plus(change: Tensor, module: Any, inputs: Any, value: Tensor) -> Tensor:
    return value + change


def written(model: Model, tokens: Tensor, other: Tensor, writer: str, form: str = "renormalised") -> Tensor:
    """What a writer adds to the stream in the other run minus what it adds in this one."""
    if writer == "input":
        here, there = (kept(model, ids, ["blocks.0.hook_resid_pre"])[0] for ids in (tokens, other))
        return there - here  # positions are embedded alike
    layer = int(writer[1:].partition(".")[0])
    if writer[0] == "m":
        here, there = (kept(model, ids, [f"blocks.{layer}.hook_mlp_out"])[0] for ids in (tokens, other))
        return there - here
    head, module = int(writer.partition(".h")[2]), model.bridge.blocks[layer].attn.o.original_component
    here, there = (kept(model, ids, [f"blocks.{layer}.attn.hook_z"])[0] for ids in (tokens, other))
    here, there = (z.reshape(*tokens.shape, HEADS, -1) for z in (here, there))
    alone = torch.zeros_like(here)
    alone[:, :, head] = (there - here)[:, :, head]
    change = module(alone.flatten(2)) - module(torch.zeros_like(alone.flatten(2)))
    if "blocks.0.ln1_post.hook_out" in model.hooks:
        norm, whole = model.bridge.blocks[layer].ln1_post.original_component, module(here.flatten(2))
        if form == "renormalised":
            return norm(whole + change) - norm(whole)
        change = (1 + norm.weight) * change / (whole.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return change


def literal(
    model: Model,
    program: Program,
    other: Tensor,
    edge: tuple[int, int],
    *,
    pos: int | None = None,
    grouped: bool = False,
    form: str = "renormalised",
) -> Tensor:
    """The metric with one edge patched."""
    graph, tokens = model.arch.graph, program.tokens
    writer, reader, kind = graph.writers[edge[0]], graph.readers[edge[1]], graph.reader_kind[edge[1]]
    change = written(model, tokens, other, writer, form)
    if pos is not None:
        change = change * (torch.arange(tokens.shape[1]) == pos)[None, :, None]

    def metric(hooks: dict[str, Any]) -> Tensor:
        logits = watched(model, tokens, hooks)
        return program.metric(logits if program.metric.reads == "all" else logits[:, -1], program.answers)

    if kind == "logits":
        return metric({"ln_final.hook_in": partial(plus, change)})
    block = f"blocks.{reader[1:].partition('.')[0].partition('<')[0]}"
    if kind == "mlp":
        return metric({f"{block}.ln2.hook_in": partial(plus, change)})
    head, names = int(reader.partition(".h")[2][:-3]), {letter: f"{block}.attn.hook_{letter}" for letter in "qkvz"}
    (z,) = kept(model, tokens, [names["z"]])
    (own,) = kept(model, tokens, [names[kind]], {f"{block}.ln1.hook_in": partial(plus, change)})
    (changed,) = kept(model, tokens, [names["z"]], {names[kind]: partial(put, own)})
    z, changed = (value.reshape(*tokens.shape, HEADS, -1).clone() for value in (z, changed))
    first, copies = (head // graph.copies * graph.copies, graph.copies) if grouped and kind != "q" else (head, 1)
    z[:, :, first : first + copies] = changed[:, :, first : first + copies]
    return metric({names["z"]: partial(put, z)})


def asked(model: Model, task: Task, direction: str = "noising") -> tuple[Program, Tensor]:
    (batch,) = task.batches()
    tokens, other = (batch.clean, batch.corrupted) if direction == "noising" else (batch.corrupted, batch.clean)
    return Program(tokens, batch.examples, metric=task.metric, answers=batch.answers), other


def some(model: Model, n: int = 3, seed: int = 0) -> list[tuple[int, int]]:
    """A few edges into each kind of reader."""
    graph, draw = model.arch.graph, np.random.default_rng(seed)
    found = []
    for kind in sorted(set(graph.reader_kind)):
        edges = np.argwhere(graph.allowed & (np.array(graph.reader_kind) == kind))
        found += [tuple(edge) for edge in edges[draw.choice(len(edges), min(n, len(edges)), replace=False)].tolist()]
    return found


def differences(model: Model, program: Program, other: Tensor) -> Differences:
    kinds = ("z", "mlp_out") if model.arch.graph.mlps else ("z",)
    keep = (("input", None), *((kind, layer) for kind in kinds for layer in range(LAYERS)))
    own, source = (run(model, Program(ids, program.examples, keep=keep)) for ids in (program.tokens, other))
    return Differences.of(model, own.activations, source.as_source(), program.examples)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "direction"), [*((name, "noising") for name in (*FAMILIES, "attention-only")), ("llama", "denoising")])
def test_equals_the_literal_twin(family: str, direction: str) -> None:
    model, task = model_named(family), swap_task()
    program, other = asked(model, task, direction)
    scores = scores_of(pl.ActivationPatching(), model, task, "edges", direction)
    effects, base = scores.data["edges"].to_numpy(), scores.data.metric_clean if direction == "noising" else scores.data.metric_corrupted
    for edge in some(model):
        expected = literal(model, program, other, edge).numpy() - base.to_numpy()
        np.testing.assert_allclose(effects[:, *edge], expected, rtol=0, atol=SINGLE_PRECISION.get(family, 1e-10), err_msg=scores.graph.name(*edge))
    assert scores.provenance["engine"].startswith("replay" if model.name in ("native", "attention-only") else "prefix")
    assert scores.provenance.get("post_norm") == ("renormalised" if family == "gemma2" else None)
    assert np.abs(effects).max() > 0.1
    assert not effects[:, ~scores.graph.allowed].any()


@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen3", "gemma2"])
def test_equals_whole_routed_passes_in_single_precision(family: str) -> None:
    maps = [scores_of(method, model_of(family), swap_task(), "edges", "noising") for method in (pl.ActivationPatching(), LITERAL)]
    fast, slow = (scores.data["edges"].to_numpy() for scores in maps)
    assert maps[1].provenance["engine"] == "literal (asked for)"
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-5 * float(np.abs(maps[0].data.metric_clean - maps[0].data.metric_corrupted).max()))
    live = maps[0].live["edges"].to_numpy()
    assert maps[1].cost.forwards == int(live.sum()) + 2
    # what is not live has no effect: one pass for each says so
    dead = np.argwhere(maps[0].graph.allowed & ~live)
    program, other = asked(model_of(family), swap_task())
    metric = literal(model_of(family), program, other, tuple(dead[0].tolist())) if len(dead) else maps[0].data.metric_clean.to_numpy()
    np.testing.assert_allclose(np.asarray(metric), maps[0].data.metric_clean, atol=1e-5)


@pytest.mark.parametrize("engine", ["auto", "literal"])
def test_held_denominators_equal_the_literal_twin(engine: str) -> None:
    model, task = model_of("gemma2", torch.float64), swap_task()
    program, other = asked(model, task)
    method = pl.ActivationPatching(engine=engine, post_norm="frozen")
    scores = scores_of(method, model, task, "edges", "noising")
    effects, base = scores.data["edges"].to_numpy(), scores.data.metric_clean.to_numpy()
    for edge in some(model):
        expected = literal(model, program, other, edge, form="frozen").numpy() - base
        np.testing.assert_allclose(effects[:, *edge], expected, rtol=0, atol=SINGLE_PRECISION["gemma2"], err_msg=scores.graph.name(*edge))
    name = {"auto": "exact-frozen", "literal": "exact-frozen[engine=literal]"}[engine]
    assert (method.name, scores.provenance["method"], scores.provenance["post_norm"]) == (name, name, "frozen")


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "native"])
def test_single_positions(family: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    program, other = asked(model, task)
    scores = scores_of(pl.ActivationPatching(), model, task, BY_POSITION, "noising")
    effects, base = scores.data[BY_POSITION].to_numpy(), scores.data.metric_clean.to_numpy()
    for i, edge in enumerate(some(model, 2)):
        pos = (1, 3, 4)[i % 3]
        expected = literal(model, program, other, edge, pos=pos).numpy() - base
        np.testing.assert_allclose(effects[:, *edge, pos], expected, rtol=0, atol=SINGLE_PRECISION.get(family, 1e-10))
    assert not effects[..., 0].any()


def test_named_positions_of_prompts_of_several_lengths() -> None:
    model, task = model_of("gpt2", torch.float64), mixed_task()
    maps = [scores_of(method, model, task, BY_POSITION, "noising") for method in (pl.ActivationPatching(), LITERAL)]
    np.testing.assert_allclose(*(scores.data[BY_POSITION].to_numpy() for scores in maps), rtol=0, atol=1e-10)
    alone = scores_of(pl.ActivationPatching(), model, task.select([2]), BY_POSITION, "noising")
    last = maps[0].data.position.to_numpy().tolist().index("END")
    np.testing.assert_allclose(maps[0].data[BY_POSITION].to_numpy()[2, ..., last], alone.data[BY_POSITION].to_numpy()[0, ..., -1], atol=1e-10)


@pytest.mark.parametrize("source", ["zero", "mean", "mean_positional"])
def test_sources(source: str) -> None:
    model = model_of("llama")
    maps = [scores_of(pl.ActivationPatching(engine, source=source), model, swap_task(), "edges", "noising") for engine in ("auto", "literal")]
    np.testing.assert_allclose(*(scores.data["edges"].to_numpy() for scores in maps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("metric", ["prob_diff", "neg_kl", Metric("all positions", lambda logits, a: logits.cumsum(1).amax(-1).sum(1), reads="all")])
def test_metrics(metric: str | Metric) -> None:
    model, task = model_of("gemma2"), swap_task(metric=metric)
    maps = [scores_of(method, model, task, "edges", "denoising") for method in (pl.ActivationPatching(), LITERAL)]
    fast, slow = (scores.data["edges"].to_numpy() for scores in maps)
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-5 * max(1.0, np.abs(slow).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_name", "task_name"),
    [("gpt2-random", "swap1"), ("llama-random", "swap2"), ("neox-random", "swap2"), ("trained-gpt2-4l", "sva_rc"), ("gemma2-random", "swap2")],
)
def test_published_values(reference_of: Callable[[str], Path], model_name: str, task_name: str) -> None:
    reference_dir = reference_of(model_name)
    model = pl.load_model(reference_dir / "models" / model_name)
    task = pl.load_task(reference_dir / "tasks" / f"{model_name}.{task_name}.jsonl", model)
    expected = load_file(reference_dir / "values" / f"{model_name}.{task_name}.safetensors")["edge_per_example.exact"].numpy()
    names = json.loads((reference_dir / "edge_names.json").read_text())[model_name]
    scores = scores_of(pl.ActivationPatching(), model, task, "edges", "noising")
    writers, readers = np.array([scores.graph.edge(name) for name in names]).T
    np.testing.assert_allclose(scores.data["edges"].to_numpy()[:, writers, readers], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TOY_CIRCUITS)
def test_the_edges_of_a_hand_made_circuit_stand_out(name: str) -> None:
    toy = TOY_CIRCUITS[name]()
    lost = -scores_of(pl.ActivationPatching(), toy.model, toy.task, "edges", "noising").mean("edges").to_numpy()
    truth = toy.model.arch.graph.mask(toy.edges)
    assert lost[truth].min() >= toy.matters
    assert np.abs(lost[~truth]).max() <= toy.level


# ---------- keys and values that several query heads share ----------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_key_or_value_for_all_heads_that_share_it(family: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    graph, (program, other) = model.arch.graph, asked(model, task)
    found = kv_effects(model, task, direction="noising", progress=False)
    base = found.data.metric_clean.to_numpy()
    for name in ("m0->a1.kv1<k>", "a0.h2->a2.kv1<v>", "a1.h3->a2.kv0<k>"):
        writer, _, reader = name.partition("->")
        layer, _, rest = reader.partition(".kv")
        edge = graph.edge(f"{writer}->{layer}.h{int(rest[0]) * graph.copies}{rest[1:]}")
        expected = literal(model, program, other, edge, grouped=True).numpy() - base
        np.testing.assert_allclose(found.sel(name), expected, rtol=0, atol=SINGLE_PRECISION.get(family, 1e-10))
    scores = scores_of(pl.ActivationPatching(), model, task, "edges", "noising").data["edges"].to_numpy()
    copies = sum(scores[:, *graph.edge(f"m0->a1.h{graph.copies + i}<k>")] for i in range(graph.copies))
    alike = np.abs(found.sel("m0->a1.kv1<k>").to_numpy() - copies).max()
    assert alike > 1e-3 if family in GROUPED else alike < 1e-12
    assert found.provenance["direction"] == "noising"
    literally = kv_effects(model, task, engine="literal", direction="noising", progress=False)
    np.testing.assert_allclose(literally.sel("sets"), found.sel("sets"), rtol=0, atol=SINGLE_PRECISION.get(family, 1e-10))


# ---------- sets of edges ----------


@pytest.mark.parametrize(("family", "direction"), [("gpt2", "noising"), ("neox", "denoising"), ("qwen3", "noising"), ("gemma2", "noising")])
def test_sets_of_edges(family: str, direction: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    graph, atol = model.arch.graph, SINGLE_PRECISION.get(family, 1e-10)
    from_head, everything = np.zeros_like(graph.allowed), graph.allowed
    from_head[graph.writers.index("a1.h2")] = graph.allowed[graph.writers.index("a1.h2")]
    sets = {"head": from_head, "all": everything, "one": ["m0->a2.h1<k>"], "another": "a0.h1->m1"}
    found = patch_edges(model, task, sets, direction=direction, progress=False)
    heads = scores_of(pl.ActivationPatching(), model, task, "z", direction).data["z"].to_numpy()
    np.testing.assert_allclose(found.sel("head"), heads[:, 1, 2], rtol=0, atol=atol)
    gap = found.data.metric_corrupted - found.data.metric_clean
    np.testing.assert_allclose(found.sel("all"), gap if direction == "noising" else -gap, rtol=0, atol=atol)
    edges = scores_of(pl.ActivationPatching(), model, task, "edges", direction).data["edges"].to_numpy()
    for name in ("one", "another"):
        np.testing.assert_allclose(found.sel(name), edges[:, *graph.edge(np.atleast_1d(sets[name])[0])], rtol=0, atol=atol)


def test_a_writer_between_two_edges_of_a_set_changes_along_the_others() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task()
    program, other = asked(model, task)
    found = patch_edges(model, task, [["a0.h1->m1", "m1->a2.h0<v>"]], direction="noising", progress=False)
    into = partial(plus, written(model, program.tokens, other, "a0.h1"))
    block, stream, z = "blocks.2", "blocks.2.hook_resid_pre", "blocks.2.attn.hook_z"
    (before, plain) = kept(model, program.tokens, [stream, "blocks.1.hook_mlp_out"])
    (changed, moved) = kept(model, program.tokens, [stream, "blocks.1.hook_mlp_out"], {"blocks.1.ln2.hook_in": into})
    # everything reads the changed m1, but the values of a2.h0 the other run's
    (theirs,) = kept(model, other, ["blocks.1.hook_mlp_out"])
    here = {"blocks.1.ln2.hook_in": into}
    (v,) = kept(model, program.tokens, [f"{block}.attn.hook_v"], {**here, f"{block}.ln1.hook_in": partial(plus, theirs - moved)})
    (usual,) = kept(model, program.tokens, [z], here)
    (routed,) = kept(model, program.tokens, [z], {**here, f"{block}.attn.hook_v": partial(put, v)})
    usual, routed = (value.reshape(*program.tokens.shape, HEADS, -1).clone() for value in (usual, routed))
    usual[:, :, 0] = routed[:, :, 0]
    logits = watched(model, program.tokens, {**here, z: partial(put, usual)})
    expected = program.metric(logits[:, -1], program.answers).numpy() - found.data.metric_clean.to_numpy()
    np.testing.assert_allclose(found.sel("0"), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(changed - before, moved - plain)


def test_sets_by_position() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task()
    graph = model.arch.graph
    mask = np.zeros((*graph.allowed.shape, 5), dtype=bool)
    mask[*graph.edge("m0->a1.h1<v>"), 3] = True
    scores = scores_of(pl.ActivationPatching(), model, task, BY_POSITION, "noising").data[BY_POSITION].to_numpy()
    alone = patch_edges(model, task, [mask], direction="noising", progress=False).sel("0")
    np.testing.assert_allclose(alone, scores[:, *graph.edge("m0->a1.h1<v>"), 3], atol=1e-10)
    whole = patch_edges(model, task, [np.repeat(mask.any(2)[..., None], 5, 2)], direction="noising", progress=False)
    named = patch_edges(model, task, {"named": ["m0->a1.h1<v>"]}, direction="noising", progress=False)
    np.testing.assert_allclose(whole.sel("0"), named.sel("named"), atol=1e-12)


def test_sets_of_several_batches_come_in_the_order_of_the_examples() -> None:
    model, task = model_of("gpt2", torch.float64), mixed_task()
    found = patch_edges(model, task, {"a": ["m0->a1.h1<v>", "input->m1"]}, batch_size=1, direction="noising", progress=False)
    for example in range(len(task)):
        alone = patch_edges(model, task.select([example]), {"a": ["m0->a1.h1<v>", "input->m1"]}, direction="noising", progress=False)
        np.testing.assert_allclose(found.sel("a")[example], alone.sel("a")[0], atol=1e-10)
        assert found.data.metric_clean[example] == pytest.approx(float(alone.data.metric_clean[0]))


# ---------- verified patching ----------


@pytest.mark.parametrize("site", ["edges", BY_POSITION])
def test_verified_patching_of_edges(site: str) -> None:
    model, task = model_of("gpt2"), swap_task()
    found = pl.VerifiedPatching(k=4, hierarchical=True).run(model, task, site, direction="noising", progress=False)
    exact = scores_of(pl.ActivationPatching(), model, task, site, "noising")
    for row in found.table.to_dict("records"):
        index = tuple(int(row[axis]) for axis in ("writer", "reader", "pos") if axis in row)
        assert row["effect"] == pytest.approx(float(exact.mean(site).to_numpy()[index]), abs=1e-5)
        assert row["address"].partition("@")[0] == exact.graph.name(*index[:2])
    assert found.n_live == int(exact.live[site].sum())
    assert abs(found.top["effect"].iloc[0]) >= np.sort(np.abs(exact.mean(site).to_numpy()).ravel())[-20]
    assert found.provenance["graph"] == exact.provenance["graph"]


def test_verified_patching_needs_a_screen_that_scores_every_edge() -> None:
    method = pl.VerifiedPatching(screen=pl.RelevancePatching("relp-ah"))
    with pytest.raises(MethodError, match="does not score edges into q .*take another screen"):
        method.run(model_of("gpt2"), swap_task(), "edges", progress=False)


# ---------- work, memory, interruption ----------


def _work(names: list[str], family: str = "gpt2", **options: Any) -> Work:
    model, (program, other) = model_of(family), asked(model_of(family), swap_task())
    work = Work()
    edges = np.array([model.arch.graph.edge(name) for name in names])
    edge_sweep(model, program, edges, differences(model, program, other), work=work, **options)
    return work


def test_only_what_an_edge_can_change_is_computed() -> None:
    rows, length, start = 3, 5, 1
    span = length - start
    # the last block once, to know the unpatched output; the logits themselves are no block
    assert _work(["m1->logits"], start=start).block_positions == rows * span
    # an MLP: its own block for the baseline and for the edge, then the later ones
    assert _work(["a0.h1->m1"], start=start).block_positions == rows * span * (1 + 1 + (LAYERS - 2))
    # a norm after the attention takes no more
    assert _work(["a0.h1->m1"], "gemma2", start=start).block_positions == rows * span * (1 + 1 + (LAYERS - 2))
    # a query: in addition its block's attention, for the baseline and for the edge
    assert _work(["m0->a1.h2<q>"], start=start).block_positions == rows * span * (1 + 2 + 1 + (LAYERS - 2))
    # one run of the attention serves the queries of all heads
    assert _work(["m0->a1.h2<q>", "m0->a1.h3<q>"], start=start).block_positions == rows * span * (1 + 2 + 2 * (1 + LAYERS - 2))
    # the last layer is finished at the answer position only
    assert _work(["m1->a2.h2<k>"], start=start).block_positions == rows * (span * 3 + 1)
    assert _work(["a0.h1->m2"], start=start).block_positions == rows * (span + 1)
    # without the baseline's keys and values, everything from the first position on
    assert _work(["a0.h1->m1"], prefix=False).block_positions == rows * length * (1 + 1 + (LAYERS - 2))


def test_a_position_is_where_an_edge_starts() -> None:
    model, (program, other) = model_of("gpt2"), asked(model_of("gpt2"), swap_task())
    work, edges = Work(), np.array([model.arch.graph.edge("a0.h1->m1")])
    edge_sweep(model, program, edges, differences(model, program, other), where=[torch.full((3,), 3)], start=1, work=work)
    assert work.block_positions == 3 * 2 * (1 + 1 + (LAYERS - 2))


def test_the_cost_counts_the_work_and_the_bar_counts_edges() -> None:
    scores = scores_of(pl.ActivationPatching(), model_of("gpt2"), swap_task(), "edges", "noising")
    assert scores.cost.forwards == 2 + int(scores.live["edges"].sum())
    # fewer positions than half a forward pass per edge
    assert scores.cost.positions < int(scores.live["edges"].sum()) * 3 * 5 / 2


def test_what_is_left_out_changes_nothing() -> None:
    model, (program, other) = model_of("llama"), asked(model_of("llama"), swap_task())
    edges, seen = np.argwhere(model.arch.graph.allowed), {}
    options = {"max_tokens": 60, "start": 1}
    whole = edge_sweep(model, program, edges, differences(model, program, other), **options)
    part = edge_sweep(
        model,
        program,
        edges,
        differences(model, program, other),
        skip=set(range(150)),
        done=lambda numbers, values: seen.update(zip(numbers, values, strict=True)),
        **options,
    )
    assert set(range(150, len(edges))) <= set(seen)
    assert torch.isnan(part[[i for i in range(150) if i not in seen]]).all()
    for number, values in seen.items():
        assert torch.equal(values, whole[number])
        assert torch.equal(part[number], whole[number])


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch) -> None:
    model, task, right, calls = model_of("gpt2"), swap_task(), Metric.__call__, 0
    monkeypatch.setattr(edge_sweep_module, "CPU_TOKENS", 120)
    whole = scores_of(pl.ActivationPatching(), model, task, "edges", "noising")

    def interrupted(metric: Metric, logits: Tensor, answers: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return right(metric, logits, answers)

    monkeypatch.setattr(Metric, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scores_of(pl.ActivationPatching(), model, task, "edges", "noising")
    again = scores_of(pl.ActivationPatching(), model, task, "edges", "noising")
    np.testing.assert_array_equal(again.data["edges"], whole.data["edges"])
    chunks = int(np.ceil(whole.live["edges"].sum() / 10))
    assert calls < 2 * chunks


def test_results_do_not_depend_on_memory_or_batches() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task(n=4)
    whole = scores_of(pl.ActivationPatching(), model, task, "edges", "noising")
    small = scores_of(pl.ActivationPatching(), model, task, "edges", "noising", max_memory=whole.cost.predicted_bytes, batch_size=3)
    np.testing.assert_allclose(whole.data["edges"], small.data["edges"], rtol=0, atol=1e-12)
    with pytest.raises(MethodError, match="exact is predicted to need"):
        scores_of(pl.ActivationPatching(), model, task, "edges", "noising", max_memory=1000)


# ---------- trust and messages ----------


def test_a_model_on_which_the_ways_disagree_is_patched_by_whole_passes(monkeypatch) -> None:
    model = native_model("odd edges")
    right = node_sweep.unembed
    monkeypatch.setattr(node_sweep, "unembed", lambda *arguments: right(*arguments) * 1.5)
    assert edge_support(model).mode == "literal"
    assert "does not fill a key-value cache" in edge_support(model).reason
    assert "differs by" in edge_support(model).reason
    maps = [scores_of(method, model, swap_task(), "edges", "noising") for method in (pl.ActivationPatching(), LITERAL)]
    assert maps[0].provenance["engine"].startswith("literal (prefix: ")
    np.testing.assert_array_equal(maps[0].data["edges"], maps[1].data["edges"])


def test_support_is_found_out_once() -> None:
    model = native_model("edges once")
    session_of(model).found["edge sweep"] = Support("literal", "set by hand")
    assert edge_support(model).reason == "set by hand"


def test_nothing_stays_on_the_model_when_a_metric_fails() -> None:
    model, (program, other) = model_of("gpt2"), asked(model_of("gpt2"), swap_task())
    edges = np.array([model.arch.graph.edge(name) for name in ("m0->a1.h2<q>", "a0.h1->m1")])

    def broken(logits: Tensor, answers: Any) -> Tensor:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        edge_sweep(model, replace(program, metric=Metric("broken", broken)), edges, differences(model, program, other))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.bridge.modules() if "HookPoint" in type(module).__name__)
    assert all("forward" not in module.__dict__ for block in model.bridge.blocks for module in (block, block.attn))


def test_what_cannot_be_patched_exactly() -> None:
    model, task = model_of("gpt2"), swap_task()
    with pytest.raises(MethodError, match=r"not by pairs of positions; got edges\[writer,reader,dest,src\]"):
        scores_of(pl.ActivationPatching(), model, task, "edges[writer,reader,dest,src]")
    program, other = asked(model, task)
    edges, changes = np.array([model.arch.graph.edge("m0->m1")]), differences(model, program, other)
    with pytest.raises(InterventionError, match="a sweep evaluates a metric"):
        edge_sweep(model, replace(program, metric=None), edges, changes)
    with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.zero())):
        with pytest.raises(InterventionError, match="single edges are patched on the model as it is; leave the intervene block"):
            edge_sweep(model, program, edges, changes)
        with pytest.raises(MethodError, match="got them inside intervene"):
            patch_edges(model, task, [["m0->m1"]], direction="noising", progress=False)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "no sets of edges given"),
        ([[]], "the set '0' has no edges"),
        ({"x": np.ones((3, 4), dtype=bool)}, r"the set 'x' has the shape \[3, 4\], but the model is a graph of 3 layers"),
        ({"x": np.ones((16, 40), dtype=bool)}, "the set 'x' holds .*, which is no edge"),
        ({"x": ["m0->m1"], "y": np.zeros((16, 40, 5), dtype=bool)}, "the set 'y' has no edges"),
    ],
)
def test_sets_that_cannot_be(sets: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        patch_edges(model_of("gpt2"), swap_task(), sets, direction="noising", progress=False)


def test_sets_by_position_that_do_not_fit() -> None:
    model = model_of("gpt2")
    mask = model.arch.graph.mask(["m0->m1"])
    with pytest.raises(MethodError, match=r"the set '0' has the shape \[16, 40, 4\]; edges of gpt2 on swap have \[16, 40, 5\]"):
        patch_edges(model, swap_task(), [np.repeat(mask[..., None], 4, 2)], direction="noising", progress=False)
    with pytest.raises(MethodError, match="some sets are masks by position and others are not"):
        patch_edges(model, swap_task(), [mask, np.repeat(mask[..., None], 5, 2)], direction="noising", progress=False)
    with pytest.raises(SiteError, match="a node does not feed itself"):
        patch_edges(model, swap_task(), [["m1->m1"]], direction="noising", progress=False)
