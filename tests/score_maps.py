"""Small score maps made by hand, for the tests of scores, comparisons and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchlab.graph import Graph
from patchlab.scores import Cost, ScoreMap
from patchlab.scores.arrays import CellNames, Patterns
from patchlab.sites import Site

COST = Cost(2, 1, 60, 0.5)
TOKENS = ("<bos>", " the", " cat", " saw", " the", " dog")


@dataclass(frozen=True)
class Labels:
    """The part of a position axis that a score map reads."""

    roles: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]


def provenance(**changes: Any) -> dict[str, Any]:
    about = {"method": "exact", "task": "toy", "task_fingerprint": "t0", "model": "tiny", "model_fingerprint": "m0"}
    about |= {"direction": "denoising", "metric": "logit_diff", "metric_unit": "logits", "dtype": "float32"}
    return {**about, "method_options": {"source": "paired"}, "not_scored": {}, "notes": [], **changes}


def edge_names(about: Mapping[str, Any]) -> CellNames:
    """Names of the edges of the graph that provenance gives, scored but for the readers that it excepts."""
    if "graph" not in about:
        return CellNames()
    graph = Graph(**about["graph"])
    scored = np.broadcast_to(~np.isin(graph.reader_kind, list(about.get("readers_not_scored", {}))), graph.allowed.shape)
    layers = np.broadcast_to(graph.reader_layer, graph.allowed.shape)
    return CellNames({"writer": graph.writers, "reader": graph.readers}, "edge", "{writer}->{reader}", graph.allowed, layers, scored)


def make_map(
    scores: Mapping[str, np.ndarray],
    *,
    live: Mapping[str, np.ndarray] | None = None,
    no_path: Mapping[str, np.ndarray] | None = None,
    labels: Labels | None = None,
    examples: Sequence[int] | None = None,
    clean: np.ndarray | None = None,
    corrupted: np.ndarray | None = None,
    cost: Cost = COST,
    patterns: Patterns | None = None,
    noise: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> ScoreMap:
    """A map of these effects; every cell is live and the gap is 2 logits unless something else is asked for.

    Cells that are not live are the same in both prompts, unless ``no_path`` has them.
    """
    n = len(next(iter(scores.values())))
    live = {site: np.ones(values.shape[1:], dtype=bool) for site, values in scores.items()} | dict(live or {})
    return ScoreMap.build(
        scores,
        live,
        task_axis=labels,
        examples=list(range(n)) if examples is None else examples,
        metric_clean=np.linspace(1.4, 1.6, n) if clean is None else clean,
        metric_corrupted=np.full(n, -0.5) if corrupted is None else corrupted,
        provenance=provenance(**changes),
        cost=cost,
        patterns=patterns,
        names={site: edge_names(changes) for site in scores if Site.parse(site).kind == "edges"},
        no_path={site: np.zeros_like(mask) for site, mask in live.items()} | dict(no_path or {}),
        noise=noise,
    )


def random_map(*sites: str, n: int = 8, seed: int = 0, n_layers: int = 3, n_pos: int = len(TOKENS), named: bool = False, **options: Any) -> ScoreMap:
    """Random effects at these sites; position 0 is a structural zero, the last token differs between examples."""
    rng = np.random.default_rng(seed)
    sizes = {"layer": n_layers, "pos": n_pos, "dest": n_pos, "src": n_pos, "head": 4, "kv_head": 2, "neuron": 40}
    scores, live = {}, {}
    for site in sites:
        axes = Site.parse(site).axes
        shape = tuple(sizes[axis] for axis in axes)
        live[site] = np.ones(shape, dtype=bool)
        if "pos" in axes:
            live[site] &= np.indices(shape)[axes.index("pos")] > 0
        scores[site] = ((rng.normal(size=shape) + 0.3 * rng.normal(size=(n, *shape))) * live[site]).astype(np.float32)
    tokens = tuple((*TOKENS[:n_pos][:-1], (" dog", " cow")[e % 2]) for e in range(n + 1))
    roles = tuple(f"P{i}" for i in range(n_pos)) if named else ()
    return make_map(scores, live=live, labels=Labels(roles, tokens), **options)


def altered(scores: ScoreMap, change: Any, *, cost: Cost = COST, **changes: Any) -> ScoreMap:
    """The same map with other effects, ``change(site, values)``, and other provenance."""
    data = scores.data.copy(data={site: change(site, scores.data[site].to_numpy()) for site in scores.sites})
    return ScoreMap(data, scores.live, {**scores.provenance, **changes}, cost, scores.patterns, scores.no_path, scores.noise, scores.standard_error)
