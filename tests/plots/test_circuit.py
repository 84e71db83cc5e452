"""What the figures of circuits, edges and faithfulness curves show: the prepared data, and that drawing keeps it apart."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from score_maps import make_map

from patchlab import plots
from patchlab.circuits import Circuit, to_dot, top_n
from patchlab.circuits.evaluation.curve import FaithfulnessCurve
from patchlab.circuits.formats.mib import MIB_FRACTIONS
from patchlab.circuits.smallest import SmallestFaithful
from patchlab.comparison.compare import compare
from patchlab.errors import CircuitError, ScoreError
from patchlab.graph import Graph
from patchlab.plots._agreement import _prepare_agreement
from patchlab.plots._circuit import _prepare_circuit
from patchlab.plots._circuit_layout import HALF_HEIGHT, HALF_WIDTH, PORTS, place, routes
from patchlab.plots._edges import _prepare_edge_heatmap
from patchlab.plots._faithfulness import _prepare_faithfulness
from patchlab.plots._heatmaps import _prepare_heatmaps
from patchlab.plots._style import OPPOSES, SUPPORTS, UNSCORED

GRAPH = Graph(3, 4, 8)
ABOUT = {"model": "tiny", "task": "toy[8]", "method": "relp", "direction": "noising", "metric": "logit_diff", "metric_unit": "logits"}


def random_effects(graph: Graph = GRAPH, seed: int = 0) -> np.ndarray:
    return np.where(graph.allowed, np.random.default_rng(seed).standard_normal(graph.allowed.shape), np.nan)


def chosen(n: int, graph: Graph = GRAPH, **about: object) -> Circuit:
    circuit = top_n(random_effects(graph), n, graph=graph, prune=False)
    return Circuit(graph, circuit.edges, circuit.scores, {**ABOUT, "how": f"top {n}", **about})


def edge_traces(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.mode == "lines" and trace.text is not None]


def drawn_edges(figure: go.Figure) -> set[str]:
    visible = [trace for trace in edge_traces(figure) if trace.visible is not False]
    return {re.search(r"<b>(.*?)</b>", text)[1].replace("&gt;", ">").replace("&lt;", "<") for trace in visible for text in trace.text if text}


# the graph


def test_the_largest_edges_come_first_and_only_their_nodes_are_there():
    circuit = chosen(120)
    data = _prepare_circuit(circuit)
    assert [len(view.edges) for view in data.views] == [5, 10, 20, 50, 120]
    view = data.views[data.shown]
    sizes = np.sort(np.abs(circuit.scores[circuit.edges]))[::-1]
    np.testing.assert_allclose([abs(mark.score) for mark in view.edges], sizes)
    assert data.largest == sizes[0]
    assert set(view.nodes) == {mark.writer for mark in view.edges} | {mark.reader for mark in view.edges}
    assert set(view.layout.places) == set(view.nodes)
    for mark in view.edges:
        at = GRAPH.edge(mark.name)
        assert mark.score == circuit.scores[at]
        assert (mark.writer, mark.kind) == (GRAPH.writers[at[0]], GRAPH.reader_kind[at[1]])
        assert mark.kind in ("mlp", "logits") or mark.kind in view.nodes[mark.reader]
        assert f"effect {mark.score:+.3g} logits" in mark.hover


def test_title_says_model_task_method_and_how_many_of_how_many():
    data = _prepare_circuit(chosen(120, pruned=True), 50)
    assert data.title == "Circuit of tiny × toy[8], relp"
    assert data.subtitle(data.views[data.shown]) == "<b>the strongest 50 of 120 edges</b> · largest by |effect| · top 120 · noising · pruned"
    from_file = _prepare_circuit(Circuit(GRAPH, GRAPH.mask(["input->m0"]), None, {"file": "ioi.json"}))
    assert from_file.title == f"Circuit of {GRAPH}, ioi.json"


@pytest.mark.parametrize(
    ("n", "asked", "sizes", "shown"),
    [
        (6, None, [6], 6),
        (60, 50, [5, 10, 20, 50, 60], 50),
        (30, 7, [5, 7, 10, 20, 30], 7),
        (150, None, [5, 10, 20, 50, 100, 150], 150),
        (151, None, [5, 10, 20, 50, 60, 100, 151], 60),
    ],
)
def test_slider_offers_sizes_up_to_the_circuit(n, asked, sizes, shown):
    data = _prepare_circuit(chosen(n), asked)
    assert [len(view.edges) for view in data.views] == sizes
    assert len(data.views[data.shown].edges) == shown


def test_more_than_a_thousand_edges_are_drawn_only_when_asked_for():
    graph = Graph(6, 8, 8)
    circuit = chosen(1500, graph)
    assert len(_prepare_circuit(circuit).views[-1].edges) == 1000
    assert len(_prepare_circuit(circuit, 1200).views[-1].edges) == 1200


@pytest.mark.parametrize(("direction", "supports"), [("noising", "lowers"), ("denoising", "raises")])
def test_legend_says_which_colour_supports_the_behaviour(direction, supports):
    legend = _prepare_circuit(chosen(120, direction=direction)).legend[0]
    told = dict(re.findall(r'<span style="color:(#\w+)">━━</span> ([^&]*?)(?= &nbsp;|$)', legend))
    opposes = {"lowers": "raises", "raises": "lowers"}[supports]
    assert told == {
        SUPPORTS: f"patching it {supports} logit_diff: it supports the behaviour",
        OPPOSES: f"patching it {opposes} logit_diff: it works against the behaviour",
    }
    unknown = _prepare_circuit(Circuit(GRAPH, GRAPH.allowed, random_effects(), {}))
    assert "negative score" in unknown.legend[0]
    assert not {OPPOSES, SUPPORTS} & {unknown.signs.negative, unknown.signs.positive}, "red and blue have a meaning"
    assert "|score|" in unknown.legend[1]


def test_edges_without_scores_are_grey_and_last():
    effects = random_effects()
    missing, known = GRAPH.edge("input->m0"), GRAPH.edge("m0->logits")
    effects[missing] = np.nan
    circuit = Circuit(GRAPH, GRAPH.mask(["input->m0", "m0->logits"]), effects, ABOUT)
    data = _prepare_circuit(circuit)
    assert [mark.name for mark in data.views[0].edges] == ["m0->logits", "input->m0"]
    assert "no score" in data.views[0].edges[1].hover
    assert "no score" in data.legend[0]
    colours = {trace.line.color: trace.text[0] for trace in edge_traces(plots.circuit(circuit))}
    assert set(colours) == {UNSCORED, SUPPORTS if effects[known] < 0 else OPPOSES}
    without = plots.circuit(Circuit(GRAPH, circuit.edges))
    assert {trace.line.color for trace in edge_traces(without)} == {UNSCORED}


def test_positions_are_collapsed_and_named_in_the_hover_text():
    effects = np.repeat(random_effects()[:, :, None], 3, axis=2)
    at = GRAPH.edge("a0.h1->m1")
    effects[at] = [1.0, -4.0, 0.5]
    mask = np.zeros_like(effects, dtype=bool)
    mask[at] = [True, True, False]
    data = _prepare_circuit(Circuit(GRAPH, mask, effects, {**ABOUT, "positions": ["S1", "S2", "END"]}))
    (mark,) = data.views[0].edges
    assert mark.score == pytest.approx(-2.5)
    assert "at S2 -4, S1 +1" in mark.hover
    assert "END" not in mark.hover
    assert "3 positions collapsed" in data.subtitle(data.views[0])
    assert "at S1, S2" in _prepare_circuit(Circuit(GRAPH, mask, None, {"positions": ["S1", "S2", "END"]})).views[0].edges[0].hover


def test_depth_grows_upwards_and_no_two_nodes_overlap():
    for graph in (GRAPH, Graph(4, 32, 8), Graph(2, 4, 8, parallel=True)):
        layout = place(graph, graph.nodes)
        heights = {node: y for node, (_, y) in layout.places.items()}
        assert heights["input"] == min(heights.values()) < heights["a0.h0"] == heights["a0.h3"] < heights["m0"] < heights["a1.h0"] < heights["logits"]
        assert heights["logits"] == layout.height
        assert {x for node, (x, _) in layout.places.items() if ".h" not in node} == {0.0}
        assert all(x < -HALF_WIDTH for node, (x, _) in layout.places.items() if ".h" in node)
        in_row = [layout.places[f"a1.h{head}"][0] for head in range(graph.n_heads)]
        assert in_row == sorted(in_row)
        places = list(layout.places.values())
        spacing = [abs(a - c) for i, (a, b) in enumerate(places) for c, d in places[:i] if b == d]
        assert min(spacing) >= (2 * HALF_WIDTH if graph.n_heads <= 12 else 30)
        assert layout.left < min(x for x, _ in places)
        assert [band.layer for band in layout.bands] == list(range(graph.n_layers))
        for band in layout.bands:
            assert band.low < heights[f"a{band.layer}.h0"] < heights[f"m{band.layer}"] < band.high


def test_rows_without_nodes_are_left_out():
    near, far = place(Graph(12, 4, 8), ["input", "m0", "logits"]), place(Graph(12, 4, 8), ["input", "m11", "logits"])
    assert list(near.places.values()) == list(far.places.values())


def test_edges_start_at_their_writer_and_end_at_their_input():
    ends = [
        ("input", "a0.h1", "q"),
        ("a0.h1", "a1.h1", "k"),
        ("a0.h1", "m2", "mlp"),
        ("m0", "a2.h0", "v"),
        ("input", "m0", "mlp"),
        ("m0", "logits", "logits"),
    ]
    layout = place(GRAPH, GRAPH.nodes, ends)
    for (writer, reader, kind), line in zip(ends, routes(layout, ends, 30), strict=True):
        (x0, y0), (x1, y1) = layout.places[writer], layout.places[reader]
        assert abs(line[0, 0] - x0) <= HALF_WIDTH
        assert abs(line[0, 1] - y0) <= HALF_HEIGHT
        if kind in PORTS:
            np.testing.assert_allclose(line[-1], [x1 + PORTS[kind], y1 - HALF_HEIGHT])
        else:
            assert abs(line[-1, 0] - x1) <= HALF_WIDTH
            assert abs(line[-1, 1] - y1) <= HALF_HEIGHT
        assert line.shape == (30, 2)
        assert line[:, 0].min() >= layout.left
        assert line[:, 0].max() <= layout.right


def test_edges_that_leave_one_side_leave_apart_and_the_longer_runs_outside():
    edges, nodes = [("input", "m1", "mlp"), ("input", "logits", "logits")], ["input", "m0", "m1", "m2", "logits"]
    layout = place(GRAPH, nodes, edges)
    assert layout.right > place(GRAPH, nodes, edges[:1]).right > place(GRAPH, nodes).right, "room for the edges that there are"
    near, far = routes(layout, edges, 40)
    assert near[0, 1] > far[0, 1]
    assert far[:, 0].max() > near[:, 0].max()


def test_circuit_figure_has_one_look_per_kind_and_a_view_per_size():
    circuit = chosen(120)
    figure, data = plots.circuit(circuit), _prepare_circuit(circuit)
    assert drawn_edges(figure) == {mark.name for mark in data.views[data.shown].edges}
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == ["5", "10", "20", "50", "120"]
    assert slider.active == data.shown
    for step, view in zip(slider.steps, data.views, strict=True):
        visible, changes = step.args
        moved = go.Figure(figure)
        for trace, shown in zip(moved.data, visible["visible"], strict=True):
            trace.visible = shown
        assert drawn_edges(moved) == {mark.name for mark in view.edges}
        assert changes["annotations"][1]["text"].startswith(f"<b>{'all' if len(view.edges) == 120 else 'the strongest'} {len(view.edges)}")
        assert changes["height"] > view.layout.height
    for trace in edge_traces(figure):
        kinds = {re.search(r"&lt;(.)&gt;", text)[1] if "&lt;" in text else "" for text in trace.text if text}
        assert kinds <= {"q": {"q"}, "k": {"k"}, "v": {"v", ""}}[{"dash": "q", "dot": "k"}.get(trace.line.dash, "v")]
        assert all(("-" in text.split("effect ")[1][:1]) == (trace.line.color == SUPPORTS) for text in trace.text if text), "noising"
    widest = max(edge_traces(figure), key=lambda trace: trace.line.width)
    assert data.views[0].edges[0].hover in widest.text
    assert plots.circuit(chosen(6)).layout.sliders == ()


def test_circuits_that_cannot_be_drawn():
    with pytest.raises(CircuitError, match="the circuit has no edges, so there is nothing to draw"):
        plots.circuit(Circuit.empty(GRAPH))
    with pytest.raises(CircuitError, match="max_edges is 0; draw at least 1 edge"):
        plots.circuit(chosen(5), 0)


# DOT


def test_dot_has_every_edge_and_node_once():
    circuit = chosen(40)
    text = to_dot(circuit)
    edges = re.findall(r'^  "(\S+)" -> "(\S+)" \[.*tooltip="(\S+) ([+-][\d.e-]+)"\];$', text, re.M)
    assert [name for *_, name, _ in edges] == circuit.edge_names
    for writer, reader, name, score in edges:
        assert (writer, reader) == (name.partition("->")[0], name.partition("->")[2].partition("<")[0])
        assert float(score) == pytest.approx(circuit.scores[GRAPH.edge(name)], rel=1e-3)
    assert re.findall(r'"(\S+)";', text) == list(circuit.nodes)
    assert text.startswith("digraph circuit {")
    assert text.endswith("}")
    for line in text.splitlines():
        if "tooltip" in line:
            assert (SUPPORTS in line) == (" -" in line.partition("tooltip")[2])
            assert ("style=dashed" in line) == ("<q>" in line) == ('label="q"' in line)
    assert "penwidth=6.00" in text


def test_dot_collapses_positions_and_says_so():
    mask = np.zeros((*GRAPH.allowed.shape, 2), dtype=bool)
    mask[GRAPH.edge("input->m0")] = True
    text = to_dot(Circuit(GRAPH, mask))
    assert text.count("->") == 2, "the edge and its tooltip"
    assert "2 positions collapsed" in text


# the matrix


def edge_map(effects: np.ndarray, **options: object):
    effects = np.where(GRAPH.allowed | np.isin(np.array(GRAPH.reader_kind), list(options.get("readers_not_scored", {}))), effects, 0.0)
    return make_map({"edges": effects[None].repeat(3, 0)}, graph=GRAPH.as_dict(), direction="noising", **options)


def test_matrix_sums_query_key_and_value_and_shows_each():
    effects = random_effects()
    data = _prepare_edge_heatmap(edge_map(effects))
    assert data.writers == GRAPH.writers
    assert data.nodes == GRAPH.nodes[1:]
    panels = {panel.name: panel for panel in data.panels}
    assert list(panels) == ["q, k and v", "q", "k", "v"]
    writer, node = data.writers.index("a0.h2"), data.nodes.index("a2.h1")
    single = {letter: effects[GRAPH.edge(f"a0.h2->a2.h1<{letter}>")] for letter in "qkv"}
    assert panels["q, k and v"].effects[writer, node] == pytest.approx(sum(single.values()))
    assert f"q {single['q']:+.2g}, k {single['k']:+.2g}" in panels["q, k and v"].hover[writer, node]
    for letter, value in single.items():
        assert panels[letter].effects[writer, node] == value
        assert f"a0.h2->a2.h1&lt;{letter}&gt;" in panels[letter].hover[writer, node]
        assert np.isnan(panels[letter].effects[:, data.nodes.index("logits")]).all()
    assert panels["q, k and v"].effects[writer, data.nodes.index("m0")] == effects[GRAPH.edge("a0.h2->m0")]
    assert data.limit == max(np.nanmax(np.abs(panel.effects)) for panel in data.panels)
    assert data.title == "Edge effects on logit_diff: exact"
    assert f"{GRAPH.n_edges} edges" in data.subtitle


def test_pairs_that_are_no_edges_are_told_from_edges_without_scores():
    effects = random_effects()
    effects[:, np.array(GRAPH.reader_kind) == "q"] = np.nan
    data = _prepare_edge_heatmap(edge_map(effects, readers_not_scored={"q": "the pattern is constant"}))
    head, earlier = data.nodes.index("a2.h1"), data.writers.index("a2.h0")
    assert data.not_scored[0, head]
    assert not data.not_scored[0, data.nodes.index("m1")]
    assert not data.possible[earlier, head]
    assert data.possible[0, head]
    assert np.isnan(data.panels[1].effects).all()
    total = sum(effects[GRAPH.edge(f"input->a2.h1<{letter}>")] for letter in "kv")
    assert data.panels[0].effects[0, head] == pytest.approx(total)
    assert "summed unless one is chosen (q not scored)" in data.subtitle
    assert "not scored" not in _prepare_edge_heatmap(edge_map(random_effects())).subtitle


def test_of_a_circuit_only_its_edges_are_drawn():
    circuit = chosen(30)
    data = _prepare_edge_heatmap(circuit)
    pairs = {(name.partition("->")[0], name.partition("->")[2].partition("<")[0]) for name in circuit.edge_names}
    drawn = {(data.writers[i], data.nodes[j]) for i, j in np.argwhere(~np.isnan(data.panels[0].effects))}
    assert drawn == pairs
    assert f"30 of {GRAPH.n_edges} edges of a circuit, top 30" in data.subtitle
    with pytest.raises(CircuitError, match="the circuit has no scores to draw"):
        plots.edge_heatmap(Circuit.full(GRAPH))


def test_large_graphs_keep_the_nodes_with_the_largest_edges(monkeypatch):
    monkeypatch.setattr("patchlab.plots._edges._MOST_NODES", 3)
    effects = np.where(GRAPH.allowed, 0.01, np.nan)
    for name in ("input->a2.h3<v>", "a0.h1->m1", "m1->logits"):
        effects[GRAPH.edge(name)] = -1.0
    data = _prepare_edge_heatmap(edge_map(effects))
    assert data.writers == ("input", "a0.h1", "m1")
    assert data.nodes == ("m1", "a2.h3", "logits")
    assert "the 3 writers and 3 readers with the largest" in data.subtitle
    few = _prepare_edge_heatmap(Circuit(GRAPH, GRAPH.mask(["m1->logits"]), np.where(GRAPH.allowed, effects, np.nan)))
    assert (few.writers, few.nodes) == (("m1",), ("logits",)), "not filled up with nodes that have no edges"


def test_matrix_figure_switches_between_its_panels():
    figure = plots.edge_heatmap(edge_map(random_effects()))
    shade, *panels = figure.data
    assert [panel.visible for panel in panels] == [True, False, False, False]
    (menu,) = figure.layout.updatemenus
    for i, button in enumerate(menu.buttons):
        assert button.label == panels[i].name
        assert button.args[0]["visible"] == [True, *(j == i for j in range(4))]
    data = _prepare_edge_heatmap(edge_map(random_effects()))
    np.testing.assert_allclose(np.array(panels[0].z, dtype=float) ** 2, np.abs(data.panels[0].effects))
    assert figure.layout.coloraxis.cmax == pytest.approx(np.sqrt(data.limit))
    assert list(figure.layout.xaxis.ticktext) == list(data.nodes)
    assert shade.showscale is False
    small = Graph(12, 12, 8)
    big = plots.edge_heatmap(Circuit(small, small.allowed, random_effects(small)))
    assert list(big.layout.xaxis.ticktext) == [*(f"layer {i}" for i in range(12)), "logits"]
    assert list(big.layout.yaxis.ticktext) == [*(f"layer {i}" for i in range(12)), "input"]


# curves


def curve(values: dict[str, list[float]], sizes: tuple[int, ...] = (0, 10, 100, 1000)) -> FaithfulnessCurve:
    rows, areas = [], []
    for name, each in values.items():
        for n, value in zip(sizes, each, strict=True):
            bounds = {"faithfulness": value, "lo": value - 0.05, "hi": value + 0.04}
            rows.append({"method": name, "n_requested": n, "fraction": n / 1000, "n_edges": 0.9 * n, **bounds, "metric": 3 * value})
        areas.append({"method": name, "cpr": 0.8, "cpr_lo": 0.7, "cpr_hi": 0.85, "cmd": 0.2, "cmd_lo": 0.15, "cmd_hi": 0.3})
    about = {"model": "tiny", "task": "toy[8]", "metric": "logit_diff", "ablation": "resample", "how": "top_n", "by": "abs"}
    return FaithfulnessCurve(pd.DataFrame(rows), pd.DataFrame(areas), {}, about)


MIB_SIZES = tuple(round(1000 * share) for share in MIB_FRACTIONS)
VALUES = {"random": [0.0, 0.0, 0.1, 1.0], "EAP": [0.0, 0.3, 0.8, 1.0], "edge-RelP": [0.0, 0.5, 0.95, 1.0]}


def test_a_line_per_method_with_its_areas_and_smallest_faithful_circuit():
    data = _prepare_faithfulness(curve(VALUES))
    assert [line.method for line in data.lines] == ["EAP", "edge-RelP", "random"]
    relp, random = data.lines[1:]
    np.testing.assert_array_equal(relp.n_requested, [10, 100, 1000])
    np.testing.assert_allclose(relp.value, [0.5, 0.95, 1.0])
    np.testing.assert_allclose(relp.low, relp.value - 0.05)
    assert relp.smallest == 100
    assert relp.legend == "f ≥ 0.9 from 90 edges on (of 4 sizes)"  # areas over other sizes than MIB's are not CPR and CMD
    (line,) = _prepare_faithfulness(curve({"EAP": [0.1] * 8 + [0.95, 1.0]}, MIB_SIZES)).lines
    assert line.legend == "CPR 0.800 [0.700, 0.850] · CMD 0.200 [0.150, 0.300] · f ≥ 0.9 from 450 edges on (of 10 sizes)"
    assert "100 edges (10.00%) asked for, 90 after pruning<br>faithfulness 0.950 [0.900, 0.990]" in relp.hover[1]
    assert random.colour == "#8b949e"
    assert len({line.colour for line in data.lines}) == 3
    assert data.total == 1000
    assert data.subtitle == "tiny × toy[8] · logit_diff · resample ablation · edges of largest |effect| · bands: 95 % CI over examples"


def test_another_level_and_a_method_that_never_reaches_it():
    data = _prepare_faithfulness(curve({"EAP": [0.0, 0.3, 0.8, 0.97]}), level=0.99)
    assert data.lines[0].smallest is None
    assert data.lines[0].legend.endswith("f ≥ 0.99 from none of these sizes on")


def test_rings_are_the_circuits_that_were_found_on_a_finer_grid():
    row = {"level": 0.8, "n_requested": 63, "fraction": 0.063, "n_edges": 57.0, "n_edges_lo": 40.0, "n_edges_hi": 80.0, "found_faithfulness": 0.81}
    row |= {"faithfulness": 1.3, "lo": 1.2, "hi": 1.4, "metric": 2.0, "n_sizes": 50, "choosing_pairs": 4, "finding_pairs": 3, "reporting_pairs": 2}
    none = dict.fromkeys(("n_requested", "fraction", "n_edges", "found_faithfulness", "faithfulness", "lo", "hi"), np.nan)
    table = pd.DataFrame([{"method": "EAP", **row}, {"method": "edge-RelP", **row, **none}])
    coarse = curve(VALUES)
    found = SmallestFaithful(table, replace(coarse, provenance={**coarse.provenance, "level": 0.8}), {}, {})
    data = _prepare_faithfulness(coarse, found)
    eap, relp, random = data.lines
    assert (eap.smallest, eap.at, eap.legend) == (63, 1.3, "f ≥ 0.8 from 57 [40, 80] edges on")
    assert (relp.smallest, relp.legend) == (None, "f ≥ 0.8 from no size on")
    assert (random.smallest, random.legend) == (None, "")
    assert data.subtitle.endswith("rings: sizes found on 3 pairs, f there on 2 others")
    assert data.span[1] > 1.3
    figure = plots.faithfulness(coarse, found)
    (ring,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert (ring.x[0], ring.y[0]) == (63, 1.3)
    assert "f = 1.300 [1.200, 1.400] there on the reporting pairs" in ring.text[0]
    assert {shape.y0 for shape in figure.layout.shapes} == {1.0, 0.8}


def test_axis_shows_all_values_but_no_wild_interval():
    wild = curve({"EAP": [0.0, -0.5, 1.4, 1.0]})
    wild.table.loc[1, "lo"] = -40.0
    low, high = _prepare_faithfulness(wild).span
    assert -2 < low < -0.5
    assert 1.4 < high < 3


def test_curve_figure_has_log_axis_bands_and_rings():
    figure = plots.faithfulness(curve(VALUES))
    assert figure.layout.xaxis.type == "log"
    assert [text.partition("<br>")[0] for text in figure.layout.xaxis.ticktext] == ["10", "100", "1,000"]
    assert "10 %" in figure.layout.xaxis.ticktext[1]
    drawn = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    np.testing.assert_allclose(drawn["EAP"].y, [0.3, 0.8, 1.0])
    assert next(iter(drawn)) == "random", "below the others"
    assert sum(trace.fill == "tonexty" for trace in figure.data) == 3
    rings = [trace for trace in figure.data if trace.mode == "markers"]
    assert sorted(float(ring.x[0]) for ring in rings) == [100.0, 1000.0, 1000.0]
    assert {shape.y0 for shape in figure.layout.shapes} == {1.0, 0.9}
    without = curve({"EAP": [0.1] * 9 + [1.0]}, MIB_SIZES)
    without.table[["lo", "hi"]] = np.nan
    without.areas[["cpr_lo", "cpr_hi", "cmd_lo", "cmd_hi"]] = np.nan
    line = _prepare_faithfulness(without).lines[0]
    assert line.legend.startswith("CPR 0.800 · CMD 0.200 ·")
    assert "nan" not in line.hover[0]
    assert not any(trace.fill for trace in plots.faithfulness(without).data)


def test_a_curve_without_rows_is_refused():
    empty = curve(VALUES)
    with pytest.raises(CircuitError, match="the curve has no rows"):
        plots.faithfulness(FaithfulnessCurve(empty.table.iloc[:0], empty.areas, {}, {}))


def test_a_slider_stands_above_the_graph_and_the_page_sets_the_width():
    figure = plots.circuit(chosen(120))
    (slider,) = figure.layout.sliders
    below = slider.pad.t + 60  # pixels from the top
    assert (slider.y, slider.yanchor) == (1, "top")
    assert figure.layout.height * (1 - figure.layout.yaxis.domain[1]) >= below - 6
    assert below < 200
    assert figure.layout.width is None
    assert figure.layout.autosize


def test_marks_say_which_node_and_edge_each_point_belongs_to():
    circuit = chosen(120)
    figure, data = plots.circuit(circuit), _prepare_circuit(circuit)
    ends = {mark.ends[:2] for mark in data.views[data.shown].edges}
    drawn = [trace for trace in figure.data if trace.meta["view"] == data.shown]
    told = {tuple(pair) for trace in drawn if trace.meta["circuit"] == "edges" for pair in trace.meta["edges"]}
    assert told == ends
    for trace in drawn:
        if trace.meta["circuit"] == "edges":
            assert len(trace.x) == len(trace.meta["edges"]) * (trace.meta["points"] + 1)
        else:
            assert len(trace.x) % len(trace.meta["nodes"]) == 0
    (names,) = (trace for trace in drawn if trace.meta["circuit"] == "names")
    layout = data.views[data.shown].layout
    assert {node: tuple(place) for node, place in zip(names.meta["nodes"], names.meta["places"], strict=True)} == layout.places
    assert [note.name for note in figure.layout.annotations if note.captureevents] == [f"layer {band.layer}" for band in layout.bands]


def test_only_pages_of_circuits_answer_clicks(tmp_path):
    for name, figure in (("circuit", plots.circuit(chosen(20))), ("edges", plots.edge_heatmap(chosen(20)))):
        page = plots.save(figure, tmp_path / f"{name}.html", include_plotlyjs="directory").read_text()
        assert ("plotly_clickannotation" in page) == (name == "circuit")
        assert "{plot_id}" not in page


# files


def test_controls_are_left_out_of_images_and_stay_in_the_figure(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "patchlab.plots._save._drawn", lambda figure, *_: seen.append((len(figure.layout.sliders), len(figure.layout.updatemenus))) or b"png"
    )
    for figure in (plots.circuit(chosen(60)), plots.edge_heatmap(chosen(60))):
        plots.save(figure, tmp_path / f"{len(seen)}.png")
        assert len(figure.layout.sliders) + len(figure.layout.updatemenus) == 1
    assert seen == [(0, 0), (0, 0)]


# edges in the figures of every site


def test_heatmaps_of_edges_show_the_largest_writers_and_readers_by_name():
    effects = np.where(GRAPH.allowed, 0.0, np.nan)
    effects[GRAPH.edge("a0.h2->a2.h1<k>")] = -3.0
    facet = _prepare_heatmaps(edge_map(effects, live={"edges": GRAPH.allowed})).rows[0][0]
    row, column = facet.rows.texts.index("a0.h2"), facet.columns.texts.index("a2.h1&lt;k&gt;")
    shown = np.asarray(facet.values)
    assert shown[row, column] == -3.0
    assert "writer a0.h2<br>reader a2.h1&lt;k&gt;" in facet.hover[row, column]
    assert shown.shape == (len(GRAPH.writers), 24)
    assert f"24 of {len(GRAPH.readers)} readers" in facet.description
    assert len(plots.heatmaps(edge_map(effects)).data)


def test_heatmaps_refuse_edges_by_position():
    effects = np.zeros((2, *GRAPH.allowed.shape, 3))
    scores = make_map({"edges[writer,reader,pos]": effects}, graph=GRAPH.as_dict(), direction="noising")
    with pytest.raises(ScoreError, match="no panels for edges by position; .* Draw it with plots.edge_heatmap"):
        plots.heatmaps(scores)


def test_agreement_of_edges_is_over_those_that_all_maps_score():
    exact, other, third = (random_effects(seed=seed) for seed in range(3))
    third[:, np.array(GRAPH.reader_kind) == "q"] = np.nan
    live = {"edges": GRAPH.allowed}
    methods = {"a": edge_map(other, live=live), "b": edge_map(third, live=live, readers_not_scored={"q": "no pattern"})}
    panels = _prepare_agreement(edge_map(exact, live=live), methods).rows[0]
    table = compare(edge_map(exact, live=live), methods, n_boot=2).table.query("cells == 'all'").set_index("method")
    for panel in panels:
        assert panel.live.all()
        assert len(panel.exact) == GRAPH.n_edges - GRAPH.allowed[:, np.array(GRAPH.reader_kind) == "q"].sum()
        assert panel.pearson == pytest.approx(table.loc[panel.method, "pearson"])
    assert panels[0].layer.max() == GRAPH.n_layers, "the logits read after the last layer"
    first = panels[0].hover.tolist().index("<b>edges</b><br>writer a0.h2<br>reader a2.h1&lt;k&gt;")
    assert (panels[0].exact[first], panels[0].layer[first]) == (exact[GRAPH.edge("a0.h2->a2.h1<k>")], 2)
    assert len(plots.agreement(edge_map(exact, live=live), methods).data)
