"""A comparison of methods on the features of dictionaries: how well they agree with exact patching of single features, and how faithful the circuits
of nodes are that they choose, of features, of features without the errors, and of neurons.

Circuits are chosen on one half of the pairs and measured on the other, as in Marks et al. 2024 (arXiv 2403.19647, §3): everything outside a circuit
carries its positional mean over corrupted prompts, and completeness is the faithfulness of all that is outside.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from patchlab.circuits import NodeCircuit, evaluate
from patchlab.circuits.evaluation.scale import Scale
from patchlab.circuits.select_nodes import top_nodes
from patchlab.comparison.compare import Comparison, compare
from patchlab.comparison.job import exact_first, named_task, scored, stopwatch
from patchlab.errors import MethodError, ScoreError, unknown
from patchlab.features import load_dictionaries
from patchlab.models import Model, load_model
from patchlab.scores import ScoreMap
from patchlab.sites import POINTS
from patchlab.stats.bootstrap import interval
from patchlab.tasks import Task

NODES = {
    "features": "features and errors of the dictionaries, both as nodes",
    "features-without-errors": "features alone; the errors are ablated in every run",
    "neurons": "neurons of the MLPs",
}
METHODS = ("exact", "atp", "relp", "relp-ah", "attnlrp", "gim", "ig:1", "ig:5", "ig:10", "ig-activations-left:10")
"""Gradients, relevance, integrated gradients over inputs, and one submodule at a time as Marks et al. take them (left sum, 10 points)."""
MARKS = "ig-activations-left:10"
RANDOM = "random"
SIZES = 12
NEURONS = "mlp_post"


@dataclass(frozen=True)
class FeatureJob:
    """The job of a comparison on features, in the words of the command line.

    Args:
        model: packaged, folder or hub name.
        task: generator or file.
        dictionaries: folder or hub name, or the name of a packaged model; None for the model's own.
        points: sites with dictionaries to use; empty for all.
        methods: exact patching is the reference.
        direction: ``noising``: corrupted values are put into the clean run, which is what circuits are measured by.
        n: pairs; None for 32 of a generator and all of a file.
        ablation: what nodes outside a circuit carry.

    Raises:
        MethodError: an unknown method, one named twice, ``exact`` not among them, or nothing beside it.
    """

    model: str
    task: str
    dictionaries: str | None = None
    points: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    direction: str = "noising"
    n: int | None = None
    seed: int = 0
    ablation: str = "mean_positional"
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods = exact_first(self.methods)
        if methods[0] != "exact":
            raise MethodError(f"features are compared between the prompts of a pair, by `exact` itself; got {methods[0]}. Leave its options out.")
        object.__setattr__(self, "methods", methods)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**asdict(self), "methods": list(self.methods), "points": list(self.points), "options": dict(self.options)}


@dataclass(frozen=True)
class FeatureResults:
    """The results of a job.

    Args:
        job: what was asked for.
        model: the model, with its dictionaries.
        points: the sites that have dictionaries.
        choosing: the half of the pairs that was scored.
        measuring: the half that circuits were measured on.
        accuracy: share of all prompts that the model answers right, by side.
        maps: score maps of features and errors by method, the reference first.
        neurons: those of neurons.
        comparison: agreement with exact patching of features and errors.
        circuits: a row per method, kind of nodes and number of nodes: ``method``, ``nodes``, ``n_nodes``, ``faithfulness`` and ``completeness``,
            these two with ``_lo`` and ``_hi``; what ``features.csv`` holds.
        areas: a row per method and kind of nodes: ``distance``, the mean of abs(1 − faithfulness) over the sizes, with ``_lo`` and ``_hi``, and
            ``left``, the mean of completeness over the sizes (both: low is good).
        differences: paired differences of ``distance`` between each method and :data:`MARKS`: ``method``, ``nodes``, ``value``, ``lo``, ``hi``.
        undefined: by kind of nodes, why faithfulness is not defined, where it is not.
        seconds: of each step.
    """

    job: FeatureJob
    model: Model
    points: tuple[str, ...]
    choosing: Task
    measuring: Task
    accuracy: dict[str, float]
    maps: dict[str, ScoreMap]
    neurons: dict[str, ScoreMap]
    comparison: Comparison
    circuits: pd.DataFrame
    areas: pd.DataFrame
    differences: pd.DataFrame
    undefined: dict[str, str]
    seconds: dict[str, float]


def run(
    job: FeatureJob,
    *,
    model: Model | None = None,
    folder: Path | None = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> FeatureResults:
    """Load model, dictionaries and task, score, compare, choose circuits, measure them.

    Args:
        job: what to compare.
        model: the job's model, if it is loaded already; dictionaries that it has are replaced.
        folder: score maps are written there as they finish; what an interrupted run left is not computed again.
        say: told, in a line each, what is going on.
        progress: show progress on stderr.

    Raises:
        PatchlabError: whatever is wrong with the names, the pairs, the model or the dictionaries.
    """
    seconds, done = stopwatch()
    model = model or load_model(job.model, device=job.device, dtype=job.dtype)
    points = attach(model, job.dictionaries or job.model, job.points)
    done("load model and dictionaries")
    task = named_task(job.task, model, n=job.n, seed=job.seed, options=job.options)
    accuracy = task.accuracy(model)
    choosing, measuring = task.split(seed=job.seed)
    done("load task")
    say(f"{model.name}: {len(choosing)} pairs for choosing, {len(measuring)} for measuring; dictionaries on {', '.join(points)}")
    settings = {"direction": job.direction, "batch_size": job.batch_size, "progress": progress}
    sites = sites_at(points)
    maps = scored(job.methods, model, choosing, sites, folder=folder, say=say, done=done, **settings)
    neurons: dict[str, ScoreMap] = {}
    if NEURONS in model.arch.sites:
        named: dict[str, Any] = {"stem": "neurons", "say": lambda line: say(f"neurons: {line}")}
        neurons = scored(job.methods, model, choosing, [NEURONS], folder=folder, **named, **settings)
        done("neurons")
    comparison = compare(maps["exact"], {name: maps[name] for name in job.methods[1:]})
    done("compare")
    tables: list[tuple[pd.DataFrame, ...]] = []
    undefined: dict[str, str] = {}
    for nodes in NODES:
        options = {"ablation": job.ablation, "seed": job.seed, "batch_size": job.batch_size, "progress": progress}
        found = circuits_of(model, measuring, nodes, neurons if nodes == "neurons" else maps, sites, **options)
        if isinstance(found, str):
            undefined[nodes] = found
            say(f"{nodes}: {found}")
        else:
            tables.append(found)
        done(f"circuits of {nodes}")
    curves, areas, differences = (_joined([parts[i] for parts in tables]) for i in range(3))
    return FeatureResults(
        job, model, points, choosing, measuring, accuracy, maps, neurons, comparison, curves, areas, differences, undefined, seconds
    )


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True) if tables else pd.DataFrame()


def attach(model: Model, dictionaries: str, points: Sequence[str] = ()) -> tuple[str, ...]:
    """Give a model dictionaries, in place of those that it has; the points that then have some, in the order of a block.

    Args:
        model: the model.
        dictionaries: folder or hub name, or the name of a packaged model.
        points: sites with dictionaries to use; empty for all.

    Raises:
        DictionaryError, ScoreError: none there, none at one of the points, or dictionaries of another model.
    """
    loaded = load_dictionaries(dictionaries, model, kind="sae", sites=points or None)
    present = {one.writes for one in loaded}
    found = tuple(point for point in POINTS if point in present)
    if missing := [point for point in points if point not in found]:
        raise ScoreError(unknown("site with dictionaries", missing[0], found))
    model.drop_dictionaries()
    model.add_dictionaries(loaded)
    return found


def sites_at(points: Sequence[str]) -> list[str]:
    """The sites that are scored: features and errors at these points.

    >>> sites_at(["mlp_out"])
    ['features.mlp_out', 'error.mlp_out']
    """
    return [f"{part}.{point}" for point in points for part in ("features", "error")]


def sizes_of(most: int, n: int = SIZES) -> list[int]:
    """Numbers of nodes that grow by a constant factor, from 1 to the most.

    >>> sizes_of(100, 5)
    [1, 3, 10, 32, 100]
    """
    return sorted({round(most ** (i / (n - 1))) for i in range(n)})


def circuits_of(
    model: Model,
    task: Task,
    nodes: str,
    maps: Mapping[str, ScoreMap],
    sites: Sequence[str],
    *,
    ablation: str,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame] | str:
    """Circuits of one kind of nodes, chosen by several maps and at random: curves, areas and differences, as :class:`FeatureResults` has them.

    Args:
        model: the model, with its dictionaries.
        task: the pairs that circuits are measured on: others than those of the maps.
        nodes: one of :data:`NODES`.
        maps: score maps by method, of these sites or of neurons.
        sites: those of :func:`sites_at`.
        ablation: what nodes outside a circuit carry.
        seed: of the resamples and of the circuits at random.
        batch_size: examples per batch.
        progress: show progress on stderr.

    Returns:
        The three tables, or a sentence on why there are none.
    """
    if not maps:
        return f"{model.name} has no site {NEURONS}"
    wanted = {"features": list(sites), "features-without-errors": [site for site in sites if site.startswith("features.")], "neurons": [NEURONS]}[
        nodes
    ]
    usable = {name: scores for name, scores in maps.items() if not set(wanted) & set(scores.not_scored)}
    counts = {name: sum(int(np.isfinite(scores.mean(site).to_numpy()).sum()) for site in wanted) for name, scores in usable.items()}
    sizes = sizes_of(min(counts.values()))
    chosen: dict[tuple[str, int], NodeCircuit] = {}
    for name, scores in usable.items():
        chosen |= {(name, n): top_nodes(scores, n, sites=wanted) for n in sizes}
    universe = top_nodes(next(iter(usable.values())), 1, sites=wanted).universe
    rng = np.random.default_rng(seed)
    chosen |= {(RANDOM, n): _at_random(universe, n, rng) for n in sizes}
    found = evaluate(
        model,
        {f"{name} {n}": one for (name, n), one in chosen.items()},
        task,
        ablation=ablation,
        errors="nodes" if nodes != "features-without-errors" else "ablated",
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    if why := found.provenance.get("faithfulness_not_defined"):
        return why
    table = pd.DataFrame({"method": [name for name, _ in chosen], "nodes": nodes, "n_nodes": [n for _, n in chosen]})
    rows = found.table.set_index("circuit").loc[[f"{name} {n}" for name, n in chosen]]
    for column, low, high in (("faithfulness", "lo", "hi"), ("completeness", "completeness_lo", "completeness_hi")):
        table[column], table[f"{column}_lo"], table[f"{column}_hi"] = rows[column].to_numpy(), rows[low].to_numpy(), rows[high].to_numpy()
    scale = Scale(found.metric_full, found.metric_empty, 1000, seed)
    drawn = {name: np.abs(1 - scale.resampled(np.stack([found.metric[f"{name} {n}"] for n in sizes]))).mean(1) for name in (*usable, RANDOM)}
    return table, _areas(table, nodes, drawn), _differences(table, nodes, drawn)


def _at_random(universe: Sequence[Any], n: int, rng: np.random.Generator) -> NodeCircuit:
    """A circuit of nodes drawn at random, each candidate as likely as any other."""
    sizes = np.array([one.size for one in universe])
    share = rng.multivariate_hypergeometric(sizes, n)
    listed = {one.name: one.cells(one.drawn(int(k), rng)) for one, k in zip(universe, share, strict=True)}
    return NodeCircuit(tuple(universe), listed, provenance={"how": f"{n} nodes at random"})


def _areas(table: pd.DataFrame, nodes: str, drawn: Mapping[str, Float[np.ndarray, " draw"]]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for name, draws in drawn.items():
        of = table[table["method"] == name]
        low, high = map(float, interval(draws))
        distance = float(np.abs(1 - of["faithfulness"]).mean())
        rows.append(
            {"method": name, "nodes": nodes, "distance": distance, "distance_lo": low, "distance_hi": high, "left": of["completeness"].mean()}
        )
    return pd.DataFrame(rows)


def _differences(table: pd.DataFrame, nodes: str, drawn: Mapping[str, Float[np.ndarray, " draw"]]) -> pd.DataFrame:
    """How much farther from 1 each method's circuits are than those of :data:`MARKS`, on the same draws of examples."""
    if MARKS not in drawn:
        return pd.DataFrame(columns=["method", "other", "nodes", "value", "lo", "hi"])
    value = {name: float(np.abs(1 - table.loc[table["method"] == name, "faithfulness"]).mean()) for name in drawn}
    rows: list[dict[str, Any]] = []
    for name, draws in drawn.items():
        if name not in (MARKS, RANDOM):
            low, high = map(float, interval(draws - drawn[MARKS]))
            rows.append({"method": name, "other": MARKS, "nodes": nodes, "value": value[name] - value[MARKS], "lo": low, "hi": high})
    return pd.DataFrame(rows)


def sentences(results: FeatureResults) -> list[str]:
    """What came out, in words: where relevance is as good as integrated gradients, and where it is not."""
    said: list[str] = []
    passes = {row["method"]: row["forwards"] + 2 * row["backwards"] for row in results.comparison.costs.to_dict("records")}
    for nodes in NODES:
        if nodes in results.undefined:
            said.append(f"{nodes}: {results.undefined[nodes]}")
            continue
        largest = (
            results.circuits[(results.circuits["nodes"] == nodes) & (results.circuits["method"] != RANDOM)].groupby("method")["faithfulness"].max()
        )
        if not len(largest):
            continue
        said.append(f"{nodes}: the most faithful circuit, of any method and size, keeps {largest.max():.0%} of the behaviour ({largest.idxmax()}).")
        compared = results.differences[results.differences["nodes"] == nodes] if len(results.differences) else results.differences
        for row in compared.to_dict("records"):
            if row["method"] not in ("relp", "atp") or not all(map(math.isfinite, (row["lo"], row["hi"]))):
                continue
            better, worse = row["hi"] < 0, row["lo"] > 0
            verdict = "are more faithful than" if better else "are less faithful than" if worse else "cannot be told in faithfulness from"
            said.append(
                f"{nodes}: circuits chosen by {row['method']} {verdict} those chosen by {MARKS} (mean |1 − f| over "
                f"{_count(results, nodes)} sizes {row['value']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]; "
                f"low is good), at {passes[row['method']]:,} passes against {passes[MARKS]:,}."
            )
    return said


def _count(results: FeatureResults, nodes: str) -> int:
    return int(results.circuits.loc[results.circuits["nodes"] == nodes, "n_nodes"].nunique())
