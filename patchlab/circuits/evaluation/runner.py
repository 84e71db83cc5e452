"""Running circuits on a task: which edges are kept where, and the metric of every circuit on every example."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchlab.circuits.circuit import Circuit, common_graph
from patchlab.engine import Program, run
from patchlab.engine.masked import pass_bytes, row_bytes
from patchlab.errors import CircuitError
from patchlab.metrics import Metric
from patchlab.models import Model
from patchlab.tasks.task import Batch, Task


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


def of_other_weights(circuit: Circuit, model: Model, what: str) -> str | None:
    """A sentence, if the circuit was found on other weights than the model's."""
    found = circuit.provenance.get("model_fingerprint")
    if found is None or found == model.fingerprint:
        return None
    return (
        f"{what} was found on {circuit.provenance.get('model', '?')} with other weights ({found}); those of {model.name} here are {model.fingerprint}"
    )


def masks_on(circuits: Sequence[Circuit], task: Task, batch: Batch) -> Bool[Tensor, "circuit writer reader *where"]:
    """The kept edges on the prompts of a batch. An edge of a position-resolved circuit is kept at its positions and nowhere else."""
    device = batch.clean.device
    if all(circuit.n_positions is None for circuit in circuits):
        return torch.as_tensor(np.stack([circuit.edges for circuit in circuits]), device=device)
    axis = task.position_axis()
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


def _at_positions(circuit: Circuit, n: int) -> Bool[np.ndarray, "writer reader pos"]:
    return circuit.edges if circuit.edges.ndim == 3 else np.repeat(circuit.edges[:, :, None], n, axis=2)


def rows_per_pass(model: Model, task: Task, budget: int | float | None = None) -> int:
    """Examples of a task whose run as one circuit fits into the memory of a forward pass, in bytes."""
    budget = pass_bytes(model) if budget is None else budget
    return max(1, int(budget // row_bytes(model, max(len(pair) for pair in task.pairs))))


def with_full_logits(model: Model, batch: Batch, metric: Metric) -> Program:
    """A program on the clean prompts of a batch; its answers hold the full model's logits where the metric compares with them."""
    answers = batch.answers
    if metric.needs_clean:
        logits = run(model, Program(batch.clean, batch.examples, logits="all" if metric.reads == "all" else "answer")).logits
        answers = replace(answers, clean_logits=logits)
    return Program(batch.clean, batch.examples, metric=metric, answers=answers)


def full_divergence(reads: str) -> Metric:
    """−KL(full model ‖ circuit) in nats, at the answer position or summed over all; the full model's logits are the ``clean_logits``."""
    return Metric("neg_kl_to_full", _neg_kl, "nats", reads="all" if reads == "all" else "answer", needs_clean=True)


def _neg_kl(logits: Tensor, answers: Any) -> Tensor:
    full, own = answers.clean_logits.log_softmax(-1), logits.log_softmax(-1)
    return -(full.exp() * (full - own)).flatten(1).sum(1)


def full_metric(model: Model, task: Task, batch_size: int | None = None) -> Float[np.ndarray, " example"]:
    """The metric of the whole model on the clean prompts."""
    values = np.zeros(len(task))
    for batch in task.batches(batch_size or rows_per_pass(model, task), model.device):
        found = run(model, with_full_logits(model, batch, task.metric)).values
        values[batch.examples.cpu().numpy()] = torch.as_tensor(found).double().cpu().numpy()
    return values


def described(model: Model, task: Task) -> dict[str, Any]:
    """Model, task and metric, as provenance."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "task": f"{task.name}[{len(task)}]",
        "task_fingerprint": task.fingerprint,
        "task_pairs": task.pair_fingerprints,
        "task_provenance": task.provenance,
        "metric": task.metric.name,
        "metric_unit": task.metric.unit,
    }


def key_of(circuit: Circuit) -> bytes:
    """The same for circuits that keep the same edges."""
    return bytes([circuit.edges.ndim]) + np.packbits(circuit.edges).tobytes()


def distinct(circuits: Sequence[Circuit]) -> tuple[list[Circuit], list[int]]:
    """The circuits without repetitions, and which of them each one is."""
    seen: dict[bytes, int] = {}
    first: list[Circuit] = []
    places = []
    for circuit in circuits:
        key = key_of(circuit)
        if key not in seen:
            seen[key] = len(first)
            first.append(circuit)
        places.append(seen[key])
    return first, places


Progress = Callable[[int], Any]
