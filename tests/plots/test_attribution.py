"""What is drawn of an attribution graph: which nodes and edges, where, and in which words."""

import pytest
from attribution_graphs import by_hand, made, random_graph

from patchlab import plots
from patchlab.errors import CircuitError
from patchlab.plots._attribution import _prepare_attribution


def test_all_of_a_small_graph_is_drawn():
    data = _prepare_attribution(by_hand())
    assert [mark.name for mark in data.marks] == ["L0.F1@1", "L1.F4@2", "L0.error@1", "input@1 'the'", "input@2 ' cat'", "logit ' sat'"]
    drawn = {(data.marks[line.source].name, data.marks[line.target].name): (line.weight, line.share) for line in data.lines}
    assert drawn == {
        ("input@1 'the'", "L0.F1@1"): (2.0, 1.0),
        ("L0.F1@1", "L1.F4@2"): (-3.0, 0.75),
        ("L0.error@1", "L1.F4@2"): (1.0, 0.25),
        ("L1.F4@2", "logit ' sat'"): (3.0, 0.75),
        ("input@2 ' cat'", "logit ' sat'"): (-1.0, 0.25),
    }
    assert data.subtitle == "<b>all 5 edges</b> · 2 features, 2 errors"
    assert data.title == "Attribution graph of toy: <s>the cat"


def test_layers_go_up_and_positions_to_the_right():
    data = _prepare_attribution(random_graph())
    heights = dict(data.layers)
    lefts = {token: (left, right) for token, left, right in data.columns}
    assert [name for name, _ in data.layers] == ["tokens", "layer 0", "layer 1", "layer 2", "logits"]
    assert sorted(heights.values()) == list(heights.values())
    for mark in data.marks:
        if mark.name.startswith("L1."):
            assert mark.y == heights["layer 1"]
        if mark.name.endswith("@2"):
            assert lefts["cat"][0] < mark.x < lefts["cat"][1]
    assert len({(mark.x, mark.y) for mark in data.marks}) == len(data.marks)


def test_the_most_influential_edges_are_drawn_first():
    data = _prepare_attribution(by_hand(), max_edges=3)
    names = [(data.marks[line.source].name, data.marks[line.target].name) for line in data.lines]
    # 3/4 of the logit, all of f0 (influence 9/16), 3/4 of f1 (influence 3/4)
    assert names == [("L1.F4@2", "logit ' sat'"), ("input@1 'the'", "L0.F1@1"), ("L0.F1@1", "L1.F4@2")]
    assert data.subtitle.startswith("<b>the most influential 3 of 5 edges</b>")


def test_hover_tells_labels_top_tokens_and_the_strongest_edges():
    data = _prepare_attribution(by_hand(), {(1, 4): "animals <b>"}, {(1, 4): [" cat", " dog"]})
    hover = next(mark.hover for mark in data.marks if mark.name == "L1.F4@2")
    words = ("at ' cat'", "animals &lt;b&gt;", "top tokens: ' cat', ' dog'", "activation 1.5", "influence 0.75", "from: -3 L0.F1@1, +1 L0.error@1")
    assert all(word in hover for word in words)
    assert "to: +3 logit ' sat'" in hover
    logit = data.marks[-1]
    assert (logit.text, "probability 1" in logit.hover) == ("sat<br>100%", True)


def test_figure_has_a_trace_per_look_and_works_offline(tmp_path):
    figure = plots.attribution_graph(random_graph().prune())
    modes = [trace.mode for trace in figure.data]
    assert modes.count("lines") >= 2
    assert modes.count("markers+text") == 1
    page = plots.save(figure, tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "cdn.plot.ly" not in page.split("</script>")[-1]
    assert figure.layout.annotations[0].text.startswith("<b>Attribution graph of toy")


def test_nothing_to_draw_is_refused():
    with pytest.raises(CircuitError, match="no edges"):
        plots.attribution_graph(made([0, 3], [0, 3], [1, 2], [0, 5], {}, [0, 1.0]))
    with pytest.raises(CircuitError, match="max_edges is 0"):
        plots.attribution_graph(by_hand(), max_edges=0)
