"""The runner of circuits of edges between nodes: each node is computed from its kept parents, with all other candidates ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.circuits.evaluation.node_ablations import NODE_ABLATIONS, CorruptedRun, Outside, meeting
from patchlab.circuits.evaluation.node_runner import NodeRunner, Prepared, dictionary_of, prepared
from patchlab.circuits.evaluation.runner import Measured, clean_program, record_of
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.circuits.sparse import SparseCircuit, point_of
from patchlab.engine import Program, Target, run
from patchlab.engine.segments import in_order
from patchlab.errors import CircuitError, InterventionError
from patchlab.host import to_array
from patchlab.interventions import Edit
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Batch, Task


@dataclass(frozen=True, eq=False)
class SparseRunner:
    """Runs circuits of edges, all among the same candidates, on one task.

    The candidates' activations are computed one after the other. Nodes of an activation that have the same parents share a run of the clean prompts,
    in which every candidate before them carries what it has in the circuit, if it is a parent, and what the ablation says, if it is not. What they
    have in that run is what they have in the circuit. A last run does the same for the logits, and gives the metric.

    Args:
        nodes: runs circuits of nodes among the same candidates with the same ablation.
    """

    nodes: NodeRunner

    @staticmethod
    def of(model: Model, task: Task, universe: Sequence[Candidates], ablation: str, **options: Any) -> "SparseRunner":
        """With an ablation by its name, one of :data:`patchlab.circuits.NODE_ABLATIONS`; takes the options of :meth:`NodeRunner.of`.

        Raises:
            CircuitError: an ablation that does not fit.
        """
        return SparseRunner(NodeRunner.of(model, task, universe, ablation, **options))

    @property
    def model(self) -> Model:
        """The model."""
        return self.nodes.model

    def full(self) -> Float[np.ndarray, " example"]:
        """The metric of the whole model on the clean prompts."""
        return self.nodes.full()

    def provenance(self) -> dict[str, Any]:
        """Model, task, metric, candidates and ablation, as JSON."""
        kind = self.nodes.way.kind
        record = record_of(self.model, self.nodes.task, kind, NODE_ABLATIONS[kind])
        universe = self.nodes.universe
        record |= {"unit": "edges", "candidates": [str(one) for one in universe], "n_candidates": sum(one.size for one in universe)}
        if self.nodes.way.train is not None:
            record["ablation_examples"] = f"{self.nodes.way.train.name}[{len(self.nodes.way.train)}]"
        return record

    def metric(self, circuits: Sequence[SparseCircuit], *, progress: bool = False) -> Measured:
        """The task's metric of every circuit on every example; equal circuits are run once."""
        runner, task = self.nodes, self.nodes.task
        unlike = {circuit.key(): circuit for circuit in circuits}
        values = {key: np.zeros(len(task)) for key in unlike}
        with progress_bar(f"circuits ({runner.way.kind})", "run", len(unlike) * len(task), show=progress) as bar:
            for batch in task.batches(runner.batch_size or runner.rows, self.model.device):
                donor = CorruptedRun(self.model, batch, runner.universe) if runner.way.kind == "resample" else None
                for key, circuit in unlike.items():
                    values[key][batch.examples.cpu().numpy()] = _Batch(runner, circuit, batch, donor).metric()
                    bar.update(len(batch))
        return Measured(np.stack([values[circuit.key()] for circuit in circuits]))


@dataclass(frozen=True, eq=False)
class _Batch:
    """One circuit on one batch."""

    runner: NodeRunner
    circuit: SparseCircuit
    batch: Batch
    donor: CorruptedRun | None

    def metric(self) -> Float[np.ndarray, " example"]:
        """Activation by activation, then the metric."""
        stored: dict[Target, Tensor] = {}
        table = self.circuit.table_of_nodes
        into = _parents(self.circuit)
        points = in_order((point_of(one.site.kind), layer) for one, layer in self._targets())
        for number, point in enumerate(points):
            sites = [(one, layer) for one, layer in self._targets() if (point_of(one.site.kind), layer) == point]
            nodes = np.flatnonzero(_at(self.circuit, point))
            if not self.circuit.all_but and not np.isin(self.circuit.source, nodes).any():
                continue  # nothing that comes later reads it
            groups: dict[bytes, list[int]] = {b"": []}  # without parents, or with all of them: the candidates that no edge names
            for node in nodes.tolist():
                if self.circuit.all_but or np.any(self.circuit.source == node):
                    groups.setdefault(into.get(node, np.zeros(0, dtype=np.int64)).tobytes(), []).append(node)
            found = self._run(list(groups), points[:number], stored, keep=[(one.site.kind, layer) for one, layer in sites])
            for one, layer in sites:
                key = (one.site.kind, layer)
                values = found[key]
                stored[key] = own = values[: len(self.batch)].clone()
                for i, members in enumerate(groups.values()):
                    mine = values[i * len(self.batch) : (i + 1) * len(self.batch)]
                    for node in members if i else ():
                        if self.circuit.nodes.universe[table.which[node]] is one:
                            mask = self._mask(one, int(table.pos[node]), int(table.unit[node]), own)
                            own[mask] = mine[mask]
        last = into.get(self.circuit.nodes.n_nodes, np.zeros(0, dtype=np.int64)).tobytes()
        return to_array(self._run([last], points, stored, keep=[])[_METRIC])

    def _targets(self) -> list[tuple[Candidates, int | None]]:
        return [(one, layer) for one in self.runner.universe for layer in (one.layers if KINDS[one.site.kind].layered else (None,))]

    def _mask(self, one: Candidates, pos: int, unit: int, value: Float[Tensor, "row pos *site"]) -> Bool[Tensor, "row pos *site"]:
        """Where the values of a node are."""
        mask = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        rows: Any = torch.arange(value.shape[0], device=value.device)
        places: Any = slice(None)
        if pos >= 0:
            axis = self.runner.task.position_axis()
            index = pos if axis.names is None else axis.index[self.batch.examples.cpu().numpy()][:, pos]
            places = torch.as_tensor(index, device=value.device).expand(value.shape[0])
        where = (rows, places) if pos >= 0 else (slice(None), slice(None))
        mask[(*where, unit) if unit >= 0 else where] = True
        return mask

    def _run(
        self, parents: Sequence[bytes], points: Sequence[Target], stored: Mapping[Target, Tensor], keep: Sequence[Target]
    ) -> dict[Target, Tensor]:
        """Runs of the clean prompts, one for each set of parents, with the activations at some points put together from these; what is kept of them,
        or the metric.
        """
        sets = [_circuit_of(self.circuit, np.frombuffer(one, dtype=np.int64)) for one in parents]
        at_once, found = max(1, self.runner.rows // len(self.batch)), list[dict[Target, Tensor]]()
        for first in range(0, len(sets), at_once):
            some = sets[first : first + at_once]
            result = run(self.runner.model, self._program(some, points, stored, keep))
            if not keep and result.values is None:
                raise InterventionError("a run of circuits evaluates a metric; the program has none.")
            found.append(dict(result.activations) if keep else {_METRIC: result.values})  # type: ignore[dict-item]
        return {key: torch.cat([one[key] for one in found]) for key in found[0]}

    def _program(self, sets: Sequence[NodeCircuit], points: Sequence[Target], stored: Mapping[Target, Tensor], keep: Sequence[Target]) -> Program:
        bare = clean_program(self.runner.model, self.runner.task, self.batch)
        index = torch.arange(len(self.batch), device=self.batch.clean.device).repeat(len(sets))
        edits = self._edits(sets, points, stored)
        answers = None if bare.answers is None else bare.answers.rows(index)
        positions = {name: at[index] for name, at in self.batch.positions.items()}
        whole = replace(bare, tokens=self.batch.clean[index], examples=self.batch.examples[index], answers=answers, edits=edits, positions=positions)
        return replace(whole, keep=tuple(keep), metric=None, answers=None, logits="none") if keep else whole

    def _edits(self, sets: Sequence[NodeCircuit], points: Sequence[Target], stored: Mapping[Target, Tensor]) -> tuple[Edit, ...]:
        axis = self.runner.task.position_axis()
        places = None if axis.names is None else torch.as_tensor(axis.index[self.batch.examples.cpu().numpy()], device=self.batch.clean.device)
        found: list[Edit] = []
        for point in points:
            for one, layer in self._targets():
                if (point_of(one.site.kind), layer) == point:
                    outside = Outside(one, layer, sets, self.runner.way, self.donor, places)
                    part = dictionary_of(one.site.kind)
                    source = _Parents(outside, stored.get((one.site.kind, layer)))
                    found.append(Edit(Site(one.site.kind, (), layer=layer), source, joint="" if part is None else part[1]))
        return tuple(found)


_METRIC: Target = ("metric", None)


@dataclass(frozen=True, eq=False)
class _Parents:
    """A source: what the circuit has in the nodes that are parents, what the ablation says in other candidates, and the run's own elsewhere.

    Args:
        outside: whose circuits are the sets of parents.
        stored: what the circuit has, ``[example, pos, *site]``; None where no parents are.
    """

    outside: Outside
    stored: Float[Tensor, "example pos *site"] | None

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "row *site"]:
        """The site's value in every run."""
        universe = self.outside.circuits[0].universe
        free = replace(self.outside, circuits=[NodeCircuit.empty(universe)] * len(self.outside.circuits)).kept(own)
        value = self.outside.ablated(own)
        if self.stored is not None:
            kept = self.outside.kept(own)
            value = torch.where(kept, self.stored.to(own.dtype).repeat(len(self.outside.circuits), *[1] * (own.ndim - 1)), value)
        return torch.where(free, own, value)


def _parents(circuit: SparseCircuit) -> dict[int, Int[np.ndarray, " parent"]]:
    """The sources of the listed edges into each node that they lead to."""
    targets, first = np.unique(circuit.target, return_index=True)
    return dict(zip(targets.tolist(), np.split(circuit.source, first[1:]), strict=True)) if len(targets) else {}


def _at(circuit: SparseCircuit, point: Target) -> Bool[np.ndarray, " node"]:
    """Which nodes are part of an activation."""
    table = circuit.table_of_nodes
    kinds = np.array([point_of(one.site.kind) == point[0] for one in circuit.nodes.universe])
    return kinds[table.which] & (table.layer == (-1 if point[1] is None else point[1]))


def _circuit_of(circuit: SparseCircuit, parents: Int[np.ndarray, " parent"]) -> NodeCircuit:
    """A set of parents as a circuit of nodes: the listed ones, or all but these."""
    chosen, start, listed = circuit.nodes, 0, {}
    for one in chosen.universe:
        cells = chosen.listed[one.name]
        own = parents[(parents >= start) & (parents < start + len(cells))] - start
        listed[one.name], start = cells[own], start + len(cells)
    return NodeCircuit(chosen.universe, listed, circuit.all_but)


def prepared_sparse(circuits: Mapping[str, SparseCircuit], model: Model, task: Task) -> Prepared:
    """Their nodes, as :func:`patchlab.circuits.evaluation.node_runner.prepared` has them: checked against model, task and each other.

    Raises:
        CircuitError: circuits that do not fit model and task, or among unlike candidates; features without the errors; dictionaries across layers;
            nodes at named positions two of which meet at one token.
    """
    ready = prepared({name: one.nodes for name, one in circuits.items()}, model, task)
    if any("pos" in one.site.axes for one in ready.universe) and (met := meeting(task.position_axis())):
        raise CircuitError(
            f"{met} at one token, where one node would be computed from the parents of either. Score fewer positions (task.at_positions(...))."
        )
    for one in ready.universe:
        accessor = model.arch.accessors[one.site.kind]
        for layer in one.layers if KINDS[one.site.kind].of else ():
            if len(accessor.at(layer).parts()) > 1:
                raise CircuitError(f"{one.name} of layer {layer} is written to several layers, so that no single activation can be put together.")
    return ready
