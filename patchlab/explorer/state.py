"""The state of the explorer: what is shown before anything is asked, as plain values that a page can hold."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from plotly.colors import get_colorscale

from patchlab.circuits import Circuit, NodeCircuit
from patchlab.errors import PatchlabError
from patchlab.explorer.maps import Maps, is_exact
from patchlab.models import Model
from patchlab.plots import circuit as draw_circuit
from patchlab.plots._facets import ZEROS, Axis, Facet, facets_of
from patchlab.plots._style import method_colours, signs
from patchlab.scores import ScoreMap
from patchlab.scores.addresses import address_of, located
from patchlab.scores.arrays import label_of
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.tasks.task import Task

MOST_PANELS = 24
"""Panels of a site that needs one per head."""
NUMBERS = 1_500_000
"""Effects per example that a state holds: of so many examples as keep below it; means and intervals are always of all."""
_DRAWS, _AT_ONCE = 1000, 4_000_000


def state_of(model: Model, task: Task, groups: Mapping[str, Maps], circuit: Circuit | NodeCircuit | None) -> dict[str, Any]:
    """The state of maps by direction: plain JSON, arrays as base64 of little-endian float64 (``f8``) or float32 (``f4``)."""
    first = next(iter(groups.values())).first
    panels = {direction: {site: _panels(maps, site) for site in maps.first.sites} for direction, maps in groups.items()}
    cells = sum(len(_shown(found)) * len(groups[direction].by_name) for direction, sites in panels.items() for found in sites.values())
    n = first.data.sizes["example"]
    examples = max(1, min(n, NUMBERS // max(1, cells)))
    return {
        "title": first.subject,
        "metric": str(first.provenance.get("metric", "the metric")),
        "unit": str(first.provenance.get("metric_unit", "")),
        "n": n,
        "shown": examples,
        "aligned": task.aligned,
        "prompts": [_prompt(task, i) for i in range(n)],
        "index": task.position_axis().index.tolist(),
        "groups": {direction: _group(model, maps, panels[direction], examples) for direction, maps in groups.items()},
        "circuit": None if circuit is None else _circuit(circuit, next(iter(groups.values()))),
    }


def label(scores: ScoreMap, site: str, cell: tuple[int, ...]) -> str:
    """A cell as people write it, positions by name where they have one of their own: ``L9.H6.z@S2``; :meth:`ScoreMap.sel` reads it."""
    text = address_of(scores.data, site, cell)
    if scores.data[site].attrs.get("names"):
        return text
    parsed, kind = Site.parse(text), KINDS[Site.parse(site).kind]
    for field, axis in (("pos", kind.position), ("src", kind.source)):
        names = None if axis is None else scores.data.coords.get(label_of("position", axis))
        place = getattr(parsed, field)
        if names is None or place is None or not isinstance(place[0], int):
            continue
        words = names.to_numpy().tolist()
        if words[place[0]] and words.count(words[place[0]]) == 1:
            parsed = replace(parsed, **{field: (words[place[0]],)})
    return str(parsed)


def nodes(scores: ScoreMap, site: str, cell: tuple[int, ...], n_heads: int, n_kv_heads: int) -> list[str]:
    """The nodes of a graph that a cell belongs to: a head, the query heads of a key-value head, all heads of a layer, an MLP, ends of an edge."""
    kind = KINDS[Site.parse(site).kind]
    at = dict(zip(scores.axes(site), cell, strict=True))
    if "writer" in at:
        graph = scores.graph
        return [graph.writers[at["writer"]], graph.nodes[graph.reader_node[at["reader"]]]]
    name = kind.of or kind.name
    if name == "input":
        return ["input"]
    if "layer" not in at:
        return []
    if name in ("mlp_out", "mlp_post"):
        return [f"m{at['layer']}"]
    if name not in ("z", "q", "k", "v", "pattern", "attn_out"):
        return []
    share = n_heads // n_kv_heads
    heads = [at["head"]] if "head" in at else range(n_heads)
    heads = range(at["kv_head"] * share, (at["kv_head"] + 1) * share) if "kv_head" in at else heads
    return [f"a{at['layer']}.h{head}" for head in heads]


def made_of(model: Model, site: str, layer: int | None) -> dict[str, str]:
    """What the activation at a layer of a site is made of, as site kinds: neurons of an MLP, features of dictionaries on it."""
    kind, found = Site.parse(site).kind, dict[str, str]()
    if layer is not None and kind == "mlp_out" and "mlp_post" not in model.arch.absent:
        found["neurons"] = "mlp_post"
    if layer is not None and layer in model.dictionaries.get(kind, {}):
        found["features"] = f"features.{kind}"
    return found


def summary(effects: Float[np.ndarray, "example cell"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean effects and their 95 % bootstrap intervals over examples, each cell alone; NaN with one example. As :meth:`ScoreMap.top` has them."""
    n, count = effects.shape
    weights = resampling_weights(n, _DRAWS if n > 1 else 0, 0)
    low, high = np.full(count, np.nan), np.full(count, np.nan)
    step = max(1, _AT_ONCE // _DRAWS)
    for start in range(0, count if n > 1 else 0, step):
        low[start : start + step], high[start : start + step] = interval(weights @ effects[:, start : start + step].astype(np.float64))
    return effects.astype(np.float64).mean(0), low, high


def packed(values: np.ndarray, kind: str = "f8") -> dict[str, str]:
    """Numbers as text: base64 of their little-endian bytes."""
    return {kind: base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()}


def _prompt(task: Task, example: int) -> dict[str, Any]:
    pair = task.pairs[example]
    texts = {side: [task.token_text(token) for token in ids] for side, ids in (("clean", pair.clean_ids), ("corrupted", pair.corrupted_ids))}
    answers = {side: [task.token_text(token) for token in ids] for side, ids in (("correct", pair.correct), ("incorrect", pair.incorrect))}
    return {**texts, **answers, "changed": [a != b for a, b in zip(pair.clean_ids, pair.corrupted_ids, strict=True)], "names": dict(pair.positions)}


def _panels(maps: Maps, site: str) -> list[Facet]:
    return facets_of(maps.first, maps.first.mean(site), ranked_by=maps.first, most=MOST_PANELS, compact=True)


def _shown(panels: list[Facet]) -> Int[np.ndarray, " cell"]:
    """The cells that any panel has, as numbers in the flattened site, each once; ``facets_of`` writes the number of cells where there is none."""
    return np.unique(np.concatenate([panel.index.ravel() for panel in panels])) if panels else np.zeros(0, dtype=np.int64)


def _group(model: Model, maps: Maps, panels: Mapping[str, list[Facet]], examples: int) -> dict[str, Any]:
    record, colours = maps.first.provenance, method_colours(maps.by_name)
    means = signs({**record, "unsigned": False})
    return {
        "direction": maps.direction,
        "source": maps.source,
        "scale": get_colorscale(means.scale) if isinstance(means.scale, str) else means.scale,
        "unsigned_scale": [[0, "#ffffff"], [1, signs({"unsigned": True}).positive]],
        "below": [means.negative, means.below],
        "above": [means.positive, means.above],
        "clean": packed(maps.first.data["metric_clean"].to_numpy()),
        "corrupted": packed(maps.first.data["metric_corrupted"].to_numpy()),
        "maps": {
            name: {"colour": colours[name], "exact": is_exact(one), "unsigned": bool(one.provenance.get("unsigned"))}
            for name, one in maps.by_name.items()
        },
        "sites": {site: _site(model, maps, site, panels[site], examples) for site in maps.first.sites},
    }


def _site(model: Model, maps: Maps, site: str, panels: list[Facet], examples: int) -> dict[str, Any]:
    first, count = maps.first, len(maps.first.cells(site))
    shown = _shown(panels)
    shown = shown[shown < count]
    where = {int(number): i for i, number in enumerate(shown)}
    cells = [tuple(cell) for cell in first.cells(site)[shown].tolist()]
    axes = first.axes(site)
    zero, exists = (part.to_numpy().ravel()[shown] for part in (first.zeros(site), first.exists(site)))
    scores = {name: _scores(one, site, shown, examples) for name, one in maps.by_name.items()}
    limits = [max((part["limits"][i] for part in scores.values()), default=0.0) or 1.0 for i in (0, 1)]
    return {
        "what": KINDS[Site.parse(site).kind].what,
        "kind": Site.parse(site).kind,
        "cells": shown.tolist(),
        "labels": [label(first, site, cell) if there else "no edge" for cell, there in zip(cells, exists, strict=True)],
        "zeros": [ZEROS.get(str(word), "") for word in zero],
        "layers": [int(cell[axes.index("layer")]) if "layer" in axes else -1 for cell in cells],
        "places": {axis: [int(cell[axes.index(axis)]) for cell in cells] for axis in axes if axis in POSITION_AXES},
        "nodes": [nodes(first, site, cell, model.arch.n_heads, model.arch.n_kv_heads) for cell in cells],
        "made_of": any(made_of(model, site, layer) for layer in range(model.arch.n_layers)) and "layer" in axes,
        "panels": [_panel(panel, where) for panel in panels],
        "limits": limits,
        "scores": scores,
    }


def _scores(one: ScoreMap, site: str, shown: Int[np.ndarray, " cell"], examples: int) -> dict[str, Any]:
    """The effects of the shown cells; a cell that the method does not score is NaN throughout."""
    effects = one.data[site].to_numpy().reshape(one.data.sizes["example"], -1)[:, shown]
    mean, low, high = summary(effects)
    live = one.live[site].to_numpy().ravel()[shown]
    each = effects[:examples].T
    sizes = [np.nan_to_num(np.abs(part[live])) for part in (mean, each)]
    return {
        "mean": packed(mean),
        "low": packed(low),
        "high": packed(high),
        "each": packed(each, "f4"),
        "limits": [float(part.max(initial=0.0)) for part in sizes],
        "not_scored": one.not_scored.get(site),
    }


def _panel(panel: Facet, where: Mapping[int, int]) -> dict[str, Any]:
    local = [[where.get(int(number), -1) for number in row] for row in panel.index]
    return {"title": panel.title, "note": panel.description, "rows": _axis(panel.rows), "columns": _axis(panel.columns), "cells": local}


def _axis(axis: Axis) -> dict[str, Any]:
    return {"title": axis.title, "places": list(axis.places), "texts": list(axis.texts), "angle": axis.angle}


def _circuit(circuit: Circuit | NodeCircuit, maps: Maps) -> dict[str, Any]:
    """The figure of a circuit, and for addresses of nodes the cell of the maps that each is."""
    figure = json.loads(draw_circuit(circuit).to_json() or "{}")
    links: dict[str, list[Any]] = {}
    for node in circuit.nodes if isinstance(circuit, NodeCircuit) else ():
        try:
            site, at = located(maps.first.data, maps.first.provenance, node)
        except PatchlabError:  # a node of a site that the maps do not score
            continue
        cell = tuple(at.get(axis, -1) for axis in maps.first.axes(site))
        hits = np.flatnonzero((maps.first.cells(site) == np.array(cell)).all(1))
        if len(hits):
            links[node] = [site, int(hits[0])]
    return {"figure": figure, "links": links}
