"""The runner of node circuits on a task: the clean prompts, with all nodes outside each circuit ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from patchlab.adapters import Architecture
from patchlab.circuits.evaluation.node_ablations import NODE_ABLATIONS, CorruptedRun, NodeAblation, Outside, check_places, node_ablation, targets_of
from patchlab.circuits.evaluation.runner import Measured, clean_metric, clean_program, record_of
from patchlab.circuits.nodes import Candidates, NodeCircuit, candidates
from patchlab.engine import Program, run
from patchlab.engine.masked import pass_bytes, slices
from patchlab.engine.memory import block_numbers, itemsize
from patchlab.errors import CircuitError, InterventionError, unknown
from patchlab.host import to_array
from patchlab.interventions import Edit
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Batch, Task

ERRORS = {
    "nodes": "they are nodes like the features, in a circuit or outside",
    "ablated": "they are ablated in every run, also of circuits and their complements (Marks et al.: remove)",
    "residual": "those in the residual stream are nodes; those of attention and MLP are ablated in every run (Marks et al.: resid_only)",
    "free": "they are never ablated",
}
"""What becomes of the errors of dictionaries where circuits of features are evaluated."""


@dataclass(frozen=True, eq=False)
class NodeRunner:
    """Runs circuits of nodes, all among the same candidates, on one task.

    In one forward pass on the clean prompts, site after site: what is outside the circuit is replaced, and everything after it reads that.
    Several circuits are rows of one pass.

    Args:
        model: the model.
        task: examples.
        universe: the candidates.
        way: what the nodes outside carry.
        always: nodes that are ablated in every run, whatever the circuit.
        batch_size: examples per batch; None for as many as fit into the memory. Results do not depend on it.
        max_memory: bytes for the activations of one forward pass; None for what suits the device.
    """

    model: Model
    task: Task
    universe: tuple[Candidates, ...]
    way: NodeAblation = field(repr=False)
    always: tuple[Candidates, ...] = ()
    batch_size: int | None = None
    max_memory: int | float | None = None

    @staticmethod
    def of(
        model: Model,
        task: Task,
        universe: Sequence[Candidates],
        ablation: str,
        *,
        always: Sequence[Candidates] = (),
        train: Task | None = None,
        batch_size: int | None = None,
        max_memory: int | float | None = None,
    ) -> "NodeRunner":
        """With an ablation by its name; see :func:`patchlab.circuits.evaluation.node_ablations.node_ablation`.

        Raises:
            CircuitError: an ablation that does not fit.
        """
        bare = NodeRunner(model, task, tuple(universe), NodeAblation("zero"), tuple(always), batch_size, max_memory)
        way = node_ablation(model, task, [*universe, *always], ablation, train=train, rows=bare.rows)
        check_places(task.position_axis(), way)
        return replace(bare, way=way)

    @property
    def budget(self) -> int | float:
        """Bytes for the activations of one forward pass."""
        return pass_bytes(self.model) if self.max_memory is None else self.max_memory

    @property
    def rows(self) -> int:
        """Circuits × examples in one forward pass."""
        length = max(len(pair) for pair in self.task.pairs)
        arch = self.model.arch
        every = (*self.universe, *self.always)
        widest = max(max(one.shape[-1], arch.d_model) if KINDS[one.site.kind].of else arch.numbers(one.site.kind, length) for one in every)
        return max(1, int(self.budget // (length * (block_numbers(self.model, length) + 4 * widest) * itemsize(self.model))))

    def metric(self, circuits: Sequence[NodeCircuit], *, progress: bool = False) -> Measured:
        """The task's metric of every circuit on every example; equal circuits are run once."""
        keys = [circuit.key() for circuit in circuits]
        unlike = list(dict(zip(keys, circuits, strict=True)).values())
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        values = np.zeros((len(unlike), len(self.task)))
        with progress_bar(f"circuits ({self.way.kind})", "run", len(unlike) * len(self.task), show=progress) as bar:
            for batch in self.task.batches(self.batch_size or self.rows, self.model.device):
                donor = CorruptedRun(self.model, batch, (*self.universe, *self.always)) if self.way.kind == "resample" else None
                program, columns = clean_program(self.model, self.task, batch), batch.examples.cpu().numpy()
                for part in slices(len(unlike), max(1, self.rows // len(batch))):
                    values[part, columns] = self._one_pass(unlike[part], program, batch, donor)
                    bar.update(len(batch) * len(unlike[part]))
        return Measured(values[[places[key] for key in keys]])

    def full(self) -> Float[np.ndarray, " example"]:
        """The metric of the whole model on the clean prompts."""
        return clean_metric(self.model, self.task, self.batch_size or self.rows)

    def provenance(self) -> dict[str, Any]:
        """Model, task, metric, candidates and ablation, as JSON."""
        record = record_of(self.model, self.task, self.way.kind, NODE_ABLATIONS[self.way.kind])
        record |= {"unit": "nodes", "candidates": [str(one) for one in self.universe], "n_candidates": sum(one.size for one in self.universe)}
        if self.way.train is not None:
            record["ablation_examples"] = f"{self.way.train.name}[{len(self.way.train)}]"
        return record

    def _one_pass(
        self, circuits: Sequence[NodeCircuit], program: Program, batch: Batch, donor: CorruptedRun | None
    ) -> Float[np.ndarray, "circuit example"]:
        times, device = len(circuits), batch.clean.device
        index = torch.arange(len(batch), device=device).repeat(times)
        answers = None if program.answers is None else program.answers.rows(index)
        whole = replace(
            program, tokens=batch.clean[index], examples=batch.examples.repeat(times), answers=answers, edits=self._edits(circuits, batch, donor)
        )
        whole = replace(whole, positions={name: at[index] for name, at in batch.positions.items()})
        found = run(self.model, whole).values
        if found is None:
            raise InterventionError("a run of circuits evaluates a metric; the program has none.")
        return to_array(found.reshape(times, len(batch)))

    def _edits(self, circuits: Sequence[NodeCircuit], batch: Batch, donor: CorruptedRun | None) -> tuple[Edit, ...]:
        """One edit per site and layer where a circuit leaves something out.

        At one hook the features and the error of a dictionary are set together. The stream between attention and MLP is written at the output of
        the attention, after what is set there.
        """
        axis = self.task.position_axis()
        places = None if axis.names is None else torch.as_tensor(axis.index[batch.examples.cpu().numpy()], device=batch.clean.device)
        nothing = [NodeCircuit.empty(self.always)] * len(circuits) if self.always else []
        found: list[tuple[bool, Edit]] = []
        for universe, held in ((self.universe, circuits), (self.always, nothing)):
            for one, layer in targets_of(universe):
                if all(circuit.keeps_all(one.name, layer) for circuit in held):
                    continue
                source = Outside(one, layer, held, self.way, donor, places)
                part = dictionary_of(one.site.kind)
                edit = Edit(Site(one.site.kind, (), layer=layer), source, joint="" if part is None else part[1])
                found.append((one.site.kind.endswith("resid_mid"), edit))
        return tuple(edit for _, edit in sorted(found, key=lambda pair: pair[0]))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Circuits as they are run.

    Args:
        circuits: by name, among the same candidates.
        universe: the candidates.
        always: what is ablated in every run.
        about: what was done to them, for the provenance.
    """

    circuits: dict[str, NodeCircuit]
    universe: tuple[Candidates, ...]
    always: tuple[Candidates, ...]
    about: dict[str, Any]

    @property
    def empty(self) -> NodeCircuit:
        """The circuit without nodes."""
        first = next(iter(self.circuits.values()))
        return NodeCircuit.empty(self.universe, {"positions": first.positions} if first.positions else {})


def prepared(circuits: Mapping[str, NodeCircuit], model: Model, task: Task, *, errors: str = "nodes", start_layer: int | None = None) -> Prepared:
    """Circuits with free early layers and with the errors as they are wanted.

    Raises:
        CircuitError: circuits that do not fit model and task, or among unlike candidates; errors of features that were not scored as nodes.
    """
    if errors not in ERRORS:
        raise CircuitError(unknown("way to treat errors", errors, ERRORS))
    made: dict[str, NodeCircuit] = {}
    always: tuple[Candidates, ...] = ()
    for name, one in circuits.items():
        one = checked_nodes(one, model, task, f"circuit {name!r}")
        one = one if start_layer is None else one.from_layer(start_layer)
        made[name], always = _with_errors(one, model.arch, errors, start_layer or 0, task, f"circuit {name!r}")
    (first, reference), *others = made.items()
    for name, one in others:
        if one.universe != reference.universe or one.positions != reference.positions:
            raise CircuitError(
                f"{first!r} chooses from {', '.join(map(str, reference.universe))} and {name!r} from {', '.join(map(str, one.universe))}: their "
                f"empty circuits differ, and so do their scales of faithfulness. Evaluate them one by one."
            )
    notes = [] if start_layer is None else [f"layers before {start_layer} are free"]
    about: dict[str, Any] = {"start_layer": start_layer, "notes": notes}
    if any(dictionary_of(one.site.kind) for one in (*reference.universe, *always)):
        about |= {"errors": errors, "errors_are": ERRORS[errors]}
    if reference.n_positions is not None and task.position_axis().names is not None:
        notes.append(f"positions other than {', '.join(task.position_axis().names or ())} are free")
    return Prepared(made, reference.universe, always, about)


def dictionary_of(kind: str) -> tuple[str, str] | None:
    """Of features and errors which of the two a site kind is, and at which point; None for others.

    >>> dictionary_of("features.resid_post"), dictionary_of("z")
    (('features', 'resid_post'), None)
    """
    part, _, point = kind.partition(".")
    return (part, point) if point and part in ("features", "error") else None


def _with_errors(
    circuit: NodeCircuit, arch: Architecture, errors: str, start: int, task: Task, what: str
) -> tuple[NodeCircuit, tuple[Candidates, ...]]:
    """The circuit with only those errors as candidates that are nodes, and those that are always ablated."""
    parts = [(dictionary_of(one.site.kind), one) for one in circuit.universe]
    points = {part[1]: one for part, one in parts if part is not None and part[0] == "features"}
    of = {part for part, _ in parts}
    if errors != "nodes" and not points:
        raise CircuitError(f"errors={errors!r} is for circuits of features; {what} chooses from {', '.join(circuit.sites)}. Leave it out.")
    as_nodes = [point for point in points if errors == "nodes" or (errors == "residual" and KINDS[point].stream)]
    if missing := [point for point in as_nodes if ("error", point) not in of]:
        raise CircuitError(
            f"{what} chooses among the features of {missing[0]} and not among the errors of their dictionaries, which carry what the features leave "
            f"out. Score 'error' as well, or say what becomes of them: errors='ablated' or errors='free'."
        )
    kept = [one.name for part, one in parts if part is None or part[0] == "features" or part[1] in as_nodes or part[1] not in points]
    always: list[Candidates] = []
    for point, one in points.items() if errors in ("ablated", "residual") else ():
        if point not in as_nodes:
            site = Site(f"error.{point}", tuple(axis for axis in one.site.axes if axis in ("layer", "pos")))
            (errors_of,) = candidates(arch, [site], task.position_axis())
            always.append(replace(errors_of, layers=tuple(layer for layer in errors_of.layers if layer >= start)))
    return circuit.only(*kept), tuple(always)


def checked_nodes(circuit: NodeCircuit, model: Model, task: Task, what: str = "the circuit") -> NodeCircuit:
    """The circuit, once it is known to fit the model and the positions of the task.

    Raises:
        SiteError: a site that the model lacks.
        CircuitError: a circuit of a model of another shape, whose positions are not those of the task, or that was found on another dictionary.
    """
    arch, axis = model.arch, task.position_axis()
    for one in circuit.universe:
        kind = one.site.kind
        arch.check(Site(kind, (), layer=max(one.layers, default=None)))
        found = circuit.provenance.get("added_sites", {}).get(kind)
        if found is not None and found != arch.accessors[kind].identity:
            raise CircuitError(
                f"{what} holds nodes of {kind} as {found}, and {model.name} has {arch.accessors[kind].identity} there; give the model the "
                f"dictionaries that they were scored with."
            )
        (own,) = candidates(arch, [one.site], axis)
        fits = own.shape == one.shape and own.units == one.units and set(one.layers) <= set(own.layers)
        if not fits and one.n_positions in (None, len(axis)):
            raise CircuitError(f"{what} chooses from {one}, and {model.name} has {own}; circuits go with models of their own shape only.")
        if (part := dictionary_of(kind)) is not None and any(other.site.kind == part[1] for other in circuit.universe):
            raise CircuitError(f"{what} chooses from {one} and from {part[1]} itself, which that is a part of; take one of them (only(...)).")
    if circuit.n_positions is not None:
        names = tuple(role or str(place) for place, role in enumerate(axis.roles or [""] * len(axis)))
        if circuit.n_positions != len(axis) or (circuit.positions or names) != names:
            theirs = ", ".join(circuit.positions or ()) or "no names"
            raise CircuitError(
                f"{what} has {circuit.n_positions} positions ({theirs}) and {task.name} {len(axis)} ({', '.join(names)}). "
                f"Evaluate it on prompts like those it was found on, or score nodes at all positions jointly."
            )
    return circuit
