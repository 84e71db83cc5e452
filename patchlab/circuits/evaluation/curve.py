"""Faithfulness against the size of circuits, of edges or of nodes: which score finds the smaller faithful circuit."""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.ablations import ABLATIONS, OptimalFit, still_falling
from patchlab.circuits.evaluation.node_runner import NodeRunner
from patchlab.circuits.evaluation.node_sizes import NodeSizes
from patchlab.circuits.evaluation.runner import Runner, checked
from patchlab.circuits.evaluation.scale import Scale, areas
from patchlab.circuits.formats.mib import MIB_FRACTIONS
from patchlab.circuits.heldout import check_disjoint
from patchlab.circuits.select import BY, greedy, top_n
from patchlab.circuits.select_nodes import of_nodes
from patchlab.circuits.sparse import AnyCircuit
from patchlab.circuits.stability import Stability, noted, stabilities
from patchlab.errors import CircuitError, unknown
from patchlab.graph import Graph
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.scores.arrays import plain
from patchlab.sites import Site
from patchlab.stats.bootstrap import TAILS, interval, resampling_weights
from patchlab.stats.jaccard import NUMBERS
from patchlab.store.files import writing
from patchlab.tasks.task import Task
from patchlab.versions import library_versions

HOW: dict[str, Callable[..., Any]] = {"top_n": top_n, "greedy": greedy}
RANDOM = "random"
_COLUMNS = {
    "table": ("method", "n_requested", "fraction", "faithfulness", "lo", "hi", "metric"),
    "areas": ("method", "cpr", "cpr_lo", "cpr_hi", "cmd", "cmd_lo", "cmd_hi"),
}
"""What a file of a curve must have, beside the number of edges or nodes."""


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size, per method.

    Args:
        table: a long table: ``method``, ``n_requested`` (edges before pruning), ``fraction`` (of all edges), ``n_edges`` (after pruning;
            counted per position for circuits by position), ``faithfulness`` with its 95 % interval ``lo``, ``hi`` over examples (for
            ``random`` also over draws), ``metric`` (mean, in its unit). Of circuits of nodes it has ``n_nodes`` for ``n_edges``,
            ``threshold`` (NaN where numbers of nodes were asked for), and ``completeness`` (faithfulness of the complement; low is good)
            with ``completeness_lo``, ``completeness_hi``. With ``stability`` also what :func:`patchlab.circuits.stability` finds of
            each choice (:data:`patchlab.stats.jaccard.NUMBERS`), over resamples of the examples of the scores; NaN for ``random`` and where nothing
            is chosen.
        areas: per method ``cpr`` (area under f, high is good) and ``cmd`` (area between f and 1, low is good; of ``random``: of the mean
            over draws) with intervals: trapezoids over the requested fractions, from the smallest to the largest, without a point at 0.
            They are MIB's CPR and CMD only at MIB's ten sizes (:attr:`mib_sizes`). And ``smallest``, what :meth:`smallest` gives at the
            level of the provenance, with the 95 % interval ``smallest_lo``, ``smallest_hi`` of measured sizes over resamples of the examples,
            the same for all methods; infinite where no size is faithful. No finer than the sizes: see :func:`smallest_faithful`. Read the three
            together: CPR has no upper bound and rewards circuits that overshoot (f above 1, by leaving out what works against the behaviour),
            which CMD counts as far from the model as falling short.
        circuits: the circuits of each method, in the order of its rows (not of ``random``).
        provenance: model, task, ablation, selection; JSON-able.
    """

    table: pd.DataFrame
    areas: pd.DataFrame
    circuits: Mapping[str, tuple[AnyCircuit, ...]] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)

    @property
    def unit(self) -> str:
        """What the circuits are made of: ``edges`` or ``nodes``."""
        return str(self.provenance.get("unit", "edges"))

    @property
    def size_column(self) -> str:
        """The column of the table with their number."""
        return f"n_{self.unit}"

    @property
    def mib_sizes(self) -> bool:
        """Whether the sizes are MIB's ten, which CPR and CMD are defined on."""
        shares = sorted(set(self.table["fraction"]))
        return len(shares) == len(MIB_FRACTIONS) and bool(np.allclose(shares, sorted(MIB_FRACTIONS)))

    def smallest(self, method: str, level: float | int = 0.9) -> pd.Series | None:
        """The row of the smallest measured circuit (after pruning) from which on all larger ones have at least this faithfulness; None if none.

        Faithfulness is not monotone in size: a small circuit can reach the level by luck, and a larger one fall below it.

        Raises:
            CircuitError: no such method.
        """
        rows = self._rows(method).sort_values(self.size_column, ascending=False, kind="stable")
        kept = int(_kept(rows["faithfulness"].to_numpy(), level))
        return rows.iloc[kept - 1] if kept else None

    def smallest_circuit(self, method: str, level: float | int = 0.9) -> AnyCircuit | None:
        """The circuit of :meth:`smallest`.

        Raises:
            CircuitError: no such method, or one without circuits (``random``, or a curve read from a file).
        """
        row = self.smallest(method, level)
        if method not in self.circuits:
            raise CircuitError(f"this curve has no circuits of {method!r}; it has those of: {', '.join(self.circuits) or '(none)'}.")
        return None if row is None else self.circuits[method][int(np.flatnonzero(self._rows(method).index == row.name)[0])]

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write tables and provenance as JSON; the circuits have files of their own (:func:`patchlab.circuits.write`).

        Raises:
            OutputError: the file exists, or cannot be written.
        """
        record = {"table": self.table.to_dict("list"), "areas": self.areas.to_dict("list"), "provenance": self.provenance}
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "FaithfulnessCurve":
        """Read what :meth:`save` wrote; without the circuits.

        Raises:
            CircuitError: no such file, or one that is no curve.
        """
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            if missing := [key for name, columns in _COLUMNS.items() for key in columns if key not in record[name]]:
                raise KeyError(missing[0])
            if (size := f"n_{record['provenance'].get('unit', 'edges')}") not in record["table"]:
                raise KeyError(size)
            table, areas = (pd.DataFrame(record[name]) for name in _COLUMNS)
            if not len(table) or set(table["method"]) != set(areas["method"]):
                raise ValueError("its areas are not those of the methods in its table")
            return FaithfulnessCurve(table, areas, {}, dict(record["provenance"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CircuitError(f"cannot read the faithfulness curve {path}: {error}. Give a file that FaithfulnessCurve.save wrote.") from error

    def _rows(self, method: str) -> pd.DataFrame:
        if method not in set(self.table["method"]):
            raise CircuitError(unknown("method of this curve", method, set(self.table["method"])))
        return self.table.loc[self.table["method"] == method]

    def _reach(self, method: str, level: float = 0.9) -> str:
        """From which size on circuits are faithful, and the next smaller one that was tried, in words."""
        rows, best = self._rows(method), self.smallest(method, level)
        tried = f"of the {len(rows)} sizes tried"
        if best is None:
            return f"f ≥ {level:g} from no size on ({tried})"
        size = self.size_column
        below = rows.loc[rows[size] < best[size], size]
        return f"f ≥ {level:g} from {best[size]:,.0f} {self.unit} on ({tried}" + (f"; not from {below.max():,.0f}, the next)" if len(below) else ")")

    def __repr__(self) -> str:
        about = self.provenance
        head = f"FaithfulnessCurve({about.get('model')} × {about.get('task')}, {about.get('metric')}, {about.get('ablation')} ablation)"
        lines = []
        for row in self.areas.to_dict("records"):
            lines.append(f"  {row['method']}: {areas_text(row)}; {self._reach(row['method'])}")
        return "\n".join([head, *lines, *still_falling(about), f"  {areas_note(self)}"])


def areas_text(row: Mapping[Hashable, Any]) -> str:
    """CPR and CMD of a row of :attr:`FaithfulnessCurve.areas` with their intervals, in words."""
    words = []
    for name in ("cpr", "cmd"):
        low, high = row[f"{name}_lo"], row[f"{name}_hi"]
        words.append(f"{name.upper()} {row[name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""))
    return ", ".join(words)


def areas_note(curve: FaithfulnessCurve) -> str:
    """What a reader of CPR and CMD must know: which sizes they are over, and what CPR rewards."""
    over = "MIB's ten sizes" if curve.mib_sizes else "the sizes that were given, so they are not MIB's"
    return f"CPR and CMD are over {over}; CPR has no upper bound and rewards f above 1, CMD and the smallest size do not"


def random_circuit(graph: Graph, n: int, *, seed: int = 0, how: str = "top_n", prune: bool = True) -> Circuit:
    """``n`` edges chosen at random, pruned like any other circuit; with one seed the smaller are part of the larger (before pruning).

    Raises:
        CircuitError: ``n`` below 1 or beyond the edges, or an unknown way to choose.
    """
    if how not in HOW:
        raise CircuitError(unknown("way to choose edges", how, HOW))
    drawn = HOW[how](np.random.default_rng(seed).random(graph.allowed.shape) + 1.0, n, prune=prune, graph=graph)
    about = {"how": f"{n:,} random edges ({how}, seed {seed})", "n_requested": n, **({"pruned": True} if prune else {})}
    return Circuit(graph, drawn.edges, None, about)


def faithfulness_curve(
    model: Model,
    scores: ScoreMap | Mapping[str, ScoreMap],
    task: Task,
    *,
    sizes: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    how: str = "top_n",
    by: str = "abs",
    ablation: str | None = None,
    train: Task | None = None,
    fit: OptimalFit | None = None,
    post_norm: str = "renormalised",
    sites: str | Iterable[str | Site] | None = None,
    errors: str = "nodes",
    start_layer: int | None = None,
    random: int = 5,
    level: float | int = 0.9,
    stability: int = 0,
    allow_overlap: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    max_memory: int | float | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Choose circuits of several sizes by each score, and measure how faithful they are.

    Source of sizes and areas: MIB (Mueller et al. 2025), ``evaluate_area_under_curve``; of thresholds of nodes Marks et al. 2024.

    Args:
        model: the model.
        scores: one map of scores of edges or of nodes, or several by name; of nodes all of the same sites.
        task: examples to evaluate on: others than those of the scores.
        sizes: edges to choose, before pruning; default MIB's fractions of all edges, ``n = int(p · N)``. No edges at all give the empty
            circuit and all edges the whole graph. Or numbers of nodes.
        thresholds: of nodes: levels of importance, in metric units, instead of sizes; default 15 from 1e-4 to 1 (logspace).
        how: ``top_n`` or ``greedy`` (of edges).
        by: ``abs`` or ``signed`` importance.
        ablation: what the rest carries; see :func:`patchlab.circuits.evaluate`, also for its default.
        train: examples for means and fitted constants, as for :func:`patchlab.circuits.evaluation.evaluate`.
        fit: the budget of optimal ablation.
        post_norm: what a head's edges carry where a norm follows the attention; see :class:`patchlab.ActivationPatching`.
        sites: of maps of nodes: which of their sites; None for all that were scored.
        errors: of maps of features: what becomes of errors; see :func:`patchlab.circuits.evaluate`.
        start_layer: of maps of nodes: earlier layers are free.
        random: draws of random circuits of the same sizes, pruned in the same way; 0 for none.
        level: what counts as faithful in ``smallest`` of the areas.
        stability: resamples of the examples of the scores on which each choice is made again, to see how stable it is; 0 for none.
        allow_overlap: accept examples that the scores were computed on.
        n_boot: resamples behind each interval.
        seed: of resamples and random circuits.
        batch_size: examples per batch; results do not depend on it.
        max_memory: bytes for the activations of one forward pass.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.

    Raises:
        CircuitError: scores of another model or of the same examples, sizes beyond the graph or the scored edges, no or repeated sizes.
        ScoreError: the full model cannot be told from the fully ablated one.
    """
    maps = {str(scores.provenance.get("method", "scores")): scores} if isinstance(scores, ScoreMap) else dict(scores)
    if how not in HOW:
        raise CircuitError(unknown("way to choose edges", how, HOW))
    if not maps or (random and RANDOM in maps) or random < 0:
        raise CircuitError(f"give at least one map of scores, none of them named {RANDOM!r}, and random >= 0; got {list(maps)}, random={random}.")
    selection = {name: check_disjoint(one.provenance, task, f"the map {name!r}", allow_overlap=allow_overlap) for name, one in maps.items()}
    about = {"how": how, "by": by, "random_draws": random, "level": float(level), "n_boot": n_boot, "seed": seed, "selection": selection}
    about |= {"versions": library_versions()}
    shared: dict[str, Any] = {"train": train, "batch_size": batch_size, "max_memory": max_memory}
    if any(of_nodes(one, sites) for one in maps.values()):
        if how != "top_n" or fit is not None or post_norm != "renormalised":
            raise CircuitError("how=, fit= and post_norm= are for circuits of edges; got scores of nodes. Leave them out.")
        nodes = NodeSizes.of(
            model,
            maps,
            task,
            sizes=sizes,
            thresholds=thresholds,
            by=by,
            sites=sites,
            errors=errors,
            start_layer=start_layer,
            draws=random,
            seed=seed,
        )
        about |= nodes.ready.about | ({"how": "thresholds"} if nodes.levels is not None else {})
        runner = NodeRunner.of(model, task, nodes.ready.universe, ablation or "mean_positional", always=nodes.ready.always, **shared)
        stable_nodes = nodes.stable(maps, by=by, sites=sites, draws=stability, seed=seed) if stability else {}
        return _curve_of_nodes(runner, nodes, about | _recorded(maps, stability, seed), stable_nodes, progress)
    if thresholds is not None or errors != "nodes" or start_layer is not None:
        raise CircuitError("thresholds=, errors= and start_layer= are for circuits of nodes; got scores of edges. Leave them out.")
    sizing = {name: _sizes(name, one, sizes) for name, one in maps.items()}
    circuits: dict[str, tuple[Circuit, ...]] = {}
    for name, one in maps.items():
        circuits[name] = tuple(checked(_chosen(one, n, total, how, by), model, task, f"{name!r}") for n, _, total in sizing[name])
    graph = model.arch.graph
    plan = [
        (int(share * graph.n_edges) if sizes is None else round(share * graph.n_edges), share, graph.n_edges)
        for _, share, _ in sizing[next(iter(maps))]
    ]
    draws = [[_random(graph, n, total, seed + draw, how) for n, _, total in plan] for draw in range(random)]
    runs = [Circuit.empty(graph), *(c for some in circuits.values() for c in some), *(c for some in draws for c in some)]
    options = {"fit": fit, "post_norm": post_norm, "allow_overlap": allow_overlap, **shared}
    runner = Runner.of(model, task, ablation or "resample", **options)
    measured = runner.metric(runs, progress=progress)
    found, scale = measured.metric, Scale(runner.full(), measured.metric[0], n_boot, seed)
    table = _Tables(scale, float(level))
    start = 1
    for name, some in circuits.items():
        table.add(name, sizing[name], np.array([[c.n_edges for c in some]]), found[None, start : start + len(some)])
        start += len(some)
    if random:
        table.add(RANDOM, plan, np.array([[c.n_edges for c in some] for some in draws]), found[start:].reshape(random, len(plan), -1))
    named = [f"{name} {n}" for name in circuits for n, _, _ in sizing[name]]
    record = {**runner.provenance(), **measured.record(["no edges", *named]), **about}
    if stability:
        stable = {name: stable_sizes(one, [n for n, _, _ in sizing[name]], how=how, by=by, draws=stability, seed=seed) for name, one in maps.items()}
        record |= _recorded(maps, stability, seed)
        by_size = {name: [found.get(n) for n, _, _ in sizing[name]] for name, found in stable.items()}
        _add_stability(table.rows, by_size)
        circuits = _noted(circuits, by_size)
    return FaithfulnessCurve(pd.DataFrame(table.rows), pd.DataFrame(table.areas), circuits, plain(record))


def _curve_of_nodes(
    runner: NodeRunner, nodes: NodeSizes, about: dict[str, Any], stable: Mapping[str, Sequence[Stability | None]], progress: bool
) -> FaithfulnessCurve:
    """Measure circuits of nodes and their complements."""
    total = nodes.ready.empty.size
    chosen = [circuit for some in (*nodes.circuits.values(), *nodes.random) for circuit in some]
    found = runner.metric([nodes.ready.empty, *chosen, *(~circuit for circuit in chosen)], progress=progress).metric
    table = _Tables(Scale(runner.full(), found[0], about["n_boot"], about["seed"]), about["level"], "nodes")
    own, complements, start = found[1 : 1 + len(chosen)], found[1 + len(chosen) :], 0
    for name, some in {**nodes.circuits, **({RANDOM: tuple(c for draw in nodes.random for c in draw)} if nodes.random else {})}.items():
        part, start = slice(start, start + len(some)), start + len(some)
        draws = len(nodes.random) if name == RANDOM else 1
        counts = np.array([c.n_nodes for c in some]).reshape(draws, -1)
        levels = None if nodes.levels is None else next(iter(nodes.levels.values()))
        sizes = [(int(n), n / total, total) for n in counts[0].tolist()]
        shape = (draws, counts.shape[1], -1)
        table.add(name, sizes, counts, own[part].reshape(shape), complements[part].reshape(shape), levels)
    if stable:
        _add_stability(table.rows, stable)
    circuits = _noted(nodes.circuits, stable)
    return FaithfulnessCurve(pd.DataFrame(table.rows), pd.DataFrame(table.areas), circuits, plain({**runner.provenance(), **about}))


def check_plan(graph: Graph, methods: Mapping[str, Any], sizes: Sequence[int] | None, *, how: str, by: str, ablation: str) -> None:
    """Check what a curve over several methods is asked for, before anything is scored.

    ``methods`` are those that will score the edges, by name.

    Raises:
        CircuitError: an unknown way to choose, importance or ablation, sizes beyond the graph, or beyond the edges that a method scores.
    """
    for what, got, valid in (("way to choose edges", how, HOW), ("importance", by, BY), ("ablation", ablation, ABLATIONS)):
        if got not in valid:
            raise CircuitError(unknown(what, got, valid))
    for name, method in methods.items():
        wanted = [n for n, _, _ in _sizes_of(name, graph.n_edges, sizes)]
        scored, cut = scored_edges(graph, method)
        if beyond := [n for n in wanted if scored < n < graph.n_edges]:
            raise CircuitError(
                f"{name} scores {scored:,} of the {graph.n_edges:,} edges (none into {' and '.join(cut)}), and circuits of {beyond[0]:,} edges were "
                f"asked for. Give sizes up to {scored:,}, or leave {name} out."
            )


def scored_edges(graph: Graph, method: Any) -> tuple[int, list[str]]:
    """How many edges a method scores, and the kinds of readers whose edges it does not."""
    composite = getattr(method, "composite", None)
    cut = [] if composite is None else list(composite.not_scored)
    return int(graph.allowed[:, ~np.isin(graph.reader_kind, cut)].sum()), cut


Size = tuple[int, float, int]
"""Edges to choose, their share of all edges, all edges."""


def _sizes(name: str, scores: ScoreMap, sizes: Sequence[int] | None) -> list[Size]:
    by_position = any("pos" in Site.parse(site).axes for site in scores.sites)
    return _sizes_of(name, scores.graph.n_edges * (scores.data.sizes["pos"] if by_position else 1), sizes)


def _sizes_of(name: str, total: int, sizes: Sequence[int] | None) -> list[Size]:
    if sizes is None:
        return [(int(share * total), share, total) for share in MIB_FRACTIONS]
    chosen = [int(n) for n in sizes]
    if chosen != list(sizes) or not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] <= total:
        raise CircuitError(
            f"sizes are whole numbers of edges from 0 to {total:,} (all of {name!r}), each larger than the one before; got {list(sizes)}."
        )
    return [(n, n / total, total) for n in chosen]


def _chosen(scores: ScoreMap, n: int, total: int, how: str, by: str) -> Circuit:
    if n == 0:
        return Circuit.empty(scores.graph)
    if n == total and total == scores.graph.n_edges:
        return Circuit.full(scores.graph)  # nothing is chosen, so edges without scores are no hindrance
    return HOW[how](scores, n, by=by)


def stable_sizes(scores: ScoreMap, sizes: Sequence[int], *, how: str, by: str, draws: int, seed: int) -> dict[int, Stability]:
    """The stability of the circuit of each size that has edges, by the number of edges asked for; nothing with no draws.

    Raises:
        CircuitError: as :func:`patchlab.circuits.stability`.
    """
    if not draws:
        return {}
    [(_, _, total), *_] = _sizes("scores", scores, [1])

    def choosing(n: int) -> Callable[[ScoreMap], Circuit]:
        return lambda one: _chosen(one, n, total, how, by)

    return stabilities(scores, {n: choosing(n) for n in sizes if choosing(n)(scores).n_edges}, draws=draws, seed=seed)


def _recorded(maps: Mapping[str, ScoreMap], draws: int, seed: int) -> dict[str, Any]:
    """What provenance says of the stability that was measured; nothing without draws."""
    prompts = {name: one.data.sizes["example"] for name, one in maps.items()}
    return {"stability": {"draws": draws, "seed": seed, "prompts": prompts}} if draws else {}


def _add_stability(rows: list[dict[str, Any]], stable: Mapping[str, Sequence[Stability | None]]) -> None:
    """The numbers in the rows of each method, which are in the order of its circuits."""
    left = {name: iter(found) for name, found in stable.items()}
    for row in rows:
        found = next(left[row["method"]]) if row["method"] in left else None
        row |= dict.fromkeys(NUMBERS, float("nan")) if found is None else found.numbers


def _noted(circuits: Mapping[str, Sequence[Any]], stable: Mapping[str, Sequence[Stability | None]]) -> dict[str, tuple[Any, ...]]:
    """Circuits that hold the record of their stability, where it was measured."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, some in circuits.items():
        records = stable.get(name, [None] * len(some))
        found[name] = tuple(one if about is None else noted(one, about.record()) for one, about in zip(some, records, strict=True))
    return found


def _random(graph: Graph, n: int, total: int, seed: int, how: str) -> Circuit:
    if n in (0, total):
        return Circuit.full(graph) if n else Circuit.empty(graph)
    return random_circuit(graph, n, seed=seed, how=how)


@dataclass
class _Tables:
    """The rows and the areas of a curve, as they are filled."""

    scale: Scale
    level: float
    unit: str = "edges"
    rows: list[dict[str, Any]] = field(default_factory=list)
    areas: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        method: str,
        sizes: list[Size],
        counts: Int[np.ndarray, "draw size"],
        metric: Float[np.ndarray, "draw size example"],
        complements: Float[np.ndarray, "draw size example"] | None = None,
        levels: Sequence[float] | None = None,
    ) -> None:
        """One method; several draws count as one, resampled like the examples."""
        shares = np.array([share for _, share, _ in sizes])
        value, resampled = self._measured(metric)
        low, high = interval(resampled)
        rest = None if complements is None else self._measured(complements)
        for i, (n, share, _) in enumerate(sizes):
            row = {"method": method, "n_requested": n, "fraction": share, f"n_{self.unit}": float(counts[:, i].mean())}
            if rest is not None:
                row["threshold"] = np.nan if levels is None else levels[i]
            row |= {"faithfulness": float(value[i]), "lo": float(low[i]), "hi": float(high[i]), "metric": float(metric[:, i].mean())}
            if rest is not None:
                bounds = [float(bound[i]) for bound in interval(rest[1])]
                row |= {"completeness": float(rest[0][i]), "completeness_lo": bounds[0], "completeness_hi": bounds[1]}
            self.rows.append(row)
        area: dict[str, Any] = {"method": method, **areas(value, resampled, shares)}
        order = np.argsort(-counts.mean(0), kind="stable")
        sizes_down = np.append(np.inf, counts.mean(0)[order])
        area["smallest"] = float(sizes_down[_kept(value[order], self.level)])
        reached = sizes_down[_kept(resampled[:, order], self.level)]
        low_and_high = np.quantile(reached, TAILS, method="inverted_cdf") if len(reached) else (np.nan, np.nan)  # sizes that were measured
        area["smallest_lo"], area["smallest_hi"] = map(float, low_and_high)
        self.areas.append(area)

    def _measured(self, metric: Float[np.ndarray, "draw size example"]) -> tuple[Float[np.ndarray, " size"], Float[np.ndarray, "boot size"]]:
        """Faithfulness, as the mean over draws, and its resamples."""
        resampled = self.scale.resampled(metric)
        if len(metric) > 1 and len(resampled):
            resampled = np.einsum("bd,bds->bs", resampling_weights(len(metric), len(resampled), self.scale.seed + 1), resampled)
        else:
            resampled = resampled.mean(1)
        return self.scale.value(metric).mean(0), resampled


def _kept(faithfulness: Float[np.ndarray, "*draw size"], level: float | int) -> Int[np.ndarray, "*draw"]:
    """How many circuits, from the largest (the first) on, are faithful without a break.

    >>> int(_kept(np.array([1.0, 0.95, 0.8, 0.92]), 0.9))
    2
    """
    return np.asarray(np.cumprod(faithfulness >= level, axis=-1).sum(-1))
