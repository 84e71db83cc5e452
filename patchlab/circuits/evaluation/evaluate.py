"""Evaluations: circuits explain a behaviour as far as it is kept with every other edge, or node, ablated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.ablations import OptimalFit, still_falling
from patchlab.circuits.evaluation.node_runner import NodeRunner, prepared
from patchlab.circuits.evaluation.runner import Runner, checked
from patchlab.circuits.evaluation.scale import Scale
from patchlab.circuits.evaluation.sparse_runner import SparseRunner, prepared_sparse
from patchlab.circuits.heldout import check_disjoint
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.sparse import AnyCircuit, SparseCircuit
from patchlab.errors import CircuitError, ScoreError, unknown
from patchlab.models import Model
from patchlab.scores.arrays import plain
from patchlab.stats.bootstrap import interval
from patchlab.tasks.task import Task

PARTS = ("edge", "node")
"""What minimality can leave out one at a time."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metric of circuits per example, and what follows from it. Metrics are in the task metric's unit; faithfulness has none (1 = the whole).

    Args:
        metric: per circuit the metric of each example.
        metric_full: of the full model.
        metric_empty: with every edge (or node) ablated.
        table: one row per circuit: ``circuit``, ``n_edges`` (of circuits of edges), ``n_nodes``, ``metric`` (mean), ``faithfulness`` with its 95 %
            interval ``lo``, ``hi`` over examples, and ``completeness`` = faithfulness of the whole without the circuit (low is good), with its
            interval. All NaN where the full model cannot be told from the fully ablated one; ``provenance["faithfulness_not_defined"]`` then
            says so.
        minimality: one row per circuit and part left out: ``circuit``, ``part`` (name of the edge or node), ``minimality`` = faithfulness lost
            without it, ``lo``, ``hi``; empty unless it was asked for.
        provenance: model, task, ablation, examples, JSON-able.
    """

    metric: Mapping[str, Float[np.ndarray, " example"]] = field(repr=False)
    metric_full: Float[np.ndarray, " example"] = field(repr=False)
    metric_empty: Float[np.ndarray, " example"] = field(repr=False)
    table: pd.DataFrame
    minimality: pd.DataFrame
    provenance: dict[str, Any]

    def faithfulness(self, circuit: str | None = None) -> float:
        """Of one circuit by name; of the only one without.

        Raises:
            CircuitError: no such circuit.
            ScoreError: the full model cannot be told from the fully ablated one.
        """
        names = list(self.metric)
        name = names[0] if circuit is None and len(names) == 1 else circuit
        if name not in names:
            raise CircuitError(unknown("circuit", name, names))
        if why := self.provenance.get("faithfulness_not_defined"):
            raise ScoreError(why)
        return float(self.table["faithfulness"].to_numpy()[names.index(str(name))])

    def to_dataframe(self) -> pd.DataFrame:
        """A long table with one row per circuit and example: ``circuit``, ``example``, ``metric``, ``metric_full``, ``metric_empty``."""
        frames = []
        for name, values in self.metric.items():
            columns = {"example": np.arange(len(values)), "metric": values, "metric_full": self.metric_full, "metric_empty": self.metric_empty}
            frames.append(pd.DataFrame({"circuit": name, **columns}))
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        about = self.provenance
        head = f"Evaluation({about['model']} × {about['task']}, {about['metric']}, {about['ablation']} ablation)"
        unit = about.get("unit", "edges")
        if why := about.get("faithfulness_not_defined"):
            rows = [
                f"  {row['circuit']}: {row[f'n_{unit}']:,} {unit}, {about['metric']} {row['metric']:.3f}" for row in self.table.to_dict("records")
            ]
            rows.append(f"  {why}")
        else:
            rows = [
                f"  {row['circuit']}: {row[f'n_{unit}']:,} {unit}, faithfulness {row['faithfulness']:.3f} [{row['lo']:.3f}, {row['hi']:.3f}]"
                + (f", completeness {row['completeness']:.3f}" if np.isfinite(row["completeness"]) else "")
                for row in self.table.to_dict("records")
            ]
        measured = np.isfinite(self.table["completeness"].to_numpy()).any()
        low = [f"  completeness: faithfulness of the model without the circuit's {unit}; low is good"] if measured else []
        return "\n".join([head, *rows, *low, *still_falling(about), *(f"  note: {note}" for note in about.get("notes", ()))])


def evaluate(
    model: Model,
    circuit: AnyCircuit | Mapping[str, AnyCircuit],
    task: Task,
    *,
    ablation: str | None = None,
    train: Task | None = None,
    fit: OptimalFit | None = None,
    post_norm: str = "renormalised",
    errors: str = "nodes",
    start_layer: int | None = None,
    completeness: bool = True,
    minimality: str | None = None,
    allow_overlap: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    max_memory: int | float | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run the model on the clean prompts with all edges, or nodes, outside each circuit ablated.

    ``faithfulness f(C) = (m(C) − m(∅)) / (m(M) − m(∅))`` of batch means, m(∅) measured with the same ablation; completeness ``f(M∖C)``;
    minimality of a part v ``f(C) − f(C∖v)``. Source: Wang et al. 2023; Hanna et al. 2024; MIB (Mueller et al. 2025); of nodes Marks et al. 2024.

    Nodes outside a circuit carry what the ablation says, site after site in one forward pass: what comes later, also features and errors, is
    computed from the stream as it then is. Candidates outside the circuit are ablated, what is no candidate is free. Of edges between nodes, each
    node that has some is computed from these parents alone, with all other candidates before it ablated.

    Args:
        model: the model.
        circuit: one circuit, or several by name; all of edges of the model's graph, all of nodes, or all of edges between nodes, among the same
            candidates.
        task: examples to evaluate on: others than those that the circuit was chosen by.
        ablation: what the rest carries: of edges one of :data:`patchlab.circuits.ABLATIONS` (default ``resample``), of nodes and of edges between
            them one of :data:`patchlab.circuits.NODE_ABLATIONS` (default ``mean_positional``).
        train: examples for means (default: those of ``task``) and for the constants of optimal ablation; resampling and zeroing need none.
        fit: the budget of optimal ablation, of edges.
        post_norm: what a head's edges carry where a norm follows the attention; see :class:`patchlab.ActivationPatching`.
        errors: of circuits of features, what becomes of the errors of their dictionaries, one of
            :data:`patchlab.circuits.ERRORS`.
        start_layer: of circuits of nodes: earlier layers are free, as :meth:`patchlab.circuits.NodeCircuit.from_layer`.
        completeness: also run the complement of each circuit.
        minimality: leave out each ``edge`` or ``node`` of each circuit in turn: one run each.
        allow_overlap: accept examples that the circuit was selected on.
        n_boot: resamples of the examples behind each interval.
        seed: of the resamples.
        batch_size: examples per batch; results do not depend on it.
        max_memory: bytes for the activations of one forward pass.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.

    Raises:
        CircuitError: a circuit of another model, no circuit with edges or nodes, selection on the same examples, an ablation that does not fit,
            circuits of edges and nodes together, or of nodes among unlike candidates; minimality of all but some edges between nodes.

    Example:
        >>> evaluate(model, top_n(scores, 100), held_out).faithfulness()  # doctest: +SKIP
    """
    if not isinstance(circuit, (Circuit, NodeCircuit, SparseCircuit, Mapping)):
        raise CircuitError(f"give one circuit, or several by name as in {{'relp': circuit}}; got {type(circuit).__name__}.")
    given = dict(circuit) if isinstance(circuit, Mapping) else {"circuit": circuit}
    if not given:
        raise CircuitError("no circuits to evaluate; give a circuit, or several by name.")
    if minimality is not None and minimality not in PARTS:
        raise CircuitError(unknown("part for minimality", minimality, PARTS))
    of_nodes = {name: one for name, one in given.items() if isinstance(one, NodeCircuit)}
    circuits = {name: checked(one, model, task, f"circuit {name!r}") for name, one in given.items() if isinstance(one, Circuit)}
    sparse = {name: one for name, one in given.items() if isinstance(one, SparseCircuit)}
    if sparse and len(sparse) < len(given):
        raise CircuitError(
            f"{next(iter(sparse))!r} has edges between nodes of sites, and {next(iter({**of_nodes, **circuits}))!r} is of another kind: their empty "
            f"circuits differ, and so may their scales of faithfulness. Evaluate them one by one."
        )
    if of_nodes and circuits:
        raise CircuitError(
            f"{next(iter(of_nodes))!r} is a circuit of nodes and {next(iter(circuits))!r} one of edges: their empty circuits differ, and so do their "
            f"scales of faithfulness. Evaluate them one by one."
        )
    shared = {"train": train, "batch_size": batch_size, "max_memory": max_memory}
    if sparse:
        if fit is not None or post_norm != "renormalised" or errors != "nodes" or start_layer is not None:
            raise CircuitError(
                "fit= and post_norm= are for circuits of a model's graph, errors= and start_layer= for circuits of nodes; got edges between nodes of "
                "sites. Leave them out (only(...) and from_layer(...) of the nodes take candidates out before edges are found)."
            )
        ready = prepared_sparse(sparse, model, task)
        sizes = {name: 1 if one.all_but else one.n_edges for name, one in sparse.items()}  # what is all but some edges is not empty
        bare, selection = _apart(sparse, sizes, "edges", task, allow_overlap)
        edges = SparseRunner.of(model, task, ready.universe, ablation or "mean_positional", **shared)
        none = next(iter(sparse.values())).emptied()
        return _evaluation(edges, sparse, none, bare, selection, completeness, minimality, n_boot, seed, progress, ready.about)
    if of_nodes:
        if fit is not None or post_norm != "renormalised" or minimality == "edge":
            raise CircuitError("fit=, post_norm= and minimality='edge' are for circuits of edges; got circuits of nodes. Leave them out.")
        ready = prepared(of_nodes, model, task, errors=errors, start_layer=start_layer)
        bare, selection = _apart(ready.circuits, {name: one.n_nodes for name, one in ready.circuits.items()}, "nodes", task, allow_overlap)
        nodes = NodeRunner.of(model, task, ready.universe, ablation or "mean_positional", always=ready.always, **shared)
        return _evaluation(nodes, ready.circuits, ready.empty, bare, selection, completeness, minimality, n_boot, seed, progress, ready.about)
    if errors != "nodes" or start_layer is not None:
        raise CircuitError("errors= and start_layer= are for circuits of nodes; got circuits of edges. Leave them out.")
    bare, selection = _apart(circuits, {name: one.n_edges for name, one in circuits.items()}, "edges", task, allow_overlap)
    options = {"fit": fit, "post_norm": post_norm, "allow_overlap": allow_overlap, **shared}
    runner = Runner.of(model, task, ablation or "resample", **options)
    nothing = Circuit.empty(model.arch.graph)
    return _evaluation(runner, circuits, nothing, bare, selection, completeness, minimality, n_boot, seed, progress, {})


def _apart(
    circuits: Mapping[str, AnyCircuit], sizes: Mapping[str, int], unit: str, task: Task, allow_overlap: bool
) -> tuple[list[str], dict[str, str]]:
    """A note for each circuit without edges or nodes, and what is known of the examples of each.

    Raises:
        CircuitError: all are empty, or one was selected on the same examples.
    """
    more = ": pruning leaves none where the chosen ones do not connect the input with the logits" if unit == "edges" else ""
    bare = [
        f"circuit {name!r} has no {unit}, so its faithfulness is 0 by definition. Choose more {unit}{more}." for name, n in sizes.items() if not n
    ]
    if len(bare) == len(circuits):
        raise CircuitError(bare[0])
    return bare, {name: check_disjoint(c.provenance, task, f"circuit {name!r}", allow_overlap=allow_overlap) for name, c in circuits.items()}


def _evaluation(
    runner: Any,
    circuits: Mapping[str, Any],
    empty: AnyCircuit,
    bare: list[str],
    selection: Mapping[str, str],
    completeness: bool,
    minimality: str | None,
    n_boot: int,
    seed: int,
    progress: bool,
    about: Mapping[str, Any],
) -> Evaluation:
    """Run the circuits, their complements and what they are without their parts, and put them on the scale of faithfulness."""
    unit = "nodes" if isinstance(empty, NodeCircuit) else "edges"
    notes = bare + [note for name, c in circuits.items() if (note := _of_other_weights(c, runner.model, f"circuit {name!r}"))]
    left_out = [(name, part, rest) for name, c in circuits.items() for part, rest in _without_parts(c, minimality)]
    named = {f"no {unit}": empty, **circuits}
    runs = [*named.values(), *(~c for c in circuits.values() if completeness), *(rest for *_, rest in left_out)]
    measured = runner.metric(runs, progress=progress)
    found = measured.metric
    full, nothing = runner.full(), found[0]
    scale, undefined = _scale(full, nothing, n_boot, seed)
    n = len(circuits)
    complements = found[1 + n : 1 + 2 * n] if completeness else None
    rest = found[len(runs) - len(left_out) :]
    parts = pd.DataFrame({"circuit": [name for name, *_ in left_out], "part": [part for _, part, _ in left_out]})
    own = found[1 : 1 + n][[list(circuits).index(name) for name, *_ in left_out]]
    parts[["minimality", "lo", "hi"]] = _lost(scale, own, rest)
    record = {**runner.provenance(), **about, **measured.record(named), "selection": selection, "n_boot": n_boot, "seed": seed}
    return Evaluation(
        {name: _frozen(values) for name, values in zip(circuits, found[1 : 1 + n], strict=True)},
        _frozen(full),
        _frozen(nothing),
        _table(circuits, scale, found[1 : 1 + n], complements),
        parts,
        plain({**record, "notes": [*about.get("notes", ()), *notes], **undefined}),
    )


def _of_other_weights(circuit: AnyCircuit, model: Model, what: str) -> str | None:
    """A sentence, if the circuit was found on other weights than the model's."""
    found = circuit.provenance.get("model_fingerprint")
    if found is None or found == model.fingerprint:
        return None
    return (
        f"{what} was found on {circuit.provenance.get('model', '?')} with other weights ({found}); those of {model.name} here are {model.fingerprint}"
    )


def _without_parts(circuit: AnyCircuit, kind: str | None) -> Iterator[tuple[str, AnyCircuit]]:
    """The circuit without each of its edges or nodes (input and logits stay), by name."""
    if isinstance(circuit, SparseCircuit):
        for edge, name in enumerate(circuit.edges if kind == "edge" else ()):
            yield name, circuit.without(edge)
        for node in circuit.joined.tolist() if kind == "node" else ():
            yield circuit.table_of_nodes.names[node], circuit.without_node(node)
        return
    if isinstance(circuit, NodeCircuit):
        for one in circuit.universe if kind == "node" else ():
            for node in circuit.ids(one.name):
                yield one.address(one.cells(node[None])[0].tolist(), circuit.positions), circuit.without(one.name, int(node))
        return
    graph = circuit.graph
    if kind == "edge":
        for writer, reader in np.argwhere(circuit.collapsed().edges):
            mask = circuit.edges.copy()
            mask[writer, reader] = False
            yield graph.name(int(writer), int(reader)), Circuit(graph, mask, None, circuit.provenance)
    if kind == "node":
        for node in np.flatnonzero(circuit.node_mask):
            if graph.nodes[node] in ("input", "logits"):
                continue
            mask = circuit.edges.copy()
            mask[node] = False
            mask[:, graph.reader_node == node] = False
            yield graph.nodes[node], Circuit(graph, mask, None, circuit.provenance)


def _scale(full: Float[np.ndarray, " example"], empty: Float[np.ndarray, " example"], n_boot: int, seed: int) -> tuple[Scale | None, dict[str, str]]:
    """The scale of faithfulness; or what provenance says where there is none."""
    try:
        return Scale(full, empty, n_boot, seed), {}
    except ScoreError as error:
        return None, {"faithfulness_not_defined": str(error)}


def _lost(scale: Scale | None, own: Float[np.ndarray, "part example"], rest: Float[np.ndarray, "part example"]) -> Float[np.ndarray, "part three"]:
    if not len(own) or scale is None:
        return np.full((len(own), 3), np.nan)
    low, high = interval(scale.resampled(own) - scale.resampled(rest))
    return np.stack([scale.value(own) - scale.value(rest), low, high], 1)


def _table(
    circuits: Mapping[str, AnyCircuit],
    scale: Scale | None,
    metric: Float[np.ndarray, "circuit example"],
    complements: Float[np.ndarray, "circuit example"] | None,
) -> pd.DataFrame:
    table = pd.DataFrame({"circuit": list(circuits)})
    if edges := [circuit.n_edges for circuit in circuits.values() if not isinstance(circuit, NodeCircuit)]:
        table["n_edges"] = edges
    table["n_nodes"] = [len(circuit.nodes) if isinstance(circuit, Circuit) else circuit.n_nodes for circuit in circuits.values()]
    table["metric"] = metric.mean(1)
    for name, values in (("", metric), ("completeness", complements)):
        column = name or "faithfulness"
        table[column], low, high = np.nan, np.nan, np.nan
        if values is not None and scale is not None:
            table[column] = scale.value(values)
            low, high = interval(scale.resampled(values))
        table[f"{name}_lo".strip("_")], table[f"{name}_hi".strip("_")] = low, high
    return table


def _frozen(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values.setflags(write=False)
    return values
