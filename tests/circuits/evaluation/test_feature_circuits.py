"""Circuits of features and errors of dictionaries, against a plain model with hooks that splits activations by the dictionaries' weights."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from families import HEADS, bridged, gap_task, hf_module, mixed_task, scores_of, swap_task
from raw_model import RawModel
from torch import Tensor

import patchlab as pl
from patchlab.circuits import NodeCircuit, candidates, evaluate, faithfulness_curve, read, top_n, write
from patchlab.errors import CircuitError
from patchlab.features import Dictionary, identity_dictionary
from patchlab.models import Model
from patchlab.tasks.task import Task
from patchlab.testing.dictionaries import random_dictionary

DTYPE = torch.float64
POINTS = {"resid_post": (0, 2), "mlp_out": (1, 2), "attn_out": (1,)}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    own = bridged(hf_module("gpt2", DTYPE), "gpt2")
    own.add_dictionaries(
        [random_dictionary(own, point, layer, 24 + 4 * layer, seed=10 * layer + i) for i, (point, at) in enumerate(POINTS.items()) for layer in at]
    )
    yield own
    own.drop_dictionaries()


def raw() -> RawModel:
    return RawModel(hf_module("gpt2", DTYPE), HEADS, HEADS)


def split(d: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and error, by the formulas of a ReLU autoencoder."""
    features = torch.relu(x @ d.w_enc + d.b_enc)
    return features, x - (features @ d.w_dec + d.b_dec)


def by_hand(
    model: Model, circuit: NodeCircuit, task: Task, ablation: str = "mean_positional", always: tuple[str, ...] = (), free: int = 0
) -> np.ndarray:
    """Metric per example: at every dictionary the activation is put together again from features and error, of this run or of the ablation."""
    plain, names, found = raw(), set(circuit.nodes), []
    runs = [plain.run(pair.corrupted_ids)[1] for pair in task.pairs]
    for e, pair in enumerate(task.pairs):
        writes = {}
        for point, of in model.dictionaries.items():
            for layer, d in of.items():
                if layer < free:
                    continue

                def put(x: Tensor, point=point, layer=layer, d=d, e=e) -> Tensor:
                    features, error = split(d, x)
                    donors = [split(d, run[point, layer]) for run in runs]
                    if ablation == "resample":
                        other = donors[e]
                    elif ablation == "zero":
                        other = torch.zeros_like(features), torch.zeros_like(error)
                    else:
                        other = tuple(sum(donor[i] for donor in donors) / len(donors) for i in range(2))
                    held = torch.tensor([f"L{layer}.F{i}.{point}" in names for i in range(features.shape[1])])
                    keeps = f"L{layer}.error.{point}" in names and point not in always
                    new = torch.where(held, features, other[0]) @ d.w_dec + d.b_dec
                    return new + (error if keeps else other[1])

                writes[point, layer] = put
        logits, _ = plain.run(pair.clean_ids, writes)
        found.append(float(task.metric(logits[None], task.batches(1)[e].answers)))
    return np.array(found)


def some(model: Model, share: float = 0.7, seed: int = 0) -> NodeCircuit:
    universe = candidates(model.arch, ["features", "error"])
    rng = np.random.default_rng(seed)
    return NodeCircuit(universe, {one.name: one.cells(one.every()[rng.random(one.size) < share]) for one in universe})


def errors_of(circuit: NodeCircuit) -> NodeCircuit:
    """All errors."""
    return NodeCircuit.of(circuit.universe, [name for name in NodeCircuit.full(circuit.universe).nodes if ".error." in name])


def measured(model: Model, circuit: NodeCircuit | Mapping[str, NodeCircuit], task: Task, **options: object) -> pl.circuits.Evaluation:
    return evaluate(model, circuit, task, progress=False, **options)


def test_candidates_are_the_features_and_errors_of_every_dictionary(model: Model) -> None:
    universe = {one.name: one for one in candidates(model.arch, ["features", "error"])}
    assert set(universe) == {f"{part}.{point}" for part in ("features", "error") for point in POINTS}
    assert universe["features.resid_post"].size == 24 + 32
    assert universe["error.mlp_out"].size == 2
    circuit = NodeCircuit.of(tuple(universe.values()), ["L2.F31.resid_post", "L1.error.mlp_out"])
    assert circuit.nodes == ("L2.F31.resid_post", "L1.error.mlp_out")
    with pytest.raises(CircuitError, match="L0.F24.resid_post is not among the candidates"):
        NodeCircuit.of(tuple(universe.values()), ["L0.F24.resid_post"])


@pytest.mark.parametrize("ablation", ["mean_positional", "resample", "zero"])
def test_circuits_equal_a_plain_model_with_dictionaries_written_out(model: Model, ablation: str) -> None:
    task = gap_task(3)
    circuit = some(model)
    got = measured(model, circuit, task, ablation=ablation)
    np.testing.assert_allclose(got.metric["circuit"], by_hand(model, circuit, task, ablation), atol=1e-9)
    np.testing.assert_allclose(got.metric_empty, by_hand(model, NodeCircuit.empty(circuit.universe), task, ablation), atol=1e-9)
    full = measured(model, NodeCircuit.full(circuit.universe), task, ablation=ablation)
    np.testing.assert_allclose(full.metric["circuit"], full.metric_full, atol=1e-9)


def test_errors_as_nodes_always_ablated_residual_ones_only_or_free(model: Model) -> None:
    task = gap_task(3)
    circuit = some(model)
    features = circuit.only(*(f"features.{point}" for point in POINTS))
    of = {
        "nodes": by_hand(model, circuit, task),
        "ablated": by_hand(model, circuit, task, always=tuple(POINTS)),
        "residual": by_hand(model, circuit, task, always=("mlp_out", "attn_out")),
        "free": by_hand(model, circuit | errors_of(circuit), task),
    }
    for errors, expected in of.items():
        got = measured(model, circuit, task, errors=errors, completeness=False)
        np.testing.assert_allclose(got.metric["circuit"], expected, atol=1e-9, err_msg=errors)
        assert got.provenance["errors"] == errors
    assert len({round(float(values.sum()), 6) for values in of.values()}) == 4, "all four differ"
    # errors that are ablated in every run are so in the complement, too
    found = measured(model, circuit, task, errors="ablated")
    outside = by_hand(model, ~circuit, task, always=tuple(POINTS))
    gap = found.metric_full.mean() - found.metric_empty.mean()
    assert found.table["completeness"][0] == pytest.approx((outside.mean() - found.metric_empty.mean()) / gap, abs=1e-9)
    # without errors among the candidates something has to be said of them
    with pytest.raises(CircuitError, match="not among the errors of their dictionaries, which carry what the features leave out. Score 'error'"):
        measured(model, features, task)
    np.testing.assert_allclose(measured(model, features, task, errors="ablated").metric["circuit"], of["ablated"], atol=1e-9)
    np.testing.assert_allclose(measured(model, features, task, errors="free").metric["circuit"], of["free"], atol=1e-9)


def test_a_dropped_error_or_means_of_the_clean_prompts_would_show(model: Model) -> None:
    task = gap_task(3)
    circuit = some(model)
    got = measured(model, circuit, task).metric["circuit"]
    swapped = Task("swapped", tuple(type(p)(p.clean_ids, p.clean_ids[::-1], p.correct, p.incorrect) for p in task.pairs), task.metric)
    assert np.abs(got - by_hand(model, circuit, task, always=tuple(POINTS))).max() > 1e-3
    assert np.abs(got - by_hand(model, circuit, swapped)).max() > 1e-3


def test_early_layers_and_their_errors_are_free(model: Model) -> None:
    task = gap_task(3)
    circuit = some(model)
    for errors, always in (("nodes", ()), ("ablated", tuple(POINTS))):
        got = measured(model, circuit, task, start_layer=1, errors=errors)
        np.testing.assert_allclose(got.metric["circuit"], by_hand(model, circuit, task, always=always, free=1), atol=1e-9)


def test_features_are_chosen_from_scores_saved_and_evaluated(model: Model, tmp_path) -> None:
    choosing, task = swap_task(4, seed=40), gap_task(3)
    scores = scores_of(pl.AttributionPatching(), model, choosing, ["features", "error"], "noising")
    circuit = top_n(scores, 12)
    assert circuit.universe == some(model).universe
    assert set(circuit.table()["node"]) == set(scores.top(12)["address"])
    write(circuit, tmp_path / "features.json")
    again = read(tmp_path / "features.json")
    assert again.equals(circuit)
    got = measured(model, again, task)
    np.testing.assert_allclose(got.metric["circuit"], by_hand(model, circuit, task), atol=1e-9)
    curve = faithfulness_curve(model, {"atp": scores}, task, sizes=[4, 12], errors="ablated", random=1, progress=False)
    assert all(".error." not in node for one in curve.circuits["atp"] for node in one.nodes)
    assert curve.table["n_nodes"].tolist() == [4, 12, 4, 12]
    kept = curve.circuits["atp"][1]
    np.testing.assert_allclose(curve.table["metric"][1], by_hand(model, kept, task, always=tuple(POINTS)).mean(), atol=1e-9)


def test_features_by_position(model: Model) -> None:
    task = gap_task(task=mixed_task())
    scores = scores_of(pl.AttributionPatching(), model, task, ["features[layer,pos,feature]", "error[layer,pos]"], "noising")
    circuit = top_n(scores, 60)
    assert circuit.positions == ("A", "B", "END")
    result = measured(model, circuit, task, allow_overlap=True)
    assert result.metric["circuit"].shape == (4,)
    whole = measured(model, NodeCircuit.full(circuit.universe, {"positions": circuit.positions}), task)
    np.testing.assert_allclose(whole.metric["circuit"], whole.metric_full, atol=1e-9)


def test_other_dictionaries_are_refused(model: Model) -> None:
    scores = scores_of(pl.AttributionPatching(), model, swap_task(4, seed=40), ["features", "error"], "noising")
    circuit = top_n(scores, 5)
    other = bridged(hf_module("gpt2", DTYPE), "gpt2")
    other.add_dictionaries([random_dictionary(other, point, layer, 24 + 4 * layer, seed=77) for point, at in POINTS.items() for layer in at])
    with pytest.raises(CircuitError, match="give the model the dictionaries that they were scored with"):
        measured(other, circuit, gap_task(3))
    both = NodeCircuit.full(candidates(model.arch, ["mlp_out[layer]", "features.mlp_out", "error.mlp_out"]))
    with pytest.raises(CircuitError, match="and from mlp_out itself, which that is a part of"):
        measured(model, both, gap_task(3))


def test_the_identity_is_a_dictionary_of_coordinates() -> None:
    own = bridged(hf_module("gpt2", DTYPE), "gpt2")
    own.add_dictionaries([identity_dictionary(own.arch.d_model, layer=i, reads="mlp_out", dtype=DTYPE) for i in range(own.arch.n_layers)])
    task, universe = gap_task(3), candidates(own.arch, "features")
    found = measured(own, {"one": NodeCircuit.of(universe, ["L1.F5.mlp_out"])}, task, errors="free")
    whole = candidates(own.arch, "mlp_out[layer]")
    alone = measured(own, NodeCircuit.of(whole, ["m0"]), task)
    np.testing.assert_allclose(found.metric_empty, alone.metric_empty, atol=1e-12)
    layer = NodeCircuit.of(universe, [f"L0.F{i}.mlp_out" for i in range(own.arch.d_model)])
    np.testing.assert_allclose(measured(own, layer, task, errors="ablated").metric["circuit"], alone.metric["circuit"], atol=1e-12)
    scores = scores_of(pl.AttributionPatching(), own, swap_task(4, seed=40), ["features"], "noising")
    assert top_n(scores, 5).n_nodes == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder", "codebook"])
def test_other_kinds_of_dictionaries(kind: str) -> None:
    own = bridged(hf_module("gpt2", DTYPE), "gpt2")
    point = "resid_post" if kind == "codebook" else "mlp_in"
    own.add_dictionaries([random_dictionary(own, point, layer, 16, kind=kind, seed=layer, skip=kind == "transcoder") for layer in (0, 1)])
    task = gap_task(3)
    universe = candidates(own.arch, ["features", "error"])
    full = NodeCircuit.full(universe)
    result = measured(own, {"full": full, "some": top_n_random(full)}, task, ablation="resample", completeness=False)
    np.testing.assert_allclose(result.metric["full"], result.metric_full, atol=1e-9)
    # with features and errors at what they are on the other prompt, what they add up to is patched (a skip reads this run)
    if kind == "codebook":
        batch = task.batches()[0]
        other = own.run(batch.corrupted, keep="resid_post")
        edits = [pl.Edit(f"L{i}.resid_post", other) for i in (0, 1)]
        expected = task.metric(own.run(batch.clean, edits=edits).logits[:, -1], batch.answers).numpy()
        np.testing.assert_allclose(result.metric_empty, expected, atol=1e-9)


def top_n_random(full: NodeCircuit) -> NodeCircuit:
    """A third of the nodes."""
    return NodeCircuit.of(full.universe, full.nodes[::3])
