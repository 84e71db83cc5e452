"""Kinds of runs: what each computes, the files that it leaves, and its statistics."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from patchlab.engine.memory import free_bytes
from patchlab.errors import MethodError, ScoreError
from patchlab.methods.names import scoring_method
from patchlab.scores import Cost, ScoreMap
from patchlab.sweeps.spec import CircuitSpec, FeatureSpec, RunSpec, ScoreSpec, VerifySpec
from patchlab.tables import json_able

if TYPE_CHECKING:
    from patchlab.circuits import FaithfulnessCurve, Sets, SmallestFaithful
    from patchlab.methods.verified.result import VerifiedResult
    from patchlab.models import Model
    from patchlab.tasks.task import Task

SCORES, VERIFIED, CURVE, SIZES, SMALLEST, CIRCUIT = "scores.nc", "verified.json", "curve.json", "sizes.json", "smallest.json", "circuit.json"
NEURONS, NODES = "neurons.nc", "nodes.csv"
"""Files of a run."""
Statistic = dict[str, Any]
"""A number of a run: ``site`` ("" for the whole run), ``statistic``, ``value``, and its 95 % interval ``lo``, ``hi`` (None without)."""


@dataclass
class Desk:
    """What the runs of a group share: the model, the task, and edge scores by method.

    Args:
        model: the model.
        task: all pairs.
        seed: of the halves of the task.
        share: of the free memory, for one run.
        progress: show the progress of cells on stderr.
    """

    model: "Model"
    task: "Task"
    seed: int = 0
    share: float = 1.0
    progress: bool = False
    edges: dict[tuple[str, int], ScoreMap] = field(default_factory=dict[tuple[str, int], ScoreMap])


@dataclass(frozen=True)
class Outcome:
    """What a run computed: its files, cost and statistics."""

    files: dict[str, bytes] = field(repr=False)
    cost: Cost
    statistics: list[Statistic]


def compute(run: RunSpec, desk: Desk, *, keeper: Any = None, say: Callable[[str], Any] = lambda _: None) -> Outcome:
    """The outcome of a run.

    Args:
        run: what is computed.
        desk: the model and the task of the run.
        keeper: keeps finished cells, for an interrupted run to go on from.
        say: told, in a line, what a reader of the results should know.

    Raises:
        PatchlabError: whatever a method or a circuit refuses, and a run that is predicted to need more memory than there is.
    """
    what = run.what
    if isinstance(what, ScoreSpec):
        return _score(run, what, desk, keeper, say)
    if isinstance(what, VerifySpec):
        return _verify(run, what, desk, say)
    if isinstance(what, FeatureSpec):
        return _features(run, what, desk, keeper, say)
    return _circuit(run, what, desk, keeper, say)


def _score(run: RunSpec, what: ScoreSpec, desk: Desk, keeper: Any, say: Callable[[str], Any]) -> Outcome:
    scores = _scored(run, what.method, desk.task, list(what.sites), desk, keeper, say)
    return Outcome({SCORES: saved(scores.save, ".nc")}, scores.cost, _of_scores(scores))


def _of_scores(scores: ScoreMap) -> list[Statistic]:
    """The ends of the gap, and per site what there is to find."""
    rows = _ends(scores)
    for site in scores.sites:
        live = scores.live[site].to_numpy() & scores.scored(site).to_numpy()
        effects = scores.mean(site).to_numpy()[live]
        rows += [_row(site, "live_cells", int(live.sum())), _row(site, "largest_effect", float(np.abs(effects).max()) if effects.size else None)]
    return rows


def _verify(run: RunSpec, what: VerifySpec, desk: Desk, say: Callable[[str], Any]) -> Outcome:
    options = {"direction": run.direction, "batch_size": run.batch_size, "progress": desk.progress}
    result = what.patching().run(desk.model, desk.task, list(what.sites), say=say, **options)
    _warn(result.screen, say)
    files = {VERIFIED: json.dumps(result.to_dict(), indent=1, allow_nan=False).encode(), SCORES: saved(result.screen.save, ".nc")}
    return Outcome(files, result.cost, _ends(result.screen) + _of_verified(result))


def _circuit(run: RunSpec, what: CircuitSpec, desk: Desk, keeper: Any, say: Callable[[str], Any]) -> Outcome:
    from patchlab import circuits

    sets = circuits.three_sets(desk.task, seed=desk.seed) if what.smallest else None
    choosing, held_out = desk.task.split(seed=desk.seed)
    memo = what.method, run.batch_size
    if memo not in desk.edges:
        desk.edges[memo] = _scored(run, what.method, choosing, ["edges"], desk, keeper, say)
    scores = desk.edges[memo]
    train = None if what.ablation in ("resample", "zero") else choosing
    options = {"how": what.how, "by": what.by, "ablation": what.ablation, "train": train, "batch_size": run.batch_size}
    options |= {"seed": desk.seed, "progress": desk.progress, "level": what.level, "stability": what.stability}
    sizes = None if what.sizes is None else list(what.sizes)
    curve = circuits.faithfulness_curve(desk.model, {what.method: scores}, held_out, sizes=sizes, random=what.random, **options)
    files, rows = {CURVE: saved(curve.save, ".json")}, _of_curve(curve)
    if sets is not None:
        more, sizes_found = _smallest(what, desk, scores, sets, options, say)
        files, rows = files | more, rows + sizes_found
    return Outcome(files, scores.cost, _ends(scores) + rows)


def _features(run: RunSpec, what: FeatureSpec, desk: Desk, keeper: Any, say: Callable[[str], Any]) -> Outcome:
    """What ``patchlab features compare`` does with one method; the model has the dictionaries only meanwhile."""
    from patchlab import feature_comparison as features

    choosing, measuring = desk.task.split(seed=desk.seed)
    points = features.attach(desk.model, str(what.path), what.points)
    try:
        sites = features.sites_at(points)
        scores = _scored(run, what.method, choosing, sites, desk, keeper, say)
        files, rows, costs = {SCORES: saved(scores.save, ".nc")}, _of_scores(scores), [scores.cost]
        neurons: dict[str, ScoreMap] = {}
        if features.NEURONS in desk.model.arch.sites:
            neurons[what.method] = _scored(run, what.method, choosing, [features.NEURONS], desk, None, say)
            files[NEURONS] = saved(neurons[what.method].save, ".nc")
            costs.append(neurons[what.method].cost)
        options = {"ablation": what.ablation, "seed": desk.seed, "batch_size": run.batch_size, "progress": desk.progress}
        tables = []
        for nodes in features.NODES:
            maps = neurons if nodes == "neurons" else {what.method: scores}
            found = features.circuits_of(desk.model, measuring, nodes, maps, sites, **options)
            if isinstance(found, str):
                say(f"warning: {nodes}: {found}")
                continue
            tables.append(found[0])
            rows += _of_nodes(nodes, found[0], found[1], random=features.RANDOM)
    finally:
        desk.model.drop_dictionaries()
    if tables:
        files[NODES] = pd.concat(tables, ignore_index=True).to_csv(index=False).encode()
    return Outcome(files, _sum(costs), rows)


def _sum(costs: Sequence[Cost]) -> Cost:
    """What several things took, one after the other."""
    peaks = ([getattr(one, name) for one in costs] for name in ("predicted_bytes", "cuda_peak_bytes"))
    return Cost(
        sum(one.forwards for one in costs),
        sum(one.backwards for one in costs),
        sum(one.positions for one in costs),
        sum(one.seconds for one in costs),
        *(max((peak for peak in found if peak is not None), default=None) for found in peaks),
    )


def _of_nodes(nodes: str, table: pd.DataFrame, areas: pd.DataFrame, *, random: str) -> list[Statistic]:
    """Faithfulness and completeness by the number of nodes, and their means over the numbers; ``nodes`` stands in the place of a site."""
    rows: list[Statistic] = []
    for area in areas.to_dict("records"):
        prefix = "random_" if area["method"] == random else ""
        rows.append(_row(nodes, f"{prefix}distance", area["distance"], area["distance_lo"], area["distance_hi"]))
        rows.append(_row(nodes, f"{prefix}left", area["left"]))
    for point in table[table["method"] != random].to_dict("records"):
        for name in ("faithfulness", "completeness"):
            rows.append(_row(nodes, f"{name}_{point['n_nodes']}", point[name], point[f"{name}_lo"], point[f"{name}_hi"]))
    return rows


def _smallest(
    what: CircuitSpec, desk: Desk, scores: ScoreMap, sets: "Sets", options: dict[str, Any], say: Callable[[str], Any]
) -> tuple[dict[str, bytes], list[Statistic]]:
    """The smallest faithful circuit; a line, and no number, where a quarter of the pairs cannot tell what faithful is."""
    from patchlab import circuits

    try:
        found = circuits.smallest_faithful(desk.model, {what.method: scores}, sets.finding, sets.reporting, **options)
    except ScoreError as error:
        say(f"warning: no smallest faithful circuit was looked for on {sets}: {error}")
        return {}, []
    files = {SIZES: saved(found.curve.save, ".json"), SMALLEST: _json(found.table.to_dict("records")[0])}
    circuit = found.circuits.get(what.method)
    if circuit is not None and circuit.nodes:
        files[CIRCUIT] = saved(lambda path: circuits.write(circuit, path), ".json")
    return files, _of_smallest(found, sets)


def _scored(run: RunSpec, name: str, task: "Task", sites: list[str], desk: Desk, keeper: Any, say: Callable[[str], Any]) -> ScoreMap:
    method, options = scoring_method(name), {"direction": run.direction, "batch_size": run.batch_size}
    needed, room = method.prepared(desk.model, task, sites, **options)[2], free_bytes(desk.model.device) * desk.share
    if needed > room:
        raise MethodError(
            f"{run.label} is predicted to need {needed / 1e9:.1f} GB for a batch of {min(run.batch_size, len(task))} pairs, and "
            f"{room / 1e9:.1f} GB are free for it. Lower batch_size, run fewer at once (--workers), or use a larger machine."
        )

    def scored() -> ScoreMap:
        return method.run(desk.model, task, sites, checkpoint=keeper, progress=desk.progress, **options)

    try:
        scores = scored()
    except MethodError as error:
        if keeper is None or keeper.read() is None:
            raise
        say(f"note: what was finished before is not used: {error}")
        keeper.remove()
        scores = scored()
    _warn(scores, say)
    return scores


def _warn(scores: ScoreMap, say: Callable[[str], Any]) -> None:
    if (warning := scores.reversed_gap()) is not None:
        say(f"warning: {warning}")
    for note in scores.provenance.get("notes", ()):
        say(f"note: {note}")


def saved(save: Callable[[Path], Any], suffix: str) -> bytes:
    """The bytes that something writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        save(path)
        return path.read_bytes()


def _json(values: dict[Any, Any]) -> bytes:
    return json.dumps(json_able({str(name): value for name, value in values.items()}), indent=1, allow_nan=False).encode()


def _row(site: str, statistic: str, value: Any, lo: Any = None, hi: Any = None) -> Statistic:
    return {"site": site, "statistic": statistic, **json_able({"value": value, "lo": lo, "hi": hi})}


def _ends(scores: ScoreMap) -> list[Statistic]:
    """The metric of the two unpatched runs and the gap between them."""
    ends = {side: scores.data[side].to_numpy() for side in ("metric_clean", "metric_corrupted")}
    interval = scores.gap_interval()
    rows = [_row("", "pairs", len(ends["metric_clean"]))]
    return [*rows, *(_row("", side, float(values.mean())) for side, values in ends.items()), _row("", "gap", scores.gap, *interval)]


def _of_verified(result: "VerifiedResult") -> list[Statistic]:
    recall = result.recall
    numbers = {"live_cells": result.n_live, "patched_cells": len(result.table), "found": len(result.top), "at_least": recall.at_least}
    shares = {"recall": recall.share, "confidence": recall.confidence, "share_of_sweep": result.share, "complete": float(result.complete)}
    return [_row("", name, value) for name, value in (numbers | shares).items()]


def _of_curve(curve: "FaithfulnessCurve") -> list[Statistic]:
    rows: list[Statistic] = []
    for area in curve.areas.to_dict("records"):
        prefix = "random_" if area["method"] == "random" else ""
        rows += [_row("edges", prefix + name, area[name], area[f"{name}_lo"], area[f"{name}_hi"]) for name in ("cpr", "cmd")]
    for point in curve.table.to_dict("records"):
        if point["method"] != "random":
            size = point["n_requested"]
            rows.append(_row("edges", f"faithfulness_{size}", point["faithfulness"], point["lo"], point["hi"]))
            if "jaccard" in point:
                rows += _of_stability(f"jaccard_{size}", point)
    return rows


def _of_stability(name: str, numbers: Mapping[Any, Any]) -> list[Statistic]:
    """How alike resamples choose, with the range of 95 % of their pairs, and what random choices of the same sizes would share."""
    ends = (numbers["jaccard"], numbers["jaccard_lo"], numbers["jaccard_hi"])
    return [_row("edges", name, *ends), _row("edges", f"{name}_chance", numbers["jaccard_chance"])]


def _of_smallest(found: "SmallestFaithful", sets: "Sets") -> list[Statistic]:
    row = found.table.to_dict("records")[0]
    reached = math.isfinite(row["n_edges"])
    rows = [_row("edges", "smallest_edges", row["n_edges"] if reached else None, row["n_edges_lo"], row["n_edges_hi"])]
    rows += [_row("edges", "smallest_share", row["fraction"]), _row("edges", "smallest_faithfulness", row["faithfulness"], row["lo"], row["hi"])]
    if "jaccard" in row:
        rows += _of_stability("smallest_jaccard", row)
    return [*rows, *(_row("", f"{name}_pairs", len(part)) for name, part in vars(sets).items())]


def plain_cost(cost: Cost) -> dict[str, Any]:
    """A cost as plain values."""
    return json_able(asdict(cost))
