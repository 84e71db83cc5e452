"""Circuits: what is in them, pruning, set operations, positions, key-value heads, and what is said about circuits that do not fit."""

import operator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchlab.circuits import Circuit, kv_view
from patchlab.errors import CircuitError, SiteError
from patchlab.graph import Graph

SMALL = Graph(2, 2, 8)
CHAIN = ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"]


EDGES = st.lists(st.sampled_from(SMALL.names()), max_size=SMALL.n_edges // 2, unique=True)


# --- what is in a circuit ---


def test_a_node_is_in_if_one_of_its_edges_is() -> None:
    circuit = Circuit.of(SMALL, CHAIN)
    assert (circuit.n_edges, circuit.nodes) == (3, ("input", "a0.h1", "m1", "logits"))
    assert circuit.edge_names == CHAIN
    assert Circuit.of(SMALL, "m1->logits").nodes == ("m1", "logits")
    assert Circuit.empty(SMALL).nodes == ()
    assert Circuit.full(SMALL).nodes == SMALL.nodes
    assert Circuit.full(SMALL).n_edges == SMALL.n_edges
    assert Circuit.of(SMALL, circuit.edges).equals(circuit)


def test_arrays_are_read_only_copies_and_what_is_no_edge_has_no_score() -> None:
    mask, scores = SMALL.mask(CHAIN), np.ones(SMALL.allowed.shape)
    circuit = Circuit(SMALL, mask, scores)
    mask[:] = False
    scores[:] = 7
    assert circuit.n_edges == 3
    assert circuit.scores is not None
    assert np.isnan(circuit.scores[~SMALL.allowed]).all()
    assert (circuit.scores[SMALL.allowed] == 1).all()
    for array in (circuit.edges, circuit.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = True


def test_what_it_says_of_itself() -> None:
    scores = np.where(SMALL.mask(["m1->logits"]), -2.0, 0.5)
    about = {"method": "relp", "direction": "noising", "metric": "logit_diff", "how": "top 3 by |effect|", "model": "tiny", "task": "ioi[32]"}
    circuit = Circuit(SMALL, SMALL.mask(CHAIN), scores, about).pruned()
    assert repr(circuit) == "Circuit(relp, noising, logit_diff, top 3 by |effect|, pruned; tiny × ioi[32]) 3 of 46 edges, 4 of 8 nodes"
    assert repr(Circuit.of(SMALL, CHAIN)) == f"Circuit({SMALL}) 3 of 46 edges, 4 of 8 nodes"
    text = circuit.summary(top=2)
    assert "Edges into: v 1, mlp 1, logits 1." in text
    assert "Layer 0: a0.h1\nLayer 1: m1" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [["m1->logits", "-2"], ["input->a0.h1<v>", "+0.5"]]
    assert "Edges into: nothing." in Circuit.empty(SMALL).summary()


# --- pruning ---


def test_pruning_takes_a_dangling_chain_in_both_directions() -> None:
    dead_end = ["input->a0.h0<q>", "input->m0"]
    from_nowhere = ["m0->a1.h1<k>", "a1.h1->logits"]
    assert Circuit.of(SMALL, CHAIN + dead_end).pruned().edge_names == CHAIN
    assert Circuit.of(SMALL, CHAIN + from_nowhere).pruned().edge_names == CHAIN
    # what one removal leaves dangling goes, too
    assert Circuit.of(SMALL, CHAIN[:2]).pruned().n_edges == 0
    assert Circuit.of(SMALL, ["input->logits"]).pruned().nodes == ("input", "logits")


@settings(deadline=None, max_examples=40)
@given(EDGES)
def test_pruning_leaves_the_edges_on_paths_from_input_to_logits(kept: list[str]) -> None:
    circuit = Circuit.of(SMALL, kept)
    pairs = {(name.split("->")[0], name.split("->")[1].partition("<")[0]) for name in kept}
    reached, reaching = {"input"}, {"logits"}
    for _ in SMALL.nodes:
        reached |= {b for a, b in pairs if a in reached}
        reaching |= {a for a, b in pairs if b in reaching}
    expected = {name for name in kept if name.split("->")[0] in reached & reaching and name.split("->")[1].partition("<")[0] in reached & reaching}
    assert set(circuit.pruned().edge_names) == expected
    assert circuit.pruned().pruned().equals(circuit.pruned())


# --- set operations ---


@settings(deadline=None, max_examples=20)
@given(EDGES, EDGES)
def test_set_operations_are_those_of_their_edges(first: list[str], second: list[str]) -> None:
    one, two = Circuit.of(SMALL, first), Circuit.of(SMALL, second)
    a, b, everything = set(first), set(second), set(SMALL.names())
    assert set((one | two).edge_names) == a | b
    assert set((one & two).edge_names) == a & b
    assert set((one - two).edge_names) == a - b
    assert set((one ^ two).edge_names) == a ^ b
    assert set((~one).edge_names) == everything - a
    assert (one - two).equals(one & ~two)


def test_what_a_combination_keeps() -> None:
    scores, about = np.ones(SMALL.allowed.shape), {"method": "relp", "task": "ioi[4]", "how": "top 3", "n_requested": 3, "pruned": True}
    one, two = Circuit(SMALL, SMALL.mask(CHAIN), scores, about), Circuit(SMALL, SMALL.mask(CHAIN[:1]), scores, about | {"task": "sva[4]"})
    both = one | two
    assert both.provenance == {"method": "relp", "how": "union"}
    assert both.scores is not None
    assert (one | Circuit(SMALL, two.edges, 2 * scores)).scores is None
    assert (one | Circuit.of(SMALL, CHAIN)).scores is None
    assert (~one).provenance == {"method": "relp", "task": "ioi[4]", "how": "complement"}


def test_equality_is_about_graph_edges_and_scores() -> None:
    scores = np.where(SMALL.mask(CHAIN), 1.0, np.nan)
    one = Circuit(SMALL, SMALL.mask(CHAIN), scores, {"method": "relp"})
    assert one.equals(Circuit(SMALL, SMALL.mask(CHAIN), scores))
    others = [Circuit.of(SMALL, CHAIN), Circuit(SMALL, SMALL.mask(CHAIN), 2 * scores), Circuit(SMALL, SMALL.mask(CHAIN[1:]), scores)]
    for first, second in combinations([one, *others, Circuit.empty(Graph(2, 2, 9))], 2):
        assert not first.equals(second)


def test_diff_lists_what_only_one_has() -> None:
    scores = np.zeros(SMALL.allowed.shape)
    scores[SMALL.edge("m1->logits")] = -3
    one, two = Circuit(SMALL, SMALL.mask(CHAIN), scores), Circuit.of(SMALL, [*CHAIN[:2], "a1.h0->logits"])
    table = one.diff(two)
    assert table.drop(columns="score_second").to_dict("records") == [
        {"edge": "m1->logits", "kept_by": "first", "score_first": -3.0},
        {"edge": "a1.h0->logits", "kept_by": "second", "score_first": 0.0},
    ]
    assert np.isnan(table["score_second"].to_numpy()).all()
    assert len(one.diff(one)) == 0


# --- positions ---


def positional() -> Circuit:
    mask = np.zeros((*SMALL.allowed.shape, 3), dtype=bool)
    for name, pos in (("input->a0.h1<v>", 0), ("input->a0.h1<v>", 1), ("a0.h1->m1", 2), ("m1->logits", 2), ("m0->logits", 1)):
        mask[(*SMALL.edge(name), pos)] = True
    return Circuit(SMALL, mask, np.full(mask.shape, 0.5), {"positions": ["S", "IO", "END"]})


def test_positions_are_kept_counted_and_collapsed() -> None:
    circuit = positional()
    assert (circuit.n_edges, circuit.n_positions, circuit.positions) == (5, 3, ("S", "IO", "END"))
    assert "4 of 46 edges at 3 positions" in repr(circuit)
    flat = circuit.collapsed()
    assert (flat.n_edges, flat.n_positions, flat.positions) == (4, None, None)
    assert flat.scores is not None
    assert flat.scores[SMALL.edge("m1->logits")] == 1.5
    assert flat.collapsed() is flat
    assert (~circuit).n_edges == 3 * SMALL.n_edges - 5


def test_pruning_does_not_cut_a_head_between_the_positions_it_connects() -> None:
    # the head reads its value at 0 and 1 and writes at 2: no position has both, and yet information flows
    pruned = positional().pruned()
    assert pruned.n_edges == 4
    assert pruned.edges[(*SMALL.edge("input->a0.h1<v>"), 0)]
    assert not pruned.edges[SMALL.edge("m0->logits")].any()


def test_positions_do_not_mix_with_their_absence() -> None:
    with pytest.raises(CircuitError, match=r"one circuit has 3 positions \(S, IO, END\) and the other no positions; .* \.collapsed\(\)"):
        operator.or_(positional(), Circuit.of(SMALL, CHAIN))


# --- grouped queries ---


def test_the_key_value_view_is_a_sum_over_copies() -> None:
    graph = Graph(2, 4, 8, n_kv_heads=2)
    scores = np.arange(graph.allowed.size, dtype=float).reshape(graph.allowed.shape)
    scores[:, graph.readers.index("a1.h3<v>")] = np.nan
    circuit = Circuit(graph, graph.mask(["input->a0.h2<k>", "input->a0.h3<k>", "m0->a1.h0<v>", "m0->a1.h1<q>"]), scores)
    view = circuit.kv_view()
    assert view["kv_reader_name"].to_numpy()[:4].tolist() == ["a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>"]
    assert view["copies"].to_numpy().sum() == 3, "the query edge is not part of it"
    at = view.isel(writer=0, kv_reader=1)
    assert (int(at["copies"]), bool(at["kept"])) == (2, True)
    assert float(at["score"]) == scores[graph.edge("input->a0.h2<k>")] + scores[graph.edge("input->a0.h3<k>")]
    by_name = view.isel(writer=graph.writers.index("m0")).set_index(kv_reader="kv_reader_name")
    assert bool(by_name["kept"].sel(kv_reader="a1.kv0<v>"))
    assert np.isnan(float(by_name["score"].sel(kv_reader="a1.kv1<v>"))), "a copy that is not scored leaves the sum unknown"
    assert kv_view(graph, circuit.edges)["score"].isnull().all()


def test_a_circuit_learns_its_key_value_heads_from_the_model() -> None:
    grouped = Graph(2, 4, 8, n_kv_heads=2)
    foreign = Circuit.of(Graph(2, 4, 8), ["input->a0.h2<k>"])
    assert foreign.on(grouped).graph == grouped
    assert (foreign | Circuit.empty(grouped)).graph == grouped
    assert foreign.kv_view().sizes["kv_reader"] == 16
    assert foreign.on(grouped).kv_view().sizes["kv_reader"] == 8


# --- what does not fit ---


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Graph(3, 2, 8), "n_layers 2 and 3"),
        (Graph(2, 4, 8), "n_heads 2 and 4"),
        (Graph(2, 2, 16), "d_model 8 and 16"),
        (Graph(2, 2, 8, parallel=True), "parallel False and True"),
        (Graph(2, 2, 8, mlps=False), "mlps True and False"),
    ],
)
def test_circuits_of_unlike_graphs(other: Graph, difference: str) -> None:
    one, two = Circuit.of(SMALL, CHAIN), Circuit.full(other)
    for operation in (lambda: one | two, lambda: one - two, lambda: one.diff(two), lambda: one.on(other)):
        with pytest.raises(CircuitError) as error:
            operation()
        assert difference in str(error.value)
        assert str(SMALL) in str(error.value)
        assert str(other) in str(error.value)


def test_key_value_heads_that_disagree() -> None:
    with pytest.raises(CircuitError, match="n_kv_heads 1 and 2"):
        operator.or_(Circuit.empty(Graph(2, 2, 8, n_kv_heads=1)), Circuit.empty(Graph(2, 2, 8, n_kv_heads=2)))


def test_bad_parts() -> None:
    with pytest.raises(CircuitError, match=r"bool \[writer 7, reader 15\] or \[writer, reader, pos\] .* got bool \[3, 4\]"):
        Circuit(SMALL, np.zeros((3, 4), dtype=bool))
    with pytest.raises(CircuitError, match="'a0.h0->a0.h0<q>' is not an edge: a node does not feed itself"):
        Circuit(SMALL, ~SMALL.allowed)
    with pytest.raises(CircuitError, match=r"scores have the shape \[7, 14\] and edges \[7, 15\]"):
        Circuit(SMALL, SMALL.allowed, np.zeros((7, 14)))
    with pytest.raises(CircuitError, match="names 2 positions and the mask has 3"):
        Circuit(SMALL, np.zeros((*SMALL.allowed.shape, 3), dtype=bool), provenance={"positions": ["a", "b"]})
    with pytest.raises(CircuitError, match="names 2 positions and the mask has none"):
        Circuit(SMALL, SMALL.allowed, provenance={"positions": ["a", "b"]})
    with pytest.raises(SiteError, match="there is no a7.h0"):
        Circuit.of(SMALL, ["a7.h0->logits"])
    with pytest.raises(SiteError, match="'m1->m0' is not an edge: m1 is not computed before m0 reads"):
        Circuit.of(SMALL, ["m1->m0"])
