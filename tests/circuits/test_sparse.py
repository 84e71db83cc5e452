"""Circuits of edges between nodes, and their files."""

import json
from pathlib import Path

import numpy as np
import pytest

from patchlab.circuits import Candidates, NodeCircuit, SparseCircuit, convert, read, to_dot, write, write_submission
from patchlab.errors import CircuitError
from patchlab.graph import Graph
from patchlab.sites import Site

UNIVERSE = (Candidates(Site.parse("z[layer,pos,head]"), (3, 2, 2)), Candidates(Site.parse("mlp_post[layer,pos,neuron]"), (3, 2, 4)))
EDGES = ["L0.H1.z@S->L0.N3.mlp_post@S", "L0.N3.mlp_post@S->L2.H0.z@END", "L2.H0.z@END->logits", "L0.H1.z@S->L1.N0.mlp_post@S"]


def made(scored: bool = True) -> SparseCircuit:
    circuit = SparseCircuit.of(UNIVERSE, EDGES, {"positions": ["S", "END"], "method": "relp", "direction": "noising"})
    scores = [{EDGES[0]: -2.0, EDGES[1]: 1 / 3, EDGES[2]: 0.5}.get(name, np.nan) for name in circuit.edges]
    return SparseCircuit(circuit.nodes, circuit.source, circuit.target, scores=np.array(scores) if scored else None, provenance=circuit.provenance)


def test_edges_have_names_and_an_order() -> None:
    circuit = made()
    assert set(circuit.edges) == set(EDGES)
    assert (circuit.n_edges, circuit.n_nodes) == (4, 4)
    assert circuit.table()["edge"].tolist()[:3] == [EDGES[0], EDGES[2], EDGES[1]]
    assert "Largest 3 of its edges" in circuit.summary()
    assert circuit.pruned().edges == tuple(name for name in circuit.edges if name != EDGES[3]), "nobody reads that neuron"
    assert "4 edges, 4 of 36 nodes" in repr(circuit)
    assert (~~circuit).equals(circuit)
    assert not (~circuit).equals(circuit)
    assert circuit.without(0).n_edges == 3
    assert SparseCircuit.of(UNIVERSE[:1], "L0.H1.z@0->L2.H0.z@1").n_edges == 1


def test_what_is_outside_is_not_taken_out_or_pruned_as_if_it_were_in() -> None:
    for change in (SparseCircuit.pruned, lambda circuit: circuit.without(0), lambda circuit: circuit.without_node(0)):
        with pytest.raises(CircuitError, match=r"listed edges are those outside.*of its complement \(~circuit\)"):
            change(~made())


@pytest.mark.parametrize("circuit", [made(), made(scored=False), ~made(), made().emptied()], ids=["scored", "plain", "complement", "empty"])
def test_what_is_written_is_read_again(circuit: SparseCircuit, tmp_path: Path) -> None:
    write(circuit, tmp_path / "edges.json")
    again = read(tmp_path / "edges.json")
    assert isinstance(again, SparseCircuit)
    assert again.equals(circuit)
    assert again.provenance == circuit.provenance | {"file": "edges.json"}
    data = json.loads((tmp_path / "edges.json").read_text())
    assert data["patchlab"]["format"] == 3
    assert read(tmp_path / "edges.json", graph=Graph(3, 2, 8)).equals(circuit)
    with pytest.raises(CircuitError, match="3 along layer, and the model 5"):
        read(tmp_path / "edges.json", graph=Graph(5, 2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["edges"].update({"L0.H1.z@S->L9.H0.z@S": {"in_graph": True}}), "unknown node of this circuit 'L9.H0.z@S'"),
        (lambda d: d["edges"].update({"L2.H0.z@END->L0.H1.z@S": {"in_graph": True}}), "does not lead forward"),
        (lambda d: d["edges"].update({"L0.H1.z@S": {"in_graph": True}}), "is no edge"),
        (lambda d: d["edges"][EDGES[0]].update(score="high"), "must be a finite number; got 'high'"),
        (lambda d: d["edges"][EDGES[0]].update(in_graph=False), "must have in_graph true"),
        (lambda d: d.update(edges=[]), "edges must map each edge"),
        (lambda d: d["patchlab"].pop("nodes"), "without nodes"),
        (lambda d: d["patchlab"].update(all_but=1), "all_but is true or false"),
    ],
)
def test_damaged_files_say_what_is_wrong(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    write(made(), path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CircuitError, match=message):
        read(path)


def test_other_formats_have_no_word_for_them(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"it is a circuit of edges between nodes \(z.*Write it as .json"):
        write(made(), tmp_path / "edges.pt")
    write(made(), tmp_path / "edges.json")
    with pytest.raises(CircuitError, match="a circuit of edges between nodes"):
        convert(tmp_path / "edges.json", tmp_path / "edges.pt")
    with pytest.raises(CircuitError, match="a graph in DOT is of edges between whole heads and MLPs; got a circuit of edges between nodes"):
        to_dot(made())
    with pytest.raises(CircuitError, match="an MIB submission is of edges between whole heads"):
        write_submission({"ioi_gpt2": made()}, tmp_path / "out")


def test_refuses_what_is_no_circuit() -> None:
    nodes, none = made().nodes, np.zeros(0, dtype=np.int64)
    with pytest.raises(CircuitError, match="these are all but the listed ones"):
        SparseCircuit(NodeCircuit.full(UNIVERSE), none, none)
    with pytest.raises(CircuitError, match="an edge is listed twice"):
        SparseCircuit(nodes, np.array([0, 0]), np.array([3, 3]))
    with pytest.raises(CircuitError, match=r"one of 4 nodes \(0 to 3\)"):
        SparseCircuit(nodes, np.array([0]), np.array([7]))
    with pytest.raises(CircuitError, match="does not lead forward"):
        SparseCircuit(nodes, np.array([1]), np.array([0]))
    with pytest.raises(CircuitError, match="is no edge; write one as"):
        SparseCircuit.of(UNIVERSE, ["L0.H1.z@0"])
