"""The runner of circuits on a task: its batches, which edges are kept where, and the metric of every circuit on every example."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchlab.circuits.circuit import Circuit, common_graph
from patchlab.circuits.evaluation.ablations import ABLATIONS, Ablation, Fitting, OptimalFit, ablation_for, rows_per_pass
from patchlab.circuits.heldout import check_disjoint
from patchlab.engine import Program, run
from patchlab.engine.contributions import Contributions, contributions, post_norm_record
from patchlab.engine.masked import pass_bytes, row_bytes, run_circuits, slices
from patchlab.errors import CircuitError
from patchlab.host import to_array
from patchlab.metrics import Metric, divergence
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.tasks.task import Batch, Task

WHOLE = 2**62
"""A budget that never cuts: all rows that are differentiated at once are one pass."""


class Loss(NamedTuple):
    """How the fit of one circuit's constants went: KL to the full model in nats, mean over the training examples.

    Attributes:
        at_mean: with the means that the fit starts from.
        final: at the best step.
        still_falling: whether the last quarter of the steps still lowered it by more than a tenth.
    """

    at_mean: float
    final: float
    still_falling: bool


@dataclass(frozen=True, eq=False)
class Measured:
    """What circuits do on a task.

    Args:
        metric: of every circuit on every example, in the metric's unit.
        losses: of the constants that were fitted to each circuit; empty for ablations that are not fitted.
    """

    metric: Float[np.ndarray, "circuit example"]
    losses: tuple[Loss, ...] = ()

    def record(self, names: Iterable[str]) -> dict[str, Any]:
        """The losses of the first circuits, by their names, for the provenance; nothing where nothing was fitted."""
        return {"optimal_losses": {name: loss._asdict() for name, loss in zip(names, self.losses, strict=False)}} if self.losses else {}


@dataclass(frozen=True, eq=False)
class Runner:
    """Runs circuits of one model on one task, every edge outside them ablated.

    Args:
        model: the model.
        task: examples; circuits run on the clean prompts.
        way: what the other edges carry.
        batch_size: examples per batch; None for as many as fit into the memory. Results do not depend on it.
        max_memory: bytes for the activations of one forward pass; None for what suits the device.

    Example:
        >>> Runner(model, task, ablation_for(model, task)).metric([Circuit.full(model.arch.graph)]).metric.shape  # doctest: +SKIP
        (1, 32)
    """

    model: Model
    task: Task
    way: Ablation = field(repr=False)
    batch_size: int | None = None
    max_memory: int | float | None = None

    @staticmethod
    def of(
        model: Model,
        task: Task,
        ablation: str,
        *,
        train: Task | None = None,
        fit: OptimalFit | None = None,
        post_norm: str = "renormalised",
        allow_overlap: bool = False,
        batch_size: int | None = None,
        max_memory: int | float | None = None,
    ) -> "Runner":
        """With an ablation by its name; see :func:`patchlab.circuits.evaluation.ablations.ablation_for`.

        Raises:
            CircuitError: an ablation that does not fit, or one fitted on the examples of the task, unless ``allow_overlap``.
        """
        way = ablation_for(model, task, ablation, train=train, fit=fit, post_norm=post_norm)
        if way.fitting is not None and train is not None:
            check_disjoint({"task_pairs": train.pair_fingerprints}, task, "train=", allow_overlap=allow_overlap)
        return Runner(model, task, way, batch_size, max_memory)

    @property
    def budget(self) -> int | float:
        """Bytes for the activations of one forward pass."""
        return pass_bytes(self.model) if self.max_memory is None else self.max_memory

    @property
    def batches(self) -> list[Batch]:
        """The examples as tensors."""
        return self.task.batches(self.batch_size or rows_per_pass(self.model, self.task, self.budget), self.model.device)

    def metric(self, circuits: Sequence[Circuit], *, progress: bool = False) -> Measured:
        """The task's metric of every circuit on every example, and the losses of constants that were fitted; equal circuits are run once.

        Raises:
            CircuitError: constants are to be fitted on examples that lack a circuit's positions.
        """
        unlike, places = _distinct(circuits)
        values, losses = np.zeros((len(unlike), len(self.task))), list[Loss]()
        with progress_bar(f"circuits ({self.way.kind})", "run", len(circuits) * len(self.task), show=progress) as bar:
            for some in slices(len(unlike), self._fitted_at_once()):
                constants = None
                if self.way.fitting is not None:
                    constants, found = self._fitted(unlike[some], self.way.fitting)
                    losses += found
                for batch in self.batches:
                    ablated = self.ablated(batch) if constants is None else constants
                    program, columns = self.program(batch), batch.examples.cpu().numpy()
                    for part in slices(len(unlike[some]), self._masked_at_once(unlike, batch)):
                        keep = self.masks(unlike[some][part], batch)
                        with torch.no_grad():
                            metric = run_circuits(self.model, program, ablated.circuits(part), keep, max_bytes=self.budget)
                        values[some.start + part.start : some.start + part.stop, columns] = to_array(metric)
                        bar.update(metric.numel())
        return Measured(values[places], tuple(losses[place] for place in places) if losses else ())

    def full(self) -> Float[np.ndarray, " example"]:
        """The metric of the whole model on the clean prompts."""
        return clean_metric(self.model, self.task, self.batch_size or rows_per_pass(self.model, self.task, self.budget))

    def program(self, batch: Batch) -> Program:
        """A program on the clean prompts of a batch; its answers hold the full model's logits where the metric compares with them."""
        return clean_program(self.model, self.task, batch)

    def ablated(self, batch: Batch) -> Contributions:
        """What every writer is ablated to on the prompts of a batch."""
        constants = self.way.constants
        return contributions(self.model, batch.corrupted, self.way.post_norm) if constants is None else constants

    def masks(self, circuits: Sequence[Circuit], batch: Batch) -> Bool[Tensor, "circuit writer reader *where"]:
        """The kept edges on the prompts of a batch. An edge of a position-resolved circuit is kept at its positions and nowhere else."""
        device = batch.clean.device
        if all(circuit.n_positions is None for circuit in circuits):
            return torch.as_tensor(np.stack([circuit.edges for circuit in circuits]), device=device)
        axis = self.task.position_axis()
        index = axis.index[batch.examples.cpu().numpy()]
        length = batch.clean.shape[1]
        if axis.names is None:
            return torch.as_tensor(np.stack([_at_positions(circuit, len(axis)) for circuit in circuits]), device=device)
        keep = np.zeros((len(circuits), *circuits[0].graph.allowed.shape, len(index), length), dtype=bool)
        for c, circuit in enumerate(circuits):
            if circuit.n_positions is None:
                keep[c] = circuit.edges[:, :, None, None]
                continue
            for row, places in enumerate(index):
                for cell, place in enumerate(places):  # two names may meet at one token
                    keep[c, :, :, row, place] |= circuit.edges[:, :, cell]
        return torch.as_tensor(keep, device=device)

    def provenance(self) -> dict[str, Any]:
        """Model, task, metric and ablation, as JSON: the examples of the ablation, and for fitted constants the budget."""
        way = self.way
        record = record_of(self.model, self.task, way.kind, ABLATIONS[way.kind]) | post_norm_record(self.model, way.post_norm)
        if way.train is not None:
            record["ablation_examples"] = f"{way.train.name}[{len(way.train)}]"
        if way.fitting is not None:
            record["optimal_fit"] = asdict(way.fitting.options)
        return record

    def _fitted(self, circuits: Sequence[Circuit], fitting: Fitting) -> tuple[Contributions, list[Loss]]:
        """Constants for each of some circuits, fitted on the training examples at once."""
        model, train, fit, mean, spread = self.model, fitting.train, fitting.options, fitting.mean.values, fitting.spread
        for circuit in circuits:
            checked(circuit, model, train)
        rows = max(1, self._rows_fitted(train) // len(circuits))
        own = replace(self, task=train.with_metric(full_divergence(train.metric.reads)), batch_size=rows)
        parts = [(own.program(batch), own.masks(circuits, batch)) for batch in own.batches]
        with torch.enable_grad():
            shift = torch.zeros(len(circuits), *mean.shape, dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device)
            optimizer = torch.optim.Adam([shift.requires_grad_()], lr=fit.lr)
            best, history = shift.detach().clone(), []
            for _ in range(fit.steps + 1):
                optimizer.zero_grad()
                loss = torch.zeros(len(circuits), device=mean.device)
                for program, keep in parts:
                    constants = Contributions((mean + spread * shift).to(mean.dtype), self.way.post_norm)
                    divergence = -run_circuits(model, program, constants, keep, max_bytes=WHOLE).sum(1) / len(train)
                    divergence.sum().backward()
                    loss += divergence.detach()
                better = loss < torch.stack(history).amin(0) if history else torch.ones_like(loss, dtype=torch.bool)
                best[better] = shift.detach()[better]
                history.append(loss)
                optimizer.step()
        final, before = (torch.stack(history[:steps]).amin(0) for steps in (len(history), 1 + 3 * fit.steps // 4))
        ends = zip(history[0].tolist(), final.tolist(), (final < 0.9 * before).tolist(), strict=True)
        return Contributions((mean + spread * best).to(mean.dtype), self.way.post_norm), [Loss(*end) for end in ends]

    def _fitted_at_once(self) -> int:
        """How many circuits get their constants fitted together."""
        return WHOLE if self.way.fitting is None else max(1, self._rows_fitted(self.way.fitting.train))

    def _rows_fitted(self, train: Task) -> int:
        """Examples × circuits whose constants are fitted in one pass: a backward pass keeps about four times more."""
        return int(self.budget // (4 * row_bytes(self.model, max(len(pair) for pair in train.pairs))))

    def _masked_at_once(self, circuits: Sequence[Circuit], batch: Batch) -> int:
        """How many circuits' masks are set up together."""
        each = circuits[0].graph.allowed.size
        if any(circuit.n_positions for circuit in circuits):
            each *= batch.clean.numel()
        return max(1, int(self.budget // each))


def clean_program(model: Model, task: Task, batch: Batch) -> Program:
    """A program on the clean prompts of a batch; its answers hold the full model's logits where the metric compares with them."""
    metric, answers = task.metric, batch.answers
    if metric.needs_clean:
        logits = run(model, Program(batch.clean, batch.examples, logits="all" if metric.reads == "all" else "answer")).logits
        answers = replace(answers, clean_logits=logits)
    return Program(batch.clean, batch.examples, metric=metric, answers=answers)


def clean_metric(model: Model, task: Task, batch_size: int) -> Float[np.ndarray, " example"]:
    """The metric of the whole model on the clean prompts of a task."""
    values = np.zeros(len(task))
    for batch in task.batches(batch_size, model.device):
        found = run(model, clean_program(model, task, batch)).values
        values[batch.examples.cpu().numpy()] = to_array(torch.as_tensor(found))
    return values


def record_of(model: Model, task: Task, ablation: str, what: str) -> dict[str, Any]:
    """Model, task, metric and ablation of an evaluation, as JSON."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "task": f"{task.name}[{len(task)}]",
        "task_fingerprint": task.fingerprint,
        "task_pairs": task.pair_fingerprints,
        "task_provenance": task.provenance,
        "metric": task.metric.name,
        "metric_unit": task.metric.unit,
        "ablation": ablation,
        "ablation_is": what,
    }


def checked(circuit: Circuit, model: Model, task: Task, what: str = "the circuit") -> Circuit:
    """The circuit on the model's graph.

    Raises:
        CircuitError: a circuit of another model, or one whose positions are not those of the task.
    """
    circuit = replace(circuit, graph=common_graph(circuit.graph, model.arch.graph, what, model.name))
    if circuit.n_positions is not None:
        axis = task.position_axis()
        names = tuple(role or str(place) for place, role in enumerate(axis.roles or [""] * len(axis)))
        if circuit.n_positions != len(axis) or (circuit.positions or names) != names:
            theirs = ", ".join(circuit.positions or ()) or "no names"
            raise CircuitError(
                f"{what} has {circuit.n_positions} positions ({theirs}) and {task.name} {len(axis)} ({', '.join(names)}). "
                f"Evaluate it on prompts like those it was found on, or drop the positions with .collapsed()."
            )
    return circuit


def full_divergence(reads: str) -> Metric:
    """−KL(full model ‖ circuit) in nats, at the answer position or summed over all; the full model's logits are the ``clean_logits``."""
    return Metric("neg_kl_to_full", _neg_kl, "nats", reads="all" if reads == "all" else "answer", needs_clean=True)


def _neg_kl(logits: Tensor, answers: Any) -> Tensor:
    return -divergence(answers.clean_logits, logits)


def _at_positions(circuit: Circuit, n: int) -> Bool[np.ndarray, "writer reader pos"]:
    return circuit.edges if circuit.edges.ndim == 3 else np.repeat(circuit.edges[:, :, None], n, axis=2)


def _distinct(circuits: Sequence[Circuit]) -> tuple[list[Circuit], list[int]]:
    """The circuits without repetitions, and which of them each one is."""
    seen: dict[bytes, int] = {}
    first: list[Circuit] = []
    places = []
    for circuit in circuits:
        key = bytes([circuit.edges.ndim]) + np.packbits(circuit.edges).tobytes()  # the same for circuits that keep the same edges
        if key not in seen:
            seen[key] = len(first)
            first.append(circuit)
        places.append(seen[key])
    return first, places
