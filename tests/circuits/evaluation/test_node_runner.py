"""Node circuits against a plain model with hooks of its own, one example and one circuit at a time, and against hand arithmetic."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import HEADS, gap_task, hf_module, mixed_task, model_of, pair, scores_of, swap_task
from raw_model import RawModel
from torch import Tensor

import patchlab as pl
from patchlab.circuits import Candidates, Circuit, NodeCircuit, candidates, evaluate, top_n
from patchlab.circuits.evaluation.node_ablations import node_ablation
from patchlab.circuits.evaluation.node_runner import NodeRunner
from patchlab.errors import CircuitError, SiteError
from patchlab.metrics import METRICS
from patchlab.models import Model
from patchlab.sites import Site
from patchlab.tasks.task import Pair, Task
from patchlab.testing.toys import micro_model, micro_task

DTYPE = torch.float64
SITES = (["z", "mlp_out[layer]"], ["mlp_post[layer,pos,neuron]", "attn_out"], ["resid_post", "q[layer,pos,head]"])
ABLATIONS = ("mean_positional", "mean", "resample", "zero")


def model() -> Model:
    return model_of("gpt2", DTYPE)


def raw() -> RawModel:
    return RawModel(hf_module("gpt2", DTYPE), HEADS, HEADS)


def some(task: Task, sites: list[str], share: float = 0.6, seed: int = 0, **about: object) -> NodeCircuit:
    """A random circuit."""
    universe = candidates(model().arch, sites, task.position_axis())
    rng = np.random.default_rng(seed)
    listed = {one.name: one.cells(one.every()[rng.random(one.size) < share]) for one in universe}
    return NodeCircuit(universe, listed, provenance=dict(about))


def spread(one: Candidates, circuit: NodeCircuit, layer: int, value: Tensor) -> Tensor:
    """Which entries of a site's value ``[pos, ...]`` a circuit holds, looking every one up by its name."""
    names, kept = set(circuit.nodes), torch.zeros(value.shape, dtype=torch.bool)
    axes = ["pos", *([one.site.axes[-1]] if one.site.axes[-1] in ("head", "neuron") else [])]
    for place in np.ndindex(*value.shape[: len(axes)]):
        at = {"layer": layer, **dict(zip(axes, place, strict=True))}
        kept[place] = one.address([at[axis] for axis in one.site.axes], None) in names
    return kept


def means(task: Task, kind: str, part: str = "corrupted_ids") -> dict:
    """Of every site, written out: the sum over prompts, one at a time."""
    runs = [raw().run(getattr(pair, part))[1] for pair in task.pairs]
    if kind == "mean_positional":
        return {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
    return {key: torch.cat([run[key] for run in runs]).mean(0, keepdim=True) for key in runs[0]}


def by_hand(circuit: NodeCircuit, task: Task, ablation: str, source: Mapping | None = None) -> np.ndarray:
    """Metric per example of a circuit, by hooks on the plain model."""
    plain, found = raw(), []
    source = source or (means(task, ablation) if "mean" in ablation else None)
    for i, one in enumerate(task.pairs):
        donor = plain.run(one.corrupted_ids)[1] if ablation == "resample" else source
        writes = {}
        for site in circuit.universe:
            for layer in site.layers:
                key = (site.site.kind, layer)

                def write(value: Tensor, site=site, layer=layer, key=key, donor=donor) -> Tensor:
                    other = torch.zeros_like(value) if ablation == "zero" else donor[key].expand(value.shape)
                    return torch.where(spread(site, circuit, layer, value), value, other)

                writes[key] = write
        logits, _ = plain.run(one.clean_ids, writes)
        found.append(float(task.metric(logits[None], task.batches(1)[i].answers)))
    return np.array(found)


def measured(circuit: NodeCircuit | Mapping[str, NodeCircuit], task: Task, ablation: str | None = None, **options: object) -> pl.circuits.Evaluation:
    return evaluate(model(), circuit, task, ablation=ablation, progress=False, **options)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("sites", SITES, ids=lambda sites: sites[0])
def test_circuits_equal_a_plain_model_with_hooks(sites: list[str], ablation: str) -> None:
    task = gap_task(3)
    circuit = some(task, sites)
    if "resid_post" in sites:
        circuit |= NodeCircuit.of(circuit.universe, [f"L{model().arch.n_layers - 1}.resid_post@4"])  # through which everything goes
    got = measured(circuit, task, ablation)
    np.testing.assert_allclose(got.metric["circuit"], by_hand(circuit, task, ablation), atol=1e-10)
    np.testing.assert_allclose(got.metric_empty, by_hand(NodeCircuit.empty(circuit.universe), task, ablation), atol=1e-10)
    full = [float(task.metric(raw().run(one.clean_ids)[0][None], batch.answers)) for one, batch in zip(task.pairs, task.batches(1), strict=True)]
    np.testing.assert_allclose(got.metric_full, full, atol=1e-10)
    assert np.ptp(got.metric["circuit"] - got.metric_empty) > 1e-4


def test_evaluation_equals_its_definitions() -> None:
    task = gap_task(4)
    circuit = some(task, SITES[0])
    result = measured(circuit, task, minimality="node")
    own, rest, nothing = (by_hand(one, task, "mean_positional") for one in (circuit, ~circuit, NodeCircuit.empty(circuit.universe)))
    gap = result.metric_full.mean() - nothing.mean()
    (row,) = result.table.to_dict("records")
    assert row["faithfulness"] == pytest.approx((own.mean() - nothing.mean()) / gap)
    assert row["completeness"] == pytest.approx((rest.mean() - nothing.mean()) / gap)
    assert row["n_nodes"] == circuit.n_nodes
    assert "n_edges" not in row
    assert row["lo"] <= row["faithfulness"] <= row["hi"]
    parts = result.minimality.set_index("part")
    assert parts.index.tolist() == list(circuit.nodes)
    for name in circuit.nodes[:3]:
        fewer = NodeCircuit.of(circuit.universe, [node for node in circuit.nodes if node != name])
        lost = row["faithfulness"] - (by_hand(fewer, task, "mean_positional").mean() - nothing.mean()) / gap
        assert parts.loc[name, "minimality"] == pytest.approx(lost, abs=1e-10)
    assert result.provenance["unit"] == "nodes"
    assert result.provenance["ablation"] == "mean_positional"
    assert f"circuit: {circuit.n_nodes} nodes, faithfulness" in repr(result)
    assert "without the circuit's nodes; low is good" in repr(result)


def test_all_nodes_are_the_model_and_their_complement_is_empty() -> None:
    task = gap_task()
    (row,) = measured(NodeCircuit.full(some(task, SITES[1]).universe), task).table.to_dict("records")
    assert row["faithfulness"] == pytest.approx(1, abs=1e-12)
    assert row["completeness"] == pytest.approx(0, abs=1e-12)


def test_means_are_those_of_the_corrupted_prompts() -> None:
    task = gap_task(3)
    circuit = some(task, SITES[0])
    got = measured(circuit, task).metric["circuit"]
    other = by_hand(circuit, task, "mean_positional", means(task, "mean_positional", "clean_ids"))
    assert np.abs(got - other).max() > 1e-3, "means over clean prompts give something else"


def test_means_come_from_the_training_examples_and_not_from_batches() -> None:
    task, train = gap_task(3), swap_task(5, seed=50)
    circuit = some(task, SITES[0])
    result = measured(circuit, task, train=train)
    np.testing.assert_allclose(result.metric["circuit"], by_hand(circuit, task, "mean_positional", means(train, "mean_positional")), atol=1e-10)
    assert result.provenance["ablation_examples"] == "swap[5]"
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"max_memory": 1}):
        again = measured(circuit, task, train=train, minimality="node", **options)
        np.testing.assert_allclose(again.metric["circuit"], result.metric["circuit"], atol=1e-12)
    small = node_ablation(model(), task, circuit.universe, "mean_positional", train=train, rows=2).means
    whole = node_ablation(model(), task, circuit.universe, "mean_positional", train=train).means
    for key, value in whole.items():
        torch.testing.assert_close(small[key], value, atol=1e-14, rtol=0)


def test_early_layers_are_free_in_the_circuit_outside_it_and_in_the_empty_one() -> None:
    task = gap_task(3)
    circuit = some(task, SITES[0])
    result = measured(circuit, task, start_layer=1)
    late = circuit.from_layer(1)
    np.testing.assert_allclose(result.metric["circuit"], by_hand(late, task, "mean_positional"), atol=1e-10)
    np.testing.assert_allclose(result.metric_empty, by_hand(NodeCircuit.empty(late.universe), task, "mean_positional"), atol=1e-10)
    assert result.provenance["start_layer"] == 1
    assert "note: layers before 1 are free" in repr(result)
    assert result.table["n_nodes"].tolist() == [late.n_nodes]


def test_one_neuron_on_paper() -> None:
    # clean (0, 2): the stream at END after attention is (1,1) + ((4,0) + (1,1))/2 = (3.5, 1.5); the neuron gives 1.5 and writes (3, 0): 6.5 − 1.5
    # corrupted (1, 2): (1,1) + ((0,2) + (1,1))/2 = (1.5, 2.5): the neuron is silent
    toy, task = micro_model(), micro_task()
    neuron = candidates(toy.arch, "mlp_post")
    head = candidates(toy.arch, "z")
    runner = NodeRunner.of(toy, task, neuron, "resample")
    assert runner.full().tolist() == [5.0]
    assert runner.metric([NodeCircuit.full(neuron), NodeCircuit.empty(neuron)]).metric.tolist() == [[5.0], [2.0]]
    # the head at its corrupted value: the stream is (1.5, 2.5), and the neuron reads that: silent
    runner = NodeRunner.of(toy, task, head, "resample")
    assert runner.metric([NodeCircuit.empty(head), NodeCircuit.full(head)]).metric.tolist() == [[-1.0], [5.0]]
    # both outside: the neuron is set to what it was on the corrupted prompt; the head alone inside: it writes as on the clean one
    both = (*head, *neuron)
    runner = NodeRunner.of(toy, task, both, "zero")
    kept = [NodeCircuit.of(both, names) for names in ([], ["a0.h0"], ["L0.N0.mlp_post"], ["a0.h0", "L0.N0.mlp_post"])]
    assert runner.metric(kept).metric.tolist() == [[0.0], [2.0], [0.0], [5.0]]


class TestNamedPositions:
    NAMES = ("A", "B", "END")

    def circuit(self, task: Task, seed: int = 0) -> NodeCircuit:
        return some(task, ["z[layer,pos,head]", "mlp_out"], seed=seed, positions=self.NAMES)

    def write_out(self, circuit: NodeCircuit, task: Task, ablation: str) -> np.ndarray:
        """As :func:`by_hand`, with nodes at the token of their name in each example; other tokens are free."""
        plain, runs = raw(), [raw().run(one.corrupted_ids)[1] for one in task.pairs]
        names, found = set(circuit.nodes), []
        for e, one in enumerate(task.pairs):
            writes = {}
            for site in circuit.universe:
                for layer in site.layers:

                    def write(value: Tensor, site=site, layer=layer, e=e, one=one) -> Tensor:
                        new, key = value.clone(), (site.site.kind, layer)
                        for i, name in enumerate(self.NAMES):
                            place = one.positions[name]
                            mean = sum(run[key][p.positions[name]] for run, p in zip(runs, task.pairs, strict=True)) / len(runs)
                            other = runs[e][key][place] if ablation == "resample" else mean
                            if site.site.kind == "mlp_out":
                                if site.address([layer, i], self.NAMES) not in names:
                                    new[place] = other
                                continue
                            for head in range(HEADS):
                                if site.address([layer, i, head], self.NAMES) not in names:
                                    new[place, head] = other[head]
                        return new

                    writes[site.site.kind, layer] = write
            logits, _ = plain.run(one.clean_ids, writes)
            found.append(float(task.metric(logits[None], Task("one", (one,), task.metric).batches()[0].answers)))
        return np.array(found)

    @pytest.mark.parametrize("ablation", ["mean_positional", "resample"])
    def test_prompts_of_two_templates(self, ablation: str) -> None:
        task = gap_task(task=mixed_task())
        circuit = self.circuit(task)
        result = measured(circuit, task, ablation)
        np.testing.assert_allclose(result.metric["circuit"], self.write_out(circuit, task, ablation), atol=1e-10)
        assert "note: positions other than A, B, END are free" in repr(result)

    def test_nodes_at_all_positions_have_no_positional_mean_there(self) -> None:
        task = mixed_task()
        with pytest.raises(CircuitError, match=r"positional means need prompts of one length.*Or choose among nodes at named positions \(z has"):
            measured(some(task, ["z"]), task)
        assert np.isfinite(measured(some(task, ["z"]), task, "mean").metric_empty).all()

    def test_two_names_at_one_token(self) -> None:
        first = pair(5, (1,), 1, template="a", A=1, B=1)
        task = Task("met", (first, pair(6, (2,), 2, template="b", A=2, B=4)), METRICS["logit_diff"])
        with pytest.raises(CircuitError, match="example 0 has A and B at one token, which would have a mean of each"):
            measured(self.circuit(task), task)
        full = NodeCircuit.full(self.circuit(task).universe, {"positions": self.NAMES})
        circuits = {"full": full, "less": full - NodeCircuit.of(full.universe, ["L0.H0.z@A"], {"positions": self.NAMES})}
        got = measured(circuits, task, "resample").metric
        assert got["less"][0] == pytest.approx(got["full"][0], abs=1e-12), "a token is held if one of its names is"
        assert abs(got["less"][1] - got["full"][1]) > 1e-6

    def test_other_positions_are_refused(self) -> None:
        circuit = self.circuit(mixed_task())
        wrong = NodeCircuit(circuit.universe, circuit.listed, provenance={"positions": ["A", "C", "END"]})
        with pytest.raises(CircuitError, match=r"has 3 positions \(A, C, END\) and mixed 3 \(A, B, END\)"):
            measured(wrong, mixed_task())
        with pytest.raises(CircuitError, match=r"has 3 positions \(A, B, END\) and swap 5"):
            measured(circuit, swap_task())


def test_metrics_that_compare_with_the_clean_run() -> None:
    task = swap_task(3, metric="neg_kl")
    result = measured({"a": some(task, ["z"]), "b": some(task, ["z"], seed=1)}, task, "resample")
    np.testing.assert_allclose(result.metric_full, 0, atol=1e-12)
    assert (result.metric_empty < -1e-4).all()


def test_an_intervention_around_it_is_part_of_every_run() -> None:
    task = gap_task(3)
    circuit = some(task, ["z"])
    with pl.intervene(model(), pl.Edit("L0.mlp_out", pl.sources.zero())):
        result = measured(circuit, task, "resample")
    assert np.abs(result.metric_full - measured(circuit, task, "resample").metric_full).max() > 1e-3


def test_selection_and_evaluation_are_apart() -> None:
    task = gap_task(4)
    scores = scores_of(pl.AttributionPatching(), model(), task, ["z"], "noising")
    circuit = top_n(scores, 3)
    with pytest.raises(CircuitError, match="comes from 4 of the 4 examples of swap that it would be evaluated on"):
        measured(circuit, task)
    assert measured(circuit, task, allow_overlap=True).provenance["selection"] == {"circuit": "4 of 4 examples shared"}
    assert measured(circuit, gap_task(3, seed=70)).provenance["selection"] == {"circuit": "disjoint"}


def test_refuses_what_does_not_fit() -> None:
    task = gap_task(3)
    circuit = some(task, ["z"])
    edges = Circuit.full(model().arch.graph)
    with pytest.raises(CircuitError, match="'a' is a circuit of nodes and 'b' one of edges: their empty circuits differ"):
        measured({"a": circuit, "b": edges}, task)
    with pytest.raises(CircuitError, match=r"'a' chooses from z\[layer 3, head 4\] and 'b' from mlp_post"):
        measured({"a": circuit, "b": some(task, ["mlp_post"])}, task)
    with pytest.raises(CircuitError, match="unknown ablation of nodes 'optimal'"):
        measured(circuit, task, "optimal")
    with pytest.raises(CircuitError, match="minimality='edge' are for circuits of edges"):
        measured(circuit, task, minimality="edge")
    with pytest.raises(CircuitError, match="start_layer= are for circuits of nodes"):
        measured(edges, task, start_layer=1)
    with pytest.raises(CircuitError, match="circuit 'circuit' has no nodes, so its faithfulness is 0"):
        measured(NodeCircuit.empty(circuit.universe), task)
    with pytest.raises(CircuitError, match="unknown way to treat errors 'gone'"):
        measured(circuit, task, errors="gone")
    with pytest.raises(CircuitError, match="errors='ablated' is for circuits of features"):
        measured(circuit, task, errors="ablated")
    wide = NodeCircuit.full([Candidates(Site.parse("z"), (3, 9))])
    with pytest.raises(CircuitError, match=r"chooses from z\[layer 3, head 9\], and gpt2 has z\[layer 3, head 4\]"):
        measured(wide, task)
    with pytest.raises(SiteError, match="names layer 6"):
        measured(NodeCircuit.full([Candidates(Site.parse("z"), (7, 2))]), task)
    two = Task("two", (pair(5, (1,), 1, template="x"), pair(5, (1,), 2, template="y")), task.metric)
    with pytest.raises(CircuitError, match="one template with its roles at the same positions"):
        measured(circuit, two)


def test_other_weights_are_noted() -> None:
    task = gap_task(3)
    circuit = replace(some(task, ["z"]), provenance={"model": "other", "model_fingerprint": "abc"})
    assert "was found on other with other weights (abc)" in repr(measured(circuit, task))


@pytest.mark.parametrize("family", ["neox", "llama", "gemma2"])
def test_other_architectures(family: str) -> None:
    own = model_of(family, DTYPE)
    task = gap_task(2, family)
    universe = candidates(own.arch, ["z", "mlp_out[layer]", "mlp_post"])
    full, nothing = NodeCircuit.full(universe), NodeCircuit.empty(universe)
    runner = NodeRunner.of(own, task, universe, "resample")
    got = runner.metric([full, nothing, NodeCircuit.of(universe, ["a0.h0"])]).metric
    np.testing.assert_allclose(got[0], runner.full(), atol=1e-12)
    # heads, neurons and MLPs all from the other prompt: only the embedding is this prompt's
    batch = task.batches()[0]
    other = own.run(batch.corrupted, keep=["z", "mlp_out"])
    edits = [pl.Edit(f"L{i}.{kind}", other) for i in range(own.arch.n_layers) for kind in ("z", "mlp_out")]
    logits = own.run(batch.clean, edits=edits).logits[:, -1]
    np.testing.assert_allclose(got[1], task.metric(logits, batch.answers).numpy(), atol=1e-10)
    kept = [edit for edit in edits if str(edit.address) != "L0.z"] + [pl.Edit(f"L0.H{h}.z", other) for h in range(1, own.arch.n_heads)]
    logits = own.run(batch.clean, edits=sorted(kept, key=lambda edit: edit.address.layer)).logits[:, -1]
    np.testing.assert_allclose(got[2], task.metric(logits, batch.answers).numpy(), atol=1e-10)
    assert isinstance(task.pairs[0], Pair)
