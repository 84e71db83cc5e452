"""ACDC: take edges away one after the other, from the logits upwards, and keep those that are missed.

Source: Conmy et al. 2023, "Towards automated circuit discovery for mechanistic interpretability", arXiv 2304.14997, algorithm 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.runner import Runner, full_divergence
from patchlab.engine import Program
from patchlab.engine.contributions import Contributions
from patchlab.engine.masked import run_circuits
from patchlab.errors import CircuitError, unknown
from patchlab.graph import Graph
from patchlab.host import precise, to_array
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.tasks.task import Task

MEASURES = ("kl", "metric")
LONGEST = 64
"""Edges that are taken away tentatively in one go, at most."""


def acdc(
    model: Model,
    task: Task,
    taus: float | Sequence[float],
    *,
    measure: str = "kl",
    ablation: str = "resample",
    train: Task | None = None,
    post_norm: str = "renormalised",
    prune: bool = True,
    max_memory: int | float | None = None,
    progress: bool = True,
) -> dict[float, Circuit]:
    """A circuit per threshold: an edge goes if without it the measure is worse by less than ``tau`` than with it.

    Readers are visited from the logits upwards and the writers of each from the last to the first; what was taken away stays away. Several edges
    are tried in one forward pass, each on top of those before it, up to the first that is kept; the result is that of the loop over single edges.

    Args:
        model: the model.
        task: examples; the measure is a mean over them.
        taus: thresholds above 0, in nats (``kl``) or in the metric's unit.
        measure: ``kl`` to the full model's output, or ``metric`` (the task's; higher is better).
        ablation: what edges that are taken away carry; see :data:`patchlab.circuits.ABLATIONS` (not ``optimal``).
        train: examples for means.
        post_norm: what a head's edges carry where a norm follows the attention; see :class:`patchlab.ActivationPatching`.
        prune: drop what dangles afterwards.
        max_memory: bytes for the activations of one forward pass.
        progress: show a progress bar on stderr; without a terminal, a line every ten seconds.

    Returns:
        A circuit by threshold. Its ``scores`` are the effects of the edges on the measure when they were tried (negative is worse);
        provenance counts ``forwards``, edges ``tried`` (with the repeated ones) and edges ``skipped`` because what they feed was gone.

    Raises:
        CircuitError: no thresholds, one that is not above 0, an unknown measure, or an ablation that would be fitted anew at every step.

    Example:
        >>> circuits = acdc(model, task, [0.01, 0.1])  # doctest: +SKIP
    """
    chosen = [float(tau) for tau in ([taus] if isinstance(taus, (int, float)) else taus)]
    if not chosen or not all(0 < tau < float("inf") for tau in chosen):
        raise CircuitError(f"ACDC needs thresholds above 0; got {chosen}. An edge goes if the measure is worse by less than tau without it.")
    if measure not in MEASURES:
        raise CircuitError(unknown("measure", measure, MEASURES))
    if ablation == "optimal":
        raise CircuitError("ACDC changes the circuit at every step, and optimal ablation would be fitted anew each time; use 'mean' or 'resample'.")
    runner = Runner.of(model, task, ablation, train=train, post_norm=post_norm, max_memory=max_memory)
    graph = model.arch.graph
    measuring = runner if measure == "metric" else replace(runner, task=task.with_metric(full_divergence(task.metric.reads)))
    found: dict[float, Circuit] = {}
    with progress_bar("acdc", "edge", len(chosen) * graph.n_edges, show=progress) as bar:
        for tau in chosen:
            search = _Search(_Measure(measuring), graph, tau, bar)
            circuit = Circuit(graph, search.run(), search.effects, _provenance(runner, measure, search))
            found[tau] = circuit.pruned() if prune else circuit
    return found


def _provenance(runner: Runner, measure: str, search: "_Search") -> dict[str, Any]:
    counts = {"forwards": search.measure.forwards, "tried": search.tried, "skipped": search.skipped}
    how = f"ACDC with tau {search.tau:g} by {measure}"
    metric = search.measure.runner.task.metric
    measured = {"metric": metric.name, "metric_unit": metric.unit}
    record = {**runner.provenance(), **measured, "method": "acdc", "direction": "noising", "how": how}
    return {**record, "tau": search.tau, "measure": measure, **counts}


@dataclass
class _Measure:
    """The measure of circuits, mean over the examples; higher is better."""

    runner: Runner
    forwards: int = 0
    parts: list[tuple[Program, Contributions]] = field(init=False)

    def __post_init__(self) -> None:
        runner = self.runner
        self.parts = [(runner.program(batch), runner.ablated(batch)) for batch in runner.batches]
        self.forwards += len(self.parts) * (runner.task.metric.needs_clean + (runner.way.constants is None))

    def __call__(self, masks: Bool[np.ndarray, "circuit writer reader"]) -> Float[np.ndarray, " circuit"]:
        total, runner = np.zeros(len(masks)), self.runner
        keep = torch.as_tensor(masks, device=runner.model.device)
        with torch.no_grad():
            for program, ablated in self.parts:
                values = run_circuits(runner.model, program, ablated, keep, max_bytes=runner.budget, done=self._count)
                total += to_array(precise(values).sum(1))
        return total / len(runner.task)

    def _count(self, finished: int) -> None:
        self.forwards += 1


@dataclass
class _Search:
    """The state of one search: which edges are left, and what the measure is with them."""

    measure: _Measure
    graph: Graph
    tau: float
    bar: Any
    tried: int = 0
    skipped: int = 0

    def run(self) -> Bool[np.ndarray, "writer reader"]:
        """The edges that are kept."""
        self.kept = self.graph.allowed.copy()
        self.effects = np.full(self.kept.shape, np.nan)
        value, length = float(self.measure(self.kept[None])[0]), 8
        order = list(_order(self.graph))
        place = 0
        while place < len(order):
            trial = self._next(order[place : place + length])
            if not trial:
                self._drop(order[place])
                place += 1
                continue
            masks = np.repeat(self.kept[None], len(trial), axis=0)
            for i, edge in enumerate(trial):
                masks[(slice(i, None), *edge)] = False
            values = self.measure(masks)
            self.tried += len(trial)
            gone = 0
            for edge, after in zip(trial, values.tolist(), strict=True):
                self.effects[edge] = after - value
                if value - after >= self.tau:
                    place += 1
                    self.bar.update(1)
                    break
                self.kept[edge] = False
                value, gone = after, gone + 1
            place += gone
            self.bar.update(gone)
            length = min(LONGEST, 2 * length) if gone == len(trial) else max(2, min(LONGEST, 2 * gone))
        return self.kept

    def _next(self, edges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The edges to try together: up to one whose reader would feed nothing any more; none if the first already feeds nothing."""
        left = self.kept.copy()
        trial = []
        for edge in edges:
            if not self._feeds(left, edge[1]):
                break
            trial.append(edge)
            left[edge] = False
        return trial

    def _feeds(self, kept: Bool[np.ndarray, "writer reader"], reader: int) -> bool:
        node = int(self.graph.reader_node[reader])
        return node == len(self.graph.writers) or bool(kept[node].any())

    def _drop(self, edge: tuple[int, int]) -> None:
        """Take away an edge into what feeds nothing: no output changes."""
        self.kept[edge] = False
        self.effects[edge] = 0.0
        self.skipped += 1
        self.bar.update(1)


def _order(graph: Graph) -> Iterator[tuple[int, int]]:
    """Readers from the logits upwards, the writers of each from the last to the first."""
    for reader in reversed(range(len(graph.readers))):
        for writer in reversed(np.flatnonzero(graph.allowed[:, reader]).tolist()):
            yield writer, reader
