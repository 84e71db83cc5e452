"""The smallest faithful circuit of each score: found on a fine grid of sizes, and judged on pairs that had no part in finding it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from patchlab.circuits.evaluation.curve import FaithfulnessCurve, faithfulness_curve, stable_sizes
from patchlab.circuits.evaluation.evaluate import evaluate
from patchlab.circuits.heldout import check_disjoint
from patchlab.circuits.select import mean_effects
from patchlab.circuits.sparse import AnyCircuit
from patchlab.circuits.stability import noted
from patchlab.errors import CircuitError
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.stats.jaccard import NUMBERS
from patchlab.tasks.task import Task


@dataclass(frozen=True, eq=False)
class SmallestFaithful:
    """Per method the smallest circuit from which on all larger ones that were measured are faithful.

    Args:
        table: a row per method: ``method``, ``level``, ``n_requested``, ``fraction``, ``n_edges`` (after pruning), its 95 % interval
            ``n_edges_lo``, ``n_edges_hi`` over resamples of the finding pairs (the same for all methods; infinite where no size is faithful),
            ``found_faithfulness`` on those pairs, ``faithfulness`` with ``lo``, ``hi`` and ``metric`` on the reporting pairs, ``n_sizes`` that
            were measured, and how many pairs each step had: ``choosing_pairs``, ``finding_pairs``, ``reporting_pairs``. NaN where no size is
            faithful. With ``stability`` also how stable the choice of that size is (:data:`patchlab.stats.jaccard.NUMBERS`).
        curve: the measurements on the finding pairs.
        circuits: the circuit of each method that has one.
        provenance: of the measurement on the reporting pairs, or of the curve if there was nothing to report; JSON-able.
    """

    table: pd.DataFrame
    curve: FaithfulnessCurve = field(repr=False)
    circuits: Mapping[str, AnyCircuit] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)

    @property
    def level(self) -> float:
        """What counts as faithful."""
        return float(self.curve.provenance["level"])

    def sentence(self, method: str) -> str:
        """What was found for a method, in words.

        Raises:
            KeyError: no such method.
        """
        row = {str(row["method"]): row for row in self.table.to_dict("records")}[method]
        if not np.isfinite(row["n_edges"]):
            return f"f ≥ {self.level:g} from no size on"
        interval = f" (95 % interval {row['n_edges_lo']:,.0f} to {row['n_edges_hi']:,.0f})" if np.isfinite(row["n_edges_lo"]) else ""
        bounds = f" [{row['lo']:.3f}, {row['hi']:.3f}]" if np.isfinite(row["lo"]) else ""
        return f"f ≥ {self.level:g} from {row['n_edges']:,.0f} edges on{interval}; f = {row['faithfulness']:.3f}{bounds} there on the reporting pairs"

    def __repr__(self) -> str:
        about, first = self.curve.provenance, self.table.iloc[0]
        pairs = f"found on {first['finding_pairs']} pairs, reported on {first['reporting_pairs']} others"
        head = f"SmallestFaithful({about['model']}, {about['metric']}, {about['ablation']} ablation; {first['n_sizes']} sizes; {pairs})"
        return "\n".join([head, *(f"  {name}: {self.sentence(name)}" for name in self.table["method"])])


def size_grid(scores: ScoreMap | Mapping[str, ScoreMap]) -> list[int]:
    """Sizes from one edge to the whole graph, each at most a tenth larger than the one before, or one edge.

    Where a method does not score all edges, the grid goes up to those that all methods score, and then to the whole graph.

    Raises:
        CircuitError: no maps, or maps of different graphs or granularity.
    """
    maps = {"scores": scores} if isinstance(scores, ScoreMap) else scores
    effects = {name: mean_effects(one)[0] for name, one in maps.items()}
    totals = {name: maps[name].graph.n_edges * (values.shape[2] if values.ndim == 3 else 1) for name, values in effects.items()}
    if len(set(totals.values())) != 1:
        raise CircuitError(f"a grid of sizes is for maps of one graph and one granularity; their edges are {totals or 'none: there is no map'}.")
    total = next(iter(totals.values()))
    scored = min(int(np.isfinite(values[maps[name].graph.allowed]).sum()) for name, values in effects.items())
    sizes = sizes_to(scored)
    whole = total == next(iter(maps.values())).graph.n_edges
    return [*sizes, total] if scored < total and whole else sizes


def sizes_to(largest: int) -> list[int]:
    """Whole numbers up to the largest, in steps of at most 1.1, or of one.

    >>> sizes_to(25)[-8:]
    [16, 17, 18, 19, 20, 22, 24, 25]
    """
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] + max(1, sizes[-1] // 10)))
    return sizes


def smallest_faithful(
    model: Model,
    scores: ScoreMap | Mapping[str, ScoreMap],
    finding: Task,
    reporting: Task,
    *,
    level: float | int = 0.9,
    how: str = "top_n",
    by: str = "abs",
    stability: int = 0,
    allow_overlap: bool = False,
    **options: Any,
) -> SmallestFaithful:
    """Find the smallest faithful circuit of each score on some pairs, and report on others how faithful it is.

    Circuits of all sizes of :func:`size_grid` are measured: faithfulness is not monotone in size, so nothing is skipped. What is smallest on
    some pairs is lucky on them; so the scores, the size and its faithfulness come from three disjoint sets (:func:`three_sets`).

    Args:
        model: the model.
        scores: one map of edge scores, or several by name.
        finding: pairs to find the size on: others than those of the scores.
        reporting: pairs to measure the circuit found on: others than both.
        level: what counts as faithful, above 0 and at most 1.
        how: ``top_n`` or ``greedy``.
        by: ``abs`` or ``signed`` importance.
        stability: resamples of the pairs of the scores on which the circuit found is chosen again; its size stays. 0 for none.
        allow_overlap: accept sets that share pairs.
        options: ``ablation``, ``train``, ``fit``, ``post_norm``, ``n_boot``, ``seed``, ``batch_size``, ``max_memory`` and ``progress``, as for
            :func:`faithfulness_curve`.

    Raises:
        CircuitError: sets that share pairs, a level outside its range, and as :func:`faithfulness_curve`.
        ScoreError: the full model cannot be told from the fully ablated one.

    Example:
        >>> smallest_faithful(model, {"EAP": atp, "edge-RelP": relp}, sets.finding, sets.reporting)  # doctest: +SKIP
    """
    if not 0 < level <= 1:
        raise CircuitError(f"the level is a faithfulness above 0 (that of no edges) and at most 1 (that of all); got {level}.")
    check_disjoint({"task_pairs": finding.pair_fingerprints}, reporting, "the size", allow_overlap=allow_overlap)
    maps = {str(scores.provenance.get("method", "scores")): scores} if isinstance(scores, ScoreMap) else dict(scores)
    shared = {"allow_overlap": allow_overlap, **options}
    curve = faithfulness_curve(model, maps, finding, sizes=size_grid(maps), how=how, by=by, random=0, level=level, **shared)
    circuits = {name: found for name in maps if (found := curve.smallest_circuit(name, level)) is not None}
    stable = {}
    for name, circuit in circuits.items():
        n, seed = int(circuit.provenance.get("n_requested", 0)), int(options.get("seed", 0))  # all edges are not chosen
        for one in stable_sizes(maps[name], [n] if n else [], how=how, by=by, draws=stability, seed=seed).values():
            stable[name], circuits[name] = one, noted(circuit, one.record())
    reported = evaluate(model, circuits, reporting, completeness=False, **shared) if circuits else None
    there = {} if reported is None else reported.table.set_index("circuit").to_dict("index")
    areas = curve.areas.set_index("method").to_dict("index")
    rows = []
    for name, one in maps.items():
        best = curve.smallest(name, level)
        found = {} if best is None else best.to_dict()
        size = {key: found.get(key, np.nan) for key in ("n_requested", "fraction", "n_edges")}
        size |= {f"n_edges_{end}": areas[name][f"smallest_{end}"] for end in ("lo", "hi")} | {"found_faithfulness": found.get("faithfulness", np.nan)}
        judged = {key: there.get(name, {}).get(key, np.nan) for key in ("faithfulness", "lo", "hi", "metric")}
        if stability:
            judged |= dict.fromkeys(NUMBERS, np.nan) if name not in stable else stable[name].numbers
        pairs = {"choosing_pairs": one.data.sizes["example"], "finding_pairs": len(finding), "reporting_pairs": len(reporting)}
        rows.append({"method": name, "level": float(level), **size, **judged, "n_sizes": len(curve.table) // len(maps), **pairs})
    return SmallestFaithful(pd.DataFrame(rows), curve, circuits, (curve if reported is None else reported).provenance)
