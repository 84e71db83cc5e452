"""The graph: names, order and edges as EAP-IG and MIB have them, and what is said about names that are no edge."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from families import model_of

from patchlab.errors import SiteError
from patchlab.graph import Graph, Node

GPT2 = Graph(12, 12, 768)


def test_gpt2_small_has_the_published_number_of_edges() -> None:
    assert (GPT2.n_edges, len(GPT2.nodes), len(GPT2.writers), len(GPT2.readers)) == (32_491, 158, 157, 445)


def test_llama_8b_fits_into_one_array() -> None:
    assert Graph(32, 32, 4096, n_kv_heads=8).n_edges == 1_592_881


@pytest.mark.parametrize(("parallel", "edges"), [(False, 262), (True, 250)])
def test_small_graphs_count_as_in_the_reference(parallel: bool, edges: int) -> None:
    assert Graph(3, 4, 48, parallel).n_edges == edges


def test_names_are_those_of_the_reference(reference_dir: Path) -> None:
    names = json.loads((reference_dir / "edge_names.json").read_text())
    for model, graph in {"gpt2-random": Graph(3, 4, 48), "neox-random": Graph(3, 4, 48, True), "trained-gpt2-4l": Graph(4, 4, 128)}.items():
        assert set(graph.names()) == set(names[model])


def test_every_edge_is_found_by_its_name() -> None:
    graph = Graph(2, 3, 6, n_kv_heads=1)
    for writer, reader in np.argwhere(graph.allowed).tolist():
        assert graph.edge(graph.name(writer, reader)) == (writer, reader)
    assert graph.mask(graph.names()).tolist() == graph.allowed.tolist()
    assert graph.copies == 3


def test_slices_cover_writers_and_readers_in_order() -> None:
    for graph in (Graph(3, 2, 4), Graph(3, 2, 4, mlps=False)):
        writers = [slice(0, 1)]
        for layer in range(3):
            writers += [graph.heads_of(layer), *([slice(graph.mlp_of(layer), graph.mlp_of(layer) + 1)] if graph.mlps else [])]
        readers = [graph.readers_of(layer) for layer in (0, 1, 2, None)]
        for parts, names in ((writers, graph.writers), (readers, graph.readers)):
            assert all(a.stop == b.start for a, b in pairwise(parts))
            assert (parts[0].start, parts[-1].stop) == (0, len(names))
        assert graph.writers[graph.heads_of(1)] == ("a1.h0", "a1.h1")
        assert graph.readers[graph.readers_of(1)][:3] == ("a1.h0<q>", "a1.h1<q>", "a1.h0<k>")
        assert graph.readers[graph.readers_of(1, "k", "v")] == ("a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>")
        assert graph.readers[graph.readers_of(None)] == ("logits",)
        with pytest.raises(SiteError, match="the readers q, v of layer 1 do not stand side by side"):
            graph.readers_of(1, "q", "v")
        with pytest.raises(SiteError, match="the readers q of layer 3 do not stand"):
            graph.readers_of(3, "q")
    assert graph.writers[-1] == "a2.h1"
    with pytest.raises(SiteError, match="there is no m1 in a graph of 3 layers × 2 heads, width 4, no MLPs"):
        graph.mlp_of(1)


@pytest.mark.parametrize("graph", [Graph(3, 4, 8, n_kv_heads=2), Graph(2, 3, 6, parallel=True), Graph(2, 2, 4, mlps=False)], ids=str)
def test_the_tables_say_what_stands_at_each_index(graph: Graph) -> None:
    assert [node.name for node in graph.node_table] == [*graph.writers, "logits"] == list(graph.nodes)
    for names, table in ((graph.nodes, graph.node_table), (graph.readers, graph.reader_table)):
        assert [Node.parse(name) for name in names] == list(table)
    for i, reader in enumerate(graph.reader_table):
        assert graph.node_table[graph.reader_node[i]] == reader.node
        assert graph.writers_before[i] == graph.allowed[:, i].sum()
        assert graph.allowed[: graph.writers_before[i], i].all(), "writers stand in the order in which they are computed"
        assert graph.reader_layer[i] == (graph.n_layers if reader.layer is None else reader.layer)
        assert graph.reader_head[i] == (-1 if reader.unit is None else reader.unit)
    heads = list(range(graph.n_heads))
    assert [heads[graph.sharing(head)] for head in heads] == [[h for h in heads if h // graph.copies == head // graph.copies] for head in heads]


@pytest.mark.parametrize("name", ["a1", "a1.h", "m", "m1<q>", "a1.h2<z>", "logits2", "", "a1.h2<q"])
def test_names_of_no_node(name: str) -> None:
    with pytest.raises(SiteError, match=f"cannot read the node {name!r}. Write 'input', 'a0.h1', 'm1' or 'logits'"):
        Node.parse(name)


def test_the_nodes_of_readers() -> None:
    graph = Graph(2, 2, 4)
    assert [graph.nodes[i] for i in graph.reader_node] == [name.partition("<")[0] for name in graph.readers]
    assert set(graph.reader_kind) == {"q", "k", "v", "mlp", "logits"}


def test_a_model_describes_its_graph() -> None:
    assert model_of("neox").arch.graph.parallel
    assert model_of("llama").arch.graph.copies == 2
    assert not model_of("gpt2").arch.graph.parallel


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a0.h0->a1.h1", "heads read through <q>, <k> or <v>"),
        ("nonsense", "cannot read the edge 'nonsense'"),
        ("a5.h0->logits", "there is no a5.h0 in a graph of 2 layers × 2 heads, width 8; the edge 'a5.h0->logits' belongs to another model"),
        ("a0.h0->a1.h7<q>", "there is no a1.h7<q>"),
        ("m1->m0", "'m1->m0' is not an edge: m1 is not computed before m0 reads"),
        ("m1->m1", "a node does not feed itself"),
        ("a0.h0->a0.h1<q>", "a0.h0 is not computed before a0.h1<q> reads"),
    ],
)
def test_names_that_are_no_edge(name: str, message: str) -> None:
    with pytest.raises(SiteError) as error:
        Graph(2, 2, 8).edge(name)
    assert message in str(error.value)


def test_impossible_shapes() -> None:
    with pytest.raises(SiteError, match="a graph needs n_layers of at least 1; got 0"):
        Graph(0, 2, 8)
    with pytest.raises(SiteError, match="6 query heads cannot share 4 key-value heads evenly"):
        Graph(1, 6, 8, n_kv_heads=4)


def test_heads_are_also_understood_as_in_addresses():
    graph = Graph(3, 2, 8)
    for written in ("a0.h1->a2.h0<q>", "L0.H1->L2.H0<q>", "A0.H1 -> a2.h0<Q>", "l0.h1->L2.H0<q>"):
        assert graph.edge(written) == (graph.writers.index("a0.h1"), graph.readers.index("a2.h0<q>"))
    with pytest.raises(SiteError, match="cannot read the edge 'L0->m1'"):
        graph.edge("L0->m1")
