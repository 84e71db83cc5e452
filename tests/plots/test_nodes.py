"""The figure of a circuit of nodes: what is prepared, and that what is left out is said."""

import numpy as np
import pytest
from score_maps import make_map

import patchlab as pl
from patchlab.circuits import NodeCircuit, top_n
from patchlab.errors import CircuitError
from patchlab.plots._nodes import _prepare_nodes


def made(n: int = 5) -> NodeCircuit:
    effects = np.random.default_rng(0).normal(size=(1, 3, 4)), np.random.default_rng(1).normal(size=(1, 3, 10))
    return top_n(make_map({"z": effects[0], "mlp_post": effects[1]}, direction="noising"), n)


def test_lanes_hold_the_nodes_of_their_site_the_largest_on_top() -> None:
    circuit = made(12)
    data = _prepare_nodes(circuit)
    assert [lane.site for lane in data.lanes] == ["z", "mlp_post"]
    table = circuit.table()
    for lane in data.lanes:
        own = table[table["site"] == lane.site]
        assert lane.score.tolist() == own["score"].tolist()
        for layer in set(lane.layer.tolist()):
            here = lane.layer == layer
            assert lane.row[here].tolist() == list(range(here.sum()))
            assert (np.diff(np.abs(lane.score[here])) <= 0).all()
    assert data.largest == pytest.approx(table["score"].abs().max())
    assert "all 12 nodes" in data.subtitle
    assert data.n_layers == 3
    first = data.lanes[0]
    assert first.label[0] == first.hover[0].split("<b>L")[1].split(".")[1]
    assert f"{len(circuit.ids('z'))} of 12" in first.count


def test_what_is_left_out_is_said_and_the_figure_is_drawn() -> None:
    circuit = made(12)
    assert "the 4 largest of 12 nodes" in _prepare_nodes(circuit, 4).subtitle
    figure = pl.plots.circuit(circuit, 4)
    assert sum(len(trace.x) for trace in figure.data) == 4
    bare = NodeCircuit.of(circuit.universe, ["a0.h0"])
    assert "no score" in _prepare_nodes(bare).lanes[0].hover[0]
    assert pl.plots.circuit(bare).data


def test_refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(CircuitError, match="no nodes, so there is nothing to draw"):
        pl.plots.circuit(NodeCircuit.empty(made().universe))
    with pytest.raises(CircuitError, match="draw at least 1"):
        pl.plots.circuit(made(), 0)
