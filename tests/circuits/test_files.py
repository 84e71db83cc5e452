"""Circuit files: EAP-IG's and MIB's formats in their versions, what patchlab adds, submission folders, and everything that can be wrong."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchlab.circuits import MIB_FRACTIONS, Circuit, convert, read, read_submission, top_n, write, write_submission
from patchlab.circuits.formats.json import _order
from patchlab.errors import CircuitError, OutputError
from patchlab.graph import Graph

SMALL = Graph(2, 2, 8)
KEPT = ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"]
SUFFIXES = (".json", ".pt")


def scores(graph: Graph = SMALL, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=graph.allowed.shape)


def eap_ig_json(graph: Graph = SMALL, kept: list[str] = KEPT, **changes: Any) -> dict[str, Any]:
    """What EAP-IG writes: all scores 0.5."""
    inside = {"logits", *Circuit.of(graph, kept).nodes}
    return {
        "cfg": {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": graph.d_model},
        "nodes": {name: {"in_graph": name in inside} for name in graph.nodes},
        "edges": {name: {"score": 0.5, "in_graph": name in kept} for name in graph.names()},
        **changes,
    }


def eap_ig_pt(graph: Graph = SMALL, kept: list[str] = KEPT, **changes: Any) -> dict[str, Any]:
    circuit = Circuit.of(graph, kept)
    return {
        "cfg": eap_ig_json(graph)["cfg"],
        "src_nodes": list(graph.writers),
        "dst_nodes": list(graph.readers),
        "edges_scores": torch.from_numpy(np.where(graph.allowed, 0.5, 0)),
        "edges_in_graph": torch.from_numpy(circuit.edges.copy()),
        "nodes_in_graph": torch.from_numpy(circuit.node_mask[:-1].copy()),
        **changes,
    }


def put(path: Path, data: Any) -> Path:
    if path.suffix == ".pt":
        torch.save(data, path)
    else:
        path.write_text(json.dumps(data))
    return path


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


# --- the published circuit ---


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> Path:
    return shared_dir / "data" / "mib-circuit-track" / "ioi-eap-ig.json"


def test_the_published_circuit_is_read_and_chosen_again(published: Path) -> None:
    circuit = read(published)
    assert (len(circuit.graph.nodes), circuit.graph.n_edges) == (158, 32_491)
    assert (circuit.n_edges, len(circuit.nodes)) == (756, 81)
    assert repr(circuit) == "Circuit(ioi-eap-ig.json) 756 of 32,491 edges, 81 of 158 nodes"
    assert circuit.scores is not None
    chosen = top_n(circuit.scores, 800, graph=circuit.graph)
    assert chosen.equals(circuit)
    assert circuit.pruned().equals(circuit)


def test_the_published_circuit_comes_back_equal(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.json")
    original, again = (json.loads(path.read_text()) for path in (published, tmp_path / "b.json"))
    assert again == original
    for part in ("nodes", "edges"):
        assert list(again[part]) == list(original[part]), "in the same order"


def test_edges_are_written_in_the_order_of_the_library(reference_dir: Path) -> None:
    names = json.loads((reference_dir / "edge_names.json").read_text())
    for model, graph in {"gpt2-random": Graph(3, 4, 48), "neox-random": Graph(3, 4, 48, True)}.items():
        assert [graph.name(*pair) for pair in _order(graph)] == names[model]


# --- what other tools write ---


@pytest.mark.parametrize("parallel", [False, True])
def test_files_of_eap_ig(tmp_path: Path, parallel: bool) -> None:
    graph = Graph(2, 2, 8, parallel)
    for path, data in ((tmp_path / "a.json", eap_ig_json(graph)), (tmp_path / "a.pt", eap_ig_pt(graph))):
        circuit = read(put(path, data))
        assert circuit.equals(Circuit(graph, graph.mask(KEPT), np.full(graph.allowed.shape, 0.5)))
        assert circuit.provenance == {"file": path.name}


def test_older_and_binary_forms(tmp_path: Path) -> None:
    plain = eap_ig_json()
    old = plain | {"nodes": {name: entry["in_graph"] for name, entry in plain["nodes"].items()}}
    old["edges"] = {name: entry | {"score": None} for name, entry in plain["edges"].items()}
    binary = plain | {"edges": {name: {"in_graph": int(entry["in_graph"])} for name, entry in plain["edges"].items()}}
    tensors = without(eap_ig_pt(), "edges_scores")
    tensors["edges_in_graph"] = tensors["edges_in_graph"].float()
    for path, data in ((tmp_path / "old.json", old), (tmp_path / "binary.json", binary), (tmp_path / "binary.pt", tensors)):
        circuit = read(put(path, data))
        assert circuit.edge_names == KEPT
        assert circuit.scores is None
    # older still: the width is not in the file
    narrow = plain | {"cfg": without(plain["cfg"], "d_model")}
    assert read(put(tmp_path / "narrow.json", narrow), graph=SMALL).graph == SMALL


def test_half_precision_and_partial_scores(tmp_path: Path) -> None:
    half = eap_ig_pt(edges_scores=torch.full(SMALL.allowed.shape, 0.5, dtype=torch.bfloat16))
    made = read(put(tmp_path / "half.pt", half))
    assert made.scores is not None
    assert made.scores[SMALL.edge(KEPT[0])] == 0.5
    some = eap_ig_json()
    some["edges"]["input->m0"]["score"] = None
    made = read(put(tmp_path / "some.json", some))
    assert made.scores is not None
    assert np.isnan(made.scores).sum() == (~SMALL.allowed).sum() + 1


def test_marked_nodes_give_way_to_edges(tmp_path: Path) -> None:
    data = eap_ig_json()
    data["nodes"]["m0"]["in_graph"] = True
    circuit = read(put(tmp_path / "a.json", data))
    assert circuit.nodes == ("input", "a0.h1", "m1", "logits")
    assert circuit.provenance["notes"] == ["1 nodes (m0, ...) are marked otherwise than their edges; the edges are what counts"]


def test_scores_of_nodes_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), *range(2, 7)])
    first = read(put(tmp_path / "a.pt", eap_ig_pt(nodes_scores=values)))
    assert first.provenance["node_scores"] == {"input": 1.0, "a0.h1": 2.0, "m0": 3.0, "a1.h0": 4.0, "a1.h1": 5.0, "m1": 6.0}
    for suffix in SUFFIXES:
        write(first, tmp_path / f"b{suffix}")
        assert read(tmp_path / f"b{suffix}").provenance["node_scores"] == first.provenance["node_scores"]
    assert json.loads((tmp_path / "b.json").read_text())["nodes"]["m0"] == {"in_graph": False, "score": 3.0}


def test_the_model_says_more_than_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", eap_ig_json(Graph(2, 4, 8)))
    grouped = Graph(2, 4, 8, n_kv_heads=2)
    assert read(path, graph=grouped).graph == grouped
    with pytest.raises(CircuitError, match=r"a\.json: the file belongs to a graph of 2 layers × 4 heads.* and the model to a graph of 3 layers"):
        read(path, graph=Graph(3, 4, 8))


# --- what patchlab writes ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_circuits_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    partly = scores()
    partly[:, 3] = np.nan
    grouped = Graph(2, 4, 8, n_kv_heads=2)
    about = {"method": "relp", "how": "top 3", "examples": [0, 2], "nested": {"a": None}}
    positional = np.zeros((*SMALL.allowed.shape, 3), dtype=bool)
    positional[(*SMALL.edge("input->m0"), 1)] = positional[(*SMALL.edge("m0->logits"), 2)] = True
    placed = np.where(np.arange(3) == 0, np.nan, scores()[:, :, None])
    circuits = [
        Circuit.empty(SMALL),
        Circuit.of(SMALL, KEPT),
        Circuit(SMALL, SMALL.mask(KEPT), scores(), about),
        Circuit(SMALL, SMALL.mask(KEPT), partly),
        Circuit(SMALL, SMALL.mask(KEPT), scores().astype(np.float32)),
        Circuit.full(grouped),
        Circuit(SMALL, positional),
        Circuit(SMALL, positional, placed, {"positions": ["S", "IO", "END"]}),
    ]
    if suffix == ".json":
        circuits.append(Circuit.full(Graph(2, 2, 8, mlps=False)))
    for i, circuit in enumerate(circuits):
        path = tmp_path / f"{i}{suffix}"
        write(circuit, path)
        again = read(path)
        assert again.equals(circuit), i
        assert again.provenance == circuit.provenance | {"file": path.name}


def test_other_tools_find_what_they_expect(tmp_path: Path) -> None:
    partly = scores()
    partly[:, SMALL.readers.index("a1.h0<q>")] = np.nan
    circuit = Circuit(SMALL, SMALL.mask(KEPT), partly, {"method": "relp"})
    for suffix in SUFFIXES:
        write(circuit, tmp_path / f"a{suffix}")
    named = json.loads((tmp_path / "a.json").read_text())
    assert named["cfg"] == eap_ig_json()["cfg"]
    assert named["nodes"] == eap_ig_json()["nodes"]
    assert set(named["edges"]) == set(SMALL.names())
    assert named["edges"]["input->m0"] == {"score": partly[SMALL.edge("input->m0")], "in_graph": False}
    assert named["edges"]["input->a1.h0<q>"] == {"score": 0.0, "in_graph": False, "scored": False}
    write(Circuit.empty(SMALL), tmp_path / "empty.json")
    marked = [name for name, entry in json.loads((tmp_path / "empty.json").read_text())["nodes"].items() if entry["in_graph"]]
    assert marked == ["logits"], "EAP-IG always counts the logits in"
    tensors = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(tensors) == {*eap_ig_pt(), "patchlab"}
    assert (tensors["src_nodes"], tensors["dst_nodes"]) == (list(SMALL.writers), list(SMALL.readers))
    assert tensors["edges_in_graph"].sum() == 3
    assert torch.isfinite(tensors["edges_scores"]).all()
    assert tensors["nodes_in_graph"].tolist() == [name in circuit.nodes for name in SMALL.writers]


def test_a_position_resolved_circuit_looks_collapsed_to_other_tools(tmp_path: Path) -> None:
    mask = np.zeros((*SMALL.allowed.shape, 2), dtype=bool)
    mask[(*SMALL.edge("input->m0"), 1)] = True
    write(Circuit(SMALL, mask, np.ones(mask.shape)), tmp_path / "a.json")
    entry = json.loads((tmp_path / "a.json").read_text())["edges"]["input->m0"]
    assert entry == {"score": 2.0, "in_graph": True, "positions": [1], "position_scores": [1.0, 1.0]}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_is_whole_or_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, circuit = tmp_path / f"a{suffix}", Circuit.of(SMALL, KEPT)
    write(circuit, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        write(circuit, path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write(Circuit.empty(SMALL), path, overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    write(Circuit.empty(SMALL), path, overwrite=True)
    assert read(path).n_edges == 0


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"cannot write .*a\.yaml: unknown kind of circuit file '\.yaml'.*Valid: \.json, \.pt"):
        write(Circuit.empty(SMALL), tmp_path / "a.yaml")
    with pytest.raises(CircuitError, match=r"\.pt files have an MLP in every block"):
        write(Circuit.empty(Graph(2, 2, 8, mlps=False)), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


# --- what can be wrong with a file ---


def changed(part: str, name: str, value: Any) -> dict[str, Any]:
    data = eap_ig_json()
    data[part][name] = value
    return data


BAD_JSON = {
    "list": ([1, 2], "not a circuit file: it has list; expected cfg, nodes, edges"),
    "keys": (without(eap_ig_json(), "edges"), "not a circuit file without edges: it has cfg, nodes"),
    "cfg": (eap_ig_json(cfg=[]), "cfg must be a mapping"),
    "cfg-missing": (eap_ig_json(cfg={"n_layers": 2, "n_heads": 2}), "cfg has no d_model"),
    "cfg-value": (changed("cfg", "n_layers", "2"), "cfg has n_layers '2'; it must be a whole number of at least 1"),
    "cfg-zero": (changed("cfg", "n_heads", 0), "cfg has n_heads 0"),
    "cfg-bool": (changed("cfg", "d_model", True), "cfg has d_model True"),
    "cfg-parallel": (changed("cfg", "parallel_attn_mlp", 1), "cfg has parallel_attn_mlp 1; it must be true or false"),
    "cfg-wrong": (changed("cfg", "n_layers", 3), "3 of 11 nodes are missing, the first is a2.h0"),
    "cfg-small": (changed("cfg", "n_layers", 1), "there is no node 'a1.h0' in a graph of 1 layers"),
    "cfg-sequential": (eap_ig_json(Graph(2, 2, 8, True)) | {"cfg": eap_ig_json()["cfg"]}, "4 of 46 edges are missing, the first is a0.h0->m0"),
    "nodes": (eap_ig_json(nodes=["input"]), "nodes must map each node to whether it is in the circuit; got list"),
    "node-missing": (eap_ig_json(nodes=without(eap_ig_json()["nodes"], "m1")), "1 of 8 nodes are missing, the first is m1"),
    "node-flag": (changed("nodes", "m1", {"in_graph": "yes"}), "in_graph of m1 must be true or false; got 'yes'"),
    "node-score": (changed("nodes", "m1", {"in_graph": True, "score": 10**400}), "the score of the node m1 is not finite"),
    "neurons": (changed("nodes", "m1", {"in_graph": True, "neurons": [True]}), "m1 has neurons: this is a neuron-level circuit"),
    "edges": (eap_ig_json(edges=[]), "edges must map each edge"),
    "edge-missing": (eap_ig_json(edges=without(eap_ig_json()["edges"], "m0->m1")), "1 of 46 edges are missing, the first is m0->m1"),
    "edge-unknown": (changed("edges", "a9.h0->logits", {}), "there is no a9.h0 in a graph of 2 layers"),
    "edge-nonsense": (changed("edges", "input", {}), "cannot read the edge 'input'"),
    "edge-cyclic": (changed("edges", "m1->m0", {}), "'m1->m0' is not an edge: m1 is not computed before m0 reads"),
    "edge-itself": (changed("edges", "m1->m1", {}), "a node does not feed itself"),
    "edge-twice": (changed("edges", "input -> m0", {"in_graph": True}), "1 edges stand there twice"),
    "edge-entry": (changed("edges", "input->m0", 0.5), "the edge input->m0 must have in_graph and score; got 0.5"),
    "edge-flag": (changed("edges", "input->m0", {"score": 1}), "in_graph of input->m0 must be true or false; got None"),
    "score-text": (changed("edges", "input->m0", {"in_graph": True, "score": "1"}), "the score of input->m0 must be a number; got '1'"),
    "score-bool": (changed("edges", "input->m0", {"in_graph": True, "score": True}), "must be a number; got True"),
    "score-huge": (changed("edges", "input->m0", {"in_graph": True, "score": 10**400}), "the score of input->m0 is not finite"),
    "own": (eap_ig_json(patchlab="x"), "the entry 'patchlab' is damaged: it has no format number"),
    "own-newer": (eap_ig_json(patchlab={"format": 99}), "it has the format 99 and this patchlab reads up to 3. Update patchlab"),
    "own-graph": (eap_ig_json(patchlab={"format": 1, "graph": {"layers": 2}}), "the graph under 'patchlab' is damaged"),
    "own-other": (eap_ig_json(patchlab={"format": 1, "graph": Graph(2, 2, 16).as_dict()}), "d_model 16 and 8"),
    "positions": (eap_ig_json(patchlab={"format": 1, "n_positions": 2}), "the positions of the edge input->a0.h0<q> do not fit 2 positions"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_wrong_json(tmp_path: Path, case: str) -> None:
    data, message = BAD_JSON[case]
    with pytest.raises(CircuitError) as error:
        read(put(tmp_path / "bad.json", data))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'bad.json'}: "), "the message names the file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(eap_ig_json())[:-40], "not JSON, or cut off"),
        ("", "not JSON, or cut off"),
        (json.dumps(changed("edges", "input->m0", {"score": float("nan"), "in_graph": True})), "the score of input->m0 must be a number; got 'NaN'"),
        (json.dumps(changed("edges", "input->m0", {"score": float("inf"), "in_graph": True})), "it holds Infinity"),
        (json.dumps(changed("edges", "input->m0", {"score": 0.0, "in_graph": True})).replace("0.0", "1e999"), "the score of input->m0 is not finite"),
        ('{"cfg": {"n_layers": 1, "n_layers": 2}}', "'n_layers' occurs twice"),
        ("[" * 100_000, "not JSON, or cut off"),
    ],
)
def test_text_that_is_no_sound_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CircuitError, match=rf"bad\.json: .*{message}"):
        read(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CircuitError, match=r"bad\.json: not JSON"):
        read(tmp_path / "bad.json")


CYCLE = SMALL.allowed.copy()
CYCLE[SMALL.writers.index("m1"), SMALL.readers.index("m0")] = True
BAD_PT = {
    "tensor": (torch.zeros(3), "not a circuit file: it has Tensor; expected cfg, src_nodes"),
    "keys": (without(eap_ig_pt(), "dst_nodes", "nodes_in_graph"), "not a circuit file without dst_nodes, nodes_in_graph"),
    "cfg": (eap_ig_pt(cfg={"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False}), "cfg has no d_model"),
    "cfg-wrong": (eap_ig_pt(cfg=eap_ig_json(Graph(3, 2, 8))["cfg"]), "src_nodes does not list the 10 names of a graph of 3 layers"),
    "readers": (eap_ig_pt(dst_nodes=list(reversed(SMALL.readers))), "dst_nodes does not list the 15 names"),
    "shape": (eap_ig_pt(edges_in_graph=torch.zeros(3, 3)), "edges_in_graph must be a tensor of shape [7, 15]; got torch.float32 of shape [3, 3]"),
    "kind": (eap_ig_pt(edges_in_graph=[0, 1]), "edges_in_graph must be a tensor of shape [7, 15]; got list"),
    "values": (eap_ig_pt(edges_in_graph=torch.full((7, 15), 0.3)), "edges_in_graph says what is in the circuit"),
    "cyclic": (eap_ig_pt(edges_in_graph=torch.from_numpy(CYCLE)), "'m1->m0' is not an edge: m1 is not computed before m0 reads"),
    "nodes": (eap_ig_pt(nodes_in_graph=torch.ones(9)), "nodes_in_graph must be a tensor of shape [7]"),
    "scores": (eap_ig_pt(edges_scores=torch.zeros(7, 15, dtype=torch.int64)), "edges_scores must be floats of shape [7, 15]; got torch.int64"),
    "nan": (eap_ig_pt(edges_scores=torch.full((7, 15), float("nan"))), "the score of input->a0.h0<q> is not a number (NaN)"),
    "inf": (eap_ig_pt(edges_scores=torch.full((7, 15), float("inf"))), "is not finite"),
    "node-scores": (eap_ig_pt(nodes_scores=torch.full((7,), float("inf"))), "the score of the node input is not finite"),
    "neurons": (eap_ig_pt(neurons_in_graph=torch.ones(7, 8)), "neuron-level circuit"),
    "own": (eap_ig_pt(patchlab={"record": "{"}), "the entry 'patchlab' is damaged"),
    "own-kind": (eap_ig_pt(patchlab=[1]), "not the entry 'patchlab'"),
    "own-newer": (eap_ig_pt(patchlab={"record": '{"format": 99}'}), "Update patchlab"),
    "positions": (eap_ig_pt(patchlab={"record": '{"format": 1, "n_positions": 2}', "edges": torch.ones(7, 15, 3)}), "shape [7, 15, 2]"),
}


@pytest.mark.parametrize("case", BAD_PT)
def test_wrong_pt(tmp_path: Path, case: str) -> None:
    data, message = BAD_PT[case]
    with pytest.raises(CircuitError) as error:
        read(put(tmp_path / "bad.pt", data))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'bad.pt'}: ")


class Trap:
    """A pickle that makes a folder when it is loaded as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "bad.pt", eap_ig_pt(cfg=Trap(tmp_path / "sprung")))
    with pytest.raises(CircuitError, match=r"bad\.pt: it holds Python objects other than tensors .* could run code when loaded; refused"):
        read(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CircuitError, match=r"plain\.pt: not a file of torch\.save, or damaged"):
        read(tmp_path / "plain.pt")
    assert not (tmp_path / "sprung").exists()
    # the trap is a real one
    with io.BytesIO((tmp_path / "plain.pt").read_bytes()) as file:
        pickle.load(file)
    assert (tmp_path / "sprung").exists()


def test_damaged_pt(tmp_path: Path) -> None:
    whole = put(tmp_path / "whole.pt", eap_ig_pt()).read_bytes()
    for i, raw in enumerate((whole[: len(whole) // 2], b"", b"nonsense", whole[:2000] + b"\x00" * 500 + whole[2500:])):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(raw)
        with pytest.raises(CircuitError, match=rf"{i}\.pt: "):
            read(path)


def test_no_file_or_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"cannot read the circuit file .*none\.json: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(CircuitError, match=r"a\.txt ends in '\.txt'; unknown kind of circuit file"):
        read(tmp_path / "a.txt")


# --- submissions and conversion ---


def nine(graph: Graph) -> list[Circuit]:
    return [top_n(scores(graph), max(1, int(p * graph.n_edges)), graph=graph, prune=False) for p in MIB_FRACTIONS[:-1]]


BIG = Graph(6, 6, 8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_submissions(tmp_path: Path, suffix: str) -> None:
    importances, sizes = Circuit(SMALL, SMALL.mask(KEPT), scores()), nine(BIG)
    files = write_submission({"ioi_gpt2": importances, "arc-easy_qwen2.5": sizes[::-1]}, tmp_path / "mine", suffix=suffix)
    assert sorted(path.relative_to(tmp_path / "mine").as_posix() for path in files) == sorted(
        [f"ioi_gpt2/importances{suffix}", *(f"arc-easy_qwen2.5/edges-{p:g}{suffix}" for p in MIB_FRACTIONS[:-1])]
    )
    back = read_submission(tmp_path / "mine")
    assert list(back) == ["arc-easy_qwen2.5", "ioi_gpt2"]
    assert back["ioi_gpt2"][0].equals(importances)
    assert all(one.equals(two) for one, two in zip(back["arc-easy_qwen2.5"], sizes, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_submissions_that_mib_does_not_take(tmp_path: Path) -> None:
    scored, sizes, out = Circuit(SMALL, SMALL.mask(KEPT), scores()), nine(BIG), tmp_path / "out"
    cases = [
        ({"ioi": scored}, "'ioi' does not name a task and a model"),
        ({"ioi_gpt2": Circuit.of(SMALL, KEPT)}, "one circuit without scores"),
        ({"ioi_gpt2": [scored, scored]}, "the entry ioi_gpt2 has 2 circuits; MIB takes one with importances, or 9"),
        ({"ioi_gpt2": [*sizes[:-1], Circuit.full(BIG)]}, r"the circuit for 50 % of the edges has 2,\d+ of 2,\d+, more than 1,\d+"),
        ({"ioi_gpt2": [Circuit.empty(SMALL), *sizes[1:]]}, "they must belong to one model"),
        ({}, "there is nothing to submit"),
    ]
    for circuits, message in cases:
        with pytest.raises(CircuitError, match=message):
            write_submission(circuits, out)
    with pytest.raises(CircuitError, match=r"unknown kind of circuit file 'json'; did you mean '\.json'"):
        write_submission({"ioi_gpt2": scored}, out, suffix="json")
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        write_submission({"ioi_gpt2": scored}, tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        write_submission({"ioi_gpt2": scored}, tmp_path / "no" / "where")
    assert not list(tmp_path.iterdir())


def test_a_submission_is_whole_or_absent(tmp_path: Path) -> None:
    without_mlps = Circuit(Graph(2, 2, 8, mlps=False), Graph(2, 2, 8, mlps=False).allowed, np.ones((5, 13)))
    with pytest.raises(CircuitError, match="an MLP in every block"):
        write_submission({"ioi_gpt2": Circuit(SMALL, SMALL.allowed, scores()), "ioi_attn": without_mlps}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_submission(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match="there is no folder"):
        read_submission(tmp_path / "none")
    with pytest.raises(CircuitError, match="has no folders in it"):
        read_submission(tmp_path)
    (tmp_path / "ioi_gpt2").mkdir()
    with pytest.raises(CircuitError, match="ioi_gpt2 has 0 circuits"):
        read_submission(tmp_path)
    (tmp_path / "ioi").mkdir()
    with pytest.raises(CircuitError, match="'ioi' does not name a task and a model"):
        read_submission(tmp_path)


def test_conversion_of_files_and_folders(tmp_path: Path) -> None:
    source = tmp_path / "a"
    write_submission({"ioi_gpt2": Circuit(SMALL, SMALL.mask(KEPT), scores())}, source, suffix=".json")
    file = source / "ioi_gpt2" / "importances.json"
    assert convert(file, tmp_path / "one.pt") == [tmp_path / "one.pt"]
    with pytest.raises(OutputError, match="exists"):
        convert(file, tmp_path / "one.pt")
    convert(file, tmp_path / "one.pt", overwrite=True)
    assert convert(source, tmp_path / "b") == [tmp_path / "b" / "ioi_gpt2" / "importances.pt"]
    assert convert(source, tmp_path / "c", suffix=".json") == [tmp_path / "c" / "ioi_gpt2" / "importances.json"]
    for made in (tmp_path / "one.pt", tmp_path / "b/ioi_gpt2/importances.pt", tmp_path / "c/ioi_gpt2/importances.json"):
        assert read(made).equals(read(file))


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    file, folder = put(tmp_path / "a.json", eap_ig_json()), tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CircuitError, match="Leave suffix out"):
        convert(file, tmp_path / "b.pt", suffix=".pt")
    with pytest.raises(CircuitError, match="unknown kind of circuit file '.yaml'"):
        convert(folder, tmp_path / "b", suffix=".yaml")
    with pytest.raises(CircuitError, match="holds no circuit files"):
        convert(folder, tmp_path / "b")
    for suffix in SUFFIXES:
        put(folder / f"a{suffix}", eap_ig_json() if suffix == ".json" else eap_ig_pt())
    with pytest.raises(CircuitError, match="differ only in their suffix"):
        convert(folder, tmp_path / "b", suffix=".pt")
    (folder / "a.pt").unlink()
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        convert(folder, folder)
