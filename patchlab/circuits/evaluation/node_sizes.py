"""Circuits of nodes of growing size: at thresholds of importance, or of given numbers of nodes, and random ones of the same sizes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchlab.circuits.evaluation.node_runner import Prepared, prepared
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.circuits.select_nodes import BY, RankedNodes, check_number
from patchlab.circuits.stability import Stability, stabilities
from patchlab.errors import CircuitError
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.sites import Site
from patchlab.tasks.task import Task

THRESHOLDS = tuple(float(level) for level in np.logspace(-4, 0, 15))
"""Levels of importance, in metric units, at which Marks et al. 2024 (arXiv 2403.19647) evaluate."""


@dataclass(frozen=True, eq=False)
class NodeSizes:
    """Circuits of every size, per method, small ones first.

    Args:
        ready: the candidates, what is ablated in every run, and what was done to them.
        circuits: per method.
        levels: per method the threshold of each circuit; None where numbers of nodes were asked for.
        random: per draw circuits of the sizes of the first method.
    """

    ready: Prepared
    circuits: dict[str, tuple[NodeCircuit, ...]]
    levels: dict[str, list[float]] | None
    random: list[tuple[NodeCircuit, ...]]

    @staticmethod
    def of(
        model: Model,
        maps: Mapping[str, ScoreMap],
        task: Task,
        *,
        sizes: Sequence[int] | None,
        thresholds: Sequence[float] | None,
        by: str,
        sites: str | Iterable[str | Site] | None,
        errors: str,
        start_layer: int | None,
        draws: int,
        seed: int,
    ) -> "NodeSizes":
        """Choose them.

        Raises:
            CircuitError: sizes beyond the nodes that a map scores, thresholds that are no levels, both at once, maps of unlike sites.
        """
        if sizes is not None and thresholds is not None:
            raise CircuitError("a curve is over sizes= or over thresholds=; got both. Leave one out.")
        levels = sorted({float(level) for level in THRESHOLDS if thresholds is None} | {float(level) for level in thresholds or ()}, reverse=True)
        if sizes is None and (not levels or not np.isfinite(levels).all() or (by == "abs" and levels[-1] < 0)):
            raise CircuitError(f"thresholds are finite levels of importance, at least one, and at least 0 for importance 'abs'; got {thresholds}.")
        ranked = {name: RankedNodes.of(one, by, sites) for name, one in maps.items()}
        nothing = {name: NodeCircuit.empty(one.universe, one.provenance) for name, one in ranked.items()}
        ready = prepared(nothing, model, task, errors=errors, start_layer=start_layer)
        ranked = {name: one.within(ready.universe) for name, one in ranked.items()}
        if sizes is None:
            circuits = {
                name: tuple(one.first(one.above(level), how=f"{BY[by]} at least {level:g}", level=level, by=by) for level in levels)
                for name, one in ranked.items()
            }
        else:
            circuits = {name: tuple(_of_size(one, n, by) for n in _numbers(sizes, one)) for name, one in ranked.items()}
        counts = [circuit.n_nodes for circuit in next(iter(circuits.values()))]
        positions = ready.empty.provenance
        random = [tuple(random_nodes(ready.universe, n, seed=seed + draw, provenance=positions) for n in counts) for draw in range(draws)]
        return NodeSizes(ready, circuits, None if sizes is not None else dict.fromkeys(circuits, levels), random)

    def stable(
        self, maps: Mapping[str, ScoreMap], *, by: str, sites: str | Iterable[str | Site] | None, draws: int, seed: int
    ) -> dict[str, list[Stability | None]]:
        """Per method how stable the choice of each of its circuits is under resampling of the prompts of its map; None for those without nodes.

        Args:
            maps: those that the circuits were chosen by.
            by: as they were.
            sites: as they were.
            draws: resamples.
            seed: of the resamples.

        Raises:
            CircuitError: as :func:`patchlab.circuits.stability`.
        """
        found: dict[str, list[Stability | None]] = {}
        for name, circuits in self.circuits.items():
            choices = {place: self._choice(name, place, by, sites) for place, one in enumerate(circuits) if one.n_nodes}
            measured = stabilities(maps[name], choices, draws=draws, seed=seed) if choices else {}
            found[name] = [measured.get(place) for place in range(len(circuits))]
        return found

    def _choice(self, name: str, place: int, by: str, sites: str | Iterable[str | Site] | None) -> Callable[[ScoreMap], NodeCircuit]:
        """How a circuit is chosen, from the map or from one of a resample."""
        level = None if self.levels is None else self.levels[name][place]

        def choose(scores: ScoreMap) -> NodeCircuit:
            ranked = RankedNodes.of(scores, by, sites).within(self.ready.universe)
            return _of_size(ranked, self.circuits[name][place].n_nodes, by) if level is None else ranked.first(ranked.above(level))

        return choose


def random_nodes(universe: Sequence[Candidates], n: int, *, seed: int = 0, provenance: Mapping[str, object] | None = None) -> NodeCircuit:
    """``n`` candidates chosen at random.

    Raises:
        CircuitError: more than there are.
    """
    size = sum(one.size for one in universe)
    if not 0 <= n <= size:
        raise CircuitError(f"{n:,} random nodes were asked for; there are {size:,} candidates.")
    rng = np.random.default_rng(seed)
    shares = rng.multivariate_hypergeometric([one.size for one in universe], n, method="marginals")
    listed = {one.name: one.cells(one.drawn(int(k), rng)) for one, k in zip(universe, shares, strict=True)}
    return NodeCircuit(tuple(universe), listed, provenance={**(provenance or {}), "how": f"{n:,} random nodes (seed {seed})", "n_requested": n})


def _of_size(ranked: RankedNodes, n: int, by: str) -> NodeCircuit:
    if n == sum(one.size for one in ranked.universe):
        return NodeCircuit.full(ranked.universe, ranked.provenance)  # nothing is chosen, so nodes without scores are no hindrance
    if n:
        check_number(ranked, n)
    return ranked.first(n, how=f"top {n:,} by {BY[by]}", n_requested=n, by=by)


def _numbers(sizes: Sequence[int], ranked: RankedNodes) -> list[int]:
    total = sum(one.size for one in ranked.universe)
    chosen = [int(n) for n in sizes]
    if chosen != list(sizes) or not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] <= total:
        raise CircuitError(f"sizes are whole numbers of nodes from 0 to {total:,}, each larger than the one before; got {list(sizes)}.")
    return chosen
