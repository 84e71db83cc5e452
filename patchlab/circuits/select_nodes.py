"""Selection of nodes from their scores: the n most important, or those above a level."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, Int

from patchlab.circuits.nodes import Candidates, NodeCircuit, of_entries
from patchlab.errors import CircuitError, unknown
from patchlab.scores import ScoreMap
from patchlab.sites import KINDS, Site

BY = {"abs": "|effect|", "signed": "signed importance"}
"""Importance of a node: the size of its effect, or the effect with its sign (turned for noising, where what helps has a negative effect)."""


def of_nodes(scores: Any, sites: str | Iterable[str | Site] | None = None) -> TypeGuard[ScoreMap]:
    """Whether nodes are to be chosen: of a map without edges, or of sites that are named."""
    if not isinstance(scores, ScoreMap):
        return False
    return sites is not None or (any(map(_is_nodes, scores.sites)) and all(Site.parse(name).kind != "edges" for name in scores.sites))


@dataclass(frozen=True, eq=False)
class RankedNodes:
    """Nodes of a map with a score, the most important first. Of equally important ones the first in the order of sites and axes comes first.

    Args:
        universe: the candidates: all nodes of the sites, also those without a score.
        which: the site of each node, as its place in ``universe``.
        ids: its number in its site.
        effects: mean effect, in metric units.
        importance: what it is ranked by.
        provenance: of the map, with the names of the positions and what was left out.
    """

    universe: tuple[Candidates, ...]
    which: Int[np.ndarray, " node"]
    ids: Int[np.ndarray, " node"]
    effects: Float[np.ndarray, " node"]
    importance: Float[np.ndarray, " node"]
    provenance: dict[str, Any]

    @staticmethod
    def of(scores: ScoreMap, by: str = "abs", sites: str | Iterable[str | Site] | None = None) -> "RankedNodes":
        """Rank the nodes of a map.

        Args:
            scores: a map of nodes; the mean over its examples counts.
            by: ``abs`` or ``signed`` importance.
            sites: which of its sites; None for all that were scored.

        Raises:
            CircuitError: an unknown importance, no site of nodes, a site that was not scored, one kind at two granularities.
        """
        if by not in BY:
            raise CircuitError(unknown("importance", by, BY))
        asked = sites is not None
        names = [scores.site_name(site) for site in _several(sites)] if sites is not None else [name for name in scores.sites if _is_nodes(name)]
        if not names:
            raise CircuitError(f"there are no nodes to choose from: the map has {', '.join(scores.sites)}.")
        if skipped := [name for name in names if name in scores.not_scored and asked]:
            raise CircuitError(f"{skipped[0]} was not scored ({scores.not_scored[skipped[0]]}), so no nodes of it can be chosen. Leave it out.")
        notes = [f"{name} was not scored ({scores.not_scored[name]}) and is free" for name in names if name in scores.not_scored]
        names = [name for name in names if name not in scores.not_scored]
        if not names:
            raise CircuitError(f"none of the sites of the map was scored: {'; '.join(notes)}.")
        universe, parts = tuple(_candidates(scores, name) for name in names), []
        for place, (one, name) in enumerate(zip(universe, names, strict=True)):
            mean, cells = scores.mean(name).to_numpy().ravel(), scores.cells(name)
            known = np.isfinite(mean) & one.contains(cells)
            if missing := int(np.isnan(mean).sum()):
                notes.append(f"{missing:,} of {one.size:,} nodes of {name} were not scored and cannot be chosen; they count as outside")
            parts.append((np.full(int(known.sum()), place), one.ids(cells[known]), mean[known].astype(np.float64)))
        which, ids, effects = (np.concatenate(column) for column in zip(*parts, strict=True))
        importance = np.abs(effects) if by == "abs" else effects if scores.provenance.get("direction") == "denoising" else -effects
        order = np.argsort(-importance, kind="stable")
        about = {key: value for key, value in scores.provenance.items() if key not in ("graph", "notes", "not_scored")}
        about["examples"] = scores.data["example"].to_numpy().tolist()
        about |= {"notes": notes} if notes else {}
        about |= _positions(scores, universe)
        return RankedNodes(universe, which[order], ids[order], effects[order], importance[order], about)

    def first(self, n: int, **choice: Any) -> NodeCircuit:
        """The circuit of the ``n`` first; ``choice`` says how, for the provenance."""
        listed, scores = {}, {}
        for place, one in enumerate(self.universe):
            here = self.which[:n] == place
            listed[one.name] = one.cells(self.ids[:n][here])
            scores[one.name] = self.effects[:n][here]
        return NodeCircuit(self.universe, listed, False, scores, self.provenance | choice)

    def within(self, universe: Sequence[Candidates]) -> "RankedNodes":
        """Those that are among fewer candidates."""
        places = {one.name: place for place, one in enumerate(universe)}
        which, inside = np.full(len(self.which), -1), np.zeros(len(self.which), dtype=bool)
        for place, one in enumerate(self.universe):
            if one.name in places:
                here = np.flatnonzero(self.which == place)
                inside[here] = universe[places[one.name]].contains(one.cells(self.ids[here]))
                which[here] = places[one.name]
        return RankedNodes(tuple(universe), which[inside], self.ids[inside], self.effects[inside], self.importance[inside], self.provenance)

    def above(self, level: float | int) -> int:
        """How many are at least this important."""
        return int(np.searchsorted(-self.importance, -float(level), side="right"))


def top_nodes(scores: ScoreMap, n: int, *, by: str = "abs", sites: str | Iterable[str | Site] | None = None) -> NodeCircuit:
    """The ``n`` most important nodes of a map; see :func:`patchlab.circuits.top_n`.

    Raises:
        CircuitError: ``n`` below 1 or beyond the nodes that have a score.
    """
    ranked = RankedNodes.of(scores, by, sites)
    check_number(ranked, n)
    return ranked.first(n, how=f"top {n:,} by {BY[by]}", n_requested=n, by=by)


def nodes_above(scores: ScoreMap, level: float | int, *, by: str = "abs", sites: str | Iterable[str | Site] | None = None) -> NodeCircuit:
    """The nodes whose importance is at least ``level``, in metric units; see :func:`patchlab.circuits.threshold`.

    Raises:
        CircuitError: a level that is no number, or below 0 for ``abs``.
    """
    ranked = RankedNodes.of(scores, by, sites)
    if not np.isfinite(level) or (by == "abs" and level < 0):
        raise CircuitError(f"the level of a threshold is a finite number, at least 0 for importance 'abs'; got {level}.")
    return ranked.first(ranked.above(level), how=f"{BY[by]} at least {level:g}", level=float(level), by=by)


def check_number(ranked: RankedNodes, n: int) -> None:
    """Refuse a number of nodes that cannot be chosen.

    Raises:
        CircuitError: below 1, or beyond the nodes that have a score.
    """
    size = sum(one.size for one in ranked.universe)
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise CircuitError(f"n is the number of nodes to choose, a whole number of at least 1; got {n}. NodeCircuit.empty is the one without nodes.")
    if n > len(ranked.ids):
        raise CircuitError(
            f"{n:,} nodes were asked for, and {len(ranked.ids):,} of the {size:,} of {', '.join(map(str, ranked.universe))} have a score. "
            f"Ask for at most {len(ranked.ids):,}."
        )


def _several(sites: str | Iterable[str | Site]) -> list[str | Site]:
    return [sites] if isinstance(sites, str) else list(sites)


def _is_nodes(name: str) -> bool:
    kind = KINDS[Site.parse(name).kind]
    return kind.granularities is None and kind.source is None


def _candidates(scores: ScoreMap, name: str) -> Candidates:
    """The nodes of a site of a map, all that there are, also those without an effect that a map of some nodes does not hold."""
    site, live = Site.parse(name), scores.live[name]
    if not scores.is_sparse(name):
        return Candidates(site, tuple(live.sizes[axis] for axis in scores.axes(name)))
    about = scores.provenance.get("added_entries", {}).get(site.kind)
    if about is None:
        raise CircuitError(f"the map holds some nodes of {name} and does not say how many there are; score them again with this version of patchlab.")
    layers = {int(layer): n for layer, n in about["entries"].items()}
    return of_entries(site, about["n_layers"], layers, scores.data.sizes.get("pos", 0))


def _positions(scores: ScoreMap, universe: tuple[Candidates, ...]) -> dict[str, Any]:
    """The names of the positions, where nodes have positions."""
    if all(one.n_positions is None for one in universe):
        return {}
    size = scores.data.sizes["pos"]
    names = scores.data["position"].to_numpy().tolist() if "position" in scores.data.coords else [""] * size
    return {"positions": [name or str(i) for i, name in enumerate(names)]}
