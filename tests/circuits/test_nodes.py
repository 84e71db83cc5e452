"""Circuits of nodes: candidates, sets, addresses, free layers."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
from families import mixed_task, model_of, swap_task

from patchlab.circuits import Candidates, Circuit, NodeCircuit, candidates
from patchlab.errors import CircuitError, SiteError
from patchlab.graph import Graph
from patchlab.sites import Site


def some(name: str, *shape: int, **options) -> Candidates:
    return Candidates(Site.parse(name), shape, **options)


HEADS, MLPS = some("z", 3, 2), some("mlp_out[layer]", 3)
PLACES = (some("z[layer,pos,head]", 2, 3, 2), some("mlp_out", 2, 3))


def test_nodes_are_named_by_their_addresses_and_by_the_names_of_components() -> None:
    circuit = NodeCircuit.of((HEADS, MLPS), ["a0.h1", "m2", "L1.H0.z"])
    assert circuit.nodes == ("L0.H1.z", "L1.H0.z", "L2.mlp_out")
    assert (circuit.n_nodes, circuit.size, circuit.sites, circuit.n_positions) == (3, 9, ("z", "mlp_out[layer]"), None)
    assert repr(circuit) == "NodeCircuit() 3 of 9 nodes: 2 of z[layer 3, head 2], 1 of mlp_out[layer 3]"
    assert circuit.mask("z", 0).tolist() == [False, True]
    assert circuit.mask("mlp_out[layer]", 2).tolist() is True
    with pytest.raises(FrozenInstanceError):
        circuit.all_but = True
    with pytest.raises(ValueError, match="read-only"):
        circuit.listed["z"][0] = 0


def test_nodes_at_positions_and_with_names() -> None:
    circuit = NodeCircuit.of(PLACES, ["L0.H1.z@2", "L1.mlp_out@0"])
    assert circuit.nodes == ("L0.H1.z@2", "L1.mlp_out@0")
    assert circuit.mask("z[layer,pos,head]", 0).tolist() == [[False, False], [False, False], [False, True]]
    named = NodeCircuit.of(PLACES, ["L0.H1.z@END"], {"positions": ["A", "B", "END"]})
    assert named.nodes == ("L0.H1.z@END",)
    assert named.listed["z[layer,pos,head]"].tolist() == [[0, 2, 1]]
    half = NodeCircuit.of(PLACES, ["L1.H0.z@0"], {"positions": ["0", "1", "END"]})
    assert half.nodes == ("L1.H0.z@0",)


@pytest.mark.parametrize("seed", range(4))
def test_operations_are_those_of_sets_also_where_what_is_outside_is_listed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    both = []
    for _ in range(2):
        listed = {one.name: one.cells(one.every()[rng.random(one.size) < 0.4]) for one in PLACES}
        both.append(NodeCircuit(PLACES, listed, bool(rng.random() < 0.5)))
    one, two = both
    everything = set(NodeCircuit.full(PLACES).nodes)
    assert len(everything) == one.size == 18
    mine, theirs = set(one.nodes), set(two.nodes)
    assert set((~one).nodes) == everything - mine
    assert set((one | two).nodes) == mine | theirs
    assert set((one & two).nodes) == mine & theirs
    assert set((one - two).nodes) == mine - theirs
    assert set((one ^ two).nodes) == mine ^ theirs
    assert len(one.nodes) == one.n_nodes
    for made in (one, ~one, one | two, one ^ two):
        for site in PLACES:
            kept = np.stack([made.mask(site.name, layer) for layer in range(2)])
            assert set(map(tuple, np.argwhere(kept).tolist())) == set(map(tuple, site.cells(made.ids(site.name)).tolist()))
            for layer in range(2):
                assert made.keeps_all(site.name, layer) == made.mask(site.name, layer).all()
    for site in PLACES:
        for node in one.ids(site.name):
            name = site.address(site.cells(node[None])[0].tolist(), None)
            assert set(one.without(site.name, int(node)).nodes) == mine - {name}


def test_equal_circuits_have_one_key() -> None:
    one = NodeCircuit.of((HEADS, MLPS), ["a0.h1", "m2"])
    again = NodeCircuit.of((HEADS, MLPS), ["m2", "a0.h1"], {"task": "x"})
    assert one.equals(again)
    assert one.key() == again.key() != NodeCircuit.of((HEADS, MLPS), ["m2"]).key()
    assert one.equals(~~one)
    assert (~one).key() != one.key()
    scored = replace(one, scores={"z": np.array([1.0]), "mlp_out[layer]": np.array([2.0])})
    assert not one.equals(scored)
    assert not one.equals(NodeCircuit.of((HEADS,), ["a0.h1"]))


def test_early_layers_and_other_sites_become_free() -> None:
    circuit = NodeCircuit.of((HEADS, MLPS), ["a0.h1", "a2.h0", "m1"])
    late = circuit.from_layer(1)
    assert late.nodes == ("L2.H0.z", "L1.mlp_out")
    assert late.size == 6
    assert "z[layer 3, head 2] of layers 1, 2" in repr(late)
    assert late.mask("z", 0).all()
    assert late.keeps_all("z", 0)
    assert (~late).mask("z", 0).all(), "free in the complement, too"
    assert NodeCircuit.full(late.universe).n_nodes == 6
    assert circuit.only("z").nodes == ("L0.H1.z", "L2.H0.z")
    with pytest.raises(CircuitError, match="no candidates are left from layer 3 on"):
        circuit.from_layer(3)
    with pytest.raises(CircuitError, match="unknown site of this circuit 'q'"):
        circuit.only("q")


def test_layers_of_unlike_width() -> None:
    one = some("mlp_post", 3, 4, units=(4, 2, 3))
    assert one.size == 9
    assert len(one.every()) == 9
    circuit = NodeCircuit.of((one,), ["L1.N1.mlp_post"])
    assert (~circuit).n_nodes == 8 == len((~circuit).nodes)
    assert circuit.mask("mlp_post", 1).tolist() == [False, True, True, True], "what there is not is not ablated"
    with pytest.raises(CircuitError, match=r"L1.N2.mlp_post is not among the candidates"):
        NodeCircuit.of((one,), ["L1.N2.mlp_post"])
    with pytest.raises(CircuitError, match="units says how many neuron"):
        some("mlp_post", 3, 4, units=(4, 5, 3))


def test_nodes_of_a_circuit_of_edges() -> None:
    graph = Graph(2, 2, 8)
    edges = Circuit.of(graph, ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"], provenance={"method": "relp"})
    circuit = NodeCircuit.from_edges(edges)
    assert circuit.nodes == ("L0.H1.z", "L1.mlp_out")
    assert circuit.provenance == {"method": "relp", "how": "nodes of 3 edges"}
    without = NodeCircuit.from_edges(Circuit.of(Graph(2, 2, 8, mlps=False), ["input->a0.h1<v>"]))
    assert without.sites == ("z",)


def test_candidates_of_a_model() -> None:
    model = model_of("gpt2")
    heads, neurons = candidates(model.arch, ["z", "mlp_post"])
    assert heads.shape == (model.arch.n_layers, model.arch.n_heads)
    assert neurons.size == model.arch.n_layers * model.arch.d_mlp
    (places,) = candidates(model.arch, "z[layer,pos,head]", swap_task().position_axis())
    assert places.n_positions == 5
    (named,) = candidates(model.arch, "mlp_out", mixed_task().position_axis())
    assert named.n_positions == 3
    with pytest.raises(CircuitError, match="mlp_out has a node per position; pass the positions of your prompts"):
        candidates(model.arch, "mlp_out")
    with pytest.raises(SiteError, match="unknown site 'zz'"):
        candidates(model.arch, "zz")
    with pytest.raises(CircuitError, match="pattern has no nodes that a circuit can hold"):
        candidates(model.arch, "pattern", swap_task().position_axis())


def test_random_nodes_are_different_and_depend_on_the_seed() -> None:
    for n in (1, 5, 20, 500):
        one = some("mlp_post", 3, 200, units=(200, 100, 200))
        drawn = one.drawn(n, np.random.default_rng(0))
        assert len(set(drawn.tolist())) == n
        assert one.contains(one.cells(drawn)).all()
        assert np.array_equal(drawn, one.drawn(n, np.random.default_rng(0)))


def test_table_and_summary_show_the_largest_first() -> None:
    listed = {"z": np.array([[0, 1], [2, 0]]), "mlp_out[layer]": np.array([[1]])}
    scores = {"z": np.array([0.5, -2.0]), "mlp_out[layer]": np.array([1.0])}
    circuit = NodeCircuit((HEADS, MLPS), listed, scores=scores)
    table = circuit.table()
    assert table["node"].tolist() == ["L2.H0.z", "L1.mlp_out", "L0.H1.z"]
    assert table["score"].tolist() == [-2.0, 1.0, 0.5]
    assert table["head"].tolist() == [0, pd.NA, 1]
    assert "Largest 2 of its nodes by |effect|:\n  L2.H0.z                  -2" in circuit.summary(2)
    assert np.isnan((~circuit).table()["score"]).all()
    union = circuit | replace(NodeCircuit.of((HEADS, MLPS), ["m0"]), scores={"mlp_out[layer]": np.array([3.0])})
    assert union.table()["score"].tolist() == [3.0, -2.0, 1.0, 0.5]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(CircuitError, match="each kind once; got none"):
        NodeCircuit((), {})
    with pytest.raises(CircuitError, match=r"each kind once; got z, z\[layer,pos,head\]"):
        NodeCircuit((HEADS, PLACES[0]), {})
    with pytest.raises(CircuitError, match="unknown site of this circuit 'mlp_out'"):
        NodeCircuit((HEADS,), {"mlp_out": np.zeros((1, 2), int)})
    with pytest.raises(CircuitError, match=r"\[3, 0\] \(layer, head\) is not among the candidates of z\[layer 3, head 2\]"):
        NodeCircuit((HEADS,), {"z": np.array([[3, 0]])})
    with pytest.raises(CircuitError, match="1 nodes of z are listed twice"):
        NodeCircuit((HEADS,), {"z": np.array([[1, 0], [1, 0]])})
    with pytest.raises(CircuitError, match="give one finite score each"):
        NodeCircuit((HEADS,), {"z": np.array([[1, 0]])}, scores={"z": np.array([np.inf])})
    with pytest.raises(CircuitError, match="m0 is of the site mlp_out, and the candidates are of z"):
        NodeCircuit.of((HEADS,), ["m0"])
    with pytest.raises(CircuitError, match="L0.z is no node of z, whose nodes are told by layer, head"):
        NodeCircuit.of((HEADS,), ["L0.z"])
    with pytest.raises(CircuitError, match=r"L0.H0.z@1 is no node of z, whose"):
        NodeCircuit.of((HEADS,), ["L0.H0.z@1"])
    with pytest.raises(CircuitError, match="unknown position of z\\[layer,pos,head\\] 'B'"):
        NodeCircuit.of(PLACES, ["L0.H0.z@B"])
    with pytest.raises(CircuitError, match="names 2 positions and the nodes have 3"):
        NodeCircuit.of(PLACES, ["L0.H0.z@A"], {"positions": ["A", "B"]})
    with pytest.raises(CircuitError, match="the sites of a circuit share their positions"):
        NodeCircuit((PLACES[0], some("mlp_out", 2, 4)), {})
    with pytest.raises(CircuitError, match="combine circuits of the same candidates only"):
        NodeCircuit.of((HEADS,), []) | NodeCircuit.of((MLPS,), [])
    with pytest.raises(CircuitError, match="edges has no nodes"):
        some("edges", 3, 3)
    with pytest.raises(CircuitError, match="has the axes"):
        some("z", 3)
    with pytest.raises(CircuitError, match="each once and in order"):
        some("z", 3, 2, layers=(2, 1))
