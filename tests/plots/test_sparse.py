"""The graph of edges between nodes: what is prepared to be drawn."""

from collections.abc import Iterator

import numpy as np
import pytest
from families import gap_task, model_of

import patchlab as pl
from patchlab.circuits import Candidates, Circuit, SparseCircuit
from patchlab.errors import CircuitError
from patchlab.features.contexts import Context, Examples, FeatureExamples
from patchlab.graph import Graph
from patchlab.models import Model
from patchlab.plots._sparse import _prepare_sparse
from patchlab.sites import Site
from patchlab.testing.dictionaries import random_dictionary

UNIVERSE = (
    Candidates(Site.parse("features.resid_post[layer,pos,feature]"), (3, 2, 9), (0, 1, 2), (9, 9, 9)),
    Candidates(Site.parse("error.resid_post[layer,pos]"), (3, 2), (0, 1, 2)),
)
A, B, ERROR, LAST = "L0.F3.resid_post@S", "L1.F5.resid_post@END", "L1.error.resid_post@S", "L2.F1.resid_post@END"
EDGES = {f"{A}->{B}": -2.0, f"{A}->{ERROR}": 0.5, f"{ERROR}->{LAST}": 0.25, f"{B}->{LAST}": -1.0, f"{LAST}->logits": -3.0}


def circuit() -> SparseCircuit:
    made = SparseCircuit.of(UNIVERSE, EDGES, {"positions": ["S", "END"], "direction": "noising", "model": "m<1>", "task": "t"})
    return SparseCircuit(made.nodes, made.source, made.target, scores=np.array([EDGES[name] for name in made.edges]), provenance=made.provenance)


def examples() -> Examples:
    context = Context(0, None, 1, 2.0, ("<b>", "dogs", "run"), (0.0, 2.0, 0.0), 1)
    about = FeatureExamples(3, "L0.F3.resid_post", 0.1, 1.0, (context,), (("are", 0.5),), ())
    return Examples("d", "m", "texts", 10, 9, 0, (about,))


def test_rows_are_activations_and_columns_positions() -> None:
    data = _prepare_sparse(circuit(), None, (examples(),))
    marks = {mark.name: mark for mark in data.marks}
    assert set(marks) == {A, B, ERROR, LAST, "logits"}
    assert [name for name, _ in data.rows] == ["layer 0", "layer 1", "layer 2", "logits"]
    assert marks[A].y < marks[B].y == marks[ERROR].y < marks[LAST].y < marks["logits"].y
    (first, left, middle), (second, also, right) = data.columns
    assert (first, second, left, also, right) == ("S", "END", 0.0, middle, data.width)
    assert all((left <= mark.x <= middle) == name.endswith("@S") for name, mark in marks.items() if name != "logits")
    assert {mark.kind for mark in data.marks} == {"feature", "error", "logits"}
    assert {(data.marks[line.source].name, data.marks[line.target].name): line.score for line in data.lines} == {
        tuple(name.split("->")): score for name, score in EDGES.items()
    }
    assert max(line.share for line in data.lines) == 1.0
    assert "<b>all 5 edges</b>, 4 nodes" in data.subtitle


def test_features_show_what_they_stand_for_and_nothing_is_taken_for_a_tag() -> None:
    marks = {mark.name: mark for mark in _prepare_sparse(circuit(), None, (examples(),)).marks}
    assert marks[A].label == "F3<br><i>dogs</i>"
    assert marks[B].label == "F5"
    assert marks[ERROR].label == "error"
    assert "most active at: dogs" in marks[A].hover
    assert "&lt;b&gt; [dogs] run" in marks[A].hover
    assert f"to: -2 {B}, +0.5 {ERROR}" in marks[A].hover
    assert f"from: -2 {A}" in marks[B].hover


def test_the_largest_are_drawn_first() -> None:
    data = _prepare_sparse(circuit(), 2)
    assert {data.marks[line.source].name for line in data.lines} == {A, LAST}
    assert "<b>the largest 2 of 5 edges</b>" in data.subtitle
    with pytest.raises(CircuitError, match="draw at least 1"):
        _prepare_sparse(circuit(), 0)
    with pytest.raises(CircuitError, match="no edges, so there is nothing to draw"):
        pl.plots.circuit(circuit().emptied())
    with pytest.raises(CircuitError, match="all but the edges that it lists"):
        pl.plots.circuit(~circuit())
    with pytest.raises(CircuitError, match="examples= are shown of edges between nodes"):
        pl.plots.circuit(Circuit.of(Graph(1, 1, 4), ["input->m0"]), examples=examples())


@pytest.fixture
def model() -> Iterator[Model]:
    own = model_of("gpt2")
    before = own.arch
    own.add_dictionaries([random_dictionary(own, layer=layer, seed=layer) for layer in range(3)])
    yield own
    own.arch = before


def test_a_figure_of_real_edges(model: Model) -> None:
    task = gap_task(2)
    scores = pl.AttributionPatching().run(model, task, ["features", "error"], direction="noising", progress=False)
    edges = pl.circuits.node_edges(model, task, pl.circuits.top_n(scores, 12), "atp", progress=False)
    figure = pl.plots.circuit(edges)
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in marks) == edges.n_nodes + 1
    assert figure.layout.width >= 1160
