"""The exported JSON against the published schema, and against the graph."""

import json

import jsonschema
import numpy as np
import pytest
from attribution_graphs import by_hand, made, random_graph

from patchlab.errors import CircuitError, OutputError
from patchlab.features.attribution.neuronpedia import graph_json

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"}
TEXTS = {"type": "array", "items": TEXT}
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt"],
            "properties": {
                "slug": NAME,
                "scan": NAME,
                "prompt_tokens": TEXTS,
                "prompt": TEXT,
                "node_threshold": NUMBER,
                "info": {
                    "type": "object",
                    "properties": {
                        "creator_name": TEXT,
                        "generator": {"type": "object", "properties": {"name": TEXT, "version": TEXT, "url": TEXT}},
                        "create_time_ms": NUMBER,
                    },
                },
                "feature_details": {"type": "object", "properties": {"feature_json_base_url": TEXT, "neuronpedia_source_set": TEXT}},
                "generation_settings": {"properties": {"max_n_logits": WHOLE, "desired_logit_prob": NUMBER, "max_feature_nodes": WHOLE}},
                "pruning_settings": {"properties": {"node_threshold": NUMBER, "edge_threshold": NUMBER}},
            },
        },
        "qParams": {
            "type": "object",
            "properties": {"pinnedIds": TEXTS, "supernodes": {"type": "array"}, "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT},
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
                "properties": {
                    "node_id": TEXT,
                    "feature": {"type": ["integer", "null"]},
                    "layer": {"type": ["string", "integer"]},
                    "ctx_idx": WHOLE,
                    "feature_type": {"enum": ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]},
                    "jsNodeId": TEXT,
                    "clerp": TEXT,
                    "influence": {"type": ["number", "null"]},
                    "activation": {"type": ["number", "null"]},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {"type": "object", "required": ["source", "target", "weight"], "properties": {"source": TEXT, "target": TEXT, "weight": NUMBER}},
        },
    },
}
"""What the published schema asks for, with the characters that Neuronpedia takes in names."""


@pytest.mark.parametrize("graph", [by_hand(), random_graph().prune(), random_graph()], ids=["by hand", "pruned", "whole"])
def test_file_fits_the_schema_and_holds_the_graph(graph, tmp_path):
    path = graph.save_json(tmp_path / "graph.json", slug="a-graph_1.0", scan="toy-2b", info={"creator_name": "someone"})
    found = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    weights = {(link["source"], link["target"]): link["weight"] for link in found["links"]}
    matrix = graph.adjacency.toarray()
    assert weights == {(ids[s], ids[t]): matrix[t, s] for t, s in np.argwhere(matrix).tolist()}
    sizes = [abs(link["weight"]) for link in found["links"]]
    assert sizes == sorted(sizes, reverse=True)


def test_schema_sees_what_is_wrong():
    found = graph_json(by_hand(), slug="a", scan="b")
    for part, key in (("metadata", "slug"), ("nodes", "jsNodeId"), ("links", "weight")):
        broken = json.loads(json.dumps(found))
        del (broken[part] if isinstance(broken[part], dict) else broken[part][0])[key]
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(broken, SCHEMA)


def test_ids_are_those_of_the_field():
    found = graph_json(by_hand(), slug="a", scan="b", labels={(1, 4): "a cat"})
    nodes = {node["node_id"]: node for node in found["nodes"]}
    assert list(nodes) == ["0_1_1", "1_4_2", "0_-1_1", "1_-1_2", "E_1_1", "E_2_2", "4_5_2"]
    feature = nodes["1_4_2"]
    assert (feature["feature"], feature["jsNodeId"], feature["layer"], feature["activation"]) == (19, "1_4-0", "1", 1.5)
    assert (feature["clerp"], nodes["0_1_1"]["clerp"]) == ("a cat", "")
    assert (nodes["0_-1_1"]["feature"], nodes["0_-1_1"]["jsNodeId"], nodes["0_-1_1"]["ctx_idx"]) == (-1, "0_-1-1", 1)
    assert (nodes["E_2_2"]["feature"], nodes["E_2_2"]["layer"], nodes["E_2_2"]["jsNodeId"]) == (2, "E", "E_2-2")
    logit = nodes["4_5_2"]
    assert (logit["feature"], logit["layer"], logit["jsNodeId"], logit["clerp"]) == (5, "4", "L_5-2", 'Output " sat" (p=1.000)')
    assert logit["is_target_logit"]
    assert found["metadata"]["prompt_tokens"] == ["<s>", "the", " cat"]
    assert found["metadata"]["generation_settings"]["max_n_logits"] == 10


def test_layer_0_feature_and_the_error_of_the_layer_of_its_number_have_ids_of_their_own():
    # as published, feature 1 of layer 0 and the error of layer 1 at one position are both 0_1_1
    graph = made([0, 1, 2, 3], [0, 1, -1, 3], [1, 1, 1, 2], [1, -1, 1, 5], {(0, 2): 1.0, (3, 0): 1.0, (3, 1): 1.0}, [0, 0, 0, 1.0])
    ids = [node["node_id"] for node in graph_json(graph, slug="a", scan="b")["nodes"]]
    assert ids == ["0_1_1", "1_-1_1", "E_1_1", "4_5_2"]


def test_pruning_is_recorded():
    whole = random_graph()
    found = graph_json(whole.prune(0.7, 0.9), slug="a", scan="b")
    assert found["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}
    assert found["metadata"]["node_threshold"] == 0.7
    assert all(0 <= node["influence"] <= 1 + 1e-12 for node in found["nodes"] if node["feature_type"] != "logit")
    assert all(node["influence"] is None for node in graph_json(whole, slug="a", scan="b")["nodes"])


@pytest.mark.parametrize(("slug", "scan"), [("a graph", "b"), ("", "b"), ("a", "gemma/2b"), ("ä", "b")])
def test_names_with_other_characters_are_refused(slug, scan, tmp_path):
    with pytest.raises(CircuitError, match="does not take; use letters"):
        by_hand().save_json(tmp_path / "graph.json", slug=slug, scan=scan)


def test_too_large_files_are_refused_before_they_are_written(tmp_path):
    with pytest.raises(OutputError, match=r"takes 0 MB. Prune the graph of 7 nodes and 5 edges"):
        by_hand().save_json(tmp_path / "graph.json", slug="a", scan="b", largest=1000)
    assert not list(tmp_path.iterdir())


def test_files_are_not_overwritten_by_chance(tmp_path):
    path = by_hand().save_json(tmp_path / "graph.json", slug="a", scan="b")
    with pytest.raises(OutputError, match="exists"):
        by_hand().save_json(path, slug="a", scan="b")
    by_hand().save_json(path, slug="a", scan="b", overwrite=True)
