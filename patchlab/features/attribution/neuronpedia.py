"""Attribution graphs as Neuronpedia's graph JSON, which its pages and circuit-tracer's front end read.

Schema: hijohnnylin/neuronpedia, ``apps/webapp/app/api/graph/graph-schema.json``. Ids are circuit-tracer's, with one change that its later
versions made too: an error is ``{layer}_-1_{pos}``. The published ``0_{layer}_{pos}`` is also the id of layer 0's feature number ``layer``
at that position, and two nodes of one id are one node to a reader.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy import sparse

from patchlab.errors import CircuitError, OutputError
from patchlab.features.attribution.nodes import EMBEDDING, ERROR, FEATURE, NODE_KINDS, Nodes
from patchlab.store.files import writing

LARGEST = 100 * 10**6
"""Bytes of the largest file that Neuronpedia takes."""
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TYPES = {FEATURE: "cross layer transcoder", ERROR: "mlp reconstruction error", EMBEDDING: "embedding"}


@runtime_checkable
class Exported(Protocol):
    """What is written of a graph (:class:`patchlab.features.attribution.AttributionGraph`)."""

    @property
    def nodes(self) -> Nodes: ...

    @property
    def adjacency(self) -> sparse.csr_array: ...

    @property
    def cumulative(self) -> Float[np.ndarray, " node"] | None: ...

    @property
    def strings(self) -> tuple[str, ...]: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def token_of(self, node: int) -> str: ...


def graph_json(
    graph: Exported,
    *,
    slug: str,
    scan: str,
    labels: Mapping[tuple[int, int], str] | None = None,
    feature_details: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The graph as Neuronpedia's JSON, as plain values.

    Args:
        graph: usually a pruned one.
        slug: the graph's name in an address.
        scan: the model, as Neuronpedia calls it (``gemma-2-2b``).
        labels: what features are about, by layer and number.
        feature_details: where the pages of features are: ``feature_json_base_url`` or ``neuronpedia_source_set``.
        info: further facts about who made it, as the schema names them.

    Raises:
        CircuitError: a slug or scan with other characters than letters, digits, ``_``, ``.`` and ``-``; weights that are no numbers.
    """
    for what, name in (("slug", slug), ("scan", scan)):
        if _NAME.fullmatch(name) is None:
            raise CircuitError(f"the {what} {name!r} holds characters that Neuronpedia does not take; use letters, digits, '_', '.' and '-'.")
    nodes = list(_nodes(graph, labels or {}))
    ids = [node["node_id"] for node in nodes]
    if len(set(ids)) != len(ids):
        raise CircuitError("two nodes of the graph are the same feature, error, token or logit.")
    edges = graph.adjacency.tocoo()
    strongest = np.argsort(-np.abs(edges.data), kind="stable")
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(edges.col[strongest].tolist(), edges.row[strongest].tolist(), edges.data[strongest].tolist(), strict=True)
    ]
    record, pruning = graph.provenance, graph.provenance.get("pruning")
    metadata: dict[str, Any] = {"slug": slug, "scan": scan, "prompt_tokens": list(graph.strings), "prompt": str(record.get("prompt", ""))}
    metadata |= {"transcoder_list": list(record.get("transcoders", ())), "schema_version": 1}
    generator = {"name": "patchlab", "version": version("patchlab")}
    metadata["info"] = {"generator": generator, **(info or {})}
    if feature_details is not None:
        metadata["feature_details"] = dict(feature_details)
    if settings := record.get("settings"):
        metadata["generation_settings"] = {
            "max_n_logits": settings["max_logits"],
            "desired_logit_prob": settings["cumulative"],
            "max_feature_nodes": settings["max_features"],
            "skip_first": settings["skip_first"],
        }
    if pruning:
        metadata["node_threshold"] = pruning["nodes"]
        metadata["pruning_settings"] = {"node_threshold": pruning["nodes"], "edge_threshold": pruning["edges"]}
    query = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": query, "nodes": nodes, "links": links}


def save_json(graph: Exported, path: str | Path, *, overwrite: bool = False, largest: int = LARGEST, **options: Any) -> Path:
    """Write a graph as Neuronpedia's JSON; the options are those of :func:`graph_json`.

    Raises:
        CircuitError: see :func:`graph_json`.
        OutputError: a file above ``largest`` bytes (Neuronpedia takes 100 MB), one that exists, or a place that cannot be written to.
    """
    path = Path(path)
    try:
        text = json.dumps(graph_json(graph, **options), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise CircuitError(f"the graph holds weights or activations that are no finite numbers ({error}), which JSON has no word for.") from error
    if (size := len(text.encode())) > largest:
        raise OutputError(
            f"{path} would take {size / 1e6:.0f} MB, and Neuronpedia takes {largest / 1e6:.0f} MB. Prune the graph of {len(graph.nodes):,} nodes and "
            f"{graph.adjacency.nnz:,} edges (graph.prune(nodes=0.6, edges=0.9)), or make it with fewer max_features."
        )
    with writing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _nodes(graph: Exported, labels: Mapping[tuple[int, int], str]) -> Iterator[dict[str, Any]]:
    table, last = graph.nodes, graph.n_layers + 1
    logits = table.of(NODE_KINDS[-1])
    likeliest = int((table.probability * logits).argmax())
    for i in range(len(table)):
        kind, layer, pos, unit = NODE_KINDS[table.kind[i]], int(table.layer[i]), int(table.pos[i]), int(table.unit[i])
        node: dict[str, Any] = {"ctx_idx": pos, "feature_type": _TYPES.get(kind, "logit"), "clerp": "", "run_idx": 0, "reverse_ctx_idx": 0}
        node |= {"token_prob": 0.0, "is_target_logit": False, "influence": None if graph.cumulative is None else float(graph.cumulative[i])}
        if kind == FEATURE:
            pair = (layer + unit) * (layer + unit + 1) // 2 + unit  # Cantor's number of (layer, feature)
            node |= {"node_id": f"{layer}_{unit}_{pos}", "jsNodeId": f"{layer}_{unit}-0", "layer": str(layer), "feature": pair}
            node |= {"activation": float(table.activation[i]), "clerp": labels.get((layer, unit), "")}
        elif kind == ERROR:
            node |= {"node_id": f"{layer}_-1_{pos}", "jsNodeId": f"{layer}_-1-{pos}", "layer": str(layer), "feature": -1}
        elif kind == EMBEDDING:
            node |= {"node_id": f"E_{unit}_{pos}", "jsNodeId": f"E_{unit}-{pos}", "layer": "E", "feature": pos, "clerp": graph.token_of(i)}
        else:
            share = float(table.probability[i])
            node |= {"node_id": f"{last}_{unit}_{pos}", "jsNodeId": f"L_{unit}-{pos}", "layer": str(last), "feature": unit, "influence": None}
            node |= {"token_prob": share, "is_target_logit": i == likeliest, "clerp": f'Output "{graph.token_of(i)}" (p={share:.3f})'}
        yield node
