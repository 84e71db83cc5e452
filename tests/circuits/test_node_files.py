"""Files of circuits of nodes: what is written is read again, other formats have no word for them, damaged files say what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from patchlab.circuits import Candidates, Circuit, NodeCircuit, convert, read, to_dot, write, write_submission
from patchlab.circuits.files import read as read_file
from patchlab.errors import CircuitError, OutputError
from patchlab.graph import Graph
from patchlab.sites import Site

UNIVERSE = (
    Candidates(Site.parse("z[layer,pos,head]"), (2, 3, 2)),
    Candidates(Site.parse("mlp_post[layer,pos,neuron]"), (2, 3, 5), layers=(1,), units=(4, 5)),
)


def made(**options) -> NodeCircuit:
    listed = {"z[layer,pos,head]": np.array([[1, 2, 0], [0, 0, 1]]), "mlp_post[layer,pos,neuron]": np.array([[1, 1, 4]])}
    scores = {"z[layer,pos,head]": np.array([0.25, np.nan]), "mlp_post[layer,pos,neuron]": np.array([-1 / 3])}
    about = {"method": "relp", "positions": ["0", "S", "END"], "direction": "noising", "notes": ["a note"]}
    return replace(NodeCircuit(UNIVERSE, listed, scores=scores, provenance=about), **options)


@pytest.mark.parametrize("circuit", [made(), ~made(), made(scores=None), NodeCircuit.empty(UNIVERSE), NodeCircuit.full(UNIVERSE)], ids=range(5))
def test_what_is_written_is_read_again(circuit: NodeCircuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    write(circuit, path)
    again = read(path)
    assert again.equals(circuit)
    assert again.provenance == circuit.provenance | {"file": "circuit.json"}
    assert again.nodes == circuit.nodes
    with pytest.raises(OutputError, match="exists"):
        write(circuit, path)
    write(again, path, overwrite=True)
    assert read(path).equals(circuit)


def test_nodes_stand_there_by_their_addresses(tmp_path: Path) -> None:
    write(made(), tmp_path / "circuit.json")
    data = json.loads((tmp_path / "circuit.json").read_text())
    assert data["nodes"] == {
        "L0.H1.z@0": {"in_graph": True},
        "L1.H0.z@END": {"in_graph": True, "score": 0.25},
        "L1.N4.mlp_post@S": {"in_graph": True, "score": -1 / 3},
    }
    assert data["patchlab"]["format"] == 2
    assert data["patchlab"]["candidates"][1] == {"site": "mlp_post[layer,pos,neuron]", "shape": [2, 3, 5], "layers": [1], "units": [4, 5]}


def test_files_of_edges_keep_their_format(tmp_path: Path) -> None:
    write(Circuit.of(Graph(1, 1, 4), ["input->m0"], provenance={"method": "x"}), tmp_path / "edges.json")
    assert json.loads((tmp_path / "edges.json").read_text())["patchlab"]["format"] == 1


def test_other_formats_have_no_word_for_nodes(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"it is a circuit of nodes .*EAP-IG has words for edges between whole heads and MLPs only, as MIB's has"):
        write(made(), tmp_path / "circuit.pt")
    with pytest.raises(CircuitError, match="an MIB submission is of edges between whole heads and MLPs; got a circuit of nodes"):
        write_submission({"ioi_gpt2": made()}, tmp_path / "new")
    with pytest.raises(CircuitError, match="a graph in DOT is of edges"):
        to_dot(made())
    write(made(), tmp_path / "circuit.json")
    with pytest.raises(CircuitError, match="cannot write .*a circuit of nodes"):
        convert(tmp_path / "circuit.json", tmp_path / "other.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(made(), tmp_path / "circuit.json")
    assert read(tmp_path / "circuit.json", graph=Graph(2, 2, 8)).equals(made())
    with pytest.raises(CircuitError, match=r"circuit.json: its z\[layer,pos,head\] has 2 along head, and the model 4"):
        read(tmp_path / "circuit.json", graph=Graph(2, 4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["patchlab"].update(format=4), "it has the format 4 and this patchlab reads up to 3. Update patchlab"),
        (lambda d: d["patchlab"].pop("candidates"), "of a circuit of nodes without candidates"),
        (lambda d: d["patchlab"].update(all_but=1), "all_but and provenance are a list, true or false, and a mapping"),
        (lambda d: d["patchlab"].update(all_but=True), "L0.H1.z@0 must have in_graph false, as all that are listed"),
        (lambda d: d["patchlab"].update(candidates=[{"site": "z"}]), "candidates without shape, layers"),
        (lambda d: d["patchlab"]["candidates"][0].update(site="zz"), "are damaged: unknown site 'zz'"),
        (lambda d: d["patchlab"]["candidates"][0].update(shape=3), "are damaged"),
        (lambda d: d["nodes"].update({"L0.H7.z@0": {"in_graph": True}}), "L0.H7.z@0 is not among the candidates"),
        (lambda d: d["nodes"].update({"L0.H0.z@X": {"in_graph": True}}), "unknown position of z.* 'X'"),
        (lambda d: d["nodes"].update({"L0.mlp_out@0": {"in_graph": True}}), "is of the site mlp_out, and the candidates are of z, mlp_post"),
        (lambda d: d["nodes"].update({"nonsense!": {"in_graph": True}}), "cannot read the site 'nonsense!'"),
        (lambda d: d["nodes"]["L0.H1.z@0"].update(score="big"), "the score of L0.H1.z@0 must be a finite number; got 'big'"),
        (lambda d: d.update(nodes=[]), "nodes must map each node"),
    ],
)
def test_damaged_files_say_what_is_wrong(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    write(made(), path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CircuitError, match=rf"circuit.json: .*{message}"):
        read_file(path)
