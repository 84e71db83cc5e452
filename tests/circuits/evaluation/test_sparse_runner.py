"""Circuits of edges between nodes, against a model whose every node is computed from its kept parents, one node and one run at a time."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import gap_task, mixed_task, model_of
from torch import Tensor

from patchlab.circuits import NodeCircuit, SparseCircuit, candidates, evaluate, node_edges, top_n
from patchlab.circuits.evaluation.sparse_runner import SparseRunner
from patchlab.errors import CircuitError
from patchlab.features import Dictionary
from patchlab.models import Model
from patchlab.tasks.task import Task
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.toys import micro_model, micro_task

DTYPE = torch.float64
WIDTH = 4
AT = [("attn_out", 0), ("resid_post", 0), ("mlp_out", 1), ("resid_post", 1)]
SITES = [f"{part}.{point}" for point in ("attn_out", "mlp_out", "resid_post") for part in ("features", "error")]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    own = model_of("gpt2", DTYPE)
    before = own.arch
    own.add_dictionaries([random_dictionary(own, point, layer, WIDTH, seed=i) for i, (point, layer) in enumerate(AT)])
    yield own
    own.arch = before


def hook_of(point: str, layer: int) -> str:
    return f"blocks.{layer}.hook_{point}"


def split(d: Dictionary, x: Tensor) -> dict[str, Tensor]:
    """Features (``F0``, ``[pos]``) and ``error`` (``[pos, d]``) by the formulas of a ReLU autoencoder."""
    features = torch.relu(x @ d.w_enc + d.b_enc)
    return {**{f"F{i}": features[..., i] for i in range(WIDTH)}, "error": x - features @ d.w_dec - d.b_dec}


def run(model: Model, ids: tuple[int, ...], writes: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what stands at each dictionary before anything is written there."""
    seen: dict[str, Tensor] = {}

    def at(name: str) -> object:
        def hook(value: Tensor, hook: object) -> Tensor:
            seen[name] = value[0]
            return writes[name][None] if name in writes else value

        return hook

    with torch.no_grad():
        logits = model.bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(hook_of(*key), at(hook_of(*key))) for key in AT])
    return logits[0, -1], seen


def literal(model: Model, task: Task, kept: set[tuple[str, str]], ablation: str) -> np.ndarray:
    """Metric per example: each node from a run in which its kept parents have what they have in the circuit, and all others the ablation."""
    found = []
    donors = [run(model, pair.corrupted_ids, {})[1] for pair in task.pairs]
    for e, pair in enumerate(task.pairs):
        other: dict[str, Tensor] = {}
        for point, layer in AT:
            d = model.dictionaries[point][layer]
            parts = [split(d, donor[hook_of(point, layer)]) for donor in donors]
            for name in parts[0]:
                one = parts[e][name] if ablation == "resample" else sum(part[name] for part in parts) / len(parts)
                other[f"L{layer}.{name}.{point}"] = torch.zeros_like(one) if ablation == "zero" else one
        value: dict[str, Tensor] = {}

        def before(target: str, stop: int, value: dict = value, other: dict = other) -> dict[str, Tensor]:
            writes = {}
            for point, layer in AT[:stop]:
                d = model.dictionaries[point][layer]
                names = [f"L{layer}.F{i}.{point}" for i in range(WIDTH)]
                error = f"L{layer}.error.{point}"
                held = {name: value[name] if (name, target) in kept else other[name] for name in (*names, error)}
                writes[hook_of(point, layer)] = torch.stack([held[name] for name in names], -1) @ d.w_dec + d.b_dec + held[error]
            return writes

        for place, (point, layer) in enumerate(AT):
            for name in (*(f"F{i}" for i in range(WIDTH)), "error"):
                node = f"L{layer}.{name}.{point}"
                seen = run(model, pair.clean_ids, before(node, place))[1]
                value[node] = split(model.dictionaries[point][layer], seen[hook_of(point, layer)])[name]
        logits = run(model, pair.clean_ids, before("logits", len(AT)))[0]
        found.append(float(logits[list(pair.correct)].mean() - logits[list(pair.incorrect)].mean()))
    return np.array(found)


def every_node(model: Model, task: Task, sites: list[str] = SITES) -> NodeCircuit:
    universe = candidates(model.arch, sites, task.position_axis())
    return NodeCircuit(universe, {one.name: one.cells(one.every()) for one in universe})


def all_edges(nodes: NodeCircuit, among: set[int] | None = None) -> SparseCircuit:
    """Every edge that leads forward, also to the logits, among some of the nodes."""
    none = np.zeros(0, dtype=np.int64)
    stage, n = SparseCircuit(nodes, none, none).stages, nodes.n_nodes
    inside = among or set(range(n))
    pairs = [(a, b) for a in inside for b in (*inside, n) if b == n or stage[a] < stage[b]]
    return SparseCircuit(nodes, *np.array(pairs).T)


def some(circuit: SparseCircuit, share: float, seed: int = 0) -> SparseCircuit:
    kept = np.random.default_rng(seed).random(circuit.n_edges) < share
    return SparseCircuit(circuit.nodes, circuit.source[kept], circuit.target[kept])


def measured(model: Model, circuit: SparseCircuit, task: Task, **options: object) -> np.ndarray:
    return evaluate(model, circuit, task, progress=False, completeness=False, **options).metric["circuit"]


@pytest.mark.parametrize("ablation", ["mean_positional", "resample", "zero"])
def test_every_node_is_computed_from_its_kept_parents_alone(model: Model, ablation: str) -> None:
    task = gap_task(2)
    circuit = some(all_edges(every_node(model, task)), 0.3)
    kept = {tuple(edge.split("->")) for edge in circuit.edges}
    result = evaluate(model, circuit, task, ablation=ablation, progress=False)
    np.testing.assert_allclose(result.metric["circuit"], literal(model, task, kept, ablation), atol=1e-9)
    np.testing.assert_allclose(result.metric_empty, literal(model, task, set(), ablation), atol=1e-9)
    everything = {tuple(edge.split("->")) for edge in all_edges(circuit.nodes).edges}
    complement = SparseRunner.of(model, task, circuit.nodes.universe, ablation).metric([~circuit]).metric[0]
    np.testing.assert_allclose(complement, literal(model, task, everything - kept, ablation), atol=1e-9)
    assert np.abs(result.metric["circuit"] - result.metric_full).max() > 1e-3
    assert f"circuit: {circuit.n_edges} edges" in repr(result)


def test_with_all_edges_between_some_nodes_it_is_the_circuit_of_these_nodes(model: Model) -> None:
    task = gap_task(2)
    nodes = every_node(model, task)
    chosen = set(np.flatnonzero(np.random.default_rng(1).random(nodes.n_nodes) < 0.7).tolist())
    names = [name for i, name in enumerate(nodes.nodes) if i in chosen]
    expected = evaluate(model, NodeCircuit.of(nodes.universe, names), task, progress=False, completeness=False)
    np.testing.assert_allclose(measured(model, all_edges(nodes, chosen), task), expected.metric["circuit"], atol=1e-9)
    whole = evaluate(model, all_edges(nodes), task, progress=False, completeness=False)
    np.testing.assert_allclose(whole.metric["circuit"], whole.metric_full, atol=1e-9)
    np.testing.assert_allclose(measured(model, all_edges(nodes, chosen), task, batch_size=1), expected.metric["circuit"], atol=1e-9)
    np.testing.assert_allclose(measured(model, all_edges(nodes, chosen), task, max_memory=1), expected.metric["circuit"], atol=1e-9)


@pytest.mark.parametrize(("family", "sites"), [("neox", ["mlp_post", "z"]), ("gemma2", ["attn_out[layer]", "resid_mid[layer]", "mlp_post"])])
def test_neurons_heads_and_whole_activations(family: str, sites: list[str]) -> None:
    own, task = model_of(family, DTYPE), gap_task(2, family=family)
    universe = candidates(own.arch, sites, task.position_axis())
    rng = np.random.default_rng(0)
    nodes = NodeCircuit(universe, {one.name: one.cells(one.drawn(min(6, one.size), rng)) for one in universe})
    expected = evaluate(own, nodes, task, ablation="resample", progress=False, completeness=False)
    got = measured(own, all_edges(nodes), task, ablation="resample")
    np.testing.assert_allclose(got, expected.metric["circuit"], atol=1e-6)
    assert np.abs(measured(own, some(all_edges(nodes), 0.5), task, ablation="resample") - got).max() > 1e-6


def test_nodes_at_named_positions() -> None:
    own, task = model_of("gpt2", DTYPE), gap_task(task=mixed_task())
    about = {"positions": ["A", "B", "END"]}
    universe = candidates(own.arch, ["z[layer,pos,head]", "mlp_out"], task.position_axis())
    rng = np.random.default_rng(0)
    nodes = NodeCircuit(universe, {one.name: one.cells(one.every()[rng.random(one.size) < 0.5]) for one in universe}, provenance=about)
    expected = evaluate(own, nodes, task, progress=False, completeness=False)
    np.testing.assert_allclose(measured(own, all_edges(nodes), task), expected.metric["circuit"], atol=1e-9)
    one_less = all_edges(nodes).without_node(0)
    assert one_less.n_edges < all_edges(nodes).n_edges


def test_named_positions_that_meet_are_refused() -> None:
    own, (first, second) = model_of("gpt2", DTYPE), mixed_task().pairs[:2]
    task = gap_task(task=Task("met", (replace(first, positions=dict(first.positions) | {"A": first.positions["B"]}), second), mixed_task().metric))
    universe = candidates(own.arch, ["z[layer,pos,head]"], task.position_axis())
    nodes = NodeCircuit(universe, {one.name: one.cells(one.every()) for one in universe}, provenance={"positions": ["A", "B", "END"]})
    with pytest.raises(CircuitError, match=r"example 0 has A and B at one token, where one node .* Score fewer positions"):
        measured(own, all_edges(nodes), task, ablation="resample")


def test_hand_arithmetic() -> None:
    """The clean prompt gives attn_out (2.5, .5) at the end, where the stream is (1, 1): the neuron has 1.5, and the metric is 6.5 - 1.5. By zeros:
    the neuron without its parent reads (1, 1) and has 0; the metric without the neuron, 3.5 - 1.5.
    """
    model, task = micro_model(), micro_task()
    universe = candidates(model.arch, ["attn_out[layer]", "mlp_post"])
    out, neuron = "L0.attn_out", "L0.N0.mlp_post"
    expected = {
        (f"{out}->{neuron}", f"{neuron}->logits", f"{out}->logits"): 5.0,
        (f"{out}->{neuron}", f"{neuron}->logits"): 3.0,  # the logits see the stream without attention, (1, 1), and the neuron's (3, 0)
        (f"{neuron}->logits", f"{out}->logits"): 2.0,  # the neuron reads no attention and is off
        (f"{out}->{neuron}", f"{out}->logits"): 2.0,  # nobody reads the neuron
        (f"{out}->{neuron}",): 0.0,
    }
    for edges, value in expected.items():
        circuit = SparseCircuit.of(universe, edges)
        assert measured(model, circuit, task, ablation="zero").tolist() == pytest.approx([value]), edges


def test_minimality_of_edges_and_nodes_and_what_is_refused(model: Model) -> None:
    task = gap_task(2)
    nodes = every_node(model, task, ["features.resid_post", "error.resid_post"])
    edges = node_edges(model, task, NodeCircuit(nodes.universe, nodes.listed, provenance={"direction": "noising"}), "relp", progress=False)
    circuit = top_n(edges, 4)
    with pytest.raises(CircuitError, match="comes from 2 of the 2 examples"):
        measured(model, circuit, task)
    result = evaluate(model, circuit, task, minimality="edge", allow_overlap=True, progress=False)
    assert list(result.minimality["part"]) == list(circuit.edges)
    for part, lost in zip(result.minimality["part"], result.minimality["minimality"], strict=True):
        rest = SparseCircuit.of(nodes.universe, [edge for edge in circuit.edges if edge != part])
        less = evaluate(model, rest, task, progress=False, completeness=False).faithfulness() if rest.n_edges else 0.0
        assert lost == pytest.approx(result.faithfulness() - less, abs=1e-9)
    with pytest.raises(CircuitError, match="listed edges are those outside"):
        evaluate(model, ~circuit, task, minimality="edge", allow_overlap=True, progress=False)
    everything = evaluate(model, ~circuit.emptied(), task, allow_overlap=True, progress=False)
    np.testing.assert_allclose(everything.metric["circuit"], everything.metric_full, atol=1e-9)
    assert not any("has no edges" in note for note in everything.provenance["notes"]), "none is outside: it is the whole"
    assert len(evaluate(model, circuit, task, minimality="node", allow_overlap=True, progress=False).minimality) == circuit.n_nodes
    with pytest.raises(CircuitError, match="has edges between nodes of sites, and 'b' is of another kind"):
        evaluate(model, {"a": circuit, "b": nodes}, task, progress=False)
    with pytest.raises(CircuitError, match="errors= and start_layer= for circuits of nodes"):
        measured(model, circuit, task, errors="free")
    features = every_node(model, task, ["features.resid_post"])
    with pytest.raises(CircuitError, match="not among the errors of their dictionaries"):
        measured(model, all_edges(features), task)
    with pytest.raises(CircuitError, match="has no edges, so its faithfulness is 0"):
        measured(model, circuit.emptied(), task)
